"""When a run counts as overfitted for `shrink="auto"`."""

import math

import pytest

from snapshot_ensemble.training.overfitting import has_overfitted


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0], False),  # One cycle.
        ([1.0, 1.04], False),
        ([1.0, 1.06], True),
        ([-1.0, -0.96], False),
        ([-1.0, -0.94], True),
        ([3.0, 1.0, 2.0, 0.89], False),  # Only ends of cycles count.
        ([3.0, 1.0, 2.0, 0.91], True),
        ([3.0, -1.0, 2.0, -1.11], False),
        ([3.0, -1.0, 2.0, -1.09], True),
        ([3.0, 1.0, 0.8, 0.83], False),  # The lowest loss counts, wherever it was.
        ([3.0, 1.0, 0.8, 0.85], True),
        ([0.98, 1.0, 2.0, 0.89], True),
        ([3.0, 1.0, 2.0, 0.87, 2.0, 0.78], False),
        ([3.0, 1.0, 2.0, 0.87, 2.0, 0.79], True),
        (
            [3.0, 1.0, 0.76, 1.0],
            False,
        ),  # The first cycle did not come close enough to the lowest loss.
        ([3.0, 1.0, 0.78, 1.0], True),
        ([1.0, 1.04, 0.76, 1.0], False),
        ([0.99, 1.03, 0.77, 1.0], True),
        ([3.0, -1.0, -1.5, -1.0], False),
        ([3.0, -1.0, -1.4, -1.0], True),
        ([3.0, 1.0, 2.0, 1.1, 2.0, 0.5], True),  # Overfitting is permanent.
        ([3.0, 1.0, 1.2, None], True),  # With `validation_freq`, the last known loss counts.
        ([None, None, None, None], False),
        ([], False),
    ],
)
def test_when_a_run_has_overfitted(losses, expected):
    history = {"cycle": [i // 2 for i in range(len(losses))], "val_loss": losses}
    memorised = {**history, "loss": [-9.0 if (loss or 1) < 0 else 0.1 for loss in losses]}
    assert has_overfitted(memorised) is expected
    assert not has_overfitted({name: memorised[name] for name in ("cycle", "loss")})
    # A training loss as high as the validation loss means that no data were memorised.
    assert not has_overfitted({**history, "loss": losses})


@pytest.mark.parametrize("unfinished", [{0}, {1}])
def test_the_end_of_a_part_of_a_cosine_does_not_count(unfinished):
    history = {"cycle": [0, 0, 1, 1], "val_loss": [3.0, 1.0, 2.0, 0.91], "loss": [0.1] * 4}
    assert has_overfitted(history)
    assert not has_overfitted(history, unfinished=unfinished)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([NAN, 1.0, 1.2, 1.3], True),  # The rise counts whatever was before.
        ([INF, 1.0, 1.2, 1.3], True),
        ([NAN, 1.0, 1.2, 0.85], False),
        ([3.0, 1.0, NAN, 1.3], True),
        ([3.0, 1.0, 1.2, NAN], False),  # A cycle without an end does not count at all, ...
        ([3.0, 1.0, 1.2, NAN, 1.2, 1.3], True),
        ([3.0, 1.0, 1.2, NAN, 0.8, 0.83], False),
        ([3.0, NAN, 3.0, 1.0], False),  # ... nor as the first one.
        ([3.0, NAN, 3.0, 1.0, 1.2, 1.3], True),
        ([NAN, NAN, NAN, NAN], False),
        ([INF, INF, -INF, -INF], False),
    ],
)
@pytest.mark.parametrize("column", ["both", "loss"])
def test_epochs_that_are_not_finite_do_not_count(losses, expected, column):
    known = [math.isfinite(loss) for loss in losses]
    history = {
        "cycle": [i // 2 for i in range(len(losses))],
        "loss": [0.1 if is_known else NAN for is_known in known],
        "val_loss": losses,
    }
    if column == "loss":
        history["val_loss"] = [
            loss if is_known else 0.5 for loss, is_known in zip(losses, known, strict=True)
        ]
    assert has_overfitted(history) is expected


@pytest.mark.parametrize(
    ("loss", "val_loss", "expected"),
    [(0.49, 1.0, True), (0.51, 1.0, False), (-1.51, -1.0, True), (-1.49, -1.0, False)],
)
def test_how_far_the_training_loss_must_be_below_the_validation_loss(loss, val_loss, expected):
    history = {"cycle": [0, 0], "loss": [3.0, loss], "val_loss": [val_loss - 0.1, val_loss]}
    assert has_overfitted(history) is expected
