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


def pytest_addoption(parser):
    parser.addoption(
        "--all-cases", action="store_true", help="also run the cases that `sampled` tests leave out"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks cases of `sampled(n, m)` tests as slow or leaves them out, evenly over each grid."""
    seen, left_out = collections.Counter(), []
    for item in items:
        if (marker := item.get_closest_marker("sampled")) is None:
            continue
        test = (item.path, item.originalname)
        everyday, slow = (*marker.args, 1)[:2]
        if seen[test] % everyday or item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.slow)
            if seen[test, "slow"] % slow and not config.getoption("all_cases"):
                left_out.append(item)
            seen[test, "slow"] += 1
        seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


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
