"""A run through `fit`: the rate of every step, what is kept, and what is as before afterwards."""

import json
import logging
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble

PEAK, FLOOR, OWN = 0.1, 0.001, 0.05
X = np.zeros((32, 1), "float32")

# What Keras says at the end of each pass over data of unknown length.
ran_out_of_data = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")


# A model that adds up its learning rates.


@keras.saving.register_keras_serializable("test_training")
class OneWeight(keras.layers.Layer):
    """Gives its one weight, which starts at 0, for every row."""

    def build(self, input_shape):
        self.w = self.add_weight(shape=(), initializer="zeros", name="w")

    def call(self, x):
        return ops.zeros_like(x) + self.w


def first_row(y, output):
    """A loss whose gradient is exactly 1, whatever the data and the size of a batch."""
    return output[0]


def one_weight(optimizer=None, model_type=keras.Sequential, **compile_arguments):
    model = model_type([keras.Input((1,)), OneWeight()])
    model.compile(optimizer or keras.optimizers.SGD(OWN), first_row, **compile_arguments)
    return model


def ensemble(model, cycles=2, **arguments):
    if "schedule" not in arguments:
        arguments = {"lr_init": PEAK, "lr_min": FLOOR, **arguments}
    return SnapshotEnsemble(model, cycles=cycles, task="regression", **arguments)


def arrays(batch_size=4):
    """8 batches an epoch, if nothing else is said."""
    return {"x": X, "y": X, "batch_size": batch_size}


def fitted(model=None, epochs=4, cycles=2, **fit_arguments):
    if "x" not in fit_arguments:
        fit_arguments |= arrays()
    ens = ensemble(one_weight() if model is None else model, cycles)
    ens.fit(epochs=epochs, verbose=0, **fit_arguments)
    return ens


def cosine(n, lr_max=PEAK, lr_min=FLOOR):
    """The rates of a cycle of `n` steps, in float64."""
    return lr_min + (lr_max - lr_min) / 2 * (1 + np.cos(np.pi * np.arange(n) / n))


def descend(*cycles, accumulate=1):
    """The one weight at the end of each cycle: float32, one step after the other."""
    w, ends, step = np.float32(0), [], 0
    for rates in cycles:
        for rate in rates.astype("float32"):
            step += 1
            if step % accumulate == 0:
                w -= rate
        ends.append(w)
    return ends


def weight(model):
    return model.get_weights()[0]


def members(ens):
    return [weight(member) for member in ens]


