"""Members that are far worse than the others on the validation data."""

import warnings

import pytest

from snapshot_ensemble import Snapshot
from snapshot_ensemble.training.member_checks import warn_of_stragglers

NAN, INF = float("nan"), float("inf")


def named(losses, first=3.0):
    """The members that are named, by their validation losses and that of the first epoch."""
    snapshots = [Snapshot(i, metrics={"val_loss": loss}) for i, loss in enumerate(losses)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_stragglers(snapshots, {"val_loss": [None, first, *losses]})
    text = "".join(str(warning.message) for warning in caught)
    return [i for i in range(len(losses)) if f"member {i} (" in text], text


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 1.0, 1.0], []),
        ([1.0, 2.1, 1.0], [1]),
        ([1.0, 1.9, 1.0], []),
        ([1.0, 2.5], []),  # Too few to say.
        ([-1.0, 2.5, -1.0], []),
        ([1.0, NAN, 1.1], [1]),
        ([1.0, INF, 1.1, 1.2], [1]),
        ([1.0, NAN], [1]),
        ([1.0, NAN, 1.1, 5.0, 1.2], [1, 3]),
        ([1.0, NAN, -1.0], [1]),
        ([NAN, NAN, NAN], []),  # None is worse than the others.
        ([1.0], []),
        ([], []),
    ],
)
def test_which_members_are_named(losses, expected):
    assert named(losses)[0] == expected


def test_losses_that_are_not_finite_do_not_count_for_the_others():
    assert "member 1 (val_loss nan, median of the others 1.05)" in named([1.0, NAN, 1.1])[1]


@pytest.mark.parametrize(("first", "expected"), [(100.0, []), (2.0, [1]), (NAN, [1]), (INF, [1])])
def test_the_first_epoch_counts_if_it_is_finite(first, expected):
    # With a first loss that does not count, the first one that does is that of member 0.
    assert named([1.0, 2.5, 1.0], first)[0] == expected
