"""Snapshot ensembles for Keras: one training budget, one compiled model, an ensemble out of it."""

from snapshot_ensemble.cycles import Cycle
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation.report import Report
from snapshot_ensemble.legacy import (
    GenerateSnapshotCallbacks,
    SnapshotEnsembleCallback,
    VisualizeLR,
)
from snapshot_ensemble.schedules import CosineAnnealing
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError

__all__ = [
    "CosineAnnealing",
    "Cycle",
    "GenerateSnapshotCallbacks",
    "Report",
    "Snapshot",
    "SnapshotEnsemble",
    "SnapshotEnsembleCallback",
    "SnapshotError",
    "VisualizeLR",
]
__version__ = "2.0.0"
