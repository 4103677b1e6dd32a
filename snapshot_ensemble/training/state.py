"""The state of training at the end of an epoch, from which an interrupted run is resumed."""

import contextlib
import dataclasses
import json
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.keras_compat.optimizers import built_for, optimizers_of
from snapshot_ensemble.keras_compat.random_seed import global_seed, set_global_seed
from snapshot_ensemble.keras_compat.stock_layers import is_stock_callback
from snapshot_ensemble.storage.record import Counts
from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.typed_json import Count, decode, encode
from snapshot_ensemble.storage.weight_delta import as_bits, from_bits, same


@dataclasses.dataclass
class RunPosition:
    """How far a run has come; saved in the state.

    Attributes:
        run: Its number among the runs of its directory, from 0.
        fingerprint: What must be the same for it to be resumed.
        next_epoch: Keras's number of the epoch to resume with.
        finished: Whether it has ended.
        steps: Steps per epoch; None until that is known.
        cycles_before: Number of cycles before the run.
        epochs: Number of its finished epochs.
        run_epochs: Number of epochs of each earlier run.
        done: Totals over all runs.
    """

    run: Count = 0
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)
    next_epoch: Count = 0
    finished: bool = False
    steps: Count | None = None
    cycles_before: Count = 0
    epochs: Count = 0
    run_epochs: list[Count] = dataclasses.field(default_factory=list, metadata={"json": "earlier"})
    done: Counts = dataclasses.field(default_factory=Counts.zero)

    def epochs_of_runs(self) -> list[int]:
        """The number of epochs of each run that has ended."""
        return self.run_epochs + [self.epochs] * self.finished


@dataclasses.dataclass
class _Facts:
    """What a state file holds besides its arrays and the position of the run.

    Attributes:
        callbacks: Class name and state of each callback.
        optimizers: For each optimizer, the numbers of the variables that it was built for.
        random: The states of Python's and NumPy's generators.
        weights: For each of the model's weights, its number among the variables.
        shared: For each variable that the file leaves out, its index in the base.
    """

    callbacks: list[Any]
    optimizers: list[list[Count] | None]
    random: dict[str, Any]
    weights: list[Count]
    shared: dict[str, Count] = dataclasses.field(default_factory=dict)


