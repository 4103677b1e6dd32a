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

from snapshot_ensemble.keras_compat.layer_states import recurrent_states
from snapshot_ensemble.keras_compat.optimizers import built_for, built_twin, optimizers_of
from snapshot_ensemble.keras_compat.random_seed import global_seed, set_global_seed
from snapshot_ensemble.storage.array_files import array_headers, read_arrays
from snapshot_ensemble.storage.record import Counts
from snapshot_ensemble.storage.snapshot import SnapshotError, Weights
from snapshot_ensemble.storage.typed_json import Count, decode, encode, parse
from snapshot_ensemble.storage.weight_delta import as_bits, from_bits, header_of, same
from snapshot_ensemble.training.callback_state import restore, restorers, states_of


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

    def check(self) -> None:
        """Raises `ValueError` unless its numbers agree."""
        first, done = self.fingerprint.get("first epoch", 0), self.done
        plan = self.fingerprint.get("plan", [[0, done.epochs]])
        are_valid = (
            sum(self.run_epochs) + self.epochs <= done.epochs
            and len(self.run_epochs) <= self.run
            and self.cycles_before <= done.cycles <= done.epochs
            and (self.steps is None or self.steps > 0)
            and self.epochs <= plan[-1][1] + 1
            and (self.finished or self.next_epoch == first + self.epochs)
        )
        if not are_valid:
            raise ValueError(f"the position of the run does not add up. Received: {self}")

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
        snapshot: The cycle whose snapshot is the base; None for the base of the directory.
    """

    callbacks: list[Any]
    optimizers: list[list[Count] | None]
    random: dict[str, Any]
    weights: list[Count] = dataclasses.field(default_factory=list)
    shared: dict[str, Count] = dataclasses.field(default_factory=dict)
    snapshot: Count | None = None


class TrainingState:
    """Everything needed to resume a run: arrays, and facts that JSON can represent.

    Args:
        arrays: The arrays by name.
        position: How far the run has come.
        facts: The other facts.
        base: Returns the weights that the state leaves out because another file has them; called
            with the model and the cycle whose snapshot has them, or None.
        path: The file that it was read from, for error messages.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        position: RunPosition,
        facts: _Facts,
        base: Callable[[keras.Model, int | None], Weights] | None = None,
        path: str | os.PathLike[str] = "",
    ) -> None:
        self.arrays, self.position = arrays, position
        self._facts, self._base, self._path = facts, base, path
        self._callbacks: list[tuple[Any, Any]] = []
        self._before: _Moment | None = None
        self._kept: Weights | None = None

    @classmethod
    def of(cls, model: keras.Model, callbacks: Sequence[Any], position: RunPosition) -> Self:
        """The current state."""
        arrays, variables = {}, variables_of(model)
        for number, variable in enumerate(variables):
            arrays[f"variable_{number}"] = keras.ops.convert_to_numpy(variable.value)
        if (seed := global_seed()) is not None:
            arrays["keras_seed"] = seed
        states = states_of(callbacks, arrays)
        numbers = {id(variable): number for number, variable in enumerate(variables)}
        weights = [numbers[id(variable)] for variable in model.weights]
        return cls(arrays, position, _Facts(states, _built_for(model), _random_state(), weights))

    def write(self, path: str | os.PathLike[str], base: Weights | None = None) -> None:
        """Writes the state as `.npz` without pickles, leaving out arrays that the base has.

        Args:
            path: The file.
            base: Weights in another file. Those of a snapshot, of `leave_out`, come first.
        """
        base = base if self._kept is None else self._kept
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

    def leave_out(self, cycle: int, weights: Weights) -> None:
        """Lets the file leave out weights that the snapshot of a cycle has."""
        self._facts = dataclasses.replace(self._facts, snapshot=cycle)
        self._kept = weights

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        base: Callable[[keras.Model, int | None], Weights] | None = None,
    ) -> Self:
        """Reads what `write` wrote; raises `SnapshotError` for any other file."""
        try:
            array_headers(path)
            arrays = read_arrays(path)
            content = parse(arrays.pop("facts").tobytes())
            position, facts = (decode(kind, content, "facts") for kind in (RunPosition, _Facts))
            position.check()
        except Exception as error:  # NumPy raises many classes of errors for a damaged file.
            raise SnapshotError(f"'{path}' is not a valid state of training: {error}") from error
        return cls(arrays, position, facts, base, path)

    def check_within(self, done: Counts) -> None:
        """Raises `SnapshotError` if it is from later in training than the directory."""
        own = self.position.done
        pairs = [(own.epochs, done.epochs), (own.cycles, done.cycles), (own.steps, done.steps)]
        if any(one > other for one, other in [*pairs, (self.position.run, done.runs)]):
            raise SnapshotError(
                f"'{self._path}' is from later in training than the directory. "
                f"Received: done={own}; expected at most {done}"
            )

    def check_for(self, model: keras.Model, callbacks: Sequence[Any]) -> None:
        """Checks that everything can be restored, before anything is.

        Args:
            model: The model to restore. It is not changed.
            callbacks: The callbacks to restore. They are not changed.

        Raises:
            SnapshotError: If the state is another model's, or is damaged.
        """
        try:
            variables, are_all = _after_building(model, self._facts.optimizers)
            self._add_shared(model)
            self._check_arrays(variables, are_all)
            _check_random(self._facts.random, self.arrays.get("keras_seed"))
            self._callbacks = restorers(model, callbacks, self._facts.callbacks, self.arrays)
        except SnapshotError:
            raise
        except Exception as error:  # Anything may be in a forged state.
            raise SnapshotError(
                f"'{self._path}' is not a valid state of training: {error!r}"
            ) from error

    def _add_shared(self, model: keras.Model) -> None:
        """Adds the arrays that the file leaves out."""
        if self._facts.shared and self._base is not None:
            base = self._base(model, self._facts.snapshot)
            for key, index in self._facts.shared.items():
                self.arrays[f"variable_{key}"] = base[index]

    def _check_arrays(self, variables: Sequence[Any], are_all: bool = True) -> None:
        """Raises `SnapshotError` unless there is an array for each variable, and no other."""
        kept = [name for name in self.arrays if name.startswith("variable_")]
        for number, variable in enumerate(variables):
            array = self.arrays.get(f"variable_{number}")
            found = None if array is None else header_of(array)
            empty = np.empty(0, variable.dtype)
            expected = (tuple(variable.shape), header_of(empty)[1])
            if found != expected or (are_all and len(kept) > len(variables)):
                raise SnapshotError(
                    f"The state of training in '{self._path}' belongs to another model or "
                    f"optimizer. Received: {variable.path} of shape and dtype {expected}, but "
                    f"{found} in the state; {len(variables)} variables, but {len(kept)} in the "
                    "state"
                )

    def restore_model(self, model: keras.Model) -> None:
        """Restores the model, its optimizers and the random generators."""
        _build_optimizers(model, self._facts.optimizers)
        self._add_shared(model)
        variables = variables_of(model)
        self._check_arrays(variables)
        # A callback's own `set_state` may still refuse its state.
        self._before = _Moment(variables) if self._callbacks else None
        for number, variable in enumerate(variables):
            array = self.arrays[f"variable_{number}"]
            variable.assign(from_bits(array, np.dtype(variable.dtype)))
        if "keras_seed" in self.arrays:
            set_global_seed(self.arrays["keras_seed"])
        _set_random_state(self._facts.random)

    def restore_callbacks(self) -> None:
        """Restores the callbacks that the state was checked for.

        Raises:
            SnapshotError: If one refuses its state. The model is then as it was before.
        """
        before, self._before = self._before, None
        try:
            self._restore_callbacks()
        except SnapshotError:
            if before is not None:
                before.bring_back()
            raise

    def _restore_callbacks(self) -> None:
        for callback, state in self._callbacks:
            try:
                restore(callback, state)
            except Exception as error:
                raise SnapshotError(
                    f"'{self._path}' has a state that {type(callback).__name__}.set_state() "
                    f"refuses: {error!r}"
                ) from error


