"""Snapshot ensembles for Keras: one training budget, one compiled model, an ensemble out of it."""

from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.schedules import CosineAnnealing, Cycle
from snapshot_ensemble.snapshots import Snapshot, SnapshotError

__all__ = ["CosineAnnealing", "Cycle", "Snapshot", "SnapshotEnsemble", "SnapshotError"]
__version__ = "2.0.0.dev0"
