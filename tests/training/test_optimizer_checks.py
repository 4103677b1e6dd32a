"""The rate that is annealed is the one that trains; else `fit` and `find_lr` say so."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers
from training_cases import OWN, PEAK, X, arrays, cosine, ensemble, members, one_weight

from snapshot_ensemble import SnapshotEnsemble


class Own(keras.Sequential):
    """A model with a training step of its own, which uses `optimizers_used`."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.apply_with(gradients)
        return {"loss": loss}

    def apply_with(self, gradients):
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))


class Gan(Own):
    """As in Keras's examples: `compile` takes two optimizers, and Keras's own is unused."""

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile(loss="mse")
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn

    def apply_with(self, gradients):
        for optimizer in (self.d_optimizer, self.g_optimizer):
            optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))


class InAList(Own):
    def compile(self, *given, **arguments):
        super().compile(*given, **arguments)
        self.more = {"others": [optimizers.Adam()]}


def made(kind):
    return one_weight(model_type=kind)


def gan():
    model = Gan([keras.Input((1,)), layers.Dense(1)])
    model.compile(optimizers.Adam(), optimizers.SGD(), "mse")
    return model


def multi(selector=None):
    chosen = selector or optimizers.OptimizerMap(optimizers.SGD(OWN))
    return one_weight(optimizers.MultiOptimizer(chosen))


class Wrapper(optimizers.SGD):
    def __init__(self, wrapped):
        super().__init__(OWN)
        self.wrapped = wrapped


SEVERAL = {
    "a GAN": (gan, "compiled with RMSprop, and Adam, SGD in its attributes"),
    "in containers": (lambda: made(InAList), "compiled with SGD, and Adam in its attributes"),
    "MultiOptimizer": (multi, "optimizer=MultiOptimizer"),
    "by a function": (lambda: multi(lambda v: optimizers.SGD()), "optimizer=MultiOptimizer"),
    "a wrapper": (lambda: one_weight(Wrapper(optimizers.SGD())), "optimizer=Wrapper"),
}


def unchanged(model, run, error, message):
    before = [np.array(a) for a in model.get_weights()]
    with pytest.raises(error, match=message):
        run()
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_optimizers_are_refused_before_training(kind):
    make, received = SEVERAL[kind]
    model = make()
    message = rf"one optimizer is annealed.*Received: .*{received}\. Compile the model with one"
    ens = ensemble(model)
    unchanged(model, lambda: ens.fit(**arrays(), epochs=2, verbose=0), ValueError, message)
    unchanged(model, lambda: ens.find_lr(X, X), ValueError, message)
    without_peak = SnapshotEnsemble(model, task="regression")
    unchanged(model, lambda: without_peak.plan(5), ValueError, message)
    assert len(ens) == 0


def test_other_optimizers_of_a_stock_training_step_are_ignored():
    model = one_weight()
    model.unused = optimizers.Adam()
    ens = ensemble(model)
    ens.fit(**arrays(), epochs=4, verbose=0)
    assert members(ens)[0] == pytest.approx(-cosine(16).sum(), rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_compiled_optimizer_may_be_an_attribute_too(scaled):
    model = made(Own)
    model.mine = optimizers.SGD(OWN)
    model.compile(optimizers.LossScaleOptimizer(model.mine) if scaled else model.mine, "mse")
    ens = ensemble(model)
    history = ens.fit(**arrays(), epochs=4, verbose=0).history
    assert history["learning_rate"] == np.float32(cosine(16)[[7, 15, 7, 15]]).tolist()


class ByHand(Own):
    """Never applies gradients with an optimizer."""

    def apply_with(self, gradients):
        for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.01 * gradient)


class Hidden(Own):
    """Trains with an optimizer that is in no attribute of the model."""

    hidden = (optimizers.SGD(OWN),)

    def apply_with(self, gradients):
        type(self).hidden[0].apply_gradients(zip(gradients, self.trainable_variables, strict=True))


class OwnFunction(Own):
    """A training function that does not call `train_step`."""

    def make_train_function(self, force=False):
        @tf.function
        def train(iterator):
            data = next(iterator)
            return Own.train_step(self, data)

        self.train_function = train


class Inner(Own):
    """Trains with the optimizer of a model inside, and with its own."""

    both = True

    def apply_with(self, gradients):
        inside = self.layers[0]
        inside.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        if self.both:
            super().apply_with(gradients)


def inner(both):
    model = Inner([keras.Input((1,)), one_weight(optimizers.SGD(OWN))])
    model.both = both
    model.compile(optimizers.Adam(), "mse")
    return model


