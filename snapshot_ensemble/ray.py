"""More than one machine, with Ray: `pip install 'snapshot-ensemble[ray]'`.

`fit_chains` trains independent chains and merges them into one ensemble. `BatchPredictor` predicts
with a saved ensemble in `ray.data.Dataset.map_batches`.
"""

import contextlib
import functools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.batch_columns import InputColumns, output_columns
from snapshot_ensemble.chains import (
    Bar,
    Job,
    check_models,
    folders_of,
    make_job,
    merge_chains,
    run_here,
    seeds_of,
)
from snapshot_ensemble.checks import whole_number
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.packing import files_in, write_files

__all__ = ["BatchPredictor", "fit_chains"]


def fit_chains(
    make_model: Callable[[], keras.Model],
    x: Any = None,
    y: Any = None,
    *,
    chains: int,
    epochs: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    seed: int = 0,
    engine: str = "ray",
    resources: Mapping[str, Any] | None = None,
    retries: int = 3,
    verbose: Any = "auto",
    **arguments: Any,
) -> SnapshotEnsemble:
    """Trains independent chains, each a run of its own, and merges them into one ensemble.

    Each chain makes its model, from a seed of its own, and trains it through all cycles, as a task
    of Ray: on this machine, or on the cluster that `ray.init` has connected to. If no Ray runs
    yet, one is started on this machine, and stopped at the end. Arrays are sent to each machine
    once. A worker that is lost is replaced: with a `directory` its chain goes on after the
    last saved epoch, otherwise from its beginning; the result is the same. TensorFlow uses as many
    threads in a worker as the task has CPUs.

    A chain that fails for good is named in a warning, and the others are merged. Ctrl-C stops all
    chains. With a `directory`, the same call then goes on where they were.

    With `engine="local"` the chains are trained one after another in this process, without Ray.
    The result is the same to the bit on CPUs, under the conditions of `fit(resume=True)`, if
    TensorFlow uses as many threads here as in a worker
    (`tf.config.threading.set_intra_op_parallelism_threads(1)`, before anything else).

    Example:

    >>> def make_model():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    ...     model.compile("sgd", "sparse_categorical_crossentropy")
    ...     return model
    >>> arguments = {"chains": 3, "cycles": 2, "epochs": 4, "lr_init": 0.1, "verbose": 0}
    >>> ens = fit_chains(make_model, x, y, engine="local", **arguments)
    >>> [(snapshot.chain, snapshot.cycle) for snapshot in ens.snapshots]
    [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]

    Args:
        make_model: A function without arguments that returns a compiled model that is built. It
            runs once in each worker, and twice here to check what it returns.
        x: Arrays as for `model.fit`, or a function without arguments that each worker calls for
            its data. It returns what `model.fit` takes as `x`, such as a `tf.data.Dataset`, or a
            tuple `(x, y)` or `(x, y, sample_weight)`.
        y: As for `model.fit`.
        chains: How many chains.
        epochs: The budget of each chain, as for `SnapshotEnsemble.fit`.
        directory: Where the chains are trained (`chain-0000-…`) and the ensemble is written
            (`merged`), on storage that all machines share. Defaults to `None`: in memory.
        seed: What the seeds of the chains are drawn from. The first chains stay the same if there
            are more of them. Defaults to `0`.
        engine: `"ray"`, or `"local"`. Defaults to `"ray"`.
        resources: What each chain needs, as options of a Ray task, such as
            `{"num_cpus": 4, "num_gpus": 1}`. Defaults to `None`: one CPU.
        retries: How often a chain is started again after its worker was lost. Defaults to `3`.
        verbose: As for `model.fit`: one progress bar for all chains, or with `2` a line for each.
            The gauges `snapshot_ensemble_epochs` and `snapshot_ensemble_loss`, by chain, are among
            the metrics that Ray exports. Defaults to `"auto"`.
        **arguments: All other arguments of `SnapshotEnsemble` and of its `fit`. Each chain gets
            copies of callbacks. `validation_data` may be a function, as `x`.

    Returns:
        A merged `SnapshotEnsemble` (see `SnapshotEnsemble.merge`), in `directory / "merged"` if
        there is a directory. If `validation_data` are arrays, its members were chosen by them.

    Raises:
        ImportError: If Ray is needed and not installed.
        ValueError: If an argument is impossible, or `make_model` returns different models.
        TypeError: If an argument has the wrong type, or there is none of that name.
        Exception: The error of the first chain, if all of them have failed.
    """
    if engine not in ("ray", "local"):
        raise ValueError(f"`engine` must be 'ray' or 'local'. Received: engine={engine!r}")
    seeds, retries = seeds_of(seed, chains), whole_number("retries", retries, 0)
    job = make_job(make_model, x, y, epochs, arguments)
    ray = _imported() if engine == "ray" else None
    with folders_of(directory, seeds) as folders:
        model, length = check_models(job, seeds)
        bar = Bar(len(seeds), length, verbose)
        if ray is None:
            failures = run_here(job, seeds, folders, bar)
        else:
            options = {"num_cpus": 1, **(resources or {}), "max_retries": retries}
            failures = _run_over_ray(ray, job, seeds, folders, directory is not None, options, bar)
        return merge_chains(job, model, folders, failures, directory)


