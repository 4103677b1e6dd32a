"""What all tests share: quiet TensorFlow, a fixed seed, small models and data."""

import gc
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import pytest
import tensorflow as tf

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
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


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
