"""Arguments that `fit_weights` and `calibrate` refuse without changing what was learned before."""

import numpy as np
import pytest
from models import TASKS, dense, eager, ensemble_of, ensemble_with, member_weights, one_batch
from weights_cases import FEATURES, LABELS, PAIRS, SOME

from snapshot_ensemble import SnapshotEnsemble


@pytest.fixture(scope="module")
def refusing():
    """Ensembles by task, with member weights and a temperature."""
    made = {
        "multiclass": ensemble_of(eager(dense()), 3),
        "binary": ensemble_of(eager(dense("binary_crossentropy", 1, "sigmoid")), 3),
        "multilabel": ensemble_of(eager(dense("binary_crossentropy", 3, "sigmoid")), 3),
        "regression": ensemble_of(eager(dense("mse", 2, None)), 3),
    }
    own = member_weights(made["multiclass"])
    own[1] = [np.full(array.shape, np.nan) for array in own[1]]
    made["one diverged"] = ensemble_with(made["multiclass"].model, *own)
    for ens in made.values():
        ens.weights, ens.temperature = [0.2, 0.3, 0.5], 1.7
    return made


def check_refusal(call, ens, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    np.testing.assert_allclose(ens.weights, [0.2, 0.3, 0.5])
    assert ens.temperature == 1.7


def changed(array, index, value):
    array = np.array(array, "float64")
    array[index] = value
    return array


SHARES = np.eye(3)[LABELS]
ODDS = np.arange(31)[:, None] % 2
MARKS = np.stack([np.arange(31) % n == 0 for n in (2, 3, 4)], axis=1).astype(int)
WRONG_TARGETS = [
    (
        "multiclass",
        LABELS[:30],
        "`y` must be as long as `x`. Received: y of shape (30,), x with 31",
    ),
    ("multiclass", changed(LABELS, 4, np.nan), "`y` must be finite. Received: y with NaN"),
    ("multiclass", changed(LABELS, 4, np.inf), "`y` must be finite. Received: y with NaN or inf"),
    (
        "multiclass",
        changed(LABELS, 4, 3),
        "`y` must be integer class labels from 0 to 2. Received: y from 0.0 to 3.0",
    ),
    ("multiclass", changed(LABELS, 4, -1), "class labels from 0 to 2. Received: y from -1"),
    ("multiclass", changed(LABELS, 4, 0.5), "`y` must be integer class labels from 0 to 2"),
    ("multiclass", SHARES * 2, "Each row of `y` must hold probabilities that sum to 1. Received"),
    ("multiclass", changed(SHARES, (slice(None), 0), -1), "Each row of `y` must hold probabil"),
    (
        "multiclass",
        SHARES[:, :2],
        "`y` does not fit the model's output. Received: y of shape (31, ",
    ),
    ("multiclass", None, "There are no targets to compare with. Received: x="),
    (
        "binary",
        ODDS + 1,
        "`y` of a binary output must lie between 0 and 1. Received: y from 1.0 to 2.0",
    ),
    (
        "binary",
        2 * ODDS - 1,
        "`y` of a binary output must lie between 0 and 1. Received: y from -1.0",
    ),
    ("multilabel", MARKS * 2, "`y` of a multilabel output must lie between 0 and 1"),
    ("multilabel", MARKS[:, 0], "`y` does not fit the model's output. Received: y of shape (31,)"),
    ("regression", SOME[:, :3], "y of shape (31, 3), where (31, 2) is needed"),
    ("regression", changed(SOME[:, :2], 0, np.nan), "`y` must be finite"),
]


@pytest.mark.parametrize(("task", "y", "message"), WRONG_TARGETS)
def test_invalid_targets_are_refused(task, y, message, refusing):
    ens = refusing[task]
    check_refusal(lambda: ens.fit_weights(FEATURES, y, verbose=0), ens, ValueError, message)


@pytest.mark.parametrize("case", [0, 1, 6, 9])
def test_calibrating_on_invalid_targets_is_refused(case, refusing):
    task, y, message = WRONG_TARGETS[case]
    ens = refusing[task]
    check_refusal(lambda: ens.calibrate(FEATURES, y, verbose=0), ens, ValueError, message)


def test_targets_that_are_not_numbers_are_refused(refusing):
    ens = refusing["multiclass"]
    names = np.array(["cat", "dog", "eel"])[LABELS]
    for call in (ens.fit_weights, ens.calibrate):
        check_refusal(
            lambda call=call: call(FEATURES, names, verbose=0),
            ens,
            TypeError,
            "`y` must be numbers. Received: y of dtype <U3",
        )


@pytest.mark.parametrize(
    ("sample_weight", "message"),
    [
        (np.zeros(31), "`sample_weight` must be at least 0 and not 0 everywhere. Received: "),
        (changed(np.ones(31), 3, -1), "and not 0 everywhere. Received: sample_weight from -1.0"),
        (changed(np.ones(31), 3, np.nan), "`sample_weight` must be finite"),
        (
            np.ones(30),
            "`sample_weight` must be as long as `x`. Received: sample_weight of shape (30",
        ),
        (np.ones((31, 2)), "`sample_weight` does not fit the model's output"),
    ],
)
def test_invalid_sample_weights_are_refused(sample_weight, message, refusing):
    ens = refusing["multiclass"]
    check_refusal(
        lambda: ens.fit_weights(FEATURES, LABELS, sample_weight=sample_weight, verbose=0),
        ens,
        ValueError,
        message,
    )


def test_invalid_data_are_refused(refusing):
    ens = refusing["multiclass"]
    for call in (ens.fit_weights, ens.calibrate):
        for x, y, message in (
            (SOME[:1], LABELS[:1], "Too few rows to learn from. Received: 1 row."),
            (changed(SOME, 2, np.nan), LABELS, "NaN or infinity from every member. Check `x`."),
        ):
            data = one_batch(x, y)
            check_refusal(lambda c=call, data=data: c(data, verbose=0), ens, ValueError, message)
        check_refusal(
            lambda call=call: call(PAIRS, LABELS, verbose=0),
            ens,
            ValueError,
            "`y` must not be passed if `x` already yields the targets. Received: x=",
        )


def test_a_member_that_predicts_nan_is_named(refusing):
    ens = refusing["one diverged"]
    for call in (ens.fit_weights, ens.calibrate):
        check_refusal(
            lambda call=call: call(FEATURES, LABELS, verbose=0),
            ens,
            ValueError,
            "Received: NaN or infinity from member 1. Make an ensemble without it.",
        )


@pytest.mark.parametrize("task", ["regression", "logits"])
def test_a_member_that_predicts_infinity_is_named(task):
    loss, units, activation = TASKS[task]
    model = eager(dense(loss, units, activation))
    own = member_weights(ensemble_of(model, 3))
    own[1] = [
        *(np.zeros_like(array) for array in own[1][:-1]),
        np.array([np.inf] + [0] * (units - 1)),
    ]
    ens = ensemble_with(model, *own)
    ens.weights, ens.temperature = [0.2, 0.3, 0.5], 1.7
    data = one_batch(SOME, SOME[:, :2]) if task == "regression" else PAIRS
    for call in (ens.fit_weights, ens.calibrate):
        check_refusal(
            lambda call=call: call(data, verbose=0), ens, ValueError, "from member 1. Make an ensem"
        )


@pytest.mark.parametrize("method", ["Greedy", "mean", None, 3])
def test_unknown_methods_are_refused(method, refusing):
    ens = refusing["multiclass"]
    check_refusal(
        lambda: ens.fit_weights(FEATURES, LABELS, method=method, verbose=0),
        ens,
        ValueError,
        f"`method` must be one of ('likelihood', 'greedy'). Received: method={method!r}",
    )


def test_without_members_nothing_is_learned():
    ens = SnapshotEnsemble(dense())
    for call in (ens.fit_weights, ens.calibrate):
        with pytest.raises(ValueError, match="The ensemble has no members yet. Call `fit`, or"):
            call(SOME, LABELS, verbose=0)
    assert ens.weights is None
    assert ens.temperature == 1
