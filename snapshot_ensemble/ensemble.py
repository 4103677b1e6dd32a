"""`SnapshotEnsemble`: the face of the package."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from snapshot_ensemble.checks import counted, real_number, whole_number
from snapshot_ensemble.fitting import Fitter
from snapshot_ensemble.inference.member_pool import MEMORY_LIMIT
from snapshot_ensemble.schedules import (
    CosineAnnealing,
    Plan,
    as_schedule,
)
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.snapshot import (
    MemoryStore,
    SnapshotStore,
)
from snapshot_ensemble.training import loop as training
from snapshot_ensemble.training.fingerprint import fingerprint
from snapshot_ensemble.training.fit_arguments import (
    check_callbacks,
    check_fit_arguments,
    is_validated,
)
from snapshot_ensemble.training.learning_rate import AnnealedRate, compiled_rate
from snapshot_ensemble.training.lr_range_test import RangeTest, range_test
from snapshot_ensemble.training.shrink_perturb import Restarter, Shrink, check_shrink


class SnapshotEnsemble(Fitter):
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
        shrink: The share of each trained weight that a restart carries over: `1.0` is the warm
            restart of the paper, `0.0` a fresh start, and between them
            `weight = shrink * weight + (1 - shrink) * a fresh draw of its initializer`
            (shrink and perturb). `"auto"`: 1 until a cycle has ended with a `val_loss` of more
            than twice its `loss` that is more than 5 % above the least of any epoch until then, or
            less than 10 % below the least before that cycle; then 0.5. Always 1 where the least
            of the first cycle was not within 30 % of the least since (one cycle could not learn
            again what a restart takes away), without validation data, and for models whose
            layers cannot be made from their configs. A dict by names of layers, also of whole
            models inside: the innermost name counts, what has none is carried over.
            Frozen weights, and with a number or `"auto"` also layers that were trained before the
            first `fit` (a bias that is not zero tells), are never touched; optimizer slots and
            batch-normalisation statistics are carried over. Defaults to `"auto"`.
        directory: Where snapshots are written as training goes. Defaults to `None`: they are
            held in memory.
        max_snapshots: Keep the newest that many. Defaults to `None`: keep all.
        task: `"multiclass"`, `"binary"`, `"multilabel"` or `"regression"`, with several outputs
            one for each, in the outputs' structure. Defaults to `None`: read off the compiled
            loss and the last activation.
        memory_limit: How many bytes the members' weights may take in memory at once, those that
            all share counted once. Members that would take more predict arrays one after
            another, through one model. Defaults to `2**28` (256 MiB).

    Raises:
        ValueError: If the model is not compiled, its task cannot be told, or a value is
            impossible.
        TypeError: If a value has the wrong type.

    References:
        - [Huang, Li, Pleiss et al., 2017](https://arxiv.org/abs/1704.00109)
        - [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983)
        - [Ash & Adams, 2020](https://arxiv.org/abs/1910.08475)
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        cycles: int = 5,
        schedule: CosineAnnealing | None = None,
        lr_init: float | None = None,
        lr_min: float = 0.0,
        shrink: Shrink = "auto",
        directory: str | os.PathLike[str] | None = None,
        max_snapshots: int | None = None,
        task: Any = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                "`SnapshotEnsemble` runs on Keras with TensorFlow. Received: "
                f"backend={keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow."
            )
        store: SnapshotStore = MemoryStore() if directory is None else DirectoryStore(directory)
        super().__init__(model, task, store, memory_limit)
        self._describe_to(store)
        self.schedule = as_schedule(cycles, schedule, lr_init, lr_min)
        if max_snapshots is not None:
            max_snapshots = whole_number("max_snapshots", max_snapshots, 1)
        self.max_snapshots = max_snapshots
        self.directory = None if directory is None else pathlib.Path(directory)
        # Until `fit` or `load` a directory is only a name: what lies there is not this ensemble's.
        self._directory_is_own = False
        self._rate = AnnealedRate(model)
        self._restarter = Restarter(check_shrink(shrink))
        self.history: dict[str, list[Any]] = {}
        self._done = {"cycles": 0, "epochs": 0, "steps": 0, "runs": 0}
        self._runs = 0  # How many of the runs in the directory this object has been through.
        self._earlier: list[int] = []  # The number of epochs of each.
        self._saves = False

    # Training

    def plan(self, epochs: int) -> Plan:
        """The cycles that `fit` would run.

        Example:

        >>> SnapshotEnsemble(model, cycles=3, lr_init=0.1).plan(10)
        cycle  epochs  length  peak rate  floor  warmup  shrink
            0     0-2       3        0.1      0
            1     3-5       3        0.1      0            auto
            2     6-9       4        0.1      0            auto

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
        plan = self.schedule.plan(epochs, compiled_rate(self.model) if peak is None else peak)
        shrink = str(self.shrink) if isinstance(self.shrink, Mapping) else self.shrink
        for place, cycle in enumerate(plan):
            if place or self._done["cycles"]:  # The very first begins with the model's weights.
                plan[place] = dataclasses.replace(cycle, shrink=shrink)
        return plan

    def find_lr(
        self,
        x: Any,
        y: Any = None,
        *,
        lr_min: float = 1e-6,
        lr_max: float = 10.0,
        steps: int = 300,
        **fit_arguments: Any,
    ) -> RangeTest:
        """Suggests a peak learning rate, by a range test.

        The model is trained for `steps` batches with a rate that grows by the same factor from
        each to the next, until the loss diverges; then its weights, its optimizer and the random
        generators are put back as they were. Of the losses, averaged over neighbouring rates, the
        suggestion is the lowest rate at which nine tenths of their fall are reached. It is a
        place to begin from, within a factor of two or so: batch size, weight decay and the
        length of cycles matter, too.

        Example:

        >>> found = SnapshotEnsemble(model).find_lr(x, y, batch_size=8)
        >>> 1e-6 < found.suggestion < 10
        True

        Args:
            x: As for `model.fit`; data that can be gone through again and again.
            y: As for `model.fit`.
            lr_min: The rate of the first step. Defaults to `1e-6`.
            lr_max: The rate of the last step. Defaults to `10.0`.
            steps: Number of steps. Defaults to `300`.
            **fit_arguments: Arguments of `model.fit` such as `batch_size` and `class_weight`.

        Returns:
            A `RangeTest` with `suggestion`, and the curve in `rates`, `losses` and `smoothed`, one
            value a step; `plots.plot_lr` draws it.

        Raises:
            ValueError: If a rate or the number of steps is impossible, or the loss never falls.
            TypeError: If `model.fit` has no such argument.

        References:
            - [Smith, 2017](https://arxiv.org/abs/1506.01186)
        """
        refused = {"epochs", "initial_epoch", "callbacks", "validation_data", "validation_split"}
        if given := sorted(refused & set(fit_arguments)):
            raise ValueError(
                "A range test counts in steps, and does nothing but train. Received: "
                f"{', '.join(given)}. Leave it out."
            )
        check_fit_arguments(self.model, fit_arguments)
        steps = whole_number("steps", steps, 10)
        lr_min, lr_max = (
            real_number(name, value, positive=True)
            for name, value in (("lr_min", lr_min), ("lr_max", lr_max))
        )
        if lr_min >= lr_max:
            raise ValueError(
                f"`lr_min` must be below `lr_max`. Received: lr_min={lr_min}, lr_max={lr_max}"
            )
        return range_test(
            self.model,
            self._rate,
            x,
            y,
            lr_min=lr_min,
            lr_max=lr_max,
            steps=steps,
            **fit_arguments,
        )

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *,
        epochs: int | None = None,
        resume: bool = False,
        overwrite: bool = False,
        save_every: int | None = 1,
        keep_going: bool = False,
        **fit_arguments: Any,
    ) -> keras.callbacks.History:
        """Trains through the cycles of `plan(epochs)` and keeps a snapshot at the end of each.

        Everything goes through one `model.fit`, with the learning rate computed inside the
        compiled training step, exact for every step. Afterwards, also after an interrupt or an
        exception, the optimizer has its own rate (or schedule) back and snapshots of finished
        cycles are kept; a cycle that did not end gives no member. A second `fit` adds cycles.

        With validation data (arrays, a `tf.data.Dataset`, a `PyDataset`) those members predict from
        then on that they say (`choose_members`): early ones that make the mean worse do not.

        A snapshot has the weights as they were trained, also where `use_ema` or
        `EarlyStopping(restore_best_weights=True)` later puts others into the model.

        Where the number of steps in an epoch is not known before the first one ends (a `tf.data`
        of unknown length without `steps_per_epoch`), the first epoch runs at the mean of the
        rates that the plan has for it, and all later ones exactly by the plan.

        With a `directory` the state of training is taken at the end of each epoch and written
        while the next one runs (a run that is killed may go on an epoch earlier): weights,
        optimizer, seeds of dropout, Python's and NumPy's random generators, history, and the
        state of Keras's own callbacks and of those that have `get_state()` and
        `set_state(state)`. If the run is broken off, by whatever, the same script with
        `resume=True` goes on and ends with the same snapshots: to the bit on a CPU with
        `keras.utils.set_random_seed` and `tf.config.experimental.enable_op_determinism`, for
        arrays and for a `tf.data.Dataset` that is gone through once an epoch, also if it
        shuffles with a seed. Data that go on from epoch to epoch (`steps_per_epoch`,
        generators) begin anew where the run goes on.

        Args:
            x: As for `model.fit`.
            y: As for `model.fit`.
            epochs: The budget. Defaults to `None`: ten epochs a cycle, or five cycles of a
                given schedule.
            resume: Whether a run that was broken off goes on. One that has ended is not run
                again, one that never began is begun. Defaults to `False`.
            overwrite: Whether new snapshots take the place of those that there are, in memory
                or in the directory. They do as soon as the first one, or the first state of
                training, is kept, not before. Defaults to `False`: a directory that holds
                something is refused, members of this ensemble are added to.
            save_every: After how many epochs the state of training is saved in the directory;
                at the end of each cycle it is in any case. `None`: never. Defaults to `1`.
            keep_going: Whether training goes on if a cycle ends with a loss or weights that are
                not finite, from where the last good cycle ended. Such a cycle gives no member
                and a warning. Defaults to `False`: training stops.
            **fit_arguments: All other arguments of `model.fit`. With `initial_epoch` the plan
                splits the epochs from there to `epochs`.

        Returns:
            The Keras `History`; its `history` also holds `learning_rate` (of the last step),
            `cycle` and, once a restart was not warm, `shrink`, one value an epoch.

        Raises:
            ValueError: If the plan is impossible, a callback sets the learning rate, the
                directory holds something, or a broken run had another plan, model or size of
                data. All before training.
            TypeError: If `model.fit` has no such argument.
            OSError: If the directory cannot be written to, or another process writes to it.
            SnapshotError: If a file to go on from is not as it was saved.
        """
        check_fit_arguments(self.model, fit_arguments)
        check_callbacks(fit_arguments.get("callbacks"))
        plan = self._plan_from(fit_arguments.get("initial_epoch"), epochs)
        if save_every is not None:
            save_every = whole_number("save_every", save_every, 1)
        self._restarter.begin(self.model, is_validated(fit_arguments))
        before = dict(vars(self))
        self._open(resume, overwrite)
        with self._store.writing():
            # What broke off may have been to take the place of what is still here.
            anew = overwrite or (resume and self._store.replacing)
            if anew:
                self._store.restart()
                self.history, self._done = {}, dict.fromkeys(self._done, 0)
                self._runs, self._earlier = 0, []
            number = self._done["runs"]
            same = fingerprint(self.model, plan, self.shrink, x, fit_arguments)
            state = None
            if resume and not anew:
                number = self._runs
                state = self._state_of(number)
                if state is None and number < self._done["runs"]:
                    return self._ended_run(number, x)
                if state is not None:
                    self._go_back_to(state, same)
            self._saves = self.directory is not None and save_every is not None
            run = training.Run(
                plan=plan,
                number=number,
                first_epoch=fit_arguments.get("initial_epoch") or 0,
                store=self._store,
                rate=self._rate,
                history=self.history,
                done=self._done,
                max_snapshots=self.max_snapshots,
                keep_going=keep_going,
                save_every=save_every if self._saves else None,
                fingerprint=same,
                earlier=self._earlier[:number],
                state=state,
                restarter=self._restarter,
            )
            return self._train(run, before if anew else None, x=x, y=y, arguments=fit_arguments)

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

    def __repr__(self) -> str:
        where = "in memory" if self.directory is None else f"in '{self.directory}'"
        return f"<SnapshotEnsemble of {self.model.name!r}: {counted(len(self), 'member')} {where}>"
