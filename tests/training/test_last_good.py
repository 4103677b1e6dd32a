"""`fit(keep_going=True)`: where training starts again after a cycle that gives no member."""

import keras
import numpy as np
import pytest
from keras import layers
from models import SimulatedCrashError, assert_close, assert_same, member_weights, three_classes

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.weight_delta import as_bits
from snapshot_ensemble.training.last_good import LastGood

X, Y = three_classes(16)
BATCH, STEPS = 8, 2
o = keras.optimizers

OPTIMIZERS = {
    "Adadelta": o.Adadelta,
    "Adafactor": o.Adafactor,
    "Adagrad": lambda: o.Adagrad(initial_accumulator_value=0.3),
    "Adam": o.Adam,
    "Adam with amsgrad": lambda: o.Adam(amsgrad=True),
    "AdamW": o.AdamW,
    "Adamax": o.Adamax,
    "Ftrl": o.Ftrl,
    "Lamb": o.Lamb,
    "Lion": o.Lion,
    "Muon": o.Muon,
    "Nadam": o.Nadam,
    "RMSprop": lambda: o.RMSprop(momentum=0.9, centered=True),
    "SGD": o.SGD,
    "SGD with momentum": lambda: o.SGD(momentum=0.9),
    "ScheduleFreeAdamW": getattr(o, "ScheduleFreeAdamW", None),
    "moving averages": lambda: o.Adam(use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "accumulation": lambda: o.Adam(gradient_accumulation_steps=2),
    "loss scale": lambda: o.LossScaleOptimizer(o.Adam(), initial_scale=64.0),
    "schedule": lambda: o.SGD(o.schedules.ExponentialDecay(0.1, 5, 0.9), momentum=0.9),
}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if make is not None}


def network(make, built=True, eager=True):
    keras.utils.set_random_seed(3)
    inside = [layers.BatchNormalization(), layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((4,)), *inside] if built else inside)
    model.compile(make(), "sparse_categorical_crossentropy", run_eagerly=eager)
    return model


class Spoil(keras.callbacks.Callback):
    """Makes the weights and the optimizer's slots NaN, in the middle of some epochs."""

    def __init__(self, *epochs):
        super().__init__()
        self.epochs, self.now = epochs, None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now in self.epochs and batch == 1:
            optimizer = self.model.optimizer
            for variable in (*self.model.weights, *optimizer.variables):
                if "float" in variable.dtype and variable is not optimizer.learning_rate:
                    variable.assign(np.full(variable.shape, np.nan))


def ensemble(model, cycles=3, **arguments):
    return SnapshotEnsemble(model, cycles=cycles, lr_init=0.05, shrink=1.0, **arguments)


def fit(ens, *callbacks, **arguments):
    arguments = {"epochs": ens.schedule.cycles, "keep_going": True, **arguments}
    data = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    return ens.fit(X, Y, callbacks=list(callbacks), **data, **arguments)


def trained_by_keras(model, plan, cycles):
    """The weights at the end of some cycles of a plan, as Keras trains them one after another."""
    ends = []
    for cycle in cycles:
        for step, rate in enumerate(plan[cycle].rates(STEPS)):
            rows = slice(step % STEPS * BATCH, (step % STEPS + 1) * BATCH)
            model.optimizer.learning_rate = rate
            model.train_on_batch(X[rows], Y[rows])
        ends.append(model.get_weights())
    return ends


def assert_members(ens, expected):
    for actual, weights in zip(member_weights(ens), expected, strict=True):
        for one, other in zip(actual, weights, strict=True):
            assert_close(one, other)
            assert np.isfinite(one).all()


def check_after_the_first_cycle(make, **arguments):
    ens = ensemble(network(make, **arguments), 2)
    with pytest.warns(UserWarning, match=r"Cycle 0 gives no member: .*Kept: 0 members\. The next"):
        fit(ens, Spoil(0))
    if make is OPTIMIZERS["schedule"]:
        make = OPTIMIZERS["SGD with momentum"]  # `trained_by_keras` sets the rate.
    assert_members(ens, trained_by_keras(network(make), ens.plan(2), [1]))


