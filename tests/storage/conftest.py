"""Fixtures for tests of storage."""

import dataclasses
import shutil

import keras
import pytest
from models import member_weights
from storage_cases import Made, X, fitted


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    keras.utils.set_random_seed(0)
    directory = tmp_path_factory.mktemp("made") / "ensemble"
    ens = fitted(directory)
    return Made(directory, member_weights(ens), ens.predict(X, verbose=0))


@pytest.fixture
def made(made_once, tmp_path):
    """A directory with three members written by `fit`, and its expected contents."""
    directory = tmp_path / "ensemble"
    shutil.copytree(made_once.directory, directory)
    return dataclasses.replace(made_once, directory=directory)