class _Moment:
    """The values of variables and the state of the random generators at a moment."""

    def __init__(self, variables: Sequence[Any]) -> None:
        self._values = [(variable, variable.numpy()) for variable in variables]
        self._seed, self._random = global_seed(), _random_state()

    def bring_back(self) -> None:
        """Sets everything to its values of that moment."""
        for variable, value in self._values:
            variable.assign(value)
        if self._seed is not None:
            set_global_seed(self._seed)
        _set_random_state(self._random)


def variables_of(model: keras.Model) -> list[Any]:
    """All variables that training changes: weights, seeds, recurrent states, optimizer slots."""
    slots = [variable for o in optimizers_of(model) for variable in o.variables]
    return _each_once([*_own_variables(model), *slots])


def _own_variables(model: keras.Model) -> list[Any]:
    """The variables of the layers; recurrent states are not among Keras's `variables`."""
    return [*model.variables, *recurrent_states(model)]


def _each_once(variables: list[Any]) -> list[Any]:
    return list({id(variable): variable for variable in variables}.values())


def _built_for(model: keras.Model) -> list[list[int] | None]:
    """For each optimizer, the numbers of the variables that it was built for."""
    numbers = {id(variable): number for number, variable in enumerate(model.variables)}
    return [
        [numbers[id(v)] for v in built_for(optimizer)] if optimizer.built else None
        for optimizer in optimizers_of(model)
    ]


