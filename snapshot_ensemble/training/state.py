"""The state of training at the end of an epoch, with which a broken run goes on to the bit."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import global_seed_generator

from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.weight_delta import as_bits, from_bits, same

Facts = dict[str, Any]
_FACTS = {
    "run": int,
    "fingerprint": dict,
    "next_epoch": int,
    "finished": bool,
    "steps": int | None,
    "cycles_before": int,
    "epochs": int,
    "earlier": list,
    "done": dict,
    "callbacks": list,
    "optimizers": list,
    "random": dict,
}


class TrainingState:
    """What a run needs to go on: plain arrays, and facts that JSON can say.

    Args:
        arrays: By name.
        facts: Numbers, strings, and lists and dicts of them.
        base: Gives the weights of a model that are kept elsewhere.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        facts: Facts,
        base: Callable[[keras.Model], Weights] | None = None,
    ) -> None:
        self.arrays, self.facts, self._base = arrays, facts, base

    @property
    def run(self) -> int:
        """The number of the run, from 0."""
        return self.facts["run"]

    @property
    def done(self) -> dict[str, int]:
        """Numbers of cycles, epochs, steps and runs that were done."""
        return self.facts["done"]

    def epochs_of_runs(self) -> list[int]:
        """The number of epochs of each run that has ended."""
        return self.facts["earlier"] + [self.facts["epochs"]] * self.facts["finished"]

    @classmethod
    def of(cls, model: keras.Model, callbacks: Sequence[Any], facts: Facts) -> "TrainingState":
        """The state of this moment."""
        arrays, variables = {}, variables_of(model)
        for number, variable in enumerate(variables):
            arrays[f"variable_{number}"] = keras.ops.convert_to_numpy(variable.value)
        if global_state.get_global_attribute("global_seed_generator") is not None:
            # The one that Keras draws from where nobody gave a seed.
            arrays["keras_seed"] = global_seed_generator().state.numpy()
        found = []
        for number, callback in enumerate(callbacks):
            state = _pack(_state_of(callback), f"callback_{number}", arrays)
            found.append([type(callback).__name__, state])
        places = {id(variable): number for number, variable in enumerate(variables)}
        more = {"callbacks": found, "optimizers": _built_for(model), "random": _random_state()}
        more["weights"] = [places[id(variable)] for variable in model.weights]
        return cls(arrays, {**facts, **more})

    def write(self, path: str | os.PathLike[str], base: Weights | None = None) -> None:
        """Writes it as `.npz`, in which nothing is pickled; without what a base has."""
        plain = {name: as_bits(array) for name, array in self.arrays.items()}
        shared = {}
        for place, number in enumerate(self.facts["weights"] if base is not None else ()):
            if base is not None and same(self.arrays[f"variable_{number}"], base[place]):
                shared[number] = place
                del plain[f"variable_{number}"]
        text = np.frombuffer(json.dumps({**self.facts, "shared": shared}).encode(), "uint8")
        with open(path, "wb") as file:  # noqa: PTH123  A file, so that NumPy adds no ending.
            np.savez(file, **plain, facts=text)  # type: ignore[arg-type]  # Names of arrays.

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], base: Callable[[keras.Model], Weights] | None = None
    ) -> "TrainingState":
        """Reads what `write` wrote; raises `SnapshotError` if it is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(arrays.pop("facts").tobytes())
            for name, kind in _FACTS.items():
                if not isinstance(facts[name], kind):
                    raise TypeError(f"{name}={facts[name]!r}")
            facts["shared"] = {int(n): int(p) for n, p in facts.get("shared", {}).items()}
        except Exception as error:  # NumPy raises errors of many classes for a broken file.
            raise SnapshotError(f"'{path}' is no state of training: {error}") from error
        return cls(arrays, facts, base)

    def restore_model(self, model: keras.Model) -> None:
        """Gives the model, its optimizers and the random generators this state."""
        _build_optimizers(model, self.facts["optimizers"])
        variables = variables_of(model)
        if self.facts.get("shared") and self._base is not None:
            base = self._base(model)
            for number, place in self.facts["shared"].items():
                self.arrays[f"variable_{number}"] = base[place]
        kept = [array for name, array in self.arrays.items() if name.startswith("variable_")]
        for number, variable in enumerate(variables):
            array = self.arrays.get(f"variable_{number}")
            if array is None or array.shape != tuple(variable.shape) or len(kept) > len(variables):
                shape = None if array is None else array.shape
                raise SnapshotError(
                    "The state of training is not this model's and its optimizer's. Received: "
                    f"{variable.path} of shape {tuple(variable.shape)}, in the state {shape}; "
                    f"{len(variables)} variables, in the state {len(kept)}"
                )
        for number, variable in enumerate(variables):
            array = self.arrays[f"variable_{number}"]
            own = keras.ops.convert_to_numpy(variable.value).dtype
            variable.assign(from_bits(array, own))
        if "keras_seed" in self.arrays:
            global_seed_generator().state.assign(self.arrays["keras_seed"])
        _set_random_state(self.facts["random"])

    def restore_callbacks(self, callbacks: Sequence[Any]) -> None:
        """Gives the callbacks, those that are of the same class as then, their state."""
        for callback, (kind, state) in zip(callbacks, self.facts["callbacks"], strict=False):
            if type(callback).__name__ == kind and state is not None:
                _give_back(callback, _unpack(state, self.arrays))


def variables_of(model: keras.Model) -> list[Any]:
    """All that training changes: weights, seeds of dropout, the slots of optimizers."""
    found = list(model.variables)
    for optimizer in _optimizers(model):
        found += optimizer.variables
    return list({id(variable): variable for variable in found}.values())


def _optimizers(model: keras.Model) -> list[Any]:
    """The model's optimizers, of which one with a training step of its own may have several."""
    own = [v for v in vars(model).values() if isinstance(v, keras.Optimizer)]
    found = [model.optimizer, *(optimizer for optimizer in own if optimizer is not model.optimizer)]
    # A `LossScaleOptimizer` has one inside, which goes before it: it may ask for its variables.
    inner = [o.inner_optimizer for o in found if hasattr(o, "inner_optimizer")]
    return [*inner, *found]


