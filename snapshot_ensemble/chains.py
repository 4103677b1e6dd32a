"""Independent chains: each is trained from a seed of its own, in this process or elsewhere.

Whatever trains them, `snapshot_ensemble.ray` merges them into one ensemble.
"""

import contextlib
import copy
import dataclasses
import inspect
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.checks import counted, whole_number
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.architecture import difference
from snapshot_ensemble.inference.model_checks import check_built
from snapshot_ensemble.inference.rebuilt import compute_the_same
from snapshot_ensemble.keras_compat.random_seed import seeded
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.file_names import directory_path
from snapshot_ensemble.storage.merging import merged_snapshots
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.storage.weight_files import get_weights
from snapshot_ensemble.training.fit_arguments import check_fit_arguments, validation_of

# What `fit_chains` passes to the constructor; all other arguments go to `fit`.
_SETTINGS = set(inspect.signature(SnapshotEnsemble).parameters) - {"model", "directory"}
# What it decides itself.
_TAKEN = {"resume": "chains resume by themselves", "overwrite": "choose another `directory`"}

# Told after each epoch: how many have ended, and the metrics.
Report = Callable[[int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What all chains have in common. It is sent to other processes as it is.

    Attributes:
        make_model: Returns a compiled model.
        x: As for `fit`, or a function that returns it, or a tuple of it and `y`.
        y: As for `fit`.
        settings: Arguments of `SnapshotEnsemble`.
        arguments: The other arguments of `fit`. `validation_data` may be a function, too.
    """

    make_model: Callable[[], keras.Model]
    x: Any
    y: Any
    settings: dict[str, Any]
    arguments: dict[str, Any]

    def train(self, seed: int, directory: str, report: Report) -> None:
        """Trains a chain in a directory, or goes on where it was.

        Args:
            seed: Of all random generators.
            directory: Path of the directory.
            report: Called after each epoch.
        """
        with seeded(seed):
            model = self.make_model()
            data, arguments = self.data(), copied(self.arguments)
            callbacks = [*keras.tree.flatten(arguments.pop("callbacks", None)), _Reporter(report)]
            callbacks = [callback for callback in callbacks if callback is not None]
            ens = SnapshotEnsemble(model, directory=directory, **self.settings)
            with warnings.catch_warnings():
                # The merged ensemble says it, once.
                warnings.filterwarnings("ignore", "The (saved copy of the )?model cannot be ")
                ens.fit(**data, resume=True, callbacks=callbacks, verbose=0, **arguments)

    def data(self) -> dict[str, Any]:
        """The data for `fit`, made by functions where it was given such."""
        x, y = (self.x() if callable(self.x) else self.x), self.y
        data = {"x": x, "y": y}
        if callable(self.x) and isinstance(x, tuple):
            data = dict(zip(("x", "y", "sample_weight"), x, strict=False))
        given = self.arguments.get("validation_data")
        return {**data, "validation_data": given() if callable(given) else given}


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for one chain: with callbacks of its own, and without validation data."""
    own = {name: value for name, value in arguments.items() if name != "validation_data"}
    return {**own, "callbacks": copy.deepcopy(own.get("callbacks"))}


class _Reporter(keras.callbacks.Callback):
    """Tells how far a chain has come."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        with contextlib.suppress(Exception):  # Nobody need listen.
            self._report(epoch + 1, dict(logs or {}))


def make_job(make_model: Any, x: Any, y: Any, epochs: int | None, arguments: dict[str, Any]) -> Job:
    """Sorts the arguments of `fit_chains`, and checks what can be checked without training.

    Raises:
        TypeError: If an argument has the wrong type, or there is none of that name.
    """
    if not callable(make_model) or isinstance(make_model, keras.Model):
        raise TypeError(
            "`make_model` must be a function that returns a compiled model, since each chain has "
            f"one of its own. Received: make_model={make_model!r}"
        )
    for name, why in _TAKEN.items():
        if name in arguments:
            raise TypeError(
                f"`fit_chains` has no argument `{name}`: {why}. Received: "
                f"{name}={arguments[name]!r}"
            )
    for name, data in {"x": x, "validation_data": arguments.get("validation_data")}.items():
        once = hasattr(data, "element_spec") or hasattr(data, "__next__")
        if once or isinstance(data, keras.utils.PyDataset):
            raise TypeError(
                f"`{name}` must be arrays, or a function without arguments that returns the data: "
                f"other kinds cannot be sent to other processes. Received: {name} of type "
                f"{type(data).__name__}. Pass the function that makes it."
            )
    settings = {name: value for name, value in arguments.items() if name in _SETTINGS}
    rest = {name: value for name, value in arguments.items() if name not in _SETTINGS}
    return Job(make_model, x, y, settings, {**rest, "epochs": epochs})


def seeds_of(seed: Any, chains: Any) -> list[int]:
    """A seed for each chain; those of the first ones do not depend on how many there are."""
    count = whole_number("chains", chains, 1)
    children = np.random.SeedSequence(whole_number("seed", seed, 0)).spawn(count)
    return [int(child.generate_state(1)[0]) for child in children]


def check_models(job: Job, seeds: Sequence[int]) -> tuple[keras.Model, int]:
    """Makes the models of the first two chains, and checks that members of all fit one.

    Returns:
        The first model, and the number of epochs of a chain.

    Raises:
        ValueError: If `make_model` returns different models, or one that is not compiled or built,
            or an argument is impossible.
        TypeError: If it returns no model.
    """
    models = []
    for seed in seeds[:2]:
        with seeded(seed):
            models.append(job.make_model())
        ens = SnapshotEnsemble(models[-1], **job.settings)
        check_built(models[-1])
    check_fit_arguments(models[0], {k: v for k, v in job.arguments.items() if k != "epochs"})
    how = difference(models[0], models[-1])
    weights = get_weights(models[0])
    if not how and compute_the_same(models[0], weights, models[-1], weights) is False:
        how = "it gives other outputs with the same weights"
    if how:
        raise ValueError(
            "`make_model` must return the same model in each chain, but for its initial weights. "
            f"Received: make_model={job.make_model!r}. Of its second model: {how}. Draw what is "
            "not a weight once, outside of `make_model`, or with a seed of its own."
        )
    epochs = job.arguments["epochs"]
    return models[0], ens.schedule.default_epochs() if epochs is None else int(epochs)


@contextlib.contextmanager
def folders_of(directory: Any, seeds: Sequence[int]) -> Iterator[list[str]]:
    """The directory of each chain, in a temporary one if there is none.

    Its name has the seed, so that no chain goes on with that of another seed.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            home = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            home = directory_path(directory)
        yield [str(home / f"chain-{k:04}-{seed:08x}") for k, seed in enumerate(seeds)]


class Bar:
    """How far all chains have come, as one progress bar.

    Args:
        chains: The number of chains.
        epochs: The number of epochs of each.
        verbose: As for `model.fit`: with 2, a line for each chain that has ended.
    """

    def __init__(self, chains: int, epochs: int, verbose: Any) -> None:
        if verbose == "auto":
            verbose = int(keras.config.is_interactive_logging_enabled())
        self._verbose, self._epochs = int(verbose), epochs
        self._done, self._losses = [0] * chains, [float("nan")] * chains
        self._ended, self._shown = 0, 0
        self._bar = keras.utils.Progbar(
            chains * epochs,
            verbose=int(self._verbose == 1),
            stateful_metrics=["chains_done", "loss"],
            unit_name="epoch",
        )

    def epoch(self, chain: int, epochs: int, logs: Mapping[str, Any]) -> None:
        """Shows that a chain has trained so many epochs."""
        self._done[chain] = epochs
        self._losses[chain] = float(logs.get("loss", float("nan")))
        self._show()

    def end(self, chain: int, error: BaseException | None) -> None:
        """Shows that a chain has ended, well or with an error."""
        done, self._done[chain] = self._done[chain], self._epochs
        self._ended += 1
        self._show()
        if self._verbose == 2:
            how = f"failed: {type(error).__name__}" if error else f"loss: {self._losses[chain]:.4f}"
            print(f"Chain {chain} has ended after {counted(done, 'epoch')} - {how}", flush=True)

    def _show(self) -> None:
        # A chain that starts over takes steps back.
        done = max(sum(self._done), self._shown)
        if done > self._shown or self._ended == len(self._done):
            self._shown = done
            losses = [loss for loss in self._losses if np.isfinite(loss)]
            values = [("chains_done", float(self._ended))]
            values += [("loss", float(np.mean(losses)))] if losses else []
            self._bar.update(done, values)


def run_here(
    job: Job, seeds: Sequence[int], folders: Sequence[str], bar: Bar
) -> dict[int, BaseException]:
    """Trains the chains one after another in this process; returns the errors of failed ones."""
    failures: dict[int, BaseException] = {}
    for number, (seed, folder) in enumerate(zip(seeds, folders, strict=True)):

        def report(epochs: int, logs: dict[str, Any], number: int = number) -> None:
            bar.epoch(number, epochs, logs)

        try:
            job.train(seed, folder, report)
        except Exception as error:  # The others can be trained.
            failures[number] = error
        bar.end(number, failures.get(number))
    return failures


def merge_chains(
    job: Job,
    model: keras.Model,
    folders: Sequence[str],
    failures: Mapping[int, BaseException],
    directory: Any,
) -> SnapshotEnsemble:
    """One ensemble of the chains that have not failed.

    Args:
        job: What the chains have in common.
        model: A model that was made by it.
        folders: The directory of each chain.
        failures: The errors of the chains that have failed, by number.
        directory: Where all of it is, or None.
    """
    left = [folder for number, folder in enumerate(folders) if number not in failures]
    if failures:
        _tell_of(failures, len(folders), directory)
    target = None if directory is None else directory_path(directory) / "merged"
    if target is not None and (merged := _merged_before(target, left, model)) is not None:
        return merged
    merged = SnapshotEnsemble.merge(left, target, overwrite=True, model=model)
    try:
        data = None if callable(job.x) else validation_of(job.x, job.y, job.arguments)
        if data is not None:
            merged.choose_members(**data, verbose=0)
    except Exception as error:  # Training has succeeded, so whatever fails here must not raise.
        warnings.warn(
            "Members could not be chosen by the validation data: "
            f"{type(error).__name__}: {error}. All annealed members predict.",
            stacklevel=3,
        )
    return merged


def _tell_of(failures: Mapping[int, BaseException], chains: int, directory: Any) -> None:
    named = "; ".join(
        f"chain {number} ({type(error).__name__}: {str(error).strip()})"
        for number, error in failures.items()
    )
    first = next(iter(failures.values()))
    if len(failures) == chains:
        first.add_note(f"All of {counted(chains, 'chain')} failed: {named}")
        raise first
    again = (
        "" if directory is None else " Call again with the same `directory` to train only these."
    )
    warnings.warn(
        f"{len(failures)} of {chains} chains failed, and the others are merged without them: "
        f"{named}.{again}",
        stacklevel=4,
    )


def _merged_before(
    target: os.PathLike[str], folders: Sequence[str], model: keras.Model
) -> SnapshotEnsemble | None:
    """The merged ensemble that an earlier call has left, if it is of just these chains.

    Then what was learned about its members is kept.
    """
    try:
        merged = SnapshotEnsemble.load(target, model=model)
        views = [DirectoryStore.open(folder).view() for folder in folders]
    except SnapshotError:
        return None
    expected = [snapshot for _, _, snapshot in merged_snapshots(views)]
    return merged if merged.snapshots == expected else None
