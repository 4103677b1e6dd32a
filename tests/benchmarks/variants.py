"""Other ways to get members from one budget, which are not in the library: they were not better.

Methods of `accuracy.py`, with `shrink="auto"` by default:

- `averaged`: a moving average of the weights over the last two fifths of each cycle
- `late`: two snapshots per cycle, from its last two epochs
- `growing`: each cycle is 1.5 times as long as the one before
- `floor`: the rate falls to a tenth of the peak, not to 0
- `statistics`, `slots`: restarts with `shrink=0.5` that also reset the batch-normalisation
  statistics, or the optimizer's moments; compare with the method `0.5`
- `early`: a cycle ends when the validation loss has not improved for two epochs, with its best
  weights; the epochs left over are used for more cycles, with warm restarts
- `star`: each cycle but the first starts from the end of the first one (StarSSE), without shrinking
- `tail`: no restarts: one run, with snapshots after 60, 70, 80, 90 and 100 % of its epochs, of
  which as many of the last ones predict as have the lowest loss on the validation data
- `taught`, `taught_by_all`: the last member, or the mean of all so far, teaches the next cycle:
  its targets are 0.55 times the labels and 0.45 times the teacher's probabilities, which are
  computed once before the cycle, so not for tasks with augmentation
"""

import keras
import numpy as np

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble


class PredictionRecorder(keras.callbacks.Callback):
    """Records predictions with averaged weights, and after the last two epochs of each cycle."""

    def __init__(self, ends, x):
        super().__init__()
        self.ends, self.x = ends, x
        self.averaged, self.late = [], []

    def on_epoch_begin(self, epoch, logs=None):
        begin = max((end for end in self.ends if end <= epoch), default=0)
        end = min(end for end in self.ends if end > epoch)
        self.left = end - epoch
        if epoch == begin:
            self.mean = None
        self.is_late = self.left <= max(1, 0.4 * (end - begin))

    def on_train_batch_end(self, batch, logs=None):
        if self.is_late:
            now = self.model.get_weights()
            pairs = zip(self.mean or now, now, strict=True)
            self.mean = [0.98 * old + 0.02 * new for old, new in pairs]

    def on_epoch_end(self, epoch, logs=None):
        if self.left <= 2:
            self.late.append(self.model.predict(self.x, verbose=0))
        if self.left == 1:
            own = self.model.get_weights()
            self.model.set_weights(self.mean)
            self.averaged.append(self.model.predict(self.x, verbose=0))
            self.model.set_weights(own)


def _recorded(task, parts, epochs, cycles):
    (x, y), validation, (x_test, _) = parts
    ens = SnapshotEnsemble(task.model(), cycles=cycles, lr_init=task.peak)
    recorder = PredictionRecorder([cycle.last_epoch + 1 for cycle in ens.plan(epochs)], x_test)
    given = {"validation_data": validation, "callbacks": [recorder], "verbose": 0}
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
    return recorder


def averaged(task, parts, epochs, cycles):
    return _recorded(task, parts, epochs, cycles).averaged


def late(task, parts, epochs, cycles):
    return _recorded(task, parts, epochs, cycles).late


class ResetAtRestarts(keras.callbacks.Callback):
    """Resets variables to their initial values at the start of each cycle."""

    def __init__(self, cycles, variables_of):
        super().__init__()
        self.begins = [cycle.first_epoch for cycle in cycles]
        self.variables_of, self.first = variables_of, None

    def on_epoch_begin(self, epoch, logs=None):
        if self.first is None:
            self.first = [variable.numpy() for variable in self.variables_of(self.model)]
        if epoch in self.begins:
            for variable, first in zip(self.variables_of(self.model), self.first, strict=True):
                variable.assign(first)


def _with_reset(variables_of):
    def run(task, parts, epochs, cycles):
        (x, y), _, (x_test, _) = parts
        model = task.model()
        model.optimizer.build(model.trainable_variables)
        ens = SnapshotEnsemble(model, cycles=cycles, lr_init=task.peak, shrink=0.5)
        given = {"callbacks": [ResetAtRestarts(ens.plan(epochs), variables_of)], "verbose": 0}
        ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
        return list(ens.predict_members(x_test, verbose=0))

    return run


def _statistics(model):
    normed = [v for v in model.layers if isinstance(v, keras.layers.BatchNormalization)]
    return [variable for layer in normed for variable in layer.non_trainable_variables]


def _slots(model):
    # The first two are the step counter and the learning rate.
    return model.optimizer.variables[2:]