@pytest.mark.sampled(8, 3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_the_first_cycle_training_starts_anew(name):
    check_after_the_first_cycle(OPTIMIZERS[name], built=False)


@pytest.mark.parametrize("name", ["Adam", "SGD with momentum"])
def test_so_it_does_with_a_built_model(name):
    check_after_the_first_cycle(OPTIMIZERS[name], built=True)


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("name", ["Adam", "loss scale", "accumulation"])
def test_so_it_does_in_a_graph(name):
    check_after_the_first_cycle(OPTIMIZERS[name], built=False, eager=False)


def test_after_another_cycle_training_starts_from_the_end_of_the_last_good_one():
    ens = ensemble(network(o.Adam))
    with pytest.warns(UserWarning, match=r"Cycle 1 gives no member: .*starts from the state bef"):
        fit(ens, Spoil(1))
    assert_members(ens, trained_by_keras(network(o.Adam), ens.plan(3), [0, 2]))


def test_after_two_cycles_in_a_row_too():
    ens = ensemble(network(o.Adam))
    with pytest.warns(UserWarning, match=r"Cycle [01] gives no member"):
        fit(ens, Spoil(0, 1))
    assert_members(ens, trained_by_keras(network(o.Adam), ens.plan(3), [2]))


@pytest.mark.slow
def test_a_second_fit_goes_back_to_its_own_start():
    ens = ensemble(network(o.Adam))
    fit(ens)
    with pytest.warns(UserWarning, match="Cycle 3 gives no member"):
        fit(ens, Spoil(0))
    assert_members(ens, trained_by_keras(network(o.Adam), ens.plan(3), [0, 1, 2, 1, 2]))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("built", [True, False], ids=["built", "not built"])
def test_alone_it_changes_nothing(built):
    ends = []
    for keep_going in (False, True):
        ens = ensemble(network(o.Adam, built))
        fit(ens, keep_going=keep_going)
        ends.append(member_weights(ens))
    assert_same(*ends)


class CrashIn(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise SimulatedCrashError


# Cycles of two epochs.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Cycle . gives no member:UserWarning")
@pytest.mark.parametrize(
    ("name", "spoiled", "crashed"),
    [("Adam", 0, 1), ("loss scale", 0, 1), ("Adam", 1, 2), ("Adam", 2, 3), ("Adam", 3, 3)],
)
def test_a_resumed_run_goes_back_to_the_same_state(name, spoiled, crashed, tmp_path):
    def run(directory, crash=None, resume=False):
        ens = ensemble(network(OPTIMIZERS[name], built=False), 3, directory=directory)
        fit(ens, Spoil(spoiled), CrashIn(crash), epochs=6, resume=resume)
        return ens

    expected = member_weights(run(None))
    with pytest.raises(SimulatedCrashError):
        run(tmp_path / "run", crashed)
    actual = member_weights(run(tmp_path / "run", resume=True))
    assert len(actual) == 2
    assert_same(actual, expected)
    assert all(np.isfinite(array).all() for weights in actual for array in weights)


def test_weights_that_numpy_cannot_store_are_saved_as_bits():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="bfloat16")])
    model.compile("adam", "mse")
    expected = model.get_weights()
    good = LastGood.of(model)
    assert good.packed(model) is None
    model.set_weights([np.full(array.shape, np.nan) for array in expected])
    saved = [as_bits(value) if value.ndim else value.item() for value in good.packed(model)]
    assert LastGood.unpacked(model, saved).restore(model) == ""
    assert_same(model.get_weights(), expected)


# Nothing to go back to


def stops(ens, message, *callbacks, **arguments):
    with pytest.warns(
        UserWarning, match=r"Cycle 0 gives no member: .* Training stops\. " + message
    ):
        history = fit(ens, *callbacks, **arguments)
    assert history.epoch == [0]
    assert len(ens) == 0


class Auxiliary(keras.Model):
    """Has a layer that runs only in training."""

    def __init__(self):
        super().__init__()
        self.head, self.extra = layers.Dense(3, "softmax"), layers.Dense(3, name="extra")

    def call(self, x, training=False):
        return self.head(x) + (self.extra(x) if training else 0)


@pytest.mark.filterwarnings("ignore:`build... was called on layer")
def test_weights_that_are_created_in_the_first_step_are_not_known_before():
    model = Auxiliary()
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    ens = ensemble(model, task="multiclass")
    stops(
        ens, r"The state before it is not known, .*/extra/kernel was created later\. Call", Spoil(0)
    )


class Own(keras.optimizers.SGD):
    def __init__(self, needed):
        super().__init__(0.1, momentum=0.9)

    def get_config(self):
        return super().get_config()


def test_an_optimizer_that_cannot_be_made_from_its_config():
    ens = ensemble(network(lambda: Own(1)))
    stops(ens, r"The optimizer cannot begin anew, .*Received: Own: .*argument", Spoil(0))


def test_weights_that_were_not_finite_before():
    model = network(o.Adam)
    model.layers[-1].set_weights([np.full((4, 3), np.nan), np.zeros(3)])
    stops(ensemble(model), r"The state before it is not finite either: its weights are not finite")