class Recorder(keras.callbacks.Callback):
    """Keeps the weight and the logs of the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.weights, self.logs = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(weight(self.model))
        self.logs.append(dict(logs))


def raiser(error):
    def stop(*_):
        raise error

    return stop


class AtBatch(keras.callbacks.Callback):
    """Does something after a batch of an epoch, both counted from 0."""

    def __init__(self, epoch, batch, action):
        super().__init__()
        self.when, self.action, self.epoch = (epoch, batch), action, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.when:
            self.action(self.model)


# The rate of every step: all comparisons are exact, to the last bit.


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 7), (32, 1)])
def test_rate_is_exact_on_arrays(batch_size, steps):
    ens = fitted(**arrays(batch_size))
    assert members(ens) == descend(*[cosine(2 * steps)] * 2)
    assert [s.step for s in ens.snapshots] == [2 * steps, 4 * steps]


def test_members_predict_with_the_weights_of_their_cycle():
    outputs = fitted().predict_members(X, verbose=0)
    assert outputs[:, 0, 0].tolist() == descend(cosine(16), cosine(16))


def test_unequal_cycles_are_each_exact():
    ens = fitted(epochs=5)
    assert members(ens) == descend(cosine(16), cosine(24))


def batches():
    return tf.data.Dataset.from_tensor_slices((X, X)).batch(2)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return X[:2], X[:2]


def endless():
    while True:
        yield X[:2], X[:2]


# Arguments of `fit`, and the steps that Keras takes in an epoch: one at a time, and 7 at a time.
DATA = {
    "arrays": (lambda: arrays(2), 16, 16),
    "arrays with all steps": (lambda: {**arrays(2), "steps_per_epoch": 16}, 16, 16),
    "tf.data": (lambda: {"x": batches()}, 16, 16),
    "endless tf.data": (lambda: {"x": batches().repeat(), "steps_per_epoch": 16}, 16, 21),
    "PyDataset": (lambda: {"x": Batches()}, 16, 16),
    "PyDataset with all steps": (lambda: {"x": Batches(), "steps_per_epoch": 16}, 16, 16),
    "generator": (lambda: {"x": endless(), "steps_per_epoch": 16}, 16, 21),
    "part of arrays": (
        lambda: {**arrays(2), "validation_split": 0.5, "steps_per_epoch": 8},
        8,
        8,
    ),
}


@pytest.mark.parametrize(
    ("kind", "steps_per_execution"),
    [*((kind, 7) for kind in DATA), *((kind, 1) for kind in DATA if "all steps" not in kind)],
)
def test_rate_is_exact_on_all_kinds_of_data(kind, steps_per_execution):
    arguments, one_at_a_time, seven_at_a_time = DATA[kind]
    steps = one_at_a_time if steps_per_execution == 1 else seven_at_a_time
    ens = fitted(one_weight(steps_per_execution=steps_per_execution), **arguments(), shuffle=False)
    assert [s.step for s in ens.snapshots] == [2 * steps, 4 * steps]
    assert members(ens) == descend(*[cosine(2 * steps)] * 2)


def test_an_epoch_may_be_less_than_a_pass():
    ens = fitted(steps_per_epoch=2)
    assert members(ens) == descend(cosine(4), cosine(4))


def filtered():
    return batches().filter(lambda x, y: True)


def from_generator():
    row = tf.TensorSpec((2, 1), "float32")
    rows = [(X[:2], X[:2])] * 16
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=(row, row))


@ran_out_of_data
@pytest.mark.parametrize("steps_per_execution", [1, 7])
@pytest.mark.parametrize("data", [filtered, from_generator])
def test_unknown_length_is_exact_after_the_first_epoch(data, steps_per_execution):
    model = one_weight(steps_per_execution=steps_per_execution)
    ens = fitted(model, epochs=6, x=data(), shuffle=False)
    first = np.full(16, ens.history["learning_rate"][0])
    cycle = cosine(48)
    assert [s.step for s in ens.snapshots] == [48, 96]
    assert members(ens) == descend(np.concatenate([first, cycle[16:]]), cycle)
    last = cycle[[31, 47, 15, 31, 47]].astype("float32")
    assert ens.history["learning_rate"][1:] == last.tolist()


@ran_out_of_data
def test_unknown_length_begins_with_the_mean_of_the_first_epochs_rates():
    ens = fitted(epochs=3, cycles=1, x=filtered(), shuffle=False)
    mean = cosine(3 * 10**5)[: 10**5].mean()
    assert ens.history["learning_rate"][0] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    "compile_arguments", [{"jit_compile": True}, {"run_eagerly": True}], ids=["jit", "eager"]
)
def test_rate_is_exact_however_the_step_is_run(compile_arguments):
    ens = fitted(one_weight(**compile_arguments))
    assert members(ens) == descend(cosine(16), cosine(16))


def test_gradient_accumulation_updates_with_the_rate_of_its_last_batch():
    ens = fitted(one_weight(keras.optimizers.SGD(OWN, gradient_accumulation_steps=2)))
    assert members(ens) == descend(cosine(16), cosine(16), accumulate=2)


def test_gradient_accumulation_goes_on_over_the_end_of_an_odd_cycle():
    model = one_weight(keras.optimizers.SGD(OWN, gradient_accumulation_steps=2))
    ens = fitted(model, epochs=2, x=X[:10], y=X[:10], batch_size=2)
    assert [s.step for s in ens.snapshots] == [5, 10]
    assert members(ens) == descend(cosine(5), cosine(5), accumulate=2)


@pytest.fixture
def mixed_float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.usefixtures("mixed_float16")
def test_rate_is_exact_under_loss_scaling():
    model = one_weight()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    ens = fitted(model)
    assert members(ens) == descend(cosine(16), cosine(16))
    assert {array.dtype for array in ens[0].get_weights()} == {np.dtype("float32")}
    assert float(model.optimizer.learning_rate) == np.float32(OWN)


def own_rate():
    return OWN


OPTIMIZERS = {
    "number": lambda: OWN,
    "schedule": lambda: keras.optimizers.schedules.ExponentialDecay(OWN, 10, 0.5),
    "callable": lambda: own_rate,
}
optimizers = pytest.mark.parametrize("kind", OPTIMIZERS)


@optimizers
def test_peak_is_by_default_the_rate_of_the_optimizer(kind):
    ens = ensemble(one_weight(keras.optimizers.SGD(OPTIMIZERS[kind]())), lr_init=None)
    ens.fit(**arrays(), epochs=4, verbose=0)
    # An optimizer holds its rate in float32; what a callable returns is what it is.
    peak = OWN if kind == "callable" else float(np.float32(OWN))
    assert members(ens) == descend(*[cosine(16, peak)] * 2)


def test_rate_does_not_depend_on_optimizer_iterations():
    model = one_weight()
    model.optimizer.iterations.assign(1000)
    assert members(fitted(model)) == descend(cosine(16), cosine(16))
    assert int(model.optimizer.iterations) == 1032


def test_rate_is_exact_for_a_model_that_was_trained_before():
    model = one_weight()
    model.fit(**arrays(), epochs=2, verbose=0)
    model.set_weights([np.float32(0)])
    assert members(fitted(model)) == descend(cosine(16), cosine(16))


def test_schedule_with_warmup_and_multipliers():
    schedule = CosineAnnealing(2, 2.0, PEAK, FLOOR, lr_multiplier=0.5, warmup=1)
    ens = ensemble(one_weight(), schedule=schedule)
    ens.fit(**arrays(), epochs=6, verbose=0)
    rise = FLOOR + (PEAK - FLOOR) * np.arange(8) / 8
    first = np.concatenate([rise, cosine(8)])
    assert members(ens) == descend(first, cosine(32, PEAK / 2, FLOOR / 2))


@ran_out_of_data
def test_unknown_length_warms_up_at_the_mean_rate():
    ens = ensemble(one_weight(), schedule=CosineAnnealing(2, 1.0, PEAK, FLOOR, warmup=1))
    ens.fit(filtered(), epochs=2, verbose=0, shuffle=False)
    first = ens.history["learning_rate"][0]
    assert first == pytest.approx((PEAK + FLOOR) / 2, rel=1e-2)
    assert members(ens) == descend(np.concatenate([np.full(16, first), cosine(16)]))


def test_initial_epoch_plans_the_epochs_that_are_left():
    ens = ensemble(one_weight())
    history = ens.fit(**arrays(), initial_epoch=2, epochs=6, verbose=0)
    assert history.epoch == [2, 3, 4, 5]
    assert members(ens) == descend(cosine(16), cosine(16))


def test_history_has_the_cycle_and_the_last_rate_of_each_epoch():
    ens = ensemble(one_weight())
    history = ens.fit(**arrays(), epochs=4, verbose=0)
    last = cosine(16).astype("float32")[[7, 15]].tolist()
    assert isinstance(history, keras.callbacks.History)
    assert set(history.history) == {"loss", "learning_rate", "cycle"}
    assert history.history["learning_rate"] == last * 2
    assert history.history["cycle"] == [0, 0, 1, 1]
    assert {len(values) for values in history.history.values()} == {4}
    assert ens.history == history.history
    assert [s.learning_rate for s in ens.snapshots] == [last[1]] * 2


MIRRORED = """
import sys
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
sys.path.insert(0, sys.argv[1])
import keras
import test_loop as t