def hidden():
    Hidden.hidden = (optimizers.SGD(OWN),)
    return made(Hidden)


STOOD_STILL = {
    "by hand": (lambda: made(ByHand), "SGD took no step in the first epoch; no optimizer of"),
    "hidden": (hidden, "SGD took no step in the first epoch; no optimizer of the model did"),
    "own function": (lambda: made(OwnFunction), "SGD took no step in the first epoch"),
    "inner": (lambda: inner(both=False), "Adam took no step in the first epoch; SGD did"),
    "both": (lambda: inner(both=True), "Adam took steps in the first epoch; SGD took steps, too"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", STOOD_STILL)
def test_a_rate_that_does_not_train_is_noticed_after_the_first_epoch(kind, tmp_path):
    make, received = STOOD_STILL[kind]
    ens = ensemble(make(), directory=tmp_path / "run")
    epochs = []
    seen = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: epochs.append(epoch))
    message = rf"annealed is not the one that trains\. Received: .*{received}.*Compile the model"
    with pytest.raises(RuntimeError, match=message):
        ens.fit(**arrays(), epochs=4, verbose=0, callbacks=[seen])
    assert epochs == [0]
    assert len(ens) == 0
    assert ens.history == {}
    assert not (tmp_path / "run").exists()
    assert float(ens.model.optimizer.learning_rate) != PEAK


def test_find_lr_notices_it_too():
    with pytest.raises(RuntimeError, match="annealed is not the one that trains"):
        ensemble(made(ByHand)).find_lr(X, X, batch_size=4, steps=10)


class Recording(Own):
    """Records the rate that the optimizer's variable has in each step."""

    def build(self, shape):
        super().build(shape)
        self.seen = self.add_weight(shape=(64,), trainable=False, initializer="zeros")

    def apply_with(self, gradients):
        step = keras.ops.cast(self.optimizer.iterations, "int32")
        rate = keras.ops.cast(self.optimizer.learning_rate, "float32")
        self.seen.assign_add(keras.ops.one_hot(step, 64) * rate)
        super().apply_with(gradients)


@pytest.mark.sampled(2, 2)
@pytest.mark.parametrize("kind", ["plain", "accumulation", "loss scale", "eager"])
def test_the_rate_inside_a_training_step_of_its_own_is_that_of_the_plan(kind):
    model = made(Recording)
    accumulated = {"gradient_accumulation_steps": 100} if kind == "accumulation" else {}
    optimizer = optimizers.SGD(OWN, **accumulated)
    if kind == "loss scale":
        optimizer = optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse", run_eagerly=kind == "eager")
    ens = ensemble(model)
    ens.fit(**arrays(), epochs=4, verbose=0)
    if kind != "accumulation":  # Its `iterations` stand still.
        np.testing.assert_array_equal(model.seen[:32], np.float32([*cosine(16), *cosine(16)]))
    assert len(ens) == 2


def test_a_model_without_trainable_weights_is_left_to_keras():
    model = one_weight()
    model.trainable = False
    model.compile("sgd", "mse")
    ens = ensemble(model)
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        ens.fit(**arrays(), epochs=2, verbose=0)
    assert len(ens) == 2


# The compiled rate as the peak


WARMUP = optimizers.schedules.CosineDecay(0.0, 100, warmup_target=0.25, warmup_steps=10)


@pytest.mark.parametrize(
    ("rate", "received", "peak"),
    [
        (WARMUP, "CosineDecay", 0.25),
        (optimizers.schedules.PolynomialDecay(0.0, 10, 0.1), "PolynomialDecay", 0.1),
        (lambda: 0.0, "function", 0.1),
        (0.0, "0", 0.1),
    ],
    ids=["warmup", "polynomial", "function", "number"],
)
def test_a_compiled_rate_that_starts_at_0_is_no_peak(rate, received, peak):
    model = one_weight(optimizers.SGD(rate))
    ens = SnapshotEnsemble(model, cycles=2, task="regression")
    message = (
        rf"compiled with cannot be the peak.*starts at 0\. Received: learning_rate={received}\. "
        rf"Pass the peak as `lr_init`, such as lr_init={peak}\."
    )
    unchanged(model, lambda: ens.fit(**arrays(), epochs=2, verbose=0), ValueError, message)
    with pytest.raises(ValueError, match=message):
        ens.plan(2)
    given = ensemble(model, lr_init=peak)
    given.fit(**arrays(), epochs=2, verbose=0)
    assert members(given)[0] == pytest.approx(-cosine(8, peak).sum(), rel=1e-5)
