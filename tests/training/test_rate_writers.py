"""Callbacks and training steps that set the learning rate, which follows the plan."""

import warnings

import keras
import numpy as np
import pytest
from training_cases import OWN, X, arrays, cosine, descend, ensemble, members, one_weight

HOOKS = [
    "on_train_begin",
    "on_epoch_begin",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_batch_end",
    "on_epoch_end",
    "on_train_end",
]
WRITES = {
    "number": lambda optimizer: setattr(optimizer, "learning_rate", 5.0),
    "assign": lambda optimizer: optimizer.learning_rate.assign(5.0),
    "assign_add": lambda optimizer: optimizer.learning_rate.assign_add(1.0),
    "decay": lambda optimizer: setattr(
        optimizer, "learning_rate", float(optimizer.learning_rate) * 0.5
    ),
}
MESSAGE = r"{} sets the learning rate, which has no effect.*Received: callbacks with {}\. Leave"


def callback(hook, write):
    def run(self, *_, **__):
        write(self.model.optimizer)

    return type("HandWritten", (keras.callbacks.Callback,), {hook: run})()


def fit(model, callbacks):
    ens = ensemble(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ens.fit(**arrays(), epochs=4, verbose=0, validation_data=(X, X), callbacks=callbacks)
    return ens, [str(w.message) for w in caught if "learning rate" in str(w.message)]


# Each hook and each way to write meets both kinds of rates.
CASES = [
    (hook, write, (i + j) % 2 == 0)
    for i, hook in enumerate(HOOKS)
    for j, write in enumerate(WRITES)
]


@pytest.mark.sampled(16, 3)
@pytest.mark.parametrize(("hook", "write", "schedule"), CASES)
def test_a_callback_that_sets_the_rate_is_named_once(hook, write, schedule):
    own = keras.optimizers.schedules.ExponentialDecay(OWN, 10, 0.5) if schedule else OWN
    model = one_weight(keras.optimizers.SGD(own))
    ens, warned = fit(model, [callback(hook, WRITES[write])])
    assert len(warned) == 1
    assert "HandWritten sets the learning rate, which has no effect" in warned[0]
    assert members(ens) == descend(cosine(16), cosine(16))
    expected = np.float32(cosine(16)[[7, 15, 7, 15]]).tolist()
    assert ens.history["learning_rate"] == expected
    assert [s.learning_rate for s in ens.snapshots] == expected[1::2]
    if schedule:
        assert model.optimizer._learning_rate is own
    else:
        assert float(model.optimizer.learning_rate) == np.float32(OWN)
    # Afterwards, the rate can be set again.
    assert "assign" not in vars(model.optimizer._learning_rate)


def test_several_callbacks_are_each_named_and_others_are_not():
    model = one_weight()
    one = callback("on_epoch_begin", WRITES["number"])
    by_function = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: WRITES["assign"](model.optimizer)
    )
    reader = callback("on_epoch_end", lambda optimizer: float(optimizer.learning_rate))
    _, warned = fit(model, [one, reader, by_function])
    assert [text.split()[0] for text in warned] == ["HandWritten", "LambdaCallback"]


def test_the_warning_says_what_to_do():
    with pytest.warns(UserWarning, match=MESSAGE.format("HandWritten", "HandWritten")):
        ensemble(one_weight()).fit(
            **arrays(), epochs=2, verbose=0, callbacks=[callback("on_epoch_end", WRITES["number"])]
        )


class SetsItself(keras.Sequential):
    def train_step(self, data):
        self.optimizer.learning_rate.assign(5.0)
        return super().train_step(data)


@pytest.mark.parametrize("eager", [False, True])
def test_a_training_step_that_sets_the_rate_is_refused_before_its_first_step(eager):
    model = one_weight(model_type=SetsItself, run_eagerly=eager)
    ens = ensemble(model)
    message = r"`train_step` must not set it\. Received: a `train_step` that assigns.*Leave that"
    with pytest.raises(ValueError, match=message):
        ens.fit(**arrays(), epochs=2, verbose=0)
    assert model.get_weights() == [0]
    assert len(ens) == 0
    assert float(model.optimizer.learning_rate) == np.float32(OWN)


@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_begin", "on_epoch_end"])
@pytest.mark.parametrize("own", [OWN, keras.optimizers.schedules.ExponentialDecay(OWN, 10, 0.5)])
def test_a_callback_that_replaces_the_rate_by_a_schedule_is_an_error(hook, own):
    other = keras.optimizers.schedules.CosineDecay(0.5, 100)
    model = one_weight(keras.optimizers.SGD(own))
    names = [variable.name for variable in model.optimizer.variables]
    replace = callback(hook, lambda optimizer: setattr(optimizer, "learning_rate", other))
    with pytest.raises(ValueError, match=r"nothing may replace it.*to CosineDecay\. Leave it out"):
        ensemble(model).fit(**arrays(), epochs=4, verbose=0, callbacks=[replace])
    assert [variable.name for variable in model.optimizer.variables] == names
    if own is OWN:
        assert float(model.optimizer.learning_rate) == np.float32(OWN)
    else:
        assert model.optimizer._learning_rate is own