def _imported() -> Any:
    try:
        import ray  # noqa: PLC0415  An optional dependency.
    except ImportError as error:
        raise ImportError(
            "`engine='ray'` needs Ray. Run: pip install 'snapshot-ensemble[ray]', or pass "
            "`engine='local'` to train the chains one after another in this process."
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Starts Ray on this machine if it is not running yet, and stops what it has started."""
    if ray.is_initialized():
        yield
        return
    ray.init()
    try:
        yield
    finally:
        ray.shutdown()


def _run_over_ray(
    ray: Any,
    job: Job,
    seeds: Sequence[int],
    folders: Sequence[str],
    is_shared: bool,
    options: dict[str, Any],
    bar: Bar,
) -> dict[int, BaseException]:
    """Trains the chains as tasks of Ray; returns the errors of those that fail.

    Args:
        ray: The module.
        job: What the chains have in common.
        seeds: The seed of each chain.
        folders: Where each chain is afterwards.
        is_shared: Whether all machines see these folders.
        options: Of each task.
        bar: Shows how far they are.
    """
    with _connected(ray):
        board = ray.remote(num_cpus=0)(_Board).remote()
        task = ray.remote(retry_exceptions=[BlockingIOError], **_with_threads(options))(_train)
        sent, waiting = ray.put(job), dict[Any, int]()
        failures: dict[int, BaseException] = {}
        try:
            for number, (seed, folder) in enumerate(zip(seeds, folders, strict=True)):
                place = folder if is_shared else None
                waiting[task.remote(sent, number, seed, place, board)] = number
            while waiting:
                ended, _ = ray.wait(list(waiting), timeout=0.5)
                _show(ray, board, bar)
                for reference in ended:
                    number = waiting.pop(reference)
                    error = _received(ray, reference, None if is_shared else folders[number])
                    failures |= {} if error is None else {number: error}
                    bar.end(number, error)
        except BaseException:
            _stop(ray, list(waiting))
            raise
    return failures


def _with_threads(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, in workers that have started with as many threads as it has CPUs.

    The number cannot be changed once TensorFlow runs. Ray reuses a worker, but only for tasks with
    the same variables.
    """
    environment = dict(options.get("runtime_env") or {})
    threads = str(max(1, int(options["num_cpus"])))
    own = {"TF_NUM_INTRAOP_THREADS": threads, "TF_NUM_INTEROP_THREADS": threads}
    environment["env_vars"] = {**own, **environment.get("env_vars", {})}
    return {**options, "runtime_env": environment}


def _received(ray: Any, reference: Any, folder: str | None) -> BaseException | None:
    """Writes what a task has returned into a folder; returns the error of one that has failed."""
    try:
        files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, BaseException) else error
    except ray.exceptions.RayError as error:
        return error
    if folder is not None:
        pathlib.Path(folder).mkdir()
        write_files(files, folder)
    return None


def _show(ray: Any, board: Any, bar: Bar) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # It may be lost, with its machine.
        for number, (epochs, logs) in ray.get(board.read.remote(), timeout=5).items():
            bar.epoch(number, epochs, logs)


def _stop(ray: Any, references: list[Any]) -> None:
    """Interrupts tasks, and waits until each has saved what it has done."""
    for reference in references:
        ray.cancel(reference)
    if references:
        _, left = ray.wait(references, num_returns=len(references), timeout=30)
        for reference in left:
            ray.cancel(reference, force=True)


