"""A model made anew is compared with the original."""

import keras
import numpy as np
import pytest

from snapshot_ensemble.inference.rebuilt import are_close, computes_the_same


@keras.saving.register_keras_serializable("tests")
class RandomMask(keras.layers.Layer):
    """As in Keras's neural decision forest: a constant that is drawn in the constructor."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.mask = np.random.default_rng().random(4) > 0.5

    def call(self, x):
        return x * self.mask.astype("float32")


def built(*layers):
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3)])
    return model, keras.Sequential.from_config(model.get_config())


@pytest.mark.parametrize("sample", [None, np.ones((3, 4), "float32")])
def test_the_same_weights_give_the_same_outputs(sample):
    model, rebuilt = built()
    rebuilt.set_weights(model.get_weights())
    assert computes_the_same(model, model.get_weights(), rebuilt, sample)
    rebuilt.set_weights([weight + 0.1 for weight in model.get_weights()])
    assert not computes_the_same(model, model.get_weights(), rebuilt, sample)
    # The weights that are passed count, not those that the model has.
    assert computes_the_same(model, rebuilt.get_weights(), rebuilt, sample)


def test_a_lost_constant_shows():
    model, rebuilt = built(RandomMask())
    rebuilt.set_weights(model.get_weights())
    rebuilt.layers[0].mask = ~model.layers[0].mask
    assert not computes_the_same(model, model.get_weights(), rebuilt)
    rebuilt.layers[0].mask = model.layers[0].mask
    assert computes_the_same(model, model.get_weights(), rebuilt)


def test_both_draw_the_same_random_numbers_and_neither_changes():
    functional = []
    for _ in range(2):
        inputs = keras.Input((4,))
        outputs = keras.layers.Dropout(0.5)(inputs, training=True)
        functional.append(keras.Model(inputs, keras.layers.Dense(3)(outputs)))
    model, rebuilt = functional
    rebuilt.set_weights(model.get_weights())
    before = [v.numpy() for m in functional for v in m.variables]
    assert computes_the_same(model, model.get_weights(), rebuilt)
    for old, variable in zip(before, [v for m in functional for v in m.variables], strict=True):
        np.testing.assert_array_equal(old, variable.numpy())


def test_a_sample_that_the_model_cannot_predict_is_replaced_by_a_made_up_batch():
    model, rebuilt = built()
    rebuilt.set_weights(model.get_weights())
    assert computes_the_same(model, model.get_weights(), rebuilt, np.ones((2, 7), "float32"))


def test_a_rebuilt_model_that_fails_computes_something_else():
    model, _ = built()
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    assert not computes_the_same(model, model.get_weights(), other)


@pytest.mark.parametrize(
    ("one", "other", "close"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1.0, np.inf]), np.array([1.0, np.inf]), True),
        (np.array([1.0, 2.0]), np.array([1.0, 2.001]), False),
        (np.array([1000.0]), np.array([1000.01]), True),
        (np.array([1.0], "float16"), np.array([1.01], "float16"), True),
        (np.array([1]), np.array([2]), False),
        (np.array([1]), np.array([1.0]), False),
        (np.array(["a"]), np.array(["a"]), True),
        ([np.ones(2)], [np.ones(2), np.ones(2)], False),
        (np.ones(2), np.ones(3), False),
    ],
)
def test_what_is_close(one, other, close):
    assert are_close(one, other) is close
