"""What a snapshot is, how its weights are read, and how snapshots are kept in memory."""

import contextlib
import ctypes
import dataclasses
import gc
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import h5py
import keras
import numpy as np

Weights = list[np.ndarray]


class SnapshotError(Exception):
    """A directory of snapshots that cannot be trusted; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """One member of an ensemble: where in training its weights were taken.

    A value is `None` where it is not known, as for weights that something else trained.

    Attributes:
        index: Its place among the members, from 0: `ensemble[index]` is its model.
        cycle: Number of the cycle that it ends, from 0, counted over all calls of `fit`.
        epoch: Number of the epoch that it ends, from 0, counted over all calls of `fit`.
        step: Training steps (batches) taken when it was kept.
        learning_rate: The learning rate of the last of these steps.
        metrics: The training and validation metrics of its epoch, by name.
    """

    index: int
    cycle: int | None = None
    epoch: int | None = None
    step: int | None = None
    learning_rate: float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


class SnapshotSink(Protocol):
    """Where a run puts its snapshots.

    Attributes:
        snapshots: Those that there are, oldest first.
    """

    @property
    def snapshots(self) -> list[Snapshot]: ...

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        """Keeps the model's weights of this moment."""

    def keep_newest(self, count: int) -> None:
        """Forgets all but the newest `count` snapshots."""

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        """Keeps the state of training in the place of the one before, where there is a file.

        Args:
            write: Takes a path, and weights that need not be written there.
        """


class SnapshotStore(SnapshotSink, Protocol):
    """Where snapshots are kept, and found again.

    Attributes:
        version: Another number whenever they change.
        replacing: Whether a run has begun that will take the place of what there is.
        state: The file with the state of the run that was last, if there is one.
    """

    version: int

    @property
    def replacing(self) -> bool: ...

    @property
    def state(self) -> pathlib.Path | None: ...

    def base(self, model: keras.Model) -> Weights:
        """The weights that a state leaves out."""

    def take_back(self, cycles: int) -> None:
        """Forgets the snapshots of this cycle and later ones, which a run will make again."""

    def restart(self, restarting: bool = True) -> None:
        """Lets the next `add` take the place of all snapshots that there are by then."""

    def weights(self, model: keras.Model, index: int) -> Weights:
        """The weights of one snapshot, in the order of `model.weights`."""

    def put(self, member: keras.Model, model: keras.Model, index: int) -> None:
        """Gives a model of the same architecture the weights of one snapshot."""

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others from writing to the same place meanwhile."""

    def commit(self) -> None:
        """Makes sure that what is described beside the snapshots is kept as well."""

    def settle(self) -> None:
        """Waits until all that is kept is safe; raises an error if it cannot be."""


def renumbered(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with `index` as their place in the list."""
    return [dataclasses.replace(s, index=index) for index, s in enumerate(snapshots)]


class MemoryStore:
    """Snapshots as arrays in memory."""

    # No run that was broken off is found again here.
    replacing = False
    state = None

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.version = 0
        self._weights: list[Weights] = []
        self._restarting = False

    def add(self, model: keras.Model, snapshot: Snapshot) -> None:
        if self._restarting:
            self.snapshots, self._weights, self._restarting = [], [], False
        self.add_weights(model.get_weights(), snapshot)

    def restart(self, restarting: bool = True) -> None:
        self._restarting = restarting

    def commit(self) -> None:
        pass  # Memory has nothing to add.

    def settle(self) -> None:
        pass

    def keep_state(self, write: Callable[[str, Weights | None], None]) -> None:
        pass  # Nor would it outlive a break.

    def base(self, model: keras.Model) -> Weights:
        return []

    def take_back(self, cycles: int) -> None:
        pass

    def writing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def add_weights(self, weights: Weights, snapshot: Snapshot) -> None:
        """Keeps arrays; one that equals the last snapshot's (a frozen layer) is not kept twice."""
        if self._weights:
            pairs = zip(self._weights[-1], weights, strict=True)
            weights = [old if np.array_equal(old, new) else new for old, new in pairs]
        self._weights.append(weights)
        self.version += 1
        self.snapshots = renumbered([*self.snapshots, snapshot])

    def keep_newest(self, count: int) -> None:
        self._weights = self._weights[-count:]
        self.version += 1
        self.snapshots = renumbered(self.snapshots[-count:])

    def weights(self, model: keras.Model, index: int) -> Weights:
        return self._weights[index]

    def put(self, member: keras.Model, model: keras.Model, index: int) -> None:
        set_weights(member, self._weights[index])