for steps_per_execution in 1, 7:
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        schedule = keras.optimizers.schedules.ExponentialDecay(t.OWN, 10, 0.5)
        model = t.one_weight(
            keras.optimizers.SGD(schedule), steps_per_execution=steps_per_execution
        )
    ens = t.fitted(model, **t.arrays(2))
    assert t.members(ens) == t.descend(t.cosine(32), t.cosine(32)), t.members(ens)
    assert [s.step for s in ens.snapshots] == [32, 64]
    assert model.optimizer._learning_rate is schedule
"""


@pytest.mark.slow
def test_rate_is_exact_on_two_devices():
    # Devices are set up before TensorFlow starts, so that this takes a process of its own.
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-c", MIRRORED, str(here)]
    done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# A training step of the user's own.


@keras.saving.register_keras_serializable("test_training")
class Doubling(keras.Sequential):
    """Takes two optimizer steps on each batch."""

    def train_step(self, data):
        super().train_step(data)
        return super().train_step(data)


def test_train_step_of_a_subclass_runs():
    model = one_weight(model_type=Doubling)
    ens = fitted(model)
    assert members(ens) == descend(*[np.repeat(cosine(16), 2)] * 2)
    assert model.train_step.__func__ is Doubling.train_step
    assert "train_step" not in vars(model)


def test_train_step_set_on_the_instance_runs():
    model = one_weight()
    plain = model.train_step

    def twice(data):
        plain(data)
        return plain(data)

    model.train_step = twice
    ens = fitted(model)
    assert members(ens) == descend(*[np.repeat(cosine(16), 2)] * 2)
    assert model.train_step is twice


# Afterwards.


def check_own_rate(model, kind, rate):
    """The optimizer has its own rate, and `fit` trains with it."""
    if kind == "number":
        assert float(model.optimizer.learning_rate) == np.float32(OWN)
    else:
        assert model.optimizer._learning_rate is rate
    steps = float(model.optimizer.iterations)
    model.set_weights([np.float32(0)])
    model.fit(X, X, batch_size=32, verbose=0)
    if kind == "schedule":
        # Keras computes the power in float32.
        assert weight(model) == pytest.approx(-OWN * 0.5 ** (steps / 10), rel=1e-5)
    else:
        assert weight(model) == -np.float32(OWN)


@optimizers
def test_rate_is_exact_and_the_own_one_is_back(kind):
    rate = OPTIMIZERS[kind]()
    model = one_weight(keras.optimizers.SGD(rate))
    assert members(fitted(model)) == descend(cosine(16), cosine(16))
    check_own_rate(model, kind, rate)


@pytest.mark.parametrize(
    ("kind", "error"), [("number", KeyboardInterrupt), ("schedule", RuntimeError)]
)
def test_own_rate_is_back_after_a_break(kind, error):
    rate = OPTIMIZERS[kind]()
    model = one_weight(keras.optimizers.SGD(rate))
    with pytest.raises(error):
        fitted(model, callbacks=[AtBatch(2, 5, raiser(error))])
    assert "train_step" not in vars(model)
    check_own_rate(model, kind, rate)


@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_optimizer_variables_are_the_same_objects(kind):
    model = one_weight(keras.optimizers.Adam(OPTIMIZERS[kind]()))
    model.optimizer.build(model.trainable_variables)
    before = model.optimizer.variables
    fitted(model)
    assert list(map(id, model.optimizer.variables)) == list(map(id, before))


def test_variables_of_an_optimizer_with_a_schedule_are_those_that_keras_makes():
    names = []
    for fit in (fitted, lambda model: model.fit(**arrays(), verbose=0)):
        keras.backend.clear_session()  # Names are given anew.
        model = one_weight(keras.optimizers.Adam(OPTIMIZERS["schedule"]()))
        fit(model)
        names.append([variable.path for variable in model.optimizer.variables])
    assert names[0] == names[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_break_keeps_finished_cycles_and_epochs(error):
    ens = ensemble(one_weight())
    with pytest.raises(error):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[AtBatch(3, 5, raiser(error))])
    assert members(ens) == descend(cosine(16))
    assert ens.predict(X[:1], verbose=0) == descend(cosine(16))
    assert ens.history["cycle"] == [0, 0, 1]
    assert {len(values) for values in ens.history.values()} == {3}


def test_a_break_in_the_first_cycle_keeps_no_member():
    ens, last_batch = ensemble(one_weight()), AtBatch(1, 7, raiser(RuntimeError))
    with pytest.raises(RuntimeError):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[last_batch])
    assert len(ens) == 0


def test_an_error_in_a_callback_at_the_end_of_a_cycle_keeps_its_member():
    def stop(epoch, logs):
        if epoch == 1:
            raise RuntimeError

    ens = ensemble(one_weight())
    with pytest.raises(RuntimeError):
        ens.fit(
            **arrays(),
            epochs=4,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=stop)],
        )
    assert members(ens) == descend(cosine(16))


# What `fit` takes, as in Keras.


def classifier():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile(
        keras.optimizers.SGD(OWN), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {"validation_data": (np.ones((8, 4)), np.arange(8) % 3), "validation_batch_size": 3},
        {"validation_split": 0.25, "validation_freq": 2},
        {"class_weight": {0: 1.0, 1: 5.0, 2: 0.1}},
        {"sample_weight": np.linspace(0, 2, 64)},
    ],
    ids=", ".join,
)
def test_arguments_of_fit_mean_what_they_mean_in_keras(data, arguments):
    # Where the peak is the floor, the rate stands still, as in plain Keras.
    x, y = data
    plain = classifier()
    common = {"batch_size": 16, "epochs": 4, "shuffle": False, "verbose": 0, **arguments}
    expected = plain.fit(x, y, **common).history
    model = classifier()
    ens = SnapshotEnsemble(model, cycles=2, lr_init=OWN, lr_min=OWN)
    history = ens.fit(x, y, **common).history
    for ours, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert history.pop("cycle") == [0, 0, 1, 1]
    assert history.pop("learning_rate") == [np.float32(OWN)] * 4
    assert history == expected


@pytest.mark.parametrize(("validation_freq", "validated"), [(2, [1]), ([1, 3], [0, 2])])
def test_history_has_gaps_where_there_was_no_validation(validation_freq, validated):
    ens = ensemble(one_weight(), cycles=1)
    ens.fit(
        **arrays(),
        epochs=3,
        verbose=0,
        validation_data=(X, X),
        validation_freq=validation_freq,
    )
    assert {len(values) for values in ens.history.values()} == {3}
    known = [epoch for epoch, value in enumerate(ens.history["val_loss"]) if value is not None]
    assert known == validated


def test_history_has_gaps_for_a_fit_without_validation():
    ens = ensemble(one_weight(), cycles=1)
    ens.fit(**arrays(), epochs=2, verbose=0, validation_data=(X, X))
    ens.fit(**arrays(), epochs=2, verbose=0)
    assert {len(values) for values in ens.history.values()} == {4}
    known = [value is not None for value in ens.history["val_loss"]]
    assert known == [True, True, False, False]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda callback: callback,
        lambda callback: [(callback,), []],
        lambda callback: keras.callbacks.CallbackList(
            [callback], add_history=True, steps=8, epochs=4, verbose=0
        ),
        lambda callback: [keras.callbacks.CallbackList([callback])],
    ],
    ids=["one", "nested", "CallbackList", "list of CallbackList"],
)
def test_callbacks_come_in_all_ways_that_keras_knows(wrap):
    model, recorder = one_weight(), Recorder()
    callbacks = wrap(recorder)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.set_model(model)  # Keras leaves this to its maker.
    ens = fitted(model, callbacks=callbacks)
    last = cosine(16).astype("float32")[[7, 15]].tolist()
    assert [logs["learning_rate"] for logs in recorder.logs] == last * 2
    assert [recorder.weights[1], recorder.weights[3]] == members(ens)


def callback_list(model, *callbacks, **params):
    return keras.callbacks.CallbackList(list(callbacks), add_history=True, model=model, **params)


def test_callback_list_is_as_before_afterwards():
    model = one_weight()
    callbacks = callback_list(model, Recorder(), epochs=4, steps=8, verbose=0)
    before = list(callbacks.callbacks)
    fitted(model, callbacks=callbacks)
    assert callbacks.callbacks == before


@pytest.mark.parametrize("params", [{}, {"steps": 99}], ids=["none", "wrong"])
def test_rate_does_not_depend_on_the_parameters_of_a_callback_list(params):
    model = one_weight()
    ens = fitted(model, callbacks=callback_list(model, **params))
    assert members(ens) == descend(cosine(16), cosine(16))


def test_callback_list_without_parameters_is_quiet_with_verbose_0(capsys):
    model = one_weight()
    fitted(model, callbacks=callback_list(model))
    assert capsys.readouterr().out == ""


def test_a_history_that_is_used_twice_goes_on():
    ens, history = ensemble(one_weight()), keras.callbacks.History()
    for _ in range(2):
        ens.fit(**arrays(), epochs=2, verbose=0, callbacks=[history])
    assert history.history["cycle"] == [0, 1, 2, 3]
    assert {len(values) for values in history.history.values()} == {4}


def test_a_metric_of_several_values_is_kept(tmp_path, data):
    x, y = data
    model = classifier()
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score(average=None)])
    ens = SnapshotEnsemble(model, cycles=2, lr_init=OWN, directory=tmp_path / "kept")
    ens.fit(x, np.eye(3)[y], epochs=2, verbose=0)
    assert np.shape(ens.history["f1_score"]) == (2, 3)
    loaded = SnapshotEnsemble.load(tmp_path / "kept")
    np.testing.assert_array_equal(loaded.history["f1_score"], ens.history["f1_score"])


def test_snapshot_has_the_metrics_of_its_epoch():
    recorder = Recorder()
    ens = fitted(validation_data=(X, X), callbacks=[recorder])
    for snapshot, logs in zip(ens.snapshots, recorder.logs[1::2], strict=True):
        del logs["learning_rate"]
        assert snapshot.metrics == logs
        assert set(logs) == {"loss", "val_loss"}


# Callbacks that would set the rate.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda callback: callback,
        lambda callback: [Recorder(), callback],
        lambda callback: [Recorder(), [callback]],
        lambda callback: keras.callbacks.CallbackList([callback]),
        lambda callback: [keras.callbacks.CallbackList([callback])],
    ],
    ids=["one", "list", "nested", "CallbackList", "list of CallbackList"],
)
@pytest.mark.parametrize("name", ["LearningRateScheduler", "ReduceLROnPlateau"])
def test_callback_that_sets_the_rate_is_refused_before_training(name, wrap):
    callback = {
        "LearningRateScheduler": lambda: keras.callbacks.LearningRateScheduler(lambda e: 1.0),
        "ReduceLROnPlateau": lambda: keras.callbacks.ReduceLROnPlateau("loss"),
    }[name]()
    model = one_weight()
    ens = ensemble(model)
    message = f"set by the ensemble's schedule.* Received: callbacks with {name}"
    with pytest.raises(ValueError, match=message):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=wrap(callback))
    assert len(ens) == 0
    assert weight(model) == 0


# Callbacks and optimizers that stop training, or change the weights after it.


def early_stopping(patience, **arguments):
    """Stops after epoch `patience`, counted from 0: the loss falls all the time."""
    return keras.callbacks.EarlyStopping("loss", mode="max", patience=patience, **arguments)


def test_early_stopping_in_mid_cycle_gives_no_member():
    ens = fitted(callbacks=[early_stopping(2)])
    assert members(ens) == descend(cosine(16))
    assert ens.history["cycle"] == [0, 0, 1]


def test_early_stopping_at_the_end_of_a_cycle_gives_its_member():
    ens = fitted(epochs=6, cycles=3, callbacks=[early_stopping(3)])
    assert members(ens) == descend(cosine(16), cosine(16))


@pytest.mark.parametrize("epoch", [0, 1])
def test_stopping_within_an_epoch_gives_no_member(epoch):
    stop = AtBatch(epoch, 3, lambda model: setattr(model, "stop_training", True))
    ens = fitted(callbacks=[stop])
    assert len(ens) == 0


def test_stopping_after_the_last_batch_of_a_cycle_gives_its_member():
    stop = AtBatch(1, 7, lambda model: setattr(model, "stop_training", True))
    ens = fitted(callbacks=[stop])
    assert members(ens) == descend(cosine(16))


def test_restore_best_weights_does_not_change_snapshots():
    model, recorder = one_weight(), Recorder()
    best = early_stopping(2, restore_best_weights=True)
    ens = fitted(model, callbacks=[best, recorder])
    assert weight(model) == recorder.weights[0]
    assert members(ens) == [recorder.weights[1]] == descend(cosine(16))


def test_averaging_by_the_optimizer_does_not_change_snapshots():
    recorder = Recorder()
    model = one_weight(keras.optimizers.SGD(OWN, use_ema=True, ema_momentum=0.9))
    ens = fitted(model, callbacks=[recorder])
    assert weight(model) != recorder.weights[-1]
    assert members(ens) == recorder.weights[1::2] == descend(cosine(16), cosine(16))


def test_swapping_averages_in_does_not_change_snapshots():
    model = one_weight(keras.optimizers.SGD(OWN, use_ema=True, ema_momentum=0.9))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    ens = fitted(model, callbacks=[swap])
    # Keras swaps by adding and subtracting, which costs the last digits.
    assert members(ens) == pytest.approx(descend(cosine(16), cosine(16)), rel=1e-6)


# More than one run.


def test_a_second_fit_adds_cycles():
    ens = fitted()
    history = ens.fit(**arrays(), epochs=5, verbose=0).history
    assert history["cycle"] == [2, 2, 3, 3, 3]
    assert {len(values) for values in history.values()} == {5}
    assert members(ens) == descend(cosine(16), cosine(16), cosine(16), cosine(24))
    assert [s.index for s in ens.snapshots] == [0, 1, 2, 3]
    assert [s.cycle for s in ens.snapshots] == [0, 1, 2, 3]
    assert [s.epoch for s in ens.snapshots] == [1, 3, 5, 8]
    assert [s.step for s in ens.snapshots] == [16, 32, 48, 72]
    assert ens.history["cycle"] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert {len(values) for values in ens.history.values()} == {9}


def test_a_fit_after_a_break_adds_cycles():
    ens, stop = ensemble(one_weight()), AtBatch(2, 5, raiser(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[stop])
    ens.model.set_weights([np.float32(0)])
    ens.fit(**arrays(), epochs=2, verbose=0)
    first, *more = members(ens)
    assert [first] == descend(cosine(16))
    assert more == descend(cosine(8), cosine(8))
    assert [s.cycle for s in ens.snapshots] == [0, 1, 2]
    assert [s.epoch for s in ens.snapshots] == [1, 2, 3]


def test_members_of_a_second_fit_are_in_predictions():
    ens = fitted()
    ens.predict(X, verbose=0)
    ens.fit(**arrays(), epochs=2, verbose=0)
    ends = descend(cosine(16), cosine(16), cosine(8), cosine(8))
    assert ens.predict_members(X[:1], verbose=0).ravel().tolist() == ends


def test_max_snapshots_keeps_the_newest():
    ens = ensemble(one_weight(), cycles=3, max_snapshots=2)
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert members(ens) == descend(*[cosine(8)] * 3)[1:]
    ens.fit(**arrays(), epochs=3, verbose=0)
    assert members(ens) == descend(*[cosine(8)] * 6)[4:]
    assert [(s.index, s.cycle) for s in ens.snapshots] == [(0, 4), (1, 5)]
    assert ens.history["cycle"] == [0, 1, 2, 3, 4, 5]


# What is shown.


def check_line(line, snapshot):
    """A line holds all that one wants to know of a snapshot; epochs count from 1, as Keras's."""
    assert line.startswith(f"Snapshot of cycle {snapshot.cycle} ")
    assert f"epoch {snapshot.epoch + 1}," in line
    assert f"learning rate {snapshot.learning_rate:.3g}" in line
    assert f"- loss: {snapshot.metrics['loss']:.4f}" in line
    assert f"val_loss: {snapshot.metrics['val_loss']:.4f}" in line


