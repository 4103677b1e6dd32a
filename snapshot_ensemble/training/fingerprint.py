"""Checks that a resumed run has the plan, model and data size of the interrupted one."""

import json
from collections.abc import Mapping
from typing import Any

import keras

from snapshot_ensemble.cycles import Plan
from snapshot_ensemble.inference.architecture import digest_of
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
        "layers": digest_of(model),
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
