"""Whether a run is the one that broke off: the same plan, model and size of the data."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import keras

from snapshot_ensemble.schedules import Plan


def fingerprint(
    model: keras.Model, plan: Plan, shrink: Any, x: Any, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a run to go on: the plan, the model, the size of the data."""
    cycles = [[c.first_epoch, c.last_epoch, c.lr_max, c.lr_min, c.warmup] for c in plan]
    sizes = {name: arguments.get(name) for name in ("batch_size", "steps_per_epoch")}
    return {
        "plan": cycles,
        "shrink": dict(shrink) if isinstance(shrink, Mapping) else shrink,
        "first epoch": arguments.get("initial_epoch") or 0,
        "layers": _digest(model),
        "optimizer": type(model.optimizer).__name__,
        "rows or batches of data": _size(x),
        **{name: None if value is None else int(value) for name, value in sizes.items()},
    }


def _size(x: Any) -> int | None:
    if hasattr(x, "cardinality"):
        return int(x.cardinality())
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    leaves = keras.tree.flatten(x)
    return int(leaves[0].shape[0]) if leaves and getattr(leaves[0], "shape", None) else None


def _digest(model: keras.Model) -> str:
    """The classes and settings of the layers; their names may differ from process to process."""
    try:
        config = _nameless(model.get_config())
    except Exception:  # A subclass need not have one; its variables' shapes are compared anyway.
        config = None
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=_class_name)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _class_name(value: Any) -> str:
    return type(value).__name__


def _nameless(value: Any) -> Any:
    if isinstance(value, dict):
        skipped = ("name", "inbound_nodes", "input_layers", "output_layers", "build_config")
        return {str(k): _nameless(v) for k, v in value.items() if k not in skipped}
    if isinstance(value, (list, tuple)):
        return [_nameless(item) for item in value]
    return value


def check_same(found: dict[str, Any], now: dict[str, Any], where: Any) -> None:
    """Raises `ValueError` that says what differs between a broken run and the one to go on."""
    found, now = json.loads(json.dumps(found)), json.loads(json.dumps(now))
    different = [name for name in now if found.get(name) != now[name]]
    if different:
        told = "; ".join(f"{name}: {found.get(name)}, now {now[name]}" for name in different)
        raise ValueError(
            f"The run in '{where}' cannot go on as another one. Received: {told}. Give the same "
            "model, data and plan, or start anew with `overwrite=True`."
        )