@pytest.mark.parametrize("verbose", [1, 2])
def test_each_snapshot_is_told_in_one_line(capsys, verbose):
    ens = ensemble(one_weight())
    ens.fit(**arrays(), epochs=4, verbose=verbose, validation_data=(X, X))
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if "Snapshot" in line]
    assert len(lines) == 2
    for line, snapshot in zip(lines, ens.snapshots, strict=True):
        check_line(line, snapshot)
    if verbose == 2:
        starts = [line.split()[0] for line in out if line]
        assert starts == ["Epoch", "8/8", "Epoch", "8/8", "Snapshot"] * 2


def test_nothing_is_shown_with_verbose_0(capsys, caplog):
    caplog.set_level(logging.DEBUG, logger="snapshot_ensemble")
    fitted()
    assert capsys.readouterr().out == ""
    assert not [record for record in caplog.records if record.name == "snapshot_ensemble"]


@pytest.fixture
def no_interactive_logging():
    keras.config.disable_interactive_logging()
    yield
    keras.config.enable_interactive_logging()


@pytest.mark.usefixtures("no_interactive_logging")
def test_lines_go_to_a_logger_without_interactive_logging(capsys, caplog):
    caplog.set_level(logging.INFO, logger="snapshot_ensemble")
    ens = ensemble(one_weight())
    ens.fit(**arrays(), epochs=4, verbose=2, validation_data=(X, X))
    assert "Snapshot" not in capsys.readouterr().out
    records = [record for record in caplog.records if record.name == "snapshot_ensemble"]
    assert len(records) == 2
    for record, snapshot in zip(records, ens.snapshots, strict=True):
        check_line(record.getMessage(), snapshot)


