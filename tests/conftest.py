"""Shared by all tests: no TensorFlow logging, a fixed seed, small models and data."""

import collections
import gc
import os
import shutil

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import pytest
import tensorflow as tf
from models import SimulatedCrashError, three_classes
from resume_cases import crash_in_epoch, run

# Imported modules stay anyway, so the garbage collector can skip them.
gc.collect()
gc.freeze()

# TensorFlow would warn that tests retrace functions for their many small models.
tf.get_logger().setLevel("ERROR")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the cases of a `sampled(n)` test as slow, except for every n-th."""
    seen = collections.Counter()
    for item in items:
        if (marker := item.get_closest_marker("sampled")) is not None:
            test = (item.path, item.originalname)
            if seen[test] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)
    yield
    # Collecting garbage each time would take a third of the time of all tests.
    keras.backend.clear_session(free_memory=False)


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
def interrupted_run_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted") / "ensemble"
    with pytest.raises(SimulatedCrashError):
        run(directory, callbacks=[crash_in_epoch(3)])
    return directory


@pytest.fixture
def interrupted_run(interrupted_run_once, tmp_path):
    """The directory of a run interrupted in its fourth epoch, with one of three members."""
    return shutil.copytree(interrupted_run_once, tmp_path / "interrupted")
