"""The dataclass `Snapshot`."""

import dataclasses

import pytest

from snapshot_ensemble import Snapshot


def test_only_the_index_of_a_snapshot_is_required():
    assert dataclasses.asdict(Snapshot(3)) == {
        "index": 3,
        "cycle": None,
        "epoch": None,
        "step": None,
        "learning_rate": None,
        "metrics": {},
        "chain": None,
        "is_annealed": True,
    }


def test_a_snapshot_is_frozen():
    for field in dataclasses.fields(Snapshot):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(Snapshot(0), field.name, 1)


def test_snapshots_share_no_default_metrics():
    first, second = Snapshot(0), Snapshot(1)
    first.metrics["loss"] = 1.0
    assert second.metrics == {}