class StartFromFirst(keras.callbacks.Callback):
    """Starts each cycle but the first from where the first has ended."""

    def __init__(self, cycles):
        super().__init__()
        self.begins = [cycle.first_epoch for cycle in cycles[1:]]
        self.first = None

    def on_epoch_begin(self, epoch, logs=None):
        if epoch in self.begins:
            self.first = self.first or self.model.get_weights()
            self.model.set_weights(self.first)


def star(task, parts, epochs, cycles):
    (x, y), validation, (x_test, _) = parts
    ens = SnapshotEnsemble(task.model(), cycles=cycles, lr_init=task.peak, shrink=1.0)
    callbacks = [StartFromFirst(ens.plan(epochs))]
    given = {"validation_data": validation, "verbose": 0, "callbacks": callbacks}
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
    return list(ens.predict_members(x_test, members=list(range(len(ens))), verbose=0))


class TailRecorder(keras.callbacks.Callback):
    """Records predictions of some data after each of the given epochs."""

    def __init__(self, ends, data):
        super().__init__()
        self.ends, self.data, self.members = ends, data, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.ends:
            self.members.append([self.model.predict(x, verbose=0) for x in self.data])


def tail(task, parts, epochs, cycles):
    (x, y), (x_val, y_val), (x_test, _) = parts
    ends = {round(epochs * tenths / 10) for tenths in range(6, 11)}
    recorder = TailRecorder(ends, (x_val, x_test))
    ens = SnapshotEnsemble(task.model(), cycles=1, lr_init=task.peak)
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, callbacks=[recorder], verbose=0)
    held_out, members = (np.asarray(part) for part in zip(*recorder.members, strict=True))
    loss = keras.losses.get(task.loss)
    losses = [np.mean(loss(y_val, held_out[-n:].mean(0))) for n in range(1, len(members) + 1)]
    return list(members[-1 - int(np.argmin(losses)) :])


def _taught(members):
    def run(task, parts, epochs, cycles):
        (x, y), (x_val, y_val), (x_test, _) = parts
        labels, validation = (np.eye(task.classes)[of] for of in (y, y_val))
        model = task.model()
        model.compile(task.optimizer(task.peak), "categorical_crossentropy")
        ens = SnapshotEnsemble(model, cycles=1, lr_init=task.peak)
        targets = labels
        for part in np.array_split(range(epochs), cycles):
            given = {"validation_data": (x_val, validation), "verbose": 0}
            ens.fit(x, targets, epochs=len(part), batch_size=task.batch, **given)
            teacher = ens.predict(x, members=members or len(ens), verbose=0)
            targets = 0.55 * labels + 0.45 * teacher
        return list(ens.predict_members(x_test, members=len(ens), verbose=0))

    return run


def _members(task, parts, epochs, **arguments):
    (x, y), validation, (x_test, _) = parts
    ens = SnapshotEnsemble(task.model(), **arguments)
    given = {"validation_data": validation, "verbose": 0}
    ens.fit(x, y, epochs=epochs, batch_size=task.batch, **given)
    return list(ens.predict_members(x_test, members=list(range(len(ens))), verbose=0))


def growing(task, parts, epochs, cycles):
    first = max(1, round(epochs * 0.5 / (1.5**cycles - 1)))
    return _members(task, parts, epochs, schedule=CosineAnnealing(first, 1.5, lr_init=task.peak))


def floor(task, parts, epochs, cycles):
    rates = {"lr_init": task.peak, "lr_min": task.peak / 10}
    return _members(task, parts, epochs, cycles=cycles, **rates)


def early(task, parts, epochs, cycles):
    (x, y), validation, (x_test, _) = parts
    model, done, members = task.model(), 0, []
    while done < epochs:
        length = min(epochs // cycles, epochs - done)
        rates = keras.callbacks.LearningRateScheduler(
            lambda epoch, n=length: task.peak / 2 * (1 + np.cos(np.pi * epoch / n))
        )
        stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
        given = {"validation_data": validation, "callbacks": [rates, stop], "verbose": 0}
        history = model.fit(x, y, epochs=length, batch_size=task.batch, **given)
        done += len(history.epoch)
        members.append(model.predict(x_test, verbose=0))
    return members


VARIANTS = {"averaged": averaged, "late": late, "growing": growing, "floor": floor, "early": early}
VARIANTS |= {"statistics": _with_reset(_statistics), "slots": _with_reset(_slots)}
VARIANTS |= {"star": star, "tail": tail, "taught": _taught(1), "taught_by_all": _taught(None)}
