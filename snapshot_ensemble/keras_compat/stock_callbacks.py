"""What training changes in Keras's own callbacks, as opposed to what their users set."""

from typing import Any

import numpy as np

from snapshot_ensemble.keras_compat.stock_layers import is_stock_callback

_BEST = {"best": float | None}
_BATCHES = {"_batches_seen_since_last_saving": int, "_last_batch_seen": int | None}
# Classes that are not listed here keep nothing between epochs.
_CHANGED: dict[str, dict[str, Any]] = {
    "CSVLogger": {"keys": list[str] | None},
    "EarlyStopping": {
        **_BEST,
        "wait": int,
        "stopped_epoch": int,
        "best_epoch": int,
        "best_weights": list[np.ndarray] | None,
    },
    "ModelCheckpoint": {**_BEST, **_BATCHES},
    "OrbaxCheckpoint": {**_BEST, **_BATCHES, "_total_batches_seen": int},
    "ReduceLROnPlateau": {**_BEST, "wait": int, "cooldown_counter": int},
    "SwapEMAWeights": {"_ema_weights_in_model": bool},
    "TensorBoard": {"_global_train_batch": int, "_global_test_batch": int},
}


def changed_by_training(callback: Any) -> dict[str, Any] | None:
    """The type of each attribute that training changes; None for a user's own class."""
    return _CHANGED.get(type(callback).__name__, {}) if is_stock_callback(callback) else None
