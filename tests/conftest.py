"""What all tests share: quiet TensorFlow, a fixed seed, small models and data."""

import gc
import os
import shutil

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import pytest
import tensorflow as tf
from models import BreakOffError, three_classes
from resume_cases import break_off_in, run

# What was imported stays: the collector, which Keras calls whenever a session is cleared, need
# not go through it again each time.
gc.collect()
gc.freeze()

# Tests make many small models, each traced anew, which TensorFlow would warn of.
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


@pytest.fixture(scope="session")
def broken_run_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("broken") / "ensemble"
    with pytest.raises(BreakOffError):
        run(directory, callbacks=[break_off_in(3)])
    return directory


@pytest.fixture
def broken_run(broken_run_once, tmp_path):
    """The directory of a run that broke off in its fourth epoch, with one of three members."""
    return shutil.copytree(broken_run_once, tmp_path / "broken")
