"""The members' outputs and weights, for every kind of model."""

import keras
import numpy as np
import pytest
from members_cases import (
    KINDS,
    adapted_normalization,
    ensemble_from_files,
    half_precision,
    outputs_with,
    random_weights,
)
from models import assert_all_close

from snapshot_ensemble import SnapshotEnsemble


class Case:
    def __init__(self, kind, directory):
        self.model, self.x = kind()
        self.own = self.model.get_weights()
        if kind is adapted_normalization:
            # Only the head is random; the normalisation is adapted to data.
            paths, self.weights = [], []
            for seed in range(2):
                self.model.layers[-1].set_weights(random_weights(self.model.layers[-1], seed))
                self.weights.append(self.model.get_weights())
                paths.append(directory / f"{seed}.weights.h5")
                self.model.save_weights(paths[-1])
            self.model.set_weights(self.own)
            self.ens = SnapshotEnsemble.from_weights(self.model, paths)
        else:
            self.ens, self.weights = ensemble_from_files(self.model, directory, task="regression")
        self.expected = outputs_with(self.model, self.weights, self.x)
        for first, second in keras.tree.flatten(self.expected):
            assert np.abs(first - second).max() > 1e-3
        self.tolerance = 5e-3 if kind is half_precision else 1e-5

    def expected_of(self, index):
        return keras.tree.map_structure(lambda array: array[index], self.expected)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def case(request, tmp_path_factory):
    keras.utils.set_random_seed(0)
    return Case(request.param, tmp_path_factory.mktemp("members"))


@pytest.mark.sampled(6, 3)
def test_all_members_in_one_pass(case):
    actual = case.ens.predict_members(case.x, verbose=0)
    assert_all_close(actual, case.expected, case.tolerance)


@pytest.mark.sampled(4, 3)
def test_a_member_as_a_model(case):
    member = case.ens[1]
    assert isinstance(member, keras.Model)
    assert_all_close(member.predict(case.x, verbose=0), case.expected_of(1), case.tolerance)


@pytest.mark.sampled(4, 3)
def test_each_member_has_the_weights_of_its_file(case):
    for member, weights in zip(case.ens, case.weights, strict=True):
        for actual, expected in zip(member.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.sampled(4, 3)
def test_the_model_keeps_its_own_weights(case):
    for actual, expected in zip(case.model.get_weights(), case.own, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.sampled(4, 3)
def test_the_model_predicts_with_the_weights_that_are_set(case):
    # Also after the ensemble has traced it.
    assert_all_close(outputs_with(case.model, case.weights, case.x), case.expected, case.tolerance)