def _after_building(model: keras.Model, built: list[list[int] | None]) -> tuple[list[Any], bool]:
    """The variables once the optimizers are built, and whether they are all known.

    Raises:
        ValueError: If they cannot be built for these variables.
    """
    optimizers = optimizers_of(model)
    for _, numbers in zip(optimizers, built, strict=True):
        if numbers and (len(set(numbers)) < len(numbers) or max(numbers) >= len(model.variables)):
            raise ValueError(f"an optimizer was built for the variables {numbers}")
    if all(o.built or not numbers for o, numbers in zip(optimizers, built, strict=True)):
        return variables_of(model), True
    known = _each_once(_own_variables(model))
    twin = None
    if len(optimizers) == 1:
        with model.distribute_strategy.scope():
            twin = built_twin(optimizers[0], [model.variables[n] for n in built[0] or ()])
    return known + ([] if twin is None else twin.variables), twin is not None


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
    kinds = (tf.data.Dataset, keras.utils.PyDataset)
    is_readable = isinstance(x, kinds) or all(
        hasattr(array, "__getitem__") for array in keras.tree.flatten(x)
    )
    if hasattr(x, "__next__") or not is_readable:
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


def _random_state() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, which data and callbacks may use."""
    state: Any = np.random.get_state()  # noqa: NPY002  The global generator is needed.
    kind, keys, *rest = state
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _check_random(state: dict[str, Any], seed: np.ndarray | None) -> None:
    """Raises an exception unless the random generators can be set to a state."""
    version, words, gauss = state["python"]
    random.Random().setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    own = (kind, np.asarray(keys, "uint32"), position, has_gauss, cached)
    np.random.RandomState().set_state(own)
    # NumPy would read past the end of the keys.
    if not 0 <= position <= len(keys) or not isinstance(gauss, (float, type(None))):
        raise ValueError(f"Received: position={position!r}, gauss={gauss!r}")
    if seed is not None and (seed.shape != (2,) or seed.dtype.kind not in "iu"):
        raise ValueError(f"Received: a seed of shape {seed.shape} and dtype {seed.dtype}")


def _set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, "uint32"), *rest))  # noqa: NPY002
