"""The learning rate of every step, bit for bit, and the restored rate of the optimizer."""

import json
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from training_cases import (
    DATA,
    FLOOR,
    OWN,
    PEAK,
    AtBatch,
    X,
    arrays,
    classifier,
    cosine,
    descend,
    ensemble,
    filtered,
    first_row,
    fitted,
    members,
    one_weight,
    raiser,
    ran_out_of_data,
    weight,
)

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble

# The rate of every step: all comparisons are exact, bit for bit


@pytest.mark.parametrize(("batch_size", "steps"), [(5, 7), (32, 1)])
def test_rate_is_exact_for_arrays(batch_size, steps):
    ens = fitted(**arrays(batch_size))
    assert members(ens) == descend(*[cosine(2 * steps)] * 2)
    assert [s.step for s in ens.snapshots] == [2 * steps, 4 * steps]


def test_members_predict_with_the_weights_of_their_cycle():
    outputs = fitted().predict_members(X, verbose=0)
    assert outputs[:, 0, 0].tolist() == descend(cosine(16), cosine(16))


def test_unequal_cycles_are_each_exact():
    ens = fitted(epochs=5)
    assert members(ens) == descend(cosine(16), cosine(24))


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize(
    ("kind", "steps_per_execution"),
    [*((kind, 7) for kind in DATA), *((kind, 1) for kind in DATA if "all steps" not in kind)],
)
def test_rate_is_exact_for_all_kinds_of_data(kind, steps_per_execution):
    arguments, one_at_a_time, seven_at_a_time = DATA[kind]
    steps = one_at_a_time if steps_per_execution == 1 else seven_at_a_time
    ens = fitted(one_weight(steps_per_execution=steps_per_execution), **arguments(), shuffle=False)
    assert [s.step for s in ens.snapshots] == [2 * steps, 4 * steps]
    assert members(ens) == descend(*[cosine(2 * steps)] * 2)


def test_an_epoch_may_be_shorter_than_a_pass_over_the_data():
    ens = fitted(steps_per_epoch=2)
    assert members(ens) == descend(cosine(4), cosine(4))


def from_generator():
    row = tf.TensorSpec((2, 1), "float32")
    rows = [(X[:2], X[:2])] * 16
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=(row, row))


@pytest.mark.sampled(3)
@ran_out_of_data
@pytest.mark.parametrize("steps_per_execution", [1, 7])
@pytest.mark.parametrize("data", [filtered, from_generator])
def test_with_unknown_length_rates_are_exact_after_the_first_epoch(data, steps_per_execution):
    model = one_weight(steps_per_execution=steps_per_execution)
    ens = fitted(model, epochs=6, x=data(), shuffle=False)
    first = np.full(16, ens.history["learning_rate"][0])
    cycle = cosine(48)
    assert [s.step for s in ens.snapshots] == [48, 96]
    assert members(ens) == descend(np.concatenate([first, cycle[16:]]), cycle)
    last = cycle[[31, 47, 15, 31, 47]].astype("float32")
    assert ens.history["learning_rate"][1:] == last.tolist()


@ran_out_of_data
def test_with_unknown_length_the_first_epoch_runs_at_its_mean_rate():
    ens = fitted(epochs=3, cycles=1, x=filtered(), shuffle=False)
    mean = cosine(3 * 10**5)[: 10**5].mean()
    assert ens.history["learning_rate"][0] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    "compile_arguments", [{"jit_compile": True}, {"run_eagerly": True}], ids=["jit", "eager"]
)
def test_rate_is_exact_in_compiled_and_eager_steps(compile_arguments):
    ens = fitted(one_weight(**compile_arguments))
    assert members(ens) == descend(cosine(16), cosine(16))


def test_gradient_accumulation_updates_with_the_rate_of_its_last_batch():
    ens = fitted(one_weight(keras.optimizers.SGD(OWN, gradient_accumulation_steps=2)))
    assert members(ens) == descend(cosine(16), cosine(16), accumulate=2)


def test_gradient_accumulation_continues_into_the_next_cycle():
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


@pytest.mark.sampled(2)
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
def test_peak_defaults_to_the_rate_of_the_optimizer(kind):
    ens = ensemble(one_weight(keras.optimizers.SGD(OPTIMIZERS[kind]())), lr_init=None)
    ens.fit(**arrays(), epochs=4, verbose=0)
    # An optimizer stores its rate as float32; the result of a callable is used as it is.
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
def test_with_unknown_length_warmup_runs_at_the_mean_rate():
    ens = ensemble(one_weight(), schedule=CosineAnnealing(2, 1.0, PEAK, FLOOR, warmup=1))
    ens.fit(filtered(), epochs=2, verbose=0, shuffle=False)
    first = ens.history["learning_rate"][0]
    assert first == pytest.approx((PEAK + FLOOR) / 2, rel=1e-2)
    assert members(ens) == descend(np.concatenate([np.full(16, first), cosine(16)]))


def test_with_initial_epoch_the_remaining_epochs_are_planned():
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
import training_cases as t

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
    # Devices must be configured before TensorFlow starts, which needs a new process.
    tests = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", MIRRORED, str(tests)]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# The optimizer's own rate, after `fit`


def check_own_rate(model, kind, rate):
    """The optimizer has its own rate again, and `fit` trains with it."""
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
def test_rate_is_exact_and_the_optimizers_own_is_restored(kind):
    rate = OPTIMIZERS[kind]()
    model = one_weight(keras.optimizers.SGD(rate))
    assert members(fitted(model)) == descend(cosine(16), cosine(16))
    check_own_rate(model, kind, rate)


@pytest.mark.parametrize(
    ("kind", "error"), [("number", KeyboardInterrupt), ("schedule", RuntimeError)]
)
def test_own_rate_is_restored_after_an_exception(kind, error):
    rate = OPTIMIZERS[kind]()
    model = one_weight(keras.optimizers.SGD(rate))
    with pytest.raises(error):
        fitted(model, callbacks=[AtBatch(2, 5, raiser(error))])
    assert "train_step" not in vars(model)
    check_own_rate(model, kind, rate)


@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_optimizer_variables_are_not_replaced(kind):
    model = one_weight(keras.optimizers.Adam(OPTIMIZERS[kind]()))
    model.optimizer.build(model.trainable_variables)
    before = model.optimizer.variables
    fitted(model)
    assert list(map(id, model.optimizer.variables)) == list(map(id, before))


@pytest.mark.slow
def test_an_optimizer_with_a_schedule_has_the_variables_that_keras_gives_it():
    names = []
    for fit in (fitted, lambda model: model.fit(**arrays(), verbose=0)):
        keras.backend.clear_session()  # Resets the numbering of names.
        model = one_weight(keras.optimizers.Adam(OPTIMIZERS["schedule"]()))
        fit(model)
        names.append([variable.path for variable in model.optimizer.variables])
    assert names[0] == names[1]


# Checkpoints written by other callbacks


def slots(optimizer):
    """The optimizer's state except for its rate."""
    return [v.numpy() for v in optimizer.variables if v.name != "learning_rate"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["number", "schedule"])
def test_a_checkpoint_during_training_has_an_ordinary_optimizer(tmp_path, data, kind):
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


def test_a_recompiled_model_trains_with_its_new_optimizer():
    model = one_weight()
    ens = ensemble(model)
    model.compile(keras.optimizers.SGD(0.3), first_row)
    ens.fit(epochs=4, verbose=0, **arrays())
    assert members(ens) == descend(cosine(16), cosine(16))
    assert float(model.optimizer.learning_rate.numpy()) == np.float32(0.3)
