"""Checks that a resumed run has the plan, model and data size of the interrupted one."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.cycles import Plan
from snapshot_ensemble.training.epoch_steps import dataset_batches


def fingerprint(
    model: keras.Model, plan: Plan, shrink: Any, x: Any, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same to resume a run: the plan, the model and the size of the data."""
    cycles = [[c.first_epoch, c.last_epoch, c.lr_max, c.lr_min, c.warmup] for c in plan]
    sizes = {name: arguments.get(name) for name in ("batch_size", "steps_per_epoch")}
    return {
        "plan": cycles,
        # Not in the state of a run whose plan was certain, as all were before.
        "number of cycles": None if plan.is_decided else "auto",
        "shrink": dict(shrink) if isinstance(shrink, Mapping) else shrink,
        "first epoch": arguments.get("initial_epoch") or 0,
        "layers": _digest(model),
        "optimizer": type(model.optimizer).__name__,
        "rows or batches of data": _size(x),
        **{name: None if value is None else int(value) for name, value in sizes.items()},
    }


def _size(x: Any) -> int | None:
    if hasattr(x, "cardinality"):
        return dataset_batches(x)
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    leaves = keras.tree.flatten(x)
    return int(leaves[0].shape[0]) if leaves and getattr(leaves[0], "shape", None) else None


def _digest(model: keras.Model) -> str:
    """A hash of the layers' classes and settings, without names, which depend on the process."""
    name = type(model).__name__
    try:
        config = _without_names(model.get_config())
        text = json.dumps([name, config], sort_keys=True, default=_described)
    except Exception:  # Optional for a subclass; variable shapes are compared anyway.
        text = json.dumps([name, None])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """What identifies a setting that JSON cannot represent: an array's contents, or a class."""
    if keras.ops.is_tensor(value):
        value = keras.ops.convert_to_numpy(value)
    if isinstance(value, (np.ndarray, np.generic)):
        # The bytes of an array of objects would be addresses.
        has_bytes = value.dtype != object
        content = hashlib.sha256(value.tobytes()).hexdigest() if has_bytes else value.tolist()
        return [str(value.dtype), list(value.shape), content]
    return value.hex() if isinstance(value, bytes) else type(value).__name__


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        skipped = ("name", "inbound_nodes", "input_layers", "output_layers", "build_config")
        return {str(k): _without_names(v) for k, v in value.items() if k not in skipped}
    if isinstance(value, (list, tuple)):
        return [_without_names(item) for item in value]
    return value


def check_same(saved: dict[str, Any], current: dict[str, Any], directory: Any) -> None:
    """Raises `ValueError` that lists how a run differs from the interrupted one, if it does."""
    saved, current = json.loads(json.dumps(saved)), json.loads(json.dumps(current))
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        listed = "; ".join(f"{name}: {saved.get(name)}, now {current[name]}" for name in different)
        raise ValueError(
            f"The run in '{directory}' can only be resumed with the same model, data and plan. "
            f"Received: {listed}. Pass the same ones, or start over with `overwrite=True`."
        )