def load_weights(
    model: keras.Model, path: str | os.PathLike[str], *, foreign: bool = True
) -> Weights:
    """Reads a weight file of Keras's into arrays; the model is as it was afterwards.

    Args:
        model: A built model.
        path: The file.
        foreign: Whether the file may belong to another model. Keras itself takes one that has
            more layers than it needs.

    Raises:
        SnapshotError: If the file does not hold the weights of this model.
    """
    own = model.get_weights()
    try:
        with weights_only(model):
            if foreign and str(path).endswith(".weights.h5"):
                _check_layout(model, path)
            model.load_weights(path)
        return model.get_weights()
    except Exception as error:  # Keras and h5py raise errors of many classes for a broken file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error
    finally:
        set_weights(model, own)


def load_into(model: keras.Model, path: str | os.PathLike[str]) -> None:
    """Reads a weight file of the model's own, with hardly more memory than the model has.

    Args:
        model: A built model, whose weights are lost if there is an error.
        path: The file.

    Raises:
        SnapshotError: If the file does not hold the weights of this model.
    """
    try:
        with weights_only(model):
            model.load_weights(path)
    except Exception as error:  # Keras and h5py raise errors of many classes for a broken file.
        raise SnapshotError(f"'{path}' does not hold weights of this model: {error}") from error
    finalize(model)
    gc.collect()  # Reading leaves cycles of objects that hold its arrays.
    if sys.platform == "linux":
        # What is freed there glibc keeps, in pieces into which the next arrays do not fit.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def set_weights(model: Any, weights: Weights) -> None:
    """Sets the weights of a model or layer, and what its layers work out from them."""
    model.set_weights(weights)
    finalize(model)


def finalize(model: Any) -> None:
    """Lets layers work out what they hold beside their weights, which were set."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # It holds its mean and variance a second time.


def _check_layout(model: keras.Model, path: str | os.PathLike[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference = f"{folder}/reference.weights.h5"
        model.save_weights(reference)
        more = _layout(path) - _layout(reference)
    if more:
        raise ValueError(f"it also holds {', '.join(sorted(more))}")


def _layout(path: str | os.PathLike[str]) -> set[str]:
    """The names of the arrays in a file, without an optimizer's and those of random seeds."""
    names: set[str] = set()
    with h5py.File(path) as file:
        file.visititems(lambda name, item: names.add(name) if hasattr(item, "shape") else None)
    return {n for n in names if not n.startswith("optimizer/") and "seed_generator" not in n}


@contextlib.contextmanager
def weights_only(model: keras.Model) -> Iterator[None]:
    """Hides the optimizers, whose slots Keras would write beside the weights, or ask for.

    Also those of models inside, such as a backbone that was compiled to be trained before.
    """
    inside = [layer for layer in model._flatten_layers() if isinstance(layer, keras.Model)]
    models = [inner for inner in inside if getattr(inner, "optimizer", None) is not None]
    optimizers = [inner.optimizer for inner in models]
    try:
        for inner in models:
            # Past Keras's own tracking of attributes: nothing is to be noticed.
            object.__setattr__(inner, "optimizer", None)
        yield
    finally:
        for inner, optimizer in zip(models, optimizers, strict=True):
            object.__setattr__(inner, "optimizer", optimizer)
