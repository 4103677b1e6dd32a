"""`SnapshotEnsemble`, the class that users work with."""

import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import keras
import numpy as np

from snapshot_ensemble.checks import counted, real_number, whole_number
from snapshot_ensemble.cycles import Plan
from snapshot_ensemble.evaluation.calibration import calibrated
from snapshot_ensemble.evaluation.conformal import conformalize, predict_interval, predict_set
from snapshot_ensemble.evaluation.early_exit import check_rows_apart, learn_early_exit
from snapshot_ensemble.evaluation.evaluating import evaluate
from snapshot_ensemble.evaluation.extra_outputs import PREDICTION, check_outputs, extras_of
from snapshot_ensemble.evaluation.gathering import gather
from snapshot_ensemble.evaluation.member_weights import check_method, learn_weights
from snapshot_ensemble.evaluation.refusing import checked_risk, refusals
from snapshot_ensemble.evaluation.report import Report, make_report
from snapshot_ensemble.evaluation.streamed_choice import count_of_members
from snapshot_ensemble.evaluation.uncertainty import predict_uncertainty
from snapshot_ensemble.evaluation.weight_averaging import average_weights
from snapshot_ensemble.export.formats import check_format, check_weights_dtype, export_members
from snapshot_ensemble.export.merged_model import merge
from snapshot_ensemble.export.served import Beside
from snapshot_ensemble.inference.combining import check_weights
from snapshot_ensemble.inference.early_exit import check_early_exit
from snapshot_ensemble.inference.member_pool import (
    MEMORY_LIMIT,
    MemberPool,
    PredictArguments,
)
from snapshot_ensemble.inference.merging import Merger, check_sources
from snapshot_ensemble.inference.model_checks import check_built, check_learned, check_model
from snapshot_ensemble.keras_compat.random_seed import generators_restored
from snapshot_ensemble.schedules import (
    CosineAnnealing,
    arguments_of,
    as_schedule,
    plan_of_fit,
    settings_of,
)
from snapshot_ensemble.storage.copying import copy_snapshots
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.file_names import directory_path
from snapshot_ensemble.storage.memory import MemoryStore
from snapshot_ensemble.storage.merging import write_merged
from snapshot_ensemble.storage.record import Decision
from snapshot_ensemble.storage.snapshot import Snapshot, SnapshotError, annealed
from snapshot_ensemble.storage.store import SnapshotStore
from snapshot_ensemble.storage.view import View
from snapshot_ensemble.storage.weight_files import load_weights
from snapshot_ensemble.training.distilling import distill
from snapshot_ensemble.training.exclusive import is_training, only_training
from snapshot_ensemble.training.fit_arguments import (
    check_fit_arguments,
    check_not_merged,
    validation_of,
)
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.loss_ratios import scale_of
from snapshot_ensemble.training.lr_range_test import RangeTest, range_test
from snapshot_ensemble.training.member_checks import warn_of_stragglers
from snapshot_ensemble.training.session import FitSession
from snapshot_ensemble.training.shrink_perturb import Restarter, Shrink, check_shrink


