"""Columns of tables as inputs of a model, and its outputs as columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.keras_compat.layer_graph import graph_of


class InputColumns:
    """Which columns a model gets.

    Args:
        model: The model.
        inputs: As for `BatchPredictor`.
    """

    def __init__(self, model: keras.Model, inputs: Any) -> None:
        self._given = inputs
        self._names = [tensor.name for tensor in getattr(model, "inputs", None) or ()]

    def of(self, batch: Any) -> Any:
        """The inputs for the model.

        Raises:
            TypeError: If the batch is no dict of arrays.
            ValueError: If it has not the columns.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                "A batch must be a dict of NumPy arrays. Received: a batch of type "
                f"{type(batch).__name__}. Pass `batch_format='numpy'` to `map_batches`."
            )
        return self._read(batch, self._wanted(batch) if self._given is None else self._given)

    def _wanted(self, batch: Mapping[str, Any]) -> Any:
        if self._names and set(self._names) <= set(batch):
            return self._names[0] if len(self._names) == 1 else {n: n for n in self._names}
        if len(batch) == 1 and len(self._names) <= 1:
            return next(iter(batch))
        raise ValueError(
            "It is not clear which columns the model gets. Received: a batch with the columns "
            f"{sorted(batch)}, for a model with the inputs {self._names}. Pass `inputs=`."
        )

    def _read(self, batch: Mapping[str, Any], wanted: Any) -> Any:
        if isinstance(wanted, Mapping):
            return {name: self._read(batch, columns) for name, columns in wanted.items()}
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if missing := [name for name in names if name not in batch]:
            raise ValueError(
                f"There are no columns of these names. Received: inputs={self._given!r}, of which "
                f"{missing} are not among {sorted(batch)}."
            )
        arrays = [_as_array(batch[name]) for name in names]
        return arrays[0] if isinstance(wanted, str) else np.stack(arrays, axis=-1)


def _as_array(column: Any) -> np.ndarray:
    """A column as one array; lists and arrays of each row become its further axes."""
    array = np.asarray(column)
    if array.dtype == object and len(array) and not isinstance(array[0], (str, bytes)):
        array = np.stack([np.asarray(row) for row in array])
    return array


def output_columns(
    model: keras.Model, outputs: Any, kind: str, name: str | None
) -> dict[str, np.ndarray]:
    """Outputs as columns, by their names.

    Args:
        model: The model.
        outputs: What `predict`, `predict_uncertainty` or `predict_members` returned.
        kind: `"prediction"`, `"uncertainty"` or `"members"`.
        name: The name for a single output, or None.

    Raises:
        ValueError: If there is a name for several outputs.
    """
    structure = outputs
    if kind == "uncertainty":
        leaves: list[Any] = _dicts_in(outputs)
        structure = [0] * len(leaves)
        if isinstance(outputs, Mapping) and not _is_of_one_output(outputs):
            structure = dict.fromkeys(outputs, 0)
    else:
        leaves = keras.tree.flatten(outputs)
    names: Sequence[str] = names_of(graph_of(model) or model, structure)
    if name is not None:
        if len(names) > 1:
            raise ValueError(
                f"`name` is for a model with one output. Received: name={name!r}, for the outputs "
                f"{list(names)}"
            )
        names = [name]
    if kind == "uncertainty":
        pairs = zip(names, leaves, strict=True)
        return {f"{own}_{key}": array for own, leaf in pairs for key, array in leaf.items()}
    if kind == "members":
        leaves = [np.moveaxis(array, 0, 1) for array in leaves]
    return dict(zip(names, leaves, strict=True))


def _dicts_in(outputs: Any) -> list[dict[str, np.ndarray]]:
    """The dicts of `predict_uncertainty`, in the order of the flat outputs."""
    if isinstance(outputs, Mapping):
        if _is_of_one_output(outputs):
            return [dict(outputs)]
        outputs = [outputs[key] for key in sorted(outputs)]
    return [leaf for inner in outputs for leaf in _dicts_in(inner)]


def _is_of_one_output(outputs: Mapping[str, Any]) -> bool:
    return isinstance(outputs.get("mean"), np.ndarray)