class TrainingState:
    """Everything needed to resume a run: arrays, and facts that JSON can represent.

    Args:
        arrays: The arrays by name.
        position: How far the run has come.
        facts: The other facts.
        base: Returns the weights that the state leaves out because another file has them.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        position: RunPosition,
        facts: _Facts,
        base: Callable[[keras.Model], Weights] | None = None,
    ) -> None:
        self.arrays, self.position = arrays, position
        self._facts, self._base = facts, base

    @classmethod
    def of(cls, model: keras.Model, callbacks: Sequence[Any], position: RunPosition) -> Self:
        """The current state."""
        arrays, variables = {}, variables_of(model)
        for number, variable in enumerate(variables):
            arrays[f"variable_{number}"] = keras.ops.convert_to_numpy(variable.value)
        if (seed := global_seed()) is not None:
            arrays["keras_seed"] = seed
        states = []
        for number, callback in enumerate(callbacks):
            state = _pack(_state_of(callback), f"callback_{number}", arrays)
            states.append([type(callback).__name__, state])
        numbers = {id(variable): number for number, variable in enumerate(variables)}
        weights = [numbers[id(variable)] for variable in model.weights]
        return cls(arrays, position, _Facts(states, _built_for(model), _random_state(), weights))

    def write(self, path: str | os.PathLike[str], base: Weights | None = None) -> None:
        """Writes the state as `.npz` without pickles, leaving out arrays that the base has."""
        plain = {name: as_bits(array) for name, array in self.arrays.items()}
        shared = {}
        for index, number in enumerate(self._facts.weights if base is not None else ()):
            if base is not None and same(self.arrays[f"variable_{number}"], base[index]):
                shared[str(number)] = index
                del plain[f"variable_{number}"]
        facts = dataclasses.replace(self._facts, shared=shared)
        text = json.dumps({**encode(self.position), **encode(facts)}).encode()
        with open(path, "wb") as file:  # noqa: PTH123  For a path, NumPy adds a suffix.
            np.savez(file, **plain, facts=np.frombuffer(text, "uint8"))  # type: ignore[arg-type]

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], base: Callable[[keras.Model], Weights] | None = None
    ) -> Self:
        """Reads what `write` wrote; raises `SnapshotError` for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            content = json.loads(arrays.pop("facts").tobytes())
            position, facts = (decode(kind, content, "facts") for kind in (RunPosition, _Facts))
        except Exception as error:  # NumPy raises many classes of errors for a damaged file.
            raise SnapshotError(f"'{path}' is not a valid state of training: {error}") from error
        return cls(arrays, position, facts, base)

    def restore_model(self, model: keras.Model) -> None:
        """Restores the model, its optimizers and the random generators."""
        _build_optimizers(model, self._facts.optimizers)
        variables = variables_of(model)
        if self._facts.shared and self._base is not None:
            base = self._base(model)
            for key, index in self._facts.shared.items():
                self.arrays[f"variable_{key}"] = base[index]
        self._check_for(variables)
        for number, variable in enumerate(variables):
            array = self.arrays[f"variable_{number}"]
            dtype = keras.ops.convert_to_numpy(variable.value).dtype
            variable.assign(from_bits(array, dtype))
        if "keras_seed" in self.arrays:
            set_global_seed(self.arrays["keras_seed"])
        _set_random_state(self._facts.random)

    def _check_for(self, variables: Sequence[Any]) -> None:
        """Raises `SnapshotError` unless there is exactly one array for each variable."""
        kept = [name for name in self.arrays if name.startswith("variable_")]
        for number, variable in enumerate(variables):
            array = self.arrays.get(f"variable_{number}")
            if array is None or array.shape != tuple(variable.shape) or len(kept) > len(variables):
                shape = None if array is None else array.shape
                raise SnapshotError(
                    "The state of training belongs to another model or optimizer. Received: "
                    f"{variable.path} of shape {tuple(variable.shape)}, but {shape} in the state; "
                    f"{len(variables)} variables, but {len(kept)} in the state"
                )

    def restore_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Restores the callbacks that have the same class as when the state was saved."""
        for callback, (kind, state) in zip(callbacks, self._facts.callbacks, strict=False):
            if type(callback).__name__ == kind and state is not None:
                _set_state_of(callback, _unpack(state, self.arrays))


def variables_of(model: keras.Model) -> list[Any]:
    """All variables that training changes: weights, dropout seeds, optimizer slots."""
    variables = list(model.variables)
    for optimizer in optimizers_of(model):
        variables += optimizer.variables
    return list({id(variable): variable for variable in variables}.values())


def _built_for(model: keras.Model) -> list[list[int] | None]:
    """For each optimizer, the numbers of the variables that it was built for."""
    numbers = {id(variable): number for number, variable in enumerate(model.variables)}
    return [
        [numbers[id(v)] for v in built_for(optimizer)] if optimizer.built else None
        for optimizer in optimizers_of(model)
    ]


def _build_optimizers(model: keras.Model, variables: list[list[int] | None]) -> None:
    """Builds the optimizers that were built, without waiting for their first step."""
    for optimizer, numbers in zip(optimizers_of(model), variables, strict=True):
        if numbers and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build([model.variables[number] for number in numbers])


def build(model: keras.Model, x: Any) -> None:
    """Builds a model before its first step, so that its state can be restored."""
    if model.built:
        return
    if hasattr(x, "__next__"):
        raise ValueError(
            "With data that can be read only once, the model must be built. Received: "
            f"model={model.name!r}, not built, x={type(x).__name__}. Call it on a batch first."
        )
    if isinstance(x, tf.data.Dataset):  # From its spec, without beginning a pass.
        spec = keras.utils.unpack_x_y_sample_weight(x.element_spec)[0]
        batch = (keras.tree.map_structure(lambda s: np.zeros(_one_row(s.shape), _dtype(s)), spec),)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        batch = (keras.tree.map_structure(lambda array: np.asarray(array[:1]), x),)
    # If the model cannot be called, restoring its state reports the missing variables.
    with contextlib.suppress(NotImplementedError):
        model(keras.utils.unpack_x_y_sample_weight(batch)[0])


def _one_row(shape: Any) -> list[int]:
    return [1 if size is None else size for size in shape]


def _dtype(spec: Any) -> Any:
    return spec.dtype.as_numpy_dtype


def _state_of(callback: Any) -> Any:
    """The result of `get_state`, or the plain attributes of one of Keras's own callbacks."""
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        return callback.get_state()
    if not is_stock_callback(callback):
        return None
    plain = (bool, int, float, str, np.generic, np.ndarray, list, type(None))
    return {
        name: value
        for name, value in vars(callback).items()
        if isinstance(value, plain) or _is_operation(value)
    }


def _is_operation(value: Any) -> bool:
    """Whether it is a Keras operation, such as the comparison that `EarlyStopping` uses."""
    return callable(value) and getattr(keras.ops, getattr(value, "__name__", ""), None) is value


def _set_state_of(callback: Any, state: Any) -> None:
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        callback.set_state(state)
    else:
        vars(callback).update(state)


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """A value as JSON; arrays are added to `arrays`, and the JSON names them."""
    if isinstance(value, np.ndarray) and value.ndim:
        arrays[name] = value
        return {"array": name}
    if isinstance(value, (np.generic, np.ndarray)):
        return value.item()
    if _is_operation(value):
        return {"operation": value.__name__}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}_{i}", arrays) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {"dict": {str(k): _pack(v, f"{name}_{k}", arrays) for k, v in value.items()}}
    return value


def _unpack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, arrays) for item in value]
    if isinstance(value, dict) and "array" in value:
        return arrays[value["array"]]
    if isinstance(value, dict) and "operation" in value:
        return getattr(keras.ops, value["operation"])
    if isinstance(value, dict):
        return {name: _unpack(item, arrays) for name, item in value["dict"].items()}
    return value


def _random_state() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, which data and callbacks may use."""
    state: Any = np.random.get_state()  # noqa: NPY002  The global generator is needed.
    kind, keys, *rest = state
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, "uint32"), *rest))  # noqa: NPY002
