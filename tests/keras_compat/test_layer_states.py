"""Contract: which variables of layers are states, and how a scope stands in for them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from snapshot_ensemble.keras_compat.layer_states import recurrent_states, state_variables
from snapshot_ensemble.keras_compat.random_seed import global_seed
from snapshot_ensemble.keras_compat.stateless_call import OwnStates, draws_noticed, with_weights

X = np.ones((2, 3, 4), "float32")


@pytest.fixture
def model():
    cell = layers.StackedRNNCells([layers.LSTMCell(2), layers.GRUCell(2)])
    inside = [layers.RNN(cell, stateful=True), layers.Dropout(0.5)]
    return keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), *inside])


def test_states_are_no_weights(model):
    states = state_variables(model)
    assert len(recurrent_states(model)) == 3
    assert not {id(v) for v in states} & {id(v) for v in model.weights}
    assert {id(v) for v in model.variables} <= {id(v) for v in [*states, *model.weights]}


def test_other_states_are_read_and_changed_instead(model):
    states = state_variables(model)
    before = [state.numpy() for state in states]
    own = OwnStates(states, [np.zeros(state.shape) for state in states])
    with with_weights(model, model.get_weights(), own.values):
        model(X, training=True)
        assert states[-1].value.numpy().any()
    assert own.values[-1].numpy().any()
    for state, value in zip(states, before, strict=True):
        np.testing.assert_array_equal(state.numpy(), value)
    assert not {id(v) for v in own.values} & {id(v) for v in model.variables}


@pytest.mark.parametrize("given", [True, False])
def test_the_global_generator_advances_only_where_states_are_given(model, given):
    keras.random.normal((1,))
    before = global_seed()
    states = state_variables(model) if given else None
    with with_weights(model, model.get_weights(), states):
        keras.random.normal((1,))
    assert np.array_equal(global_seed(), before) is not given


DRAWS = {
    "a generator": lambda: keras.random.normal((1,)),
    "TensorFlow": lambda: tf.random.normal((1,)),
    "TensorFlow's generator": lambda: tf.random.get_global_generator().normal((1,)),
    "a function": lambda: tf.function(tf.random.normal)((1,)),
    "a loop": lambda: tf.map_fn(lambda x: x + tf.random.normal(()), tf.zeros(2)),
    "Python": lambda: tf.py_function(lambda: 0.0, (), tf.float32),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_noticed_in_graphs(model, kind):
    tf.random.get_global_generator()
    weights, states, noticed = model.get_weights(), state_variables(model), []

    @tf.function(autograph=False)
    def run():
        with with_weights(model, weights, states):
            with draws_noticed() as nothing:
                tf.map_fn(lambda x: 2 * x, tf.zeros(2))
            with draws_noticed() as something:
                DRAWS[kind]()
        noticed.extend([list(nothing), list(something)])

    run()
    assert not noticed[0]
    assert noticed[1]
