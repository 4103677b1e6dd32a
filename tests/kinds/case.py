"""One kind of model, trained once by Keras alone and once by the package."""

import functools
import pathlib
import shutil

import keras
import numpy as np

from kinds.kind import (
    BATCH,
    CYCLES,
    EPOCHS,
    RATE,
    RateLoop,
    Recorder,
    built,
    combined,
    first_rows,
    plain_copy,
)
from kinds.verdicts import Skip
from snapshot_ensemble import SnapshotEnsemble

FIT = {"epochs": EPOCHS, "batch_size": BATCH, "verbose": 0}


class StopHereError(Exception):
    """What interrupts a run."""


class Case:
    """What the operations of one kind share, each computed when it is first asked for.

    Args:
        kind: A `Kind`.
        folder: An empty folder.
    """

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, pathlib.Path(folder)

    def path(self, name):
        return self.folder / name

    def new_path(self, name):
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        return path

    # By Keras alone

    @functools.cached_property
    def weights(self):
        """The weights at the end of each cycle, trained by plain Keras at a constant rate."""
        return self._plain_fit()

    @functools.cached_property
    def annealed_weights(self):
        return self._plain_fit(RateLoop(RATE), eager=True)

    def _plain_fit(self, *callbacks, eager=False):
        model, recorder = built(self.kind), Recorder()
        if eager:
            model.run_eagerly, model.jit_compile = True, False
            model.steps_per_execution = 1  # The callback sets the rate before each execution.
        model.fit(self.kind.trained_on, self.kind.y, callbacks=[*callbacks, recorder], **FIT)
        return recorder.weights

    def copy(self, number):
        """A plain model with the weights of a member."""
        return plain_copy(self.kind, self.weights[number])

    @functools.cached_property
    def outputs(self):
        """What each member predicts, by plain Keras."""
        return [
            self.copy(number).predict(self.kind.x, verbose=0, batch_size=BATCH)
            for number in range(len(self.weights))
        ]

    @functools.cached_property
    def mean(self):
        return combined(self.kind.meaning, self.outputs)

    def mean_of_calls(self, count=None):
        """The combination of what `model(x)` returns, of the first rows or of all."""
        batch = keras.tree.map_structure(
            keras.ops.convert_to_tensor, first_rows(self.kind.x, count)
        )
        outputs = [
            keras.tree.map_structure(np.asarray, self.copy(number)(batch, training=False))
            for number in range(len(self.weights))
        ]
        return combined(self.kind.called or self.kind.meaning, outputs)

    @functools.cached_property
    def served(self):
        """What a served model may return: the mean or, where there is none, that of the calls."""
        try:
            return self.mean
        except AssertionError:
            if self.kind.called is None:
                raise
            return self.mean_of_calls()

    # By the package

    def ensemble(self, model=None, **arguments):
        """A new ensemble at a constant rate."""
        model = built(self.kind) if model is None else model
        arguments = {"cycles": CYCLES, "shrink": 1.0, "lr_min": RATE, **arguments}
        return SnapshotEnsemble(model, lr_init=RATE, **self.kind.arguments, **arguments)

    def eager(self):
        """A new model that runs without a graph, which takes longer to trace than a few steps."""
        model = built(self.kind)
        model.run_eagerly, model.jit_compile = True, False
        return model

    @functools.cached_property
    def fitted(self):
        """The ensemble that `fit` trained, and the weights that a callback saw."""
        ens, recorder = self.ensemble(), Recorder()
        ens.fit(self.kind.trained_on, self.kind.y, callbacks=[recorder], **FIT)
        return ens, recorder.weights

    @property
    def ens(self):
        """The trained ensemble; where `fit` is refused, one of the weights of plain Keras."""
        if self.kind.is_stateful:
            # Calls would go on where those before them ended.
            return self._of_files()
        return self._shared

    @functools.cached_property
    def _shared(self):
        try:
            return self.fitted[0]
        except Exception:  # That of `fit` is a cell of its own.
            return self._of_files()

    def _of_files(self):
        paths = []
        for number in range(len(self.weights)):
            paths.append(self.path(f"member-{number}.weights.h5"))
            self.copy(number).save_weights(paths[-1])
        return SnapshotEnsemble.from_weights(built(self.kind), paths, **self.kind.arguments)

    def resumed(self):
        """The members of a run that was interrupted within its second cycle."""

        def stop(epoch, logs):
            if epoch == EPOCHS - 1:
                raise StopHereError

        directory = self.new_path("resumed")
        stopper = keras.callbacks.LambdaCallback(on_epoch_begin=stop)
        data = {"x": self.kind.trained_on, "y": self.kind.y, **FIT}
        try:
            self.ensemble(self.eager(), directory=directory).fit(callbacks=[stopper], **data)
        except StopHereError:
            pass
        else:
            raise AssertionError("the run was not interrupted")
        ens = self.ensemble(self.eager(), directory=directory)
        ens.fit(resume=True, **data)
        return [member.get_weights() for member in ens]

    def reloaded(self):
        """The predictions of the ensemble that was saved; with `model=` where it asks for it."""
        directory = self.new_path("saved")
        self.ens.save(directory)
        options = {"custom_objects": self.kind.custom_objects}
        try:
            again = SnapshotEnsemble.load(directory, **options)
        except Exception as error:
            if "model=" not in str(error):
                raise
            again = SnapshotEnsemble.load(directory, model=built(self.kind), **options)
        return again.predict(self.kind.x, verbose=0, batch_size=BATCH)

    def under_memory_limit(self):
        ens = self.ens
        limit, ens.memory_limit = ens.memory_limit, 0
        try:
            return ens.predict(self.kind.x, verbose=0, batch_size=BATCH)
        finally:
            ens.memory_limit = limit

    def saved_by_keras(self):
        """Whether Keras's file of a plain copy gives what the copy does."""
        copy, path = self.copy(-1), self.new_path("plain.keras")
        copy.save(path)
        again = keras.models.load_model(path, custom_objects=self.kind.custom_objects)
        pair = [model.predict(self.kind.x, verbose=0, batch_size=BATCH) for model in (copy, again)]
        flat = [np.concatenate([a.ravel() for a in keras.tree.flatten(each)]) for each in pair]
        return np.allclose(*flat, atol=self.kind.tolerance)

    def saved_keras_model(self):
        path = self.new_path("merged.keras")
        self.ens.to_keras().save(path)
        again = keras.models.load_model(path, custom_objects=self.kind.custom_objects)
        return again.predict(self.kind.x, verbose=0, batch_size=BATCH)

    def one_call(self):
        batch = keras.tree.map_structure(
            keras.ops.convert_to_tensor, first_rows(self.kind.x, BATCH)
        )
        return keras.tree.map_structure(np.asarray, self.ens(batch))

    def averaged(self):
        if not self.kind.is_averaged:
            raise Skip("its statistics would be estimated anew")
        means = [
            np.mean(np.stack(arrays).astype("float64"), axis=0).astype(arrays[0].dtype)
            if np.asarray(arrays[0]).dtype.kind not in "iub"
            else arrays[-1]
            for arrays in zip(*self.weights, strict=True)
        ]
        model = plain_copy(self.kind, means)
        return model.predict(self.kind.x, verbose=0, batch_size=BATCH)
