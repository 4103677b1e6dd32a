"""The checks that scikit-learn has for estimators, all of them, of the two estimators."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn_cases import Named, net, values

from snapshot_ensemble.sklearn import SnapshotEnsembleClassifier, SnapshotEnsembleRegressor

SETTINGS = {"cycles": 2, "epochs": 8, "lr_init": 0.2, "batch_size": 32}
# The names of the tests must be the same in all of pytest's processes.
ESTIMATORS = [
    SnapshotEnsembleClassifier(Named(net), **SETTINGS),
    SnapshotEnsembleRegressor(Named(values), **SETTINGS),
]
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": (
        "Mini-batches are drawn by rows: a row of weight 2 is one row of a batch, and a row that "
        "stands twice may be in two batches."
    ),
}


# Most of them train an ensemble several times.
@pytest.mark.sampled(12, 2)
@parametrize_with_checks(
    ESTIMATORS, expected_failed_checks=lambda _: EXPECTED_FAILURES, xfail_strict=True
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)