def _built_for(model: keras.Model) -> list[list[int] | None]:
    """The model's variables that each optimizer was built for, by their numbers."""
    place = {id(variable): number for number, variable in enumerate(model.variables)}
    return [
        [place[id(v)] for v in getattr(optimizer, "_trainable_variables", [])]
        if optimizer.built
        else None
        for optimizer in _optimizers(model)
    ]


def _build_optimizers(model: keras.Model, built_for: list[list[int] | None]) -> None:
    """Builds those that had been, which Keras does at their first step."""
    for optimizer, numbers in zip(_optimizers(model), built_for, strict=True):
        if numbers and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build([model.variables[number] for number in numbers])


def build(model: keras.Model, x: Any) -> None:
    """Builds a model that Keras would build at its first step, so that it can take a state."""
    if model.built:
        return
    if hasattr(x, "__next__"):
        raise ValueError(
            "Only a model that is built can go on with data that are gone through once. Received: "
            f"model={model.name!r}, not built, x={type(x).__name__}. Call it on a batch first."
        )
    if isinstance(x, tf.data.Dataset):  # Of its kind, without beginning a pass.
        spec = keras.utils.unpack_x_y_sample_weight(x.element_spec)[0]
        batch = (keras.tree.map_structure(lambda s: np.zeros(_one_row(s.shape), _name(s)), spec),)
    elif isinstance(x, keras.utils.PyDataset):
        batch = x[0]
    else:
        batch = (keras.tree.map_structure(lambda array: np.asarray(array[:1]), x),)
    # One that cannot be called is told from the state by its variables, when it takes them.
    with contextlib.suppress(NotImplementedError):
        model(keras.utils.unpack_x_y_sample_weight(batch)[0])


def _one_row(shape: Any) -> list[int]:
    return [1 if size is None else size for size in shape]


def _name(spec: Any) -> str:
    return spec.dtype.as_numpy_dtype


def _state_of(callback: Any) -> Any:
    """What a callback says of itself, and what a callback of Keras holds in plain attributes."""
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        return callback.get_state()
    if not type(callback).__module__.startswith("keras."):
        return None
    plain = (bool, int, float, str, np.generic, np.ndarray, list, type(None))
    found = vars(callback).items()
    return {name: v for name, v in found if isinstance(v, plain) or _is_operation(v)}


def _is_operation(value: Any) -> bool:
    """Whether it is one of Keras's, such as the comparison that `EarlyStopping` chose."""
    return callable(value) and getattr(keras.ops, getattr(value, "__name__", ""), None) is value


def _give_back(callback: Any, state: Any) -> None:
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        callback.set_state(state)
    else:
        vars(callback).update(state)


def _pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """What JSON can say of a value; arrays go beside it."""
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


def _random_state() -> Facts:
    """Python's and NumPy's generators, by which generators and callbacks may shuffle."""
    found: Any = np.random.get_state()  # noqa: NPY002  It is that one's state.
    kind, keys, *rest = found
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _set_random_state(state: Facts) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, "uint32"), *rest))  # noqa: NPY002


class StateKeeper(keras.callbacks.Callback):
    """Goes last among the callbacks: keeps the state when all others have seen an epoch's end.

    Args:
        callbacks: The user's callbacks.
        keep: Takes the number of the epoch that ended.
        state: The state to go on from, if any.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        keep: Callable[[int], None],
        state: TrainingState | None,
    ) -> None:
        super().__init__()
        self._callbacks, self._keep, self._state = callbacks, keep, state

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._state is not None:
            self._state.restore_callbacks(self._callbacks)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.model.stop_training:
            self._keep(epoch)