class _Board:
    """An actor: how far each chain has come."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[int, dict[str, float]]] = {}

    def write(self, number: int, epochs: int, logs: dict[str, float]) -> None:
        self._rows[number] = (epochs, logs)

    def read(self) -> dict[int, tuple[int, dict[str, float]]]:
        rows, self._rows = self._rows, {}
        return rows


def _train(
    job: Job, number: int, seed: int, folder: str | None, board: Any
) -> dict[str, bytes] | None:
    """A task: trains a chain, and returns its files unless they are in a shared folder."""
    from ray.util.metrics import Gauge  # noqa: PLC0415

    tags = {"chain": str(number)}
    gauges = {
        name: Gauge(f"snapshot_ensemble_{name}", description, tuple(tags))
        for name, description in (
            ("epochs", "Epochs that a chain has trained."),
            ("loss", "Training loss of a chain's last epoch."),
        )
    }

    def report(epochs: int, logs: dict[str, Any]) -> None:
        values = {"epochs": epochs, "loss": float(logs.get("loss", np.nan))}
        for name, gauge in gauges.items():
            gauge.set(values[name], tags)
        board.write.remote(number, epochs, {"loss": values["loss"]})

    if folder is not None:
        job.train(seed, folder, report)
        return None
    with tempfile.TemporaryDirectory() as temporary:
        job.train(seed, temporary, report)
        return files_in(temporary)


def _set_threads() -> None:
    """Lets TensorFlow use as many threads as this actor of Ray has CPUs, and at least one."""
    if sys.modules.get("ray") is None:
        return
    import ray  # noqa: PLC0415
    import tensorflow as tf  # noqa: PLC0415

    context: Any = ray.get_runtime_context() if ray.is_initialized() else None
    if context is not None and context.get_actor_id() is not None:
        threads = max(1, int(context.get_assigned_resources().get("CPU", 1)))
        with contextlib.suppress(RuntimeError):  # TensorFlow is running.
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)


class BatchPredictor:
    """Predicts with a saved ensemble, batch by batch: a class for `map_batches` of Ray Data.

    Each actor of Ray loads the ensemble once. All columns stay, and the predictions become new
    ones, with one array a row.

    Example:

        rows = ray.data.read_parquet("pixels")
        predicted = rows.map_batches(
            BatchPredictor,
            fn_constructor_args=["digits"],
            fn_constructor_kwargs={"output": "uncertainty"},
            batch_size=1024,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        predicted.write_parquet("predicted")

    Give each actor fewer CPUs than there are (`num_cpus=0.5` on a small machine): reading and
    writing need some, too.

    A batch is a dict of NumPy arrays, as `map_batches` passes them by default:

    >>> ens.save("digits")
    >>> predictor = BatchPredictor("digits", inputs=["a", "b", "c", "d"], name="digit")
    >>> columns = dict(zip("abcd", x.T))
    >>> predictor({**columns, "id": np.arange(len(x))})["digit"].shape
    (32, 3)

    Args:
        directory: Path of the directory that `fit`, `save` or `merge` wrote, on storage that all
            machines share.
        inputs: The columns that the model gets: the name of one, whose rows are arrays or
            numbers; a list of names, whose numbers become the last axis; or a dict of these for a
            model with several inputs, by their names. Defaults to `None`: the columns that have
            the names of the model's inputs, or the only column.
        output: `"prediction"`, as of `predict`; `"uncertainty"`, as of `predict_uncertainty`, each
            of its arrays as a column such as `"digit_total"`; or `"members"`, as of
            `predict_members`. Defaults to `"prediction"`.
        name: The name of the new column, or of their prefix, for a model with one output. Defaults
            to `None`: the outputs' own names.
        combine: As for `predict`. Defaults to `"mean"`.
        members: As for `predict`.
        batch_size: As for `predict`.
        **load_arguments: Arguments of `SnapshotEnsemble.load`, such as `custom_objects`.

    Raises:
        ValueError: If an argument is impossible; when called, if there are no such columns, or
            there are some of the new names.
        TypeError: If a batch is no dict of arrays.
        SnapshotError: If the directory holds no ensemble, or a file is not as it was saved.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        inputs: str | Sequence[str] | Mapping[str, Any] | None = None,
        output: str = "prediction",
        name: str | None = None,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        **load_arguments: Any,
    ) -> None:
        methods = {"prediction": "predict", "uncertainty": "predict_uncertainty"}
        methods["members"] = "predict_members"
        if output not in methods:
            raise ValueError(
                f"`output` must be one of {tuple(methods)}. Received: output={output!r}"
            )
        if combine != "mean" and output != "prediction":
            raise ValueError(
                "`combine` says how predictions are combined. Received: "
                f"combine={combine!r}, output={output!r}. Leave it out, or pass "
                "output='prediction'."
            )
        _set_threads()
        self._ensemble = SnapshotEnsemble.load(directory, **load_arguments)
        self._columns = InputColumns(self._ensemble.model, inputs)
        self._output, self._name = output, name
        arguments: dict[str, Any] = {"members": members, "batch_size": batch_size, "verbose": 0}
        arguments |= {"combine": combine} if output == "prediction" else {}
        predict = getattr(self._ensemble, methods[output])
        self._predict: Callable[[Any], Any] = functools.partial(predict, **arguments)

    def __reduce__(self) -> Any:
        raise TypeError(
            "A `BatchPredictor` cannot be sent to other processes: each of them loads the "
            f"ensemble. Received: {self._ensemble!r}. Pass the class itself: "
            "`map_batches(BatchPredictor, fn_constructor_args=[directory], …)`."
        )

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The batch with the new columns."""
        x = self._columns.of(batch)
        new = output_columns(self._ensemble.model, self._predict(x), self._output, self._name)
        if taken := sorted(set(new) & set(batch)):
            raise ValueError(
                f"The new columns must have other names than those there are. Received: {taken} in "
                f"both. Pass `name=`, or drop these columns before."
            )
        return {**batch, **new}
