"""What all tests share: quiet TensorFlow, a fixed seed, small models and data."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import pytest
import tensorflow as tf
from models import three_classes

# What was imported stays: the collector, which Keras calls whenever a session is cleared, need
# not go through it again each time.
gc.collect()
gc.freeze()

# Tests make many small models, each traced anew: nothing to be told of.
tf.get_logger().setLevel("ERROR")


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session()


@pytest.fixture
def data():
    """Three classes in four dimensions: 64 rows of `x`, and `y` as integers."""
    return three_classes(64)


@pytest.fixture
def model():
    """A compiled three-class model with batch normalisation and dropout."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, "softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