@ran_out_of_data
def test_unknown_length_warns_if_the_first_cycle_cannot_anneal():
    ens = ensemble(one_weight())
    with pytest.warns(UserWarning, match=r"first cycle.* does not anneal\. Pass `steps_per_epoch`"):
        ens.fit(filtered(), epochs=2, verbose=0, shuffle=False)
    first = np.full(16, ens.history["learning_rate"][0])
    assert members(ens) == descend(first, cosine(16))


@pytest.mark.parametrize("kind", ["arrays", "endless tf.data"])
def test_known_length_does_not_warn_of_a_cycle_of_one_epoch(kind):
    arguments, steps, _ = DATA[kind]
    ens = fitted(epochs=2, **arguments(), shuffle=False)  # A warning would be an error.
    assert members(ens) == descend(cosine(steps), cosine(steps))


# Checkpoints of other callbacks.


def slots(optimizer):
    """The optimizer's state but for its rate."""
    return [v.numpy() for v in optimizer.variables if v.name != "learning_rate"]


@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_checkpoint_in_mid_training_is_that_of_a_plain_optimizer(tmp_path, data, kind):
    x, y = data
    model = classifier()
    model.compile(keras.optimizers.Adam(OPTIMIZERS[kind]()), model.loss)
    states = []
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: states.append(slots(model.optimizer))
    )
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))
    ens = SnapshotEnsemble(model, cycles=1, lr_init=PEAK)
    ens.fit(x, y, epochs=2, verbose=0, callbacks=[checkpoint, recorder])

    path = tmp_path / "1.keras"
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
    assert "snapshot_ensemble" not in config
    rate = json.loads(config)["compile_config"]["optimizer"]["config"]["learning_rate"]
    assert rate == ens.history["learning_rate"][0]

    loaded = keras.models.load_model(path)
    assert float(loaded.optimizer.learning_rate) == rate
    for ours, theirs in zip(slots(loaded.optimizer), states[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    loaded.fit(x, y, verbose=0)
    assert float(loaded.optimizer.learning_rate) == rate


def test_a_model_that_is_compiled_anew_trains_with_its_new_optimizer():
    model = one_weight()
    ens = ensemble(model)
    model.compile(keras.optimizers.SGD(0.3), first_row)
    ens.fit(epochs=4, verbose=0, **arrays())
    assert members(ens) == descend(cosine(16), cosine(16))
    assert float(model.optimizer.learning_rate.numpy()) == np.float32(0.3)