class SnapshotEnsemble:
    """Trains a compiled Keras model once and makes an ensemble of it.

    The learning rate is annealed from its peak to its floor along a cosine, the weights are saved,
    the rate restarts, and so on until the budget is used up. Each cycle ends in another minimum,
    and together these members predict better than the last one alone, with better calibrated
    probabilities. Predictions are combined in probability space and mean what the model's output
    means: probabilities, logits (then log-probabilities, or log-odds for sigmoids) or values.

    Methods that run over data take `batch_size`, `verbose`, `steps`, `callbacks` and, for
    held-out data, `x`, `y` and `sample_weight` as `model.predict` and `model.evaluate` do. By
    default (`batch_size=None`), arrays go through a graph of Keras's own small layers in batches of
    up to 1024 rows, which is faster and gives the same predictions; everything else in batches
    of 32. Held-out data are data that training has not seen.

    All methods may be called from other threads and from callbacks while `fit` runs. They see the
    snapshots that are finished by then, and leave training as it is. Only a second `fit` or
    `find_lr` is refused.

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
        cycles: How many cycles `fit` splits its epochs into. Their lengths differ by at most one
            epoch; the longer ones come last. `"auto"`: the rate first follows the cosine of one
            ordinary run. If the network begins to memorise its training data after a fifth to a
            half of the epochs, the rest is split into five cycles, or fewer of at least three
            epochs. It does if one of these holds for two epochs in a row:

            - `loss` is more than half below the lowest `val_loss` so far.
            - `loss` is more than a tenth below it, and the two epochs have lowered `val_loss` by
              less than a third of what they have lowered `loss` by (both in percent).
            - Without validation data: `loss` is below a twentieth of that of the first epoch.

            Otherwise it is still learning, and the run stays one ordinary run. Its last snapshot
            predicts, and with it those after 90, 80, 70 and 60 % of the epochs, as many as lower
            the validation loss by more than one standard error. They differ little, so `epistemic`
            uncertainty is small (0 for one member). So it does if layers were trained before the
            first `fit`, where `shrink` looks for them (not if it is 1, or `"auto"` without
            validation data). With fewer than ten epochs there is one member. `decisions` says what
            was decided, and from what. Defaults to `"auto"`.
        schedule: A `CosineAnnealing` instead of equal cycles. Defaults to `None`.
        lr_init: The learning rate at the start of each cycle. Defaults to `None`: the rate that
            the model was compiled with (for a schedule, its rate at step 0).
        lr_min: The learning rate at the end of each cycle. Defaults to `0.0`.
        shrink: The share of each trained weight that a restart carries over. `1.0` is the paper's
            warm restart, `0.0` a fresh start; in between,
            `weight = shrink * weight + (1 - shrink) * new draw of its initializer` (shrink and
            perturb). `"auto"`: 1 until the run has overfitted, then 0.5. It has overfitted once a
            cycle ends with a `val_loss` of more than twice its `loss`, and that `val_loss` is more
            than 5 % above the lowest so far, or less than 10 % below the lowest of the cycles
            before. It stays 1 if the first cycle's lowest `val_loss` is more than 30 % above the
            lowest so far (one cycle is then too short to relearn what a restart removes), if
            there are no validation data, and for models with layers that cannot be made from
            their configs. A dict gives shares by layer name, also for whole nested models; the
            innermost name counts, and layers without one are carried over. Frozen weights are
            never changed, nor, for a number or `"auto"`, layers that were trained before the first
            `fit` (recognised by a bias that is not zero). Optimizer slots and batch-normalisation
            statistics are carried over. Defaults to `"auto"`.
        directory: Where snapshots are written as training goes. Defaults to `None`: in memory.
        max_snapshots: Keep only the newest that many. Defaults to `None`: keep all.
        task: What the model's output means: `"multiclass"`, `"binary"`, `"multilabel"` or
            `"regression"`; `"gaussian"` for means and log-variances, the two halves of the last
            axis (see `losses.GaussianNLL`); or `"passthrough"` for an id or a label, which must be
            equal in all members. `"multiclass_logits"`, `"binary_probabilities"` and so on also
            say whether
            classes come as logits or probabilities. With several outputs, one for each, in the
            outputs' structure. Defaults to `None`: inferred from the compiled loss and the last
            activation. It must be given if these do not say it: a loss of your own without a
            softmax or sigmoid, a `train_step` or `compute_loss` of your own, or a `predict_step`
            that changes the outputs. Integers, bools and strings are always passed through.
        memory_limit: How many bytes the members' weights may take in memory at once; weights that
            all members share count once. If there are more, members run one after another, in one
            model that gets the weights of each in turn: on arrays (NumPy arrays and tensors) in
            all methods that predict, evaluate or learn from data, and in `ens(x)`. All members'
            weights are in memory whatever the limit for data of other kinds, which can in general
            be read only once, for `ens(x)` inside a `tf.function`, and for `average_weights`,
            `plots.plot_landscape`, `plots.plot_trajectory`, `to_keras` and `export`. The snapshots
            themselves are in memory, too, unless there is a `directory`. Defaults to `2**28`
            (256 MiB).

    Raises:
        ValueError: If the model is not compiled, its task cannot be determined, or a value is
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
        cycles: int | Literal["auto"] = "auto",
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
        self._use(store, MemberPool(model, task, store, memory_limit))
        self.schedule = as_schedule(cycles, schedule, lr_init, lr_min)
        if max_snapshots is not None:
            max_snapshots = whole_number("max_snapshots", max_snapshots, 1)
        self.max_snapshots = max_snapshots
        self.directory = None if directory is None else directory_path(directory)
        self._rate = AnnealedRate(model)
        self._restarter = Restarter(check_shrink(shrink))
        # The number of the run that the next `fit(resume=True)` resumes.
        self._next_run = 0

    def _use(self, store: SnapshotStore, pool: MemberPool) -> None:
        self._store, self._pool = store, pool
        if isinstance(store, DirectoryStore):
            store.computes_the_same = pool.is_faithful

    def __repr__(self) -> str:
        where = "in memory" if self.directory is None else f"in '{self.directory}'"
        return f"<SnapshotEnsemble of {self.model.name!r}: {counted(len(self), 'member')} {where}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "An ensemble cannot be pickled or copied. Received: "
            f"{self!r}. Use `save(directory)` and `SnapshotEnsemble.load(directory)`."
        )

    # Constructor arguments

    @property
    def model(self) -> keras.Model:
        """The model, as `fit` has trained it so far."""
        return self._pool.model

    @property
    def task(self) -> Any:
        """What the outputs mean, as passed by the user."""
        return self._pool.task

    @property
    def memory_limit(self) -> int:
        """How many bytes the members' weights may take in memory at once."""
        return self._pool.memory_limit

    @memory_limit.setter
    def memory_limit(self, memory_limit: int) -> None:
        self._pool.memory_limit = whole_number("memory_limit", memory_limit, 0)

    @property
    def shrink(self) -> Shrink:
        """The share of the weights that a restart carries over, as passed by the user."""
        return self._restarter.shrink

    # Training

    @property
    def history(self) -> dict[str, list[Any]]:
        """All epochs of all runs: a list for each metric, with `None` where an epoch has none."""
        return self._store.record.progress.history

    @property
    def decisions(self) -> list[Decision]:
        """What `cycles="auto"` has decided: a `Decision` for each run, with the losses behind it.

        Its attributes: `epoch`, before which it was decided; `is_cut`, whether the long cycle was
        cut short for several; `first_loss`, `loss` and the lowest `val_loss` so far; and
        `is_pretrained`, whether layers were trained before the first `fit`.
        """
        return list(self._store.record.progress.decisions)

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
        plan = self._plan(whole_number("epochs", epochs, 1), None)
        done = self._store.record.progress.done
        return plan.with_shrink(self.shrink, restarts_first=done.cycles > 0)

    def _plan(self, epochs: int | None, initial_epoch: int | None) -> Plan:
        limit = keras.config.max_epochs()
        return plan_of_fit(self.schedule, epochs, initial_epoch, self._peak(), limit)

    def _peak(self) -> float:
        peak = self.schedule.lr_init
        return self._rate.compiled if peak is None else peak

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
        generators are restored. The losses are averaged over neighbouring rates, and the
        suggestion is the lowest rate at which nine tenths of their total fall are reached. Take it
        as a starting point that is right within a factor of about two: batch size, weight decay
        and the length of the cycles matter, too.

        Example:

        >>> test = SnapshotEnsemble(model).find_lr(x, y, batch_size=8)
        >>> 1e-6 < test.suggestion < 10
        True

        Args:
            x: As for `model.fit`; data that can be read more than once.
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
            TypeError: If `model.fit` has no such argument, or a callback's `get_state()` returns
                something that cannot be saved.
            RuntimeError: If the model is being trained already, in this or another thread.

        References:
            - [Smith, 2017](https://arxiv.org/abs/1506.01186)
        """
        with only_training(self.model):
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
        """Trains through the cycles of `plan(epochs)` and saves a snapshot at the end of each.

        Training is one `model.fit`, with the learning rate computed inside the compiled training
        step, exact for every step. Afterwards, also after an interrupt or an exception, the
        optimizer has its own rate (or schedule) back and the snapshots of finished cycles are
        kept; a cycle that did not end gives no member. If it ends before the first snapshot or
        state of training is saved, the ensemble and its directory are as they were before. A
        second `fit` adds cycles.

        With validation data (arrays, or a `tf.data.Dataset` or `PyDataset` unless the members
        exceed `memory_limit`), `choose_members` is called with them: early members that make the
        mean worse do not predict by default. If that fails, a warning says why. Then, and without
        such data, all annealed members predict (`Snapshot.is_annealed`).

        A snapshot has the weights as they were trained, even if `use_ema` or
        `EarlyStopping(restore_best_weights=True)` puts others into the model later.

        If the number of steps in an epoch is not known before the first one ends (a `tf.data` of
        unknown length without `steps_per_epoch`), the first epoch runs at the mean of the rates
        that the plan has for it, and all later ones exactly by the plan.

        With a `directory`, the state of training is taken at the end of each epoch and written
        while the next one runs (so a run that is killed may resume one epoch earlier): weights,
        optimizer, dropout seeds, Python's and NumPy's random generators, history, and the state
        of callbacks: what training changes in Keras's own, and `get_state()` of those with
        `set_state(state)` (plain Python values and arrays, restored with their types). If the
        run is interrupted for any reason, the same script with `resume=True` continues it and
        ends with the same snapshots. They are bitwise equal on a CPU with
        `keras.utils.set_random_seed` and `tf.config.experimental.enable_op_determinism`, for
        arrays and for a `tf.data.Dataset` that is read once an epoch, also if it shuffles with a
        seed. Data that continue from one epoch to the next (`steps_per_epoch`, generators) start
        from the beginning when the run is resumed.

        Args:
            x: As for `model.fit`.
            y: As for `model.fit`.
            epochs: The budget. Defaults to `None`: ten epochs for each of a number of `cycles`,
                five cycles of a given schedule, or 50. `keras.config.set_max_epochs` limits it, and
                the cycles with it.
            resume: Whether to continue a run that was interrupted. A run that has ended is not
                run again; one that never began is begun. Defaults to `False`.
            overwrite: Whether new snapshots replace the existing ones, in memory or in the
                directory. They do so when the first new one, or the first state of training, is
                saved, not before. Defaults to `False`: a directory that holds something is
                refused, members of this ensemble are added to.
            save_every: After how many epochs the state of training is saved in the directory;
                it always is at the end of each cycle. `None`: never. Defaults to `1`.
            keep_going: Whether training continues if a cycle ends with a loss or weights that are
                not finite, from where the last good cycle ended or, if there is none, from the
                state before training. Such a cycle gives no member and a warning. Defaults to
                `False`: training stops.
            **fit_arguments: All other arguments of `model.fit`. With `initial_epoch` the plan
                splits the epochs from there to `epochs`.

        Returns:
            The Keras `History`; its `history` also holds `learning_rate` (of the last step),
            `cycle` and, once a restart was not warm, `shrink`, one value an epoch. The first two
            are also in the `logs` of all callbacks.

        Raises:
            ValueError: If the plan is impossible, a callback sets the learning rate, the model
                has several optimizers or is trained over several machines, a metric has the name
                of a column that is added, the ensemble was merged, the directory holds something,
                or an interrupted run had another plan, model or size of data. All before training.
            TypeError: If `model.fit` has no such argument.
            RuntimeError: If the model is being trained already, in this or another thread, or
                the first epoch has trained it without its compiled optimizer.
            OSError: If the directory cannot be written to, or another process writes to it.
            SnapshotError: If a file to resume from is not as it was saved.
        """
        check_fit_arguments(self.model, fit_arguments)
        check_not_merged(self.snapshots, overwrite)
        with only_training(self.model):
            return self._fit(x, y, epochs, resume, overwrite, save_every, keep_going, fit_arguments)

    def _fit(
        self,
        x: Any,
        y: Any,
        epochs: int | None,
        resume: bool,
        overwrite: bool,
        save_every: int | None,
        keep_going: bool,
        fit_arguments: dict[str, Any],
    ) -> keras.callbacks.History:
        session = FitSession(
            model=self.model,
            store=self._store,
            settings=self._settings(),
            rate=self._rate,
            restarter=self._restarter,
            plan=self._plan(epochs, fit_arguments.get("initial_epoch")),
            directory=self.directory,
            next_run=self._next_run,
            max_snapshots=self.max_snapshots,
            resume=resume,
            overwrite=overwrite,
            save_every=save_every,
            keep_going=keep_going,
            on_first_batch=self._pool.keep_sample if self._pool.sample is None else None,
        )
        history = session.run(x, y, fit_arguments)
        self._next_run = session.next_run
        if session.has_trained:
            warn_of_stragglers(self.snapshots, self.history, scale_of(self.model))
            self._choose_members_by(x, y, fit_arguments)
        return history

    def _choose_members_by(self, x: Any, y: Any, fit_arguments: dict[str, Any]) -> None:
        """Chooses the members that predict by default, if there are data and memory for it."""
        everyone = range(len(self))
        if len(everyone) < 2:
            return
        if self._pool.learned.members is None:
            self._pool.learn(members=annealed(self.snapshots))
        try:
            if (validation := validation_of(x, y, fit_arguments)) is None:
                return
            pool, is_too_large = self._pool, self._pool.is_too_large(everyone)
            if not is_too_large or pool.runs_one_by_one(everyone, validation["x"]):
                self.choose_members(**validation, verbose=0)
        except Exception as error:  # Training has succeeded, so whatever fails here must not raise.
            warnings.warn(
                "Members could not be chosen by the validation data: "
                f"{type(error).__name__}: {error}. All annealed members predict.",
                stacklevel=4,
            )

    # The members

    @property
    def snapshots(self) -> list[Snapshot]:
        """A `Snapshot` for each member, oldest first."""
        return list(self._store.snapshots)

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, index: int) -> keras.Model:
        return self._member(self._pool.now(), index)

    def __iter__(self) -> Iterator[keras.Model]:
        pool = self._pool.now()
        return (self._member(pool, i) for i in range(len(pool)))

    def _member(self, pool: MemberPool, index: int) -> keras.Model:
        with self._rate.lifted():
            return pool.member(range(len(pool))[operator.index(index)])

    # What was learned about the members

    @property
    def weights(self) -> np.ndarray | None:
        """The weights of `combine="weighted"`.

        One a member, float64, at least 0 and summing to 1; `None` until they are set. They are
        forgotten when the members change.
        """
        weights = self._pool.learned.weights
        return None if weights is None else np.asarray(weights, "float64")

    @weights.setter
    def weights(self, weights: Any) -> None:
        pool = self._pool.now()
        if weights is not None:
            weights = check_weights(weights, len(pool)).tolist()
        pool.learn(weights=weights)

    @property
    def temperature(self) -> float:
        """What `calibrate` learned; 1.0 changes nothing. Forgotten when the members change."""
        return self._pool.learned.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._pool.learn(temperature=real_number("temperature", temperature, positive=True))

    @property
    def members(self) -> int | list[int] | None:
        """The members that predictions combine by default.

        `None` for all, an int for the last that many, or a list of indices. `fit` chooses them if
        it has validation data, and so does `choose_members`. Forgotten when the members change.
        """
        return self._pool.learned.members

    @members.setter
    def members(self, members: int | Sequence[int] | None) -> None:
        pool = self._pool.now()
        if members is not None:
            indices = pool.indices(members)
            members = len(indices) if np.ndim(members) == 0 else indices
        pool.learn(members=members)

    # Predicting

    def predict(
        self,
        x: Any,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        early_exit: bool = False,
        return_counts: bool = False,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """The members' predictions, combined.

        The data are read once, however many members there are (arrays once for each member if
        those exceed `memory_limit`). Predictions are combined in float32, or in float64 if the
        model uses it.

        Args:
            x: As for `model.predict`.
            combine: `"mean"`, of the members' probabilities or values, or the mean and the
                log-variance of the mixture of their normal distributions; `"vote"`, the share of
                members that vote for each class (classes only; if several classes have the
                largest share, the one with the highest mean is raised by a millionth, so that
                `argmax` is the winner); `"weighted"`, the mean weighted by `weights`;
                `"geometric"`, the normalised geometric mean (classes only); `"median"` (regression
                only). Defaults to `"mean"`.
            members: Which members: an int for the last that many, or a list of indices. Defaults
                to `None`: those of the attribute `members`, which are all unless validation data
                chose some; for `"weighted"`, all.
            early_exit: Whether members run in turn, only until a row is settled, as
                `fit_early_exit` has learned. Defaults to `False`.
            return_counts: Whether to return how many members ran for each row, too. Defaults to
                `False`.
            batch_size, verbose, steps, callbacks: As for `model.predict`.

        Returns:
            NumPy arrays in the structure and shapes of `model.predict`. With `return_counts`, a
            tuple of them and an int32 array of shape `(rows,)`.

        Raises:
            ValueError: If there are no members, `combine` or `members` is invalid, or is given
                with `early_exit`, or nothing has been learned for `early_exit`.
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        pool = self._pool.now()
        check_early_exit(early_exit, combine, members, return_counts)
        if early_exit:
            outputs, counts = pool.predict_early(x, arguments)
            return (outputs, counts) if return_counts else outputs
        return pool.predict_combined(x, pool.combiner(combine, members), arguments)

    def __call__(
        self,
        inputs: Any,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        early_exit: bool = False,
    ) -> Any:
        """The members' outputs for one batch, combined: as `model(inputs, training=False)`.

        The outputs are those of `predict`: if the model has a `predict_step` of its own, it runs.
        For single rows, gradients with respect to the inputs, and use inside a `tf.function`.
        All members run in one compiled graph, traced at the first call. If they exceed
        `memory_limit`, they run one after another, which reads their weights anew in each call;
        a `tf.GradientTape` that needs these keeps them until it is gone. Inside a `tf.function`
        all weights are in its graph, whatever the limit.

        Example:

        >>> ens(x[:1]).shape
        TensorShape([1, 3])

        Args:
            inputs: One batch: arrays or tensors, in the structure of the model's inputs.
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`.
            early_exit: As for `predict`. Not inside a function that XLA compiles, which gives
                wrong results there. Defaults to `False`.

        Returns:
            Tensors in the structure and shapes of the model's outputs.

        Raises:
            ValueError: As for `predict`.
        """
        pool = self._pool.now()
        check_early_exit(early_exit, combine, members)
        if early_exit:
            return pool.call_early(inputs)[0]
        return pool.call(inputs, pool.combiner(combine, members))

    def reset_state(self) -> None:
        """Resets the recurrent states of all members, as `reset_state` of a stateful layer.

        Layers with `stateful=True` carry their states on from batch to batch and from call to call.
        Each member has its own, which start at zero and are shared by `predict`, `evaluate` and all
        other methods that run the members. Members as separate models (`ens[0]`) have their own.
        What a layer writes into its weights while it predicts is forgotten: each batch begins with
        the weights of the snapshot.

        Example:

        >>> ens.reset_state()
        """
        self._pool.reset_state()

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
            members: An int for the last that many, or a list of indices. Defaults to `None`, all.
            batch_size, verbose, steps, callbacks: As for `model.predict`.

        Returns:
            As `model.predict`, with the members on a new first axis of each array.

        Raises:
            ValueError: If there are no members, or `members` is invalid.
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        pool = self._pool.now()
        stacked = pool.predict(x, pool.side_by_side(members), arguments)
        # Keras joins batches along the first axis, so until here the members are on the second.
        return keras.tree.map_structure(lambda array: np.moveaxis(array, 1, 0), stacked)

    def predict_uncertainty(
        self,
        x: Any,
        *,
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """How unsure the ensemble is, and how much of that is disagreement among its members.

        With the members' probabilities `p_m` and the entropy `H(p) = -sum_c p_c log p_c`, in
        nats: `total = H(mean p_m)`, `aleatoric = mean H(p_m)`, which further members would not
        reduce, and `epistemic = total - aleatoric`. For members that predict means `mu_m` and
        variances `s2_m`: `epistemic^2 = var mu_m`, `aleatoric^2 = mean s2_m`, and `total^2` is
        their sum. The temperature is not applied.

        Example:

        >>> uncertainty = ens.predict_uncertainty(x, verbose=0)
        >>> most_unsure = np.argsort(-uncertainty["epistemic"])[:10]

        Args:
            x: As for `model.predict`.
            members: Which members, as for `predict`.
            batch_size, verbose, steps, callbacks: As for `model.predict`.

        Returns:
            A dict of arrays; with several outputs one for each, in their structure. `"mean"`: as
            `predict` returns it without a temperature. For classes `"total"`, `"aleatoric"` and
            `"epistemic"`, float32, of the output's shape without the classes' axis (one number
            a row or pixel), for binary and multilabel of the output's shape. For regression
            `"std"`, the standard deviation over the members, in the output's shape and unit; after
            `calibrate`, also the three. For the task `"gaussian"`, the three are standard
            deviations in the unit of the values, and `"mean"` is the mean of the values alone.

        Raises:
            ValueError: If there are no members, or `members` is invalid.

        References:
            - [Depeweg et al., 2018](https://arxiv.org/abs/1710.07283)
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        return predict_uncertainty(self._pool.now(), x, members, arguments)

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

        The loss is that of the combined predictions: where Keras computes a model's loss from the
        logits behind a softmax or sigmoid, it is computed from those of the combination. Penalties
        on weights and losses that layers add belong to single members and are not in it, and
        neither are the model's own `test_step`, `compute_loss` and `compute_metrics`; a warning
        says so.

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
            ValueError: If there are no members, `combine` or `members` is invalid, or the
                model has an `evaluate` of its own, no compiled loss, or a `predict_step` that
                returns something else than what the loss is computed of.
        """
        arguments = {**evaluate_arguments, "return_dict": return_dict}
        return evaluate(self._pool.now(), x, y, combine, members, arguments)

    # Learning from held-out data

    def fit_weights(
        self,
        x: Any,
        y: Any = None,
        *,
        method: str = "likelihood",
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> np.ndarray:
        """Learns the weights of `combine="weighted"` on held-out data.

        Training data would favour the members that overfitted, so there is no default.
        `"likelihood"` minimises the held-out loss of the weighted mean over all weights that are
        at least 0 and sum to 1, a convex problem, to a relative tolerance of 1e-9. The loss is
        the negative log-likelihood for classes and the squared error for regression (for the task
        `"gaussian"`, the negative log-likelihood of the mixture's density); over several outputs
        their sum, with the compiled `loss_weights`. `"greedy"` selects members with
        replacement for 25 rounds, in each the one that lowers the loss most, and keeps the round
        with the lowest loss (Caruana et al., 2004). On the data given, neither is worse than the
        best member or the mean. Members of weight 0 are neither run nor exported.

        Example:

        >>> weights = ens.fit_weights(x_val, y_val, verbose=0)
        >>> bool(weights.min() >= 0), round(float(weights.sum()), 6)
        (True, 1.0)
        >>> weighted = ens.predict(x, combine="weighted", verbose=0)

        Args:
            x, y: Held-out data, as for `model.evaluate`.
            method: `"likelihood"` or `"greedy"`. Defaults to `"likelihood"`.
            sample_weight, batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Returns:
            The weights, float64 of shape `(members,)`; also in `weights` from then on.

        Raises:
            ValueError: If the data do not fit the model, are fewer than two rows, or
                hold a NaN. The weights are as before.

        References:
            - [Caruana et al., 2004](https://doi.org/10.1145/1015330.1015432)
        """
        check_method(method)
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        pool = self._pool.now()
        held = gather(pool, x, y, sample_weight, arguments)
        weights = check_weights(learn_weights(held, method), len(pool))
        pool.learn(weights=weights.tolist())
        return weights

    def choose_members(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> int:
        """Chooses on held-out data how many of the last members predict by default.

        Early members that have not converged make the mean worse. This compares the means of the
        last 1, 2, … members and takes the largest number whose loss (negative log-likelihood in
        nats, or squared error) is within one standard error of the paired difference from the
        lowest. (Snapshots that were taken before the rate had reached its floor are added only
        where that lowers the loss by more than one standard error.) `fit` calls it with its
        validation data. Only sums are kept of each batch; arrays go through in batches whose
        outputs, of all members, take up to 64 MiB (or `memory_limit` if members exceed that and so
        run one after another).

        Example:

        >>> count = ens.choose_members(x_val, y_val, verbose=0)
        >>> ens.members in (None, count)
        True

        Args:
            x, y: Held-out data, as for `model.evaluate`.
            sample_weight, batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Returns:
            How many; also in `members` from then on, where `None` means all.

        Raises:
            ValueError: If the data do not fit the model, or hold a NaN. `members` is as before.
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        pool = self._pool.now()
        count = count_of_members(pool, x, y, sample_weight, arguments)
        pool.learn(members=None if count == len(pool) else count)
        return count

    def calibrate(
        self,
        x: Any,
        y: Any = None,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> float:
        """Learns on held-out data how sure predictions should be.

        For probabilities, that is one temperature. The logarithms of the combined probabilities
        (for binary and multilabel, their log-odds) are divided by it:
        `p_c^(1/T) / sum_k p_k^(1/T)`; the variance of a normal distribution (task `"gaussian"`) is
        multiplied by it. Above 1 it makes predictions less confident, below 1 more confident. For
        n rows it minimises `n * NLL(T) + 4 * (1 / T + log(T))` between 0.05 and 20; the second
        term, lowest at 1, keeps a few rows that are all right from making predictions too sure.
        From then on it is part of `predict`, `evaluate`, `to_keras`, `export` and `save`, for every
        combination. The most probable class never changes. `predict_members` and
        `predict_uncertainty` do not apply it. If there are several outputs, all of these share it.
        Calibrating again starts from the uncalibrated probabilities.

        For values without a distribution, it learns how far they lie from their prediction: with
        the variance `(s * std)^2 + f^2`, of the members' standard deviation, one scale `s` (0.01 to
        100) and for each unit a floor `f`, which minimise the negative log-likelihood of normal
        distributions. Predictions stay as they are; `predict_uncertainty` then has `total`,
        `aleatoric` (the floor) and `epistemic` (the scaled part), and `conformalize` uses `total`.

        Example:

        >>> temperature = ens.calibrate(x_val, y_val, verbose=0)
        >>> ens.temperature == temperature
        True

        Args:
            x, y: Held-out data, as for `model.evaluate`.
            combine: The combination to calibrate. Defaults to `"mean"`.
            members: The members to combine, as for `predict`.
            sample_weight, batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Returns:
            The temperature; also in `temperature` from then on. If all outputs are values, the
            scale of the first one.

        Raises:
            ValueError: If the data do not fit the model, are fewer than two rows, or hold a NaN.
                What was learned before stays.

        References:
            - [Guo et al., 2017](https://arxiv.org/abs/1706.04599)
        """
        pool = self._pool.now()
        indices, weights = pool.combination(combine, members)
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        held = gather(pool, x, y, sample_weight, arguments, indices=indices)
        found, learned = calibrated(held, held.combined(combine, weights))
        pool.learn(**learned)
        return found

    def fit_early_exit(
        self,
        x: Any,
        y: Any = None,
        *,
        tolerance: float = 0.0,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> float:
        """Learns on held-out data when the first members are enough, for `early_exit=True`.

        Members run one after another, and a row is settled as soon as they are sure of it: the
        probability of its most probable class is high enough or, for regression, the standard
        deviation over the members (for the task `"gaussian"`, the predicted one) is low enough.
        Then it gets the mean of the members so far, at a temperature of its own for each stage,
        which this learns together with the order of the members and the thresholds. Of these it
        takes the lowest cost at which neither the negative log-likelihood nor the error (for
        regression, the squared error) on the held-out data is more than `tolerance` standard errors
        of the paired difference above that of all members. If a share `p_k` of the rows reaches
        member `k`, the cost is `sum_k p_k` members a row. What was learned is saved with the
        ensemble and forgotten when the members change.

        Rows must not depend on each other, since later members see only some of them. With several
        outputs, a row is settled when all of them are.

        Example:

        >>> members_a_row = ens.fit_early_exit(x_val, y_val, verbose=0)
        >>> p, counts = ens.predict(x, early_exit=True, return_counts=True, verbose=0)
        >>> bool(1 <= counts.min() <= counts.max() <= len(ens))
        True

        Args:
            x, y: Held-out data, as for `model.evaluate`. Data that training has seen make members
                look surer than they are.
            tolerance: How many standard errors worse than all members the predictions may be on
                these data. Defaults to 0.0: no worse. With few rows, more is lost on others.
            sample_weight, batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Returns:
            How many members run for each of these rows, on average.

        Raises:
            ValueError: If rows depend on each other, `tolerance` is negative, there are no members,
                or the data do not fit the model, are fewer than two rows, or hold a NaN.

        References:
            - [Wang et al., 2022](https://arxiv.org/abs/2012.01988)
        """
        pool = self._pool.now()
        tolerance = real_number("tolerance", tolerance, positive=False)
        check_rows_apart(pool, x)
        indices = pool.default_indices()
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        held = gather(pool, x, y, sample_weight, arguments, indices=indices)
        learned, members_a_row = learn_early_exit(
            held, indices, pool.learned.temperature, tolerance
        )
        pool.learn(early_exit=learned)
        return members_a_row

    def conformalize(
        self,
        x: Any,
        y: Any = None,
        *,
        confidence_level: float | Sequence[float] = 0.9,
        method: Any = None,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> None:
        """Learns on held-out data how large `predict_set` and `predict_interval` must be.

        Then the set of a new row holds its true class, or the interval its true value, with at
        least the probability `confidence_level`, whatever the model is worth (split conformal
        prediction). This is the mean over new rows that come from where these rows come from; it
        need not hold for each kind of rows. With `n` rows and the conformity score `s` below,
        `q` is the score of rank `ceil(level * (n + 1))`, and the set holds all classes (the
        interval all values) with `s <= q`:

        - `"lac"`: `1 - p_y`. The smallest sets on average, of which some may be empty.
        - `"aps"`: the sum of the probabilities of all classes that are more probable than `y`, and
          a random share (with a fixed seed) of `p_y`. Sets are larger where the model is unsure.
          As in MAPIE, a set includes the class that reaches `q`.
        - `"raps"`: the same, with a penalty for each class beyond the first few. A fifth of the
          rows is set aside to choose both.
        - `"absolute"`: `|y - prediction|`. All intervals have one width.
        - `"epistemic"`: this, divided by the members' standard deviation.
        - `"total"`: this, divided by the standard deviation that is predicted (task `"gaussian"`)
          or that `calibrate` has learned. Intervals are wider where the model is unsure.

        Training data cannot be recognised. On them the model errs less, so that sets and
        intervals become too small and cover less than they say; so give data that neither `fit`
        nor its validation has seen, and that nothing else was learned on. What was learned is
        saved with the ensemble and measured by `report`. It is forgotten when members are added or
        dropped, and when their `weights`, the `temperature` or what `calibrate` learned change.

        Each unit of a binary, multilabel or regression output has a quantile of its own. If rows
        consist of several items, such as pixels or steps of time, then the probability is that of
        an item drawn at random from a new row, and the items of a row may depend on each other.
        Padding that a mask marks, and labels that the loss ignores, do not count.

        Example:

        >>> ens.conformalize(x_val, y_val, confidence_level=0.8, verbose=0)
        >>> ens.predict_set(x[:2], verbose=0).shape
        (2, 3)

        Args:
            x, y: Held-out data, as for `model.evaluate`.
            confidence_level: One level between 0 and 1, or a list of several. Defaults to `0.9`.
            method: One of the above. With several outputs, one for all, or a list or dict with one
                for each. Defaults to `None`: `"lac"` for classes; for values `"total"` where it is
                known, else `"absolute"`.
            combine: The combination to conformalize, which sets and intervals are then made of.
                Defaults to `"mean"`.
            members: The members to combine, as for `predict`.
            sample_weight: Refused, since all rows count alike.
            batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Raises:
            ValueError: If there are too few rows for the level, the data do not fit the model, hold
                a NaN or have sample weights, a target is no single class, or `method` or
                `confidence_level` is invalid. What was learned before stays.

        References:
            - [Sadinle et al., 2019](https://arxiv.org/abs/1609.00451) (LAC)
            - [Romano et al., 2020](https://arxiv.org/abs/2006.02544) (APS)
            - [Angelopoulos et al., 2021](https://arxiv.org/abs/2009.14193) (RAPS)
            - [Lei et al., 2018](https://arxiv.org/abs/1604.04173) (values)
            - [Lee et al., 2023](https://arxiv.org/abs/2306.06342) (several items a row)
        """
        pool = self._pool.now()
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        learned = conformalize(
            pool, x, y, confidence_level, method, combine, members, sample_weight, arguments
        )
        pool.learn(conformal=learned)

    def predict_set(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """For each row the classes among which the true one is, as `conformalize` has learned.

        Args:
            x: As for `model.predict`.
            batch_size, verbose, steps, callbacks: As for `model.predict`.

        Returns:
            Bools, one for each class, on the last axis: for multiclass in the output's shape; for
            binary no and yes in place of the last axis of size 1; for multilabel no and yes on a
            new last axis. With a list of confidence levels, these are on a further last axis.
            With several outputs one array for each, in their structure, and `None` for those
            that are not classes or had no targets.

        Raises:
            ValueError: If nothing has been learned for these members, or nothing about classes.
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        return predict_set(self._pool.now(), x, arguments)

    def predict_interval(
        self,
        x: Any,
        *,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> tuple[Any, Any]:
        """For each value the interval in which the true one is, as `conformalize` has learned.

        Args:
            x: As for `model.predict`.
            batch_size, verbose, steps, callbacks: As for `model.predict`.

        Returns:
            A tuple `(lower, upper)` of arrays in the output's shape and unit. With a list of
            confidence levels, these are on a new last axis. With several outputs, each of the two
            is in their structure, with `None` for those that are not values or had no targets.

        Raises:
            ValueError: If nothing has been learned for these members, or nothing about values.
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        return predict_interval(self._pool.now(), x, arguments)

    def report(
        self,
        x: Any,
        y: Any = None,
        *,
        ood: Any = None,
        risk: float | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Report:
        """Scores each member and each combination, from one pass over the data.

        For a merged ensemble it also scores the mean of each chain, and tells the disagreement
        within chains from that between them.

        Example:

        >>> report = ens.report(x_val, y_val, verbose=0)
        >>> list(report.rows)
        ['member 0', 'member 1', 'last snapshot', 'best member', 'mean', 'vote', 'geometric']
        >>> list(report.rows["mean"])
        ['loss', 'nll', 'nll_calibrated', 'brier', 'ece']

        Args:
            x, y: Held-out data, as for `model.evaluate`.
            ood: Inputs from elsewhere, as for `model.predict`, such as the model should refuse.
                How well each score of uncertainty tells them from `x` is in `refusing`. Defaults
                to `None`.
            risk: The error rate (for values, the mean squared error) at which to measure how large
                a share can be answered. Defaults to `None`.
            sample_weight, batch_size, verbose, steps, callbacks: As for `model.evaluate`.

        Returns:
            A `Report`. It prints as a table; `to_dict()` and `to_frame()` give its numbers.

        Raises:
            ValueError: If there are no members, the data do not fit the model or hold a NaN, or
                `risk` is negative.

        References:
            - [Geifman & El-Yaniv, 2017](https://arxiv.org/abs/1705.08500) (risk and coverage)
            - [Hendrycks & Gimpel, 2017](https://arxiv.org/abs/1610.02136) (data from elsewhere)
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        pool = self._pool.now()
        risk = checked_risk(risk)
        held = gather(pool, x, y, sample_weight, arguments, with_logits=True)
        stages = None if pool.learned.early_exit is None else pool.cascade().stages
        refused = refusals(pool, held, ood, risk, arguments)
        return make_report(held, pool.learned, stages, refused, pool.view.snapshots)

    def average_weights(
        self,
        members: int | Sequence[int] | str | None = None,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> keras.Model:
        """One model of the original size, whose weights are the mean of the members' weights.

        It costs no more to serve than one member, but is good only if the members lie in the same
        basin of the loss. Restarts at a high rate leave the basin, and then the averaged model is
        worse than any member. So give data to check it on, or let `members="greedy"` add only
        members that help.

        The mean is taken in float64. The batch-normalisation statistics are estimated on `x` with
        the new weights, in one pass in which these layers normalise by the statistics of the
        batch and dropout is off: the mean and variance of all rows, whatever the layers' momentum.
        Frozen layers keep their statistics.

        Example:

        >>> small = ens.average_weights("greedy", x=x_val, y=y_val, verbose=0)
        >>> small.count_params() == ens.model.count_params()
        True

        Args:
            members: As for `predict`, or `"greedy"`: beginning with the best member on `x` and
                `y`, members are tried in the order of their loss, and one is added if it lowers the
                averaged model's loss (the greedy soup of Wortsman et al., 2022). Defaults to
                `None`, all.
            x: Data as for `model.evaluate`, to estimate the statistics on.
            y: Targets of `x`, to check on. A warning says if the averaged model is worse there
                than the worst member.
            batch_size, verbose, steps, callbacks: As for `model.predict`, in each pass.

        Returns:
            A compiled `keras.Model`.

        Raises:
            ValueError: If there are no members, `members` is invalid, or `"greedy"` has no
                data.

        References:
            - [Izmailov et al., 2018](https://arxiv.org/abs/1803.05407)
            - [Wortsman et al., 2022](https://arxiv.org/abs/2203.05482)
        """
        arguments = PredictArguments(batch_size, verbose, steps, callbacks)
        with self._rate.lifted():
            return average_weights(self._pool.now(), members, x, y, arguments)

    def distill(
        self,
        x: Any,
        y: Any = None,
        *,
        epochs: int | None = None,
        student: keras.Model | None = None,
        alpha: float = 0.0,
        temperature: float = 2.0,
        **fit_arguments: Any,
    ) -> keras.Model:
        """One model of the original size, trained on the ensemble's predictions.

        It starts as the newest of the members that predict by default, and trains through one more
        cycle, from the ensemble's peak rate to its floor. Its loss is `alpha` times the compiled
        loss of the targets, plus `1 - alpha` times the cross-entropy between the ensemble's
        probabilities (for the task `"gaussian"`, its normal distributions) and its own (for values:
        the compiled loss of the ensemble's values), plus its own penalties. Sample weights and
        class weights count in both.

        The ensemble predicts arrays once, before training, and all other data batch by batch in
        each epoch, which costs one forward pass of all members a step. It sees the rows as the
        data have them, while layers of random augmentation inside the model change what the student
        sees. Such a student may be worse than one long run: use `alpha=1.0`, which trains it by the
        targets alone, or augment in a `tf.data.Dataset`, where both see the same rows. The model,
        its optimizer, the random generators and the members stay as they are.

        Example:

        >>> small = ens.distill(x, y, epochs=2, verbose=0)
        >>> small.count_params() == ens.model.count_params()
        True

        Args:
            x: Training data, as for `model.fit`.
            y: Targets, as for `model.fit`, for `alpha` and the metrics. Defaults to `None`: the
                student learns from the ensemble alone, unless `x` yields targets.
            epochs: The budget. Defaults to `None`: the length of two cycles of `fit`.
            student: Another model to train in place, with outputs of the same shapes and tasks,
                compiled or not. If it is compiled, its own rate is the peak. Defaults to `None`.
            alpha: The share of the compiled loss, from 0 to 1. Defaults to `0.0`.
            temperature: What the logarithms of the probabilities of both are divided by in the
                cross-entropy between them, which shows the student more of what the ensemble
                finds less likely. Defaults to `2.0`.
            **fit_arguments: All other arguments of `model.fit`.

        Returns:
            The student, compiled with the model's own loss and metrics and an optimizer of the
            same settings.

        Raises:
            ValueError: If there are no members, a value is impossible, the model cannot be made
                from its config, or the student has a training step or loss of its own.
            TypeError: If `student` is no model, or `model.fit` has no such argument.

        References:
            - [Hinton, Vinyals & Dean, 2015](https://arxiv.org/abs/1503.02531)
        """
        pool, done = self._pool.now(), self._store.record.progress.done
        if epochs is None and done.cycles:
            epochs = max(1, round(2 * done.epochs / done.cycles))
        # A student that is compiled has a rate of its own.
        peak = None if getattr(student, "compiled", False) else self._peak()
        annealed = as_schedule(1, None, peak, self.schedule.lr_min)
        with generators_restored(), self._rate.lifted():
            return distill(pool, x, y, student, annealed, epochs, alpha, temperature, fit_arguments)

    # One model to serve

    def to_keras(
        self, combine: str = "mean", members: int | Sequence[int] | None = None
    ) -> keras.Model:
        """One Keras model that computes the combination.

        It is made of stock Keras layers and operations and of your own model's layers, so it is
        saved and loaded without this package. Layers whose weights are equal in all members and
        that depend only on such layers (a frozen backbone, preprocessing) are in it once, and
        computed once. Its output carries no Keras mask: to score padded sequences with it, mask
        the padding by `sample_weight`.

        It takes any batch size, unless a Functional model was given a fixed one or a layer is
        stateful. Penalties for weights and outputs (regularizers) are left out, so that its
        loss is that of the combined outputs, as in `evaluate`. Keras's cross-entropies clip its
        probabilities at 1e-7, since it knows no logits; where the ensemble is surer than that and
        wrong, the loss of `evaluate` is higher. Before it is returned, the model is compared with
        the members on rows that `fit` saw or, without them, on random inputs.

        Example:

        >>> model = ens.to_keras()
        >>> model.save("ensemble.keras")
        >>> again = keras.models.load_model("ensemble.keras")  # also without this package

        Args:
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`.

        Returns:
            A Functional `keras.Model` with the inputs' structure and names and the outputs'
            structure and names of the wrapped model, compiled with its loss and metrics (and
            plain SGD, which adds no slots to its file).

        Raises:
            ValueError: If there are no members, `combine` or `members` is invalid, the model is
                a subclass, which is not a graph of layers, or a layer cannot be made from its
                config, or computes something else then.
        """
        pool = self._pool.now()
        combiner = pool.combiner(combine, members)
        weights = pool.weights(combiner.members)
        return merge(self.model, weights, combiner.combine, pool.sample)

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        early_exit: bool = False,
        outputs: str | Sequence[str] = "prediction",
        overwrite: bool = False,
        x: Any = None,
        weights: str | None = None,
        **export_arguments: Any,
    ) -> None:
        """Exports one model that computes the combination, to be served without Keras.

        The model's own layers run, as in `predict`, so nothing has to be made from a config. Its
        signature has the model's own input and output names and takes any batch size, unless a
        Functional model was given a fixed one or a layer is stateful. The file is opened by its
        own runtime, where that is installed, and compared with `predict` before it is moved into
        place: on `x`, on rows that `fit` saw or, without them, on random inputs. Where the
        ensemble cannot predict these, there is a warning instead. Outputs that are drawn at
        random are compared by shape and type alone, those of quantized files within 10%.

        Args:
            filepath: Path of the folder or file. Files end with `.onnx`, `.tflite` (LiteRT) or
                `.xml` (OpenVINO, with a `.bin` beside it).
            format: `"tf_saved_model"`, `"onnx"`, `"litert"` or `"openvino"`. Defaults to
                `"tf_saved_model"`.
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`.
            early_exit: As for `predict`; only in a SavedModel, in which members then run only for
                the rows that reach them. Defaults to `False`.
            outputs: What the file gives: `"prediction"`; `"total"`, `"aleatoric"`, `"epistemic"`
                and `"std"` of `predict_uncertainty`; `"set"` of `predict_set` and `"interval"` of
                `predict_interval`, if `conformalize` has been called for this combination. For an
                output `digit`, these are `digit`, `digit_total`, …, `digit_set`, and `digit_lower`
                and `digit_upper`. Defaults to `"prediction"`.
            overwrite: Whether an earlier export in this format may be replaced; nothing else ever
                is. The old one is removed when the new one is in place. Defaults to `False`.
            x: A few rows of inputs, as for `predict`, on which the file is compared with the
                ensemble. Defaults to `None`: rows that `fit` saw, or random inputs.
            weights: `"float16"` halves the size of the file: its kernels are stored in float16,
                and cast to the model's own dtype where they are used. How far that changes the
                outputs on the batch of the check is printed, unless `verbose=False`; more than 1%
                of the largest output is refused. Not for ONNX. Defaults to `None`.
            **export_arguments: As for `keras.Model.export`.

        Raises:
            ValueError: If there are no members, `combine`, `members`, `format`, `outputs` or
                `weights` is invalid, the model has no such output, the path exists and may not be
                replaced, or the exported file does not reproduce the ensemble's predictions.
            ImportError: If the format needs a package that is not installed.
        """
        path = check_format(filepath, format)
        check_weights_dtype(weights, format, export_arguments)
        pool = self._pool.now()
        check_early_exit(early_exit, combine, members)
        combiner = pool.cascade() if early_exit else pool.combiner(combine, members)
        chosen = check_outputs(outputs)
        beside = Beside(extras_of(pool, combiner, chosen), PREDICTION in chosen)
        export_members(
            pool, combiner, path, format, overwrite, x, weights, export_arguments, beside
        )

    # Saving and loading

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Saves the whole ensemble: the model, the snapshots, the weights and the history.

        All files are in place before the manifest names them, so a save that fails leaves the
        earlier contents as they were.

        Args:
            directory: Path of the directory.
            overwrite: Whether the contents of the directory may be replaced. Defaults to `False`.

        Raises:
            ValueError: If there are no members, or the directory holds something and
                `overwrite` is `False`.
        """
        pool = self._pool.now()
        pool.indices()  # Raises if there are no members.
        here = self.directory if self._store.claimed else None
        if here is not None and directory_path(directory).resolve() == here.resolve():
            # Its snapshots are there already. While the model is being trained, its progress is
            # saved with the next one.
            save = pool.learn if is_training(self.model) else self._store.commit
            save()
            return
        with self._rate.lifted():
            settings = self._settings()
            copy_snapshots(self.model, pool.view, directory, settings, overwrite, pool.is_faithful)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        custom_objects: dict[str, Any] | None = None,
        model: keras.Model | None = None,
        skip_damaged: bool = False,
        memory_limit: int | None = None,
    ) -> Self:
        """Loads an ensemble from the directory that `fit` or `save` wrote.

        Nothing in the directory is executed, and every file is checked against the manifest.
        The ensemble stays in its directory: a further `fit` adds to it there. The model has the
        weights of the last snapshot, to continue from; a given one keeps its own.

        Args:
            directory: Path of the directory.
            custom_objects: Classes and functions of your own that the model uses, by name.
            model: The compiled model itself, if it cannot be made from a file: a subclass
                without `get_config`, a loss that is a lambda, a layer that draws a constant. When
                the directory was written, a warning said so.
            skip_damaged: Whether to load the other snapshots if some are not as they were saved; a
                warning names them. Their files stay where they are. Defaults to `False`.
            memory_limit: As for `SnapshotEnsemble`. Defaults to `None`: as it was saved.

        Returns:
            A `SnapshotEnsemble`.

        Raises:
            SnapshotError: If the directory holds no ensemble, or a file is not as it was saved;
                the message names it.
        """
        while True:
            store = DirectoryStore.open(directory)
            try:
                ensemble = cls._load(store, directory, custom_objects, model, skip_damaged)
            except SnapshotError:
                if store.is_current():
                    raise
                continue  # A writer has replaced files in the meantime: load all of it again.
            if memory_limit is not None:
                ensemble.memory_limit = memory_limit
            return ensemble

    @classmethod
    def _load(
        cls,
        store: DirectoryStore,
        directory: str | os.PathLike[str],
        custom_objects: dict[str, Any] | None,
        model: keras.Model | None,
        skip_damaged: bool,
    ) -> Self:
        loaded = store.model(custom_objects) if model is None else model
        check_model(loaded)
        check_built(loaded)
        with store.settings_checked() as settings:
            ensemble = cls(loaded, directory=directory, **arguments_of(settings))
            check_learned(loaded, store.record.learned)
        store.leave_out_damaged(loaded, skip_damaged)
        ensemble._use(store, MemberPool(loaded, ensemble.task, store, ensemble.memory_limit))
        ensemble._next_run = store.record.progress.done.runs
        if len(ensemble) and model is None:
            store.view().put(loaded, loaded, len(ensemble) - 1)
        return ensemble

    @classmethod
    def from_weights(
        cls, model: keras.Model, paths: Sequence[str | os.PathLike[str]], **arguments: Any
    ) -> Self:
        """Makes an ensemble of existing weight files.

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
        make: Any = cls
        ensemble: Self = make(model, **arguments)
        check_built(model)
        store = MemoryStore()
        for index, path in enumerate(paths):
            store.add_weights(load_weights(model, path), Snapshot(index))
        ensemble._use(store, MemberPool(model, ensemble.task, store, ensemble.memory_limit))
        return ensemble

    @classmethod
    def merge(
        cls,
        ensembles: Sequence[Any],
        directory: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        custom_objects: dict[str, Any] | None = None,
        model: keras.Model | None = None,
        memory_limit: int | None = None,
    ) -> Self:
        """Makes one ensemble of the members of several runs, wherever they were trained.

        The runs, called chains, must have models of the same architecture whose outputs mean the
        same. Each `Snapshot` says its `chain`, numbered in the order given; ensembles that were
        merged before keep their chains apart. The last members are the last snapshots of each
        chain, then come those before them, so `members=3` of three chains combines their last
        snapshots. What was learned about the members (`weights`, `temperature`, `members`) is not
        taken over: learn it anew, on held-out data. `history` has the epochs of all chains, one
        after another.

        A merged ensemble does everything but train further: train a chain by itself and merge
        again. The ensembles stay as they are.

        Example:

        >>> other = SnapshotEnsemble(model, cycles=2)
        >>> history = other.fit(x, y, epochs=2, verbose=0)
        >>> both = SnapshotEnsemble.merge([ens, other])
        >>> [(snapshot.chain, snapshot.cycle) for snapshot in both.snapshots]
        [(0, 0), (1, 0), (0, 1), (1, 1)]

        Args:
            ensembles: A list of ensembles, of directories that `fit` or `save` wrote, or of both.
            directory: Where the merged ensemble is written, completely or not at all. Weight files
                on the same file system are not copied but linked, if they are your own: each has
                two names, and stays until the last one is removed. Defaults to `None`: in memory.
            overwrite: Whether the contents of `directory` may be replaced. Defaults to `False`.
            custom_objects: As for `load`, for the directories.
            model: As for `load`, for the directories. Defaults to `None`: each has its own.
            memory_limit: As for `SnapshotEnsemble`. Defaults to `None`: that of the first one.

        Returns:
            A `SnapshotEnsemble` with the first one's model and settings.

        Raises:
            ValueError: If there is nothing to merge, an ensemble has no members, another
                architecture or another task, members occur twice, or `directory` holds something.
            TypeError: If `ensembles` is no list of ensembles and directories.
            SnapshotError: If a directory holds no ensemble, or a file is not as it was saved;
                the message names it.
        """
        merger = Merger()
        first: Any = None
        for number, given in enumerate(check_sources(ensembles, directory)):
            name, own = f"ensembles[{number}]", given
            if loads := not isinstance(given, SnapshotEnsemble):
                name = f"'{directory_path(given)}'"
                own = cls.load(given, custom_objects=custom_objects, model=model)
            merger.add(name, own._pool.now(), is_loaded=loads)
            first = own if first is None else first
        merged = cls(
            first.model,
            shrink=first.shrink,
            task=first.task,
            memory_limit=first.memory_limit if memory_limit is None else memory_limit,
        )
        merged.schedule = first.schedule
        merged._take(merger.views, directory, overwrite, first._pool.sample)
        return merged

    def _take(self, views: list[View], directory: Any, overwrite: bool, sample: Any) -> None:
        """Fills this ensemble, which is empty, with the snapshots of others."""
        store: Any = MemoryStore() if directory is None else DirectoryStore(directory)
        self.directory = getattr(store, "directory", None)
        self._use(store, MemberPool(self.model, self.task, store, self.memory_limit))
        self._pool.sample = sample
        with self._rate.lifted():
            write_merged(store, self.model, views, self._settings(), overwrite)
        self._next_run = store.record.progress.done.runs

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments that a directory keeps."""
        return {
            "max_snapshots": self.max_snapshots,
            "shrink": self.shrink,
            **settings_of(self.schedule),
            "task": self.task,
            "memory_limit": self.memory_limit,
        }
