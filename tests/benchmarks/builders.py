"""Ensembles whose members were not trained; what the benchmarks of this folder share."""

import numpy as np

from snapshot_ensemble import Snapshot, SnapshotEnsemble


def random_ensemble(model, count, scale=0.1):
    """An ensemble whose members have random trainable weights and share all others."""
    rng = np.random.default_rng(0)
    ens = SnapshotEnsemble(model)
    for index in range(count):
        weights = [
            rng.normal(0, scale, array.shape).astype("float32") if variable.trainable else array
            for variable, array in zip(model.weights, model.get_weights(), strict=True)
        ]
        ens._pool.store.add_weights(weights, Snapshot(index))
    return ens
