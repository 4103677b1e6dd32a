"""`SnapshotEnsemble`: the face of the package."""

import contextlib
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble import training
from snapshot_ensemble.annealing import AnnealedRate, compiled_rate
from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.combining import (
    check_combine,
    check_meanings,
    check_members,
    check_weights,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.directory import DirectoryStore
from snapshot_ensemble.exporting import (
    check_format,
    export_model,
    serving_function,
    serving_graph,
)
from snapshot_ensemble.manifest import NAME as MANIFEST
from snapshot_ensemble.members import MembersModel, build_member, compile_like, metrics_lent
from snapshot_ensemble.merging import graph_of, merge
from snapshot_ensemble.schedules import (
    CosineAnnealing,
    EqualCycles,
    Plan,
    as_schedule,
)
from snapshot_ensemble.snapshots import (
    MemoryStore,
    Snapshot,
    SnapshotError,
    SnapshotStore,
    Weights,
    load_weights,
    set_weights,
)
from snapshot_ensemble.tasks import check_task, read_outputs


class SnapshotEnsemble:
    """Trains a compiled Keras model once and makes an ensemble of it.

    The learning rate is annealed from its peak to its floor along a cosine, the weights are
    kept, the rate restarts, again and again until the budget is used up: each cycle ends in
    another minimum, and together they predict better than the last one, with more honest
    probabilities. Predictions are combined in probability space and mean what the model's
    output means: probabilities, logits (then log-probabilities, for sigmoids log-odds) or
    values.

    Example:

    >>> import keras, numpy as np
    >>> from snapshot_ensemble import SnapshotEnsemble
    >>> x, y = np.random.rand(64, 4), np.random.randint(0, 3, 64)
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    >>> model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    >>> ens = SnapshotEnsemble(model, cycles=3, lr_init=0.1)
    >>> history = ens.fit(x, y, epochs=6, verbose=0)
    >>> len(ens)
    3
    >>> ens.predict(x, verbose=0).shape
    (64, 3)

    Args:
        model: A compiled `keras.Model`: Functional, Sequential or subclassed, with one or many
            inputs and outputs.
        cycles: Into how many cycles `fit` splits its epochs: their lengths differ by one epoch
            at most, the longer ones last. Defaults to `5`.
        schedule: A `CosineAnnealing`, in place of equal cycles. Defaults to `None`.
        lr_init: The learning rate at the start of each cycle. Defaults to `None`: the rate that
            the model was compiled with (of a schedule, its rate at step 0).
        lr_min: The learning rate that each cycle anneals to. Defaults to `0.0`.
        directory: Where snapshots are written as training goes. Defaults to `None`: they are
            held in memory.
        max_snapshots: Keep the newest that many. Defaults to `None`: keep all.
        task: `"multiclass"`, `"binary"`, `"multilabel"` or `"regression"`, with several outputs
            one for each, in the outputs' structure. Defaults to `None`: read off the compiled
            loss and the last activation.

    Raises:
        ValueError: If the model is not compiled, its task cannot be told, or a value is
            impossible.
        TypeError: If a value has the wrong type.

    References:
        - [Huang, Li, Pleiss et al., 2017](https://arxiv.org/abs/1704.00109)
        - [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        cycles: int = 5,
        schedule: CosineAnnealing | None = None,
        lr_init: float | None = None,
        lr_min: float = 0.0,
        directory: str | os.PathLike[str] | None = None,
        max_snapshots: int | None = None,
        task: Any = None,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`SnapshotEnsemble` runs on Keras with TensorFlow. Received: "
                f"backend={keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow."
            )
        check_model(model)
        check_task(model, task)
        self.model = model
        self.task = task
        self.schedule = as_schedule(cycles, schedule, lr_init, lr_min)
        if max_snapshots is not None:
            max_snapshots = whole_number("max_snapshots", max_snapshots, 1)
        self.max_snapshots = max_snapshots
        self.directory = None if directory is None else pathlib.Path(directory)
        # Until `fit` or `load` a directory is only a name: what lies there is not this ensemble's.
        self._directory_is_own = False
        self._store: SnapshotStore = (
            MemoryStore() if self.directory is None else DirectoryStore(self.directory)
        )
        self._describe_to(self._store)
        self._weights: np.ndarray | None = None
        self._weights_of: Any = None  # The state of the store that they belong to.
        self._rate = AnnealedRate(model)
        self.history: dict[str, list[Any]] = {}
        self._done = {"cycles": 0, "epochs": 0, "steps": 0}
        self._tensors: dict[int, list[Any]] = {}
        self._models: dict[Any, MembersModel] = {}
        self._built_of: Any = None  # The state of the store that they were made of.

    # Training

    def plan(self, epochs: int) -> Plan:
        """The cycles that `fit` would run.

        Example:

        >>> SnapshotEnsemble(model, cycles=3, lr_init=0.1).plan(10)
        cycle  epochs  length  peak rate  floor  warmup
            0     0-2       3        0.1      0
            1     3-5       3        0.1      0
            2     6-9       4        0.1      0

        Args:
            epochs: The budget in epochs.

        Returns:
            A list of `Cycle(index, first_epoch, last_epoch, lr_max, lr_min)`, epochs counted
            from 0 and both ends included; it prints as a table.

        Raises:
            ValueError: If the budget cannot be split into whole cycles, or the floor is above
                the peak.
        """
        peak = self.schedule.lr_init
        return self.schedule.plan(epochs, compiled_rate(self.model) if peak is None else peak)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *,
        epochs: int | None = None,
        overwrite: bool = False,
        **fit_arguments: Any,
    ) -> keras.callbacks.History:
        """Trains through the cycles of `plan(epochs)` and keeps a snapshot at the end of each.

        Everything goes through one `model.fit`, with the learning rate computed inside the
        compiled training step, exact for every step. Afterwards, also after an interrupt or an
        exception, the optimizer has its own rate (or schedule) back and snapshots of finished
        cycles are kept; a cycle that did not end gives no member. A second `fit` adds cycles.

        A snapshot has the weights as they were trained, also where `use_ema` or
        `EarlyStopping(restore_best_weights=True)` later puts others into the model.

        Where the number of steps in an epoch is not known before the first one ends (a `tf.data`
        of unknown length without `steps_per_epoch`), the first epoch runs at the mean of the
        rates that the plan has for it, and all later ones exactly by the plan.

        Args:
            x: As for `model.fit`.
            y: As for `model.fit`.
            epochs: The budget. Defaults to `None`: ten epochs a cycle, or five cycles of a
                given schedule.
            overwrite: Whether new snapshots take the place of those that there are, in memory
                or in the directory. They do as soon as the first one is kept, not before.
                Defaults to `False`: a directory that holds something is refused, members of
                this ensemble are added to.
            **fit_arguments: All other arguments of `model.fit`. With `initial_epoch` the plan
                splits the epochs from there to `epochs`.

        Returns:
            The Keras `History`; its `history` also holds `learning_rate` (of the last step) and
            `cycle`, one value an epoch.

        Raises:
            ValueError: If the plan is impossible, a callback sets the learning rate, or the
                directory holds something. All before training.
            TypeError: If `model.fit` has no such argument.
        """
        training.check_fit_arguments(self.model, fit_arguments)
        training.check_callbacks(fit_arguments.get("callbacks"))
        plan = self._plan_from(fit_arguments.get("initial_epoch"), epochs)
        before = (self._store, self._directory_is_own, self.history, self._done)
        if self.directory is not None and not self._directory_is_own:
            self._store = DirectoryStore.create(self.directory, overwrite)
            self._directory_is_own = True
            self._describe_to(self._store)
        if overwrite:
            self._store.restart()
            self.history, self._done = {}, dict.fromkeys(self._done, 0)
        members = self._members_now()
        try:
            result = training.train(
                self.model,
                plan,
                self._store,
                self._rate,
                x=x,
                y=y,
                arguments=fit_arguments,
                history=self.history,
                done=self._done,
                max_snapshots=self.max_snapshots,
            )
        except BaseException:
            if overwrite and self._members_now() == members:
                # Nothing took the place of what there was, so that it is still there.
                self._store.restart(False)
                self._store, self._directory_is_own, self.history, self._done = before
            elif len(self):
                with contextlib.suppress(OSError):  # What is raised already matters more.
                    self._store.commit()
            raise
        self._store.commit()
        return result

    def _plan_from(self, initial_epoch: int | None, epochs: int | None) -> Plan:
        """The plan of the epochs that are left, of as many as there are by default."""
        first = whole_number("initial_epoch", initial_epoch or 0, 0)
        if epochs is None:
            return self.plan(self.schedule.default_epochs())
        if first and whole_number("epochs", epochs, 1) <= first:
            raise ValueError(
                "`epochs` is the number of the last epoch, and must be above `initial_epoch`. "
                f"Received: epochs={epochs}, initial_epoch={first}"
            )
        return self.plan(epochs - first if first else epochs)

    def _members_now(self) -> Any:
        """Another value whenever the members are others."""
        return self._store, self._store.version

    # Predictions

    def predict(
        self,
        x: Any,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """The members' predictions, combined.

        The data is gone through once, however many members there are. Combination runs in
        float32, or float64 if the model does.

        Args:
            x: As for `model.predict`.
            combine: `"mean"` of the members' probabilities or values; `"vote"`, the share of
                members that vote for each class (classes only; of equal shares at the top, the
                one with the higher mean is raised by a millionth of itself, so that `argmax`
                is the winner); `"weighted"`, the mean by `weights`; `"geometric"`, the
                normalised geometric mean (classes only); `"median"` (regression only).
                Defaults to `"mean"`.
            members: Which members: `None` for all, an int for the last that many, or a list of
                indices. Defaults to `None`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            NumPy arrays in the structure and shapes of `model.predict`.

        Raises:
            ValueError: If there are no members, or `combine` or `members` make no sense.
        """
        check_combine(combine)
        model = self._combined(combine, members)
        return model.predict(
            x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
        )

    def predict_members(
        self,
        x: Any,
        *,
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Each member's own output.

        Args:
            x: As for `model.predict`.
            members: Which members, as for `predict`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            As `model.predict`, with the members on a new first axis of each array.

        Raises:
            ValueError: If there are no members, or `members` makes no sense.
        """
        model = self._combined(None, members)
        stacked = model.predict(
            x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
        )
        # Keras joins batches along the first axis, so that the members come second till here.
        return keras.tree.map_structure(lambda array: np.moveaxis(array, 1, 0), stacked)

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        return_dict: bool = False,
        **evaluate_arguments: Any,
    ) -> Any:
        """The compiled loss and metrics, on the combined output.

        The loss is that of the predictions alone: penalties on weights (regularizers) belong to
        single members and are not in it.

        Args:
            x: As for `model.evaluate`.
            y: As for `model.evaluate`.
            combine: As for `predict`.
            members: As for `predict`.
            return_dict: Whether to return a dict by name rather than a list.
                Defaults to `False`.
            **evaluate_arguments: `batch_size`, `verbose`, `sample_weight`, `steps` and
                `callbacks`, as for `model.evaluate`.

        Returns:
            The loss and metrics as `model.evaluate` returns them.

        Raises:
            ValueError: If there are no members, or `combine` or `members` make no sense.
        """
        check_combine(combine)
        model = self._combined(combine, members)
        with metrics_lent(self.model):
            return model.evaluate(x, y, return_dict=return_dict, **evaluate_arguments)

    def _combined(self, combine: str | None, members: Any) -> MembersModel:
        """The model that runs the members; built once for each choice. None: not combined."""
        chosen, weights = self._choice(combine, members)
        key = (combine, tuple(chosen), None if weights is None else tuple(weights))
        # A new `compile` brings other metrics, and maybe another loss.
        state = (*self._members_now(), self.model._compile_config)
        if self._built_of != state:
            self._tensors, self._models, self._built_of = {}, {}, state
        if key not in self._models:
            for i in set(chosen) - set(self._tensors):
                arrays = self._store.weights(self.model, i)
                self._tensors[i] = [ops.convert_to_tensor(array) for array in arrays]
            with self.model.distribute_strategy.scope():
                model = MembersModel(
                    self.model,
                    [self._tensors[i] for i in chosen],
                    self._put_together(combine, weights),
                )
                compile_like(model, self.model)
            self._models[key] = model
        return self._models[key]

    def _parts(self, combine: str, members: Any) -> tuple[list[Weights], Callable[[list], Any]]:
        """What one model is made of: the members' weights, and what combines their outputs."""
        chosen, weights = self._choice(combine, members)
        arrays = [self._store.weights(self.model, i) for i in chosen]
        return arrays, self._put_together(combine, weights)

    def _choice(self, combine: str | None, members: Any) -> tuple[list[int], np.ndarray | None]:
        """The members to run and, for a weighted combination, their weights; all checked."""
        if combine is not None:
            check_combine(combine)
        chosen, weights = self._chosen(members), None
        graph = graph_of(self.model)
        if combine is not None and graph is not None:
            # Of a subclass, the outputs are known only when it runs.
            check_meanings(combine, read_outputs(self.model, self.task, graph._outputs_struct))
        if combine == "weighted":
            weights = weights_of(self.weights, chosen)
            # Who has no say need not be run.
            chosen = [member for member, weight in zip(chosen, weights, strict=True) if weight]
            weights = weights[weights > 0]
        return chosen, weights

    def _put_together(
        self, combine: str | None, weights: np.ndarray | None
    ) -> Callable[[list[Any]], Any]:
        """What makes one output of the members' outputs; of arrays, tensors or symbols."""

        def put_together(outputs: list[Any]) -> Any:
            if combine is None:
                return keras.tree.map_structure(lambda *o: ops.stack(o, axis=1), *outputs)
            meanings = read_outputs(self.model, self.task, outputs[0])
            return combine_outputs(outputs, combine, meanings, weights)

        return put_together

    def _chosen(self, members: Any) -> list[int]:
        if not len(self):
            raise ValueError(
                "The ensemble has no members yet. Call `fit`, or make it with `load` or "
                "`from_weights`."
            )
        return check_members(members, len(self))

    # One model to serve

    def to_keras(
        self, combine: str = "mean", members: int | Sequence[int] | None = None
    ) -> keras.Model:
        """One Keras model that computes the combination.

        It is made of stock Keras layers and operations (and the layers of your own model), so
        that it is saved and loaded without this package. Layers whose weights are equal in all
        members and that depend only on such layers, a frozen backbone or preprocessing, are in
        it once, and computed once. Its output carries no Keras mask: to score padded sequences
        with it, mark the padding by `sample_weight`.

        Example:

        >>> model = ens.to_keras()
        >>> model.save("ensemble.keras")
        >>> again = keras.models.load_model("ensemble.keras")  # also without this package

        Args:
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`. Defaults to `None`, all.

        Returns:
            A Functional `keras.Model` with the inputs' structure and names and the outputs'
            structure and names of the wrapped model, compiled with its loss and metrics (and
            plain SGD, which adds no slots to its file).

        Raises:
            ValueError: If there are no members, `combine` or `members` make no sense, or the
                model is a subclass, which is no graph of layers.
        """
        return merge(self.model, *self._parts(combine, members))

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        overwrite: bool = False,
        **export_arguments: Any,
    ) -> None:
        """Exports one artefact that computes the combination, to be served without Keras.

        Its signature has the model's own input and output names and takes any batch size. The
        file is opened by its own runtime, where that is installed, and compared with `predict`
        on random inputs before it is moved into place.

        Args:
            filepath: Path of the folder or file. Files end with `.onnx`, `.tflite` (LiteRT) or
                `.xml` (OpenVINO, with a `.bin` beside it).
            format: `"tf_saved_model"`, `"onnx"`, `"litert"` or `"openvino"`. Defaults to
                `"tf_saved_model"`.
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`. Defaults to `None`, all.
            overwrite: Whether what lies at the path may be replaced. Defaults to `False`.
            **export_arguments: As for `keras.Model.export`.

        Raises:
            ValueError: If there are no members, `combine`, `members` or `format` make no sense,
                something lies at the path, or the file does not give the ensemble's numbers.
            ImportError: If the format needs a package that is not installed.
        """
        path = check_format(filepath, format)
        reference = self._combined(combine, members)
        if graph_of(self.model) is not None:
            served = serving_graph(self.to_keras(combine, members), reference)
        else:
            served = serving_function(self.model, *self._parts(combine, members), reference)
        export_model(served, path, format, overwrite=overwrite, **export_arguments)

    # Weights of the members

    @property
    def weights(self) -> np.ndarray | None:
        """The weights of `combine="weighted"`.

        One a member, float64, at least 0 and summing to 1; `None` until they are set. They go
        when the members change.
        """
        if self._weights is None or self._weights_of != self._members_now():
            return None
        return self._weights.copy()

    @weights.setter
    def weights(self, weights: Any) -> None:
        self._weights = None if weights is None else check_weights(weights, len(self))
        self._weights_of = self._members_now()
        if self._directory_is_own:
            self._store.commit()

    # The members

    @property
    def snapshots(self) -> list[Snapshot]:
        """A `Snapshot` for each member, oldest first."""
        return list(self._store.snapshots)

    def __len__(self) -> int:
        return len(self._store.snapshots)

    def __getitem__(self, index: int) -> keras.Model:
        weights = self._store.weights(self.model, range(len(self))[operator.index(index)])
        return build_member(self.model, weights)

    def __iter__(self) -> Iterator[keras.Model]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        where = "in memory" if self.directory is None else f"in '{self.directory}'"
        return f"<SnapshotEnsemble of {self.model.name!r}: {len(self)} members {where}>"

    # Keeping

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Saves the whole ensemble: the model, the snapshots, the weights and the history.

        All files are in place before the manifest names them: a save that breaks off leaves
        what was there.

        Args:
            directory: Path of the directory.
            overwrite: Whether the ensemble may take the place of one that lies there.
                Defaults to `False`.

        Raises:
            ValueError: If there are no members, or the directory holds something and
                `overwrite` is `False`.
        """
        self._chosen(None)
        path = pathlib.Path(directory)
        if self._directory_is_own and path.resolve() == self.directory.resolve():
            self._store.commit()  # Its snapshots are there already.
            return
        target = DirectoryStore.create(path, overwrite)
        self._describe_to(target)
        own = self.model.get_weights()
        try:
            with self._rate.lifted():
                for snapshot in self.snapshots:
                    set_weights(self.model, self._store.weights(self.model, snapshot.index))
                    target.add(self.model, snapshot, commit=False)
        finally:
            set_weights(self.model, own)
        target.commit()

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        custom_objects: dict[str, Any] | None = None,
        model: keras.Model | None = None,
    ) -> "SnapshotEnsemble":
        """Loads an ensemble from the directory that `fit` or `save` wrote.

        Nothing in the directory is executed, and every file is checked against the manifest.
        The ensemble stays in its directory: a further `fit` adds to it there. The model has the
        weights of the last snapshot, to go on from; a given one keeps its own.

        Args:
            directory: Path of the directory.
            custom_objects: Classes and functions of your own that the model uses, by name.
            model: The compiled model itself, where it cannot be made from a file: a subclass
                without `get_config`, a loss that is a lambda.

        Returns:
            A `SnapshotEnsemble`.

        Raises:
            SnapshotError: If the directory holds no ensemble, or a file is not as it was saved;
                the message names it.
        """
        store = DirectoryStore.open(directory)
        described = store.described
        given = model is not None
        model = model if given else store.model(custom_objects)
        check_model(model)
        check_built(model)
        try:
            settings = dict(described["settings"])
            if settings["schedule"] is not None:
                settings["schedule"] = CosineAnnealing(**settings["schedule"])
            ensemble = cls(model, directory=directory, **settings)
        except (KeyError, TypeError, ValueError) as error:
            manifest = store.directory / MANIFEST
            raise SnapshotError(f"The settings in '{manifest}' do not hold: {error}") from error
        ensemble._store, ensemble._directory_is_own = store, True
        ensemble.history, ensemble._done = described["history"], described["done"]
        if described["weights"] is not None:
            ensemble._weights = check_weights(described["weights"], len(ensemble))
            ensemble._weights_of = ensemble._members_now()
        ensemble._describe_to(store)
        if len(ensemble) and not given:
            set_weights(model, store.weights(model, len(ensemble) - 1))
        return ensemble

    @classmethod
    def from_weights(
        cls, model: keras.Model, paths: Sequence[str | os.PathLike[str]], **arguments: Any
    ) -> "SnapshotEnsemble":
        """An ensemble of weight files that something else trained.

        Args:
            model: The compiled model that the weights belong to. It is built, and not changed.
            paths: Files of `model.save_weights`, oldest first.
            **arguments: Arguments of `SnapshotEnsemble`, for a later `fit`.

        Returns:
            A `SnapshotEnsemble` that holds the weights in memory.

        Raises:
            SnapshotError: If a file does not hold weights of this model; the message names it.
            ValueError: If there are no paths, or the model is not built.
        """
        paths = paths if isinstance(paths, (str, os.PathLike)) or paths is None else list(paths)
        if not isinstance(paths, list) or not paths:
            raise ValueError(f"`paths` must be a list of weight files. Received: paths={paths!r}")
        if arguments.get("directory") is not None:
            raise ValueError(
                "`from_weights` holds the weights in memory. Received: "
                f"directory={arguments['directory']!r}. Call `save(directory)` afterwards."
            )
        ensemble = cls(model, **arguments)
        check_built(model)
        store = MemoryStore()
        for index, path in enumerate(paths):
            store.add_weights(load_weights(model, path), Snapshot(index))
        ensemble._store = store
        return ensemble

    def _describe_to(self, store: SnapshotStore) -> None:
        if isinstance(store, DirectoryStore):
            store.describe = self._description

    def _description(self) -> dict[str, Any]:
        """What a manifest says beside the snapshots."""
        schedule, settings = self.schedule, {"max_snapshots": self.max_snapshots}
        if isinstance(schedule, EqualCycles):
            settings |= {"schedule": None, "cycles": schedule.cycles}
            settings |= {"lr_init": schedule.lr_init, "lr_min": schedule.lr_min}
        else:
            settings["schedule"] = schedule.get_config()
        return {
            "settings": {**settings, "task": self.task},
            "weights": None if self.weights is None else self.weights.tolist(),
            "history": self.history,
            "done": self._done,
        }


def check_model(model: Any) -> None:
    """Raises an error unless it is a compiled Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that it can be trained. "
            f"Received: model={model.name!r}, not compiled. Call `model.compile(...)` first."
        )


def check_built(model: keras.Model) -> None:
    """Raises an error unless the model has weights."""
    if not model.built or not model.weights:
        raise ValueError(
            "`model` must be built, so that it has weights to load. "
            f"Received: model={model.name!r}, not built. Call it on a batch first."
        )
