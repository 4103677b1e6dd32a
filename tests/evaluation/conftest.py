"""What the tests in this folder share."""

import keras
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    # Clearing the session takes longer than most of these tests, and would break what they share.
    keras.utils.set_random_seed(0)
