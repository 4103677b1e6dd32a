"""Contract tests for private names of the training step, and for patches of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapshot_ensemble.keras_compat import epoch_iterator, random_seed, train_step

X, Y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")


def compiled(**arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **arguments)
    return model


@pytest.mark.parametrize("arguments", [{}, {"steps_per_execution": 2}, {"jit_compile": True}])
def test_before_each_step_runs_in_the_graph(arguments):
    model, calls = compiled(**arguments), []
    count = keras.Variable(0, dtype="int32", trainable=False)

    def action():
        calls.append(1)
        count.assign_add(1)

    with train_step.before_each_step(model, action):
        model.fit(X, Y, batch_size=2, epochs=3, verbose=0)
    assert int(count) == 12
    assert len(calls) < 12  # Traced, not called from Python at each step.
    assert "train_step" not in vars(model)
    model.fit(X, Y, batch_size=2, verbose=0)
    assert int(count) == 12


def test_a_train_step_set_on_the_instance_is_restored():
    model = compiled()
    own = model.train_step
    model.train_step = own
    with train_step.before_each_step(model, lambda: None):
        assert model.train_step is not own
    assert model.train_step is own


def test_the_next_fit_is_noticed():
    model, begun = compiled(), []
    with train_step.next_fit_noticed(model, lambda: begun.append(1)):
        model.fit(X, Y, verbose=0)
        train_step.remake_train_function(model)
        assert begun == [1]
    assert "make_train_function" not in vars(model)


def test_the_train_function_can_be_remade_during_fit():
    model, steps = compiled(run_eagerly=True), []

    class Swap(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                own = self.model.train_step
                self.model.train_step = lambda data: steps.append(1) or own(data)
                train_step.remake_train_function(self.model)

    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[Swap()])
    assert len(steps) == 2


def test_training_passes_are_noticed_and_others_are_not():
    model, passes = compiled(), []
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)
    with epoch_iterator.training_passes_noticed(lambda: passes.append(1)):
        model.fit(data, epochs=3, validation_data=data, verbose=0, shuffle=False)
        noticed = len(passes)
    # Keras begins one or two passes per epoch.
    assert 3 <= noticed <= 6
    model.fit(data, verbose=0, shuffle=False)
    assert len(passes) == noticed


def test_the_global_seed():
    keras.utils.clear_session()
    assert random_seed.global_seed() is None
    keras.random.normal((2,))
    state = random_seed.global_seed()
    one = np.asarray(keras.random.normal((2,)))
    random_seed.set_global_seed(state)
    np.testing.assert_array_equal(keras.random.normal((2,)), one)


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_the_first_batch_is_noticed_without_another_trace_or_read(steps_per_execution):
    traces, read, noticed = [], [], []

    class Model(keras.Sequential):
        def train_step(self, data):
            traces.append(data)
            return super().train_step(data)

    def batches():
        for i in range(6):
            read.append(i)
            yield np.full((2, 4), i, "float32"), np.zeros((2, 1), "float32")

    model = Model([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
    notice = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: train_step.notice_first_batch(model, noticed.append)
    )
    model.fit(batches(), steps_per_epoch=6, verbose=0, shuffle=False, callbacks=[notice])
    assert [batch[0].numpy()[0, 0] for batch in noticed] == [0]
    assert len(traces) == 1
    assert model.optimizer.iterations.numpy() == 6
    assert read == list(range(6))


def test_is_traced():
    assert not train_step.is_traced()
    assert tf.function(train_step.is_traced)()
