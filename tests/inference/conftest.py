"""A seed for each test, and ensembles that the tests in this folder share."""

import keras
import numpy as np
import pytest
from inference_cases import KINDS, MEMBERS, ROWS
from models import dense, ensemble_of


@pytest.fixture(autouse=True)
def _seeded():
    # No `clear_session`: it is slower than most of these tests and would break shared fixtures.
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="module")
def cases():
    """For each kind an ensemble and its members' predictions, made on first use."""
    made = {}

    def case(name):
        if name not in made:
            kind = KINDS[name]
            model = dense(kind.loss, kind.units, kind.activation)
            ens = ensemble_of(model, MEMBERS)
            stack = np.stack([member.predict(ROWS, verbose=0) for member in ens])
            made[name] = ens, stack
        return made[name]

    return case


@pytest.fixture
def ensemble():
    model = dense(metrics=["accuracy"])
    return ensemble_of(model, MEMBERS)


@pytest.fixture
def regression_ensemble():
    return ensemble_of(dense("mse", 2, None), MEMBERS)
