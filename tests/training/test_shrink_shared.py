"""Restarts of models whose layers share weights: each variable is mixed once."""

import keras
import numpy as np
import pytest
from keras import layers

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.training.shrink_perturb import Part, Restarter, check_shrink

X = np.ones((4, 4), "float32")


def dense(name):
    return layers.Dense(4, name=name)


def in_two_nested_models():
    shared = dense("shared")
    inputs = keras.Input((4,))
    one = keras.Model(inputs, dense("a")(shared(inputs)), name="one")
    other = keras.Model(inputs, dense("b")(shared(inputs)), name="other")
    return keras.Model(inputs, layers.add([one(inputs), other(inputs)]))


def beside_a_nested_model():
    shared = dense("shared")
    inside = keras.Sequential([keras.Input((4,)), shared], name="inside")
    return keras.Sequential([keras.Input((4,)), shared, inside])


def nested_model_called_twice():
    inside = keras.Sequential([keras.Input((4,)), dense("shared")], name="inside")
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.add([inside(inputs), inside(inside(inputs))]))


def layer_called_twice():
    shared, inputs = dense("shared"), keras.Input((4,))
    return keras.Model(inputs, shared(shared(inputs)))


class UnderTwoNames(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = self.second = dense("shared")
        self.every = [self.first, dense("other")]
        self.by_name = {"shared": self.first, "more": [self.every[1], self.first]}

    def call(self, x):
        return self.by_name["more"][0](self.second(self.first(x)))


class InABlockWithoutConfig(keras.Model):
    """Two blocks that hold the same layer, and cannot be recreated themselves."""

    class Block(layers.Layer):
        def __init__(self, inside):
            super().__init__()
            self.inside = [inside]

        def call(self, x):
            return self.inside[0](x)

    def __init__(self):
        super().__init__()
        shared = dense("shared")
        self.one, self.other = self.Block(shared), self.Block(shared)

    def call(self, x):
        return self.one(x) + self.other(x)


@keras.saving.register_keras_serializable("test_shrink_shared")
class Tied(layers.Layer):
    """A layer that can be recreated, with a layer inside that others may use too."""

    def __init__(self, inside=None, **kwargs):
        super().__init__(**kwargs)
        self.inside = dense("shared") if inside is None else inside

    def get_config(self):
        return {"name": self.name}

    def build(self, shape):
        if not self.inside.built:
            self.inside.build(shape)

    def call(self, x):
        return self.inside(x)


class TiedWeights(keras.Model):
    def __init__(self):
        super().__init__()
        self.shared = dense("shared")
        self.tied = Tied(self.shared, name="tied")

    def call(self, x):
        return self.tied(self.shared(x))


MODELS = [
    in_two_nested_models,
    beside_a_nested_model,
    nested_model_called_twice,
    layer_called_twice,
    UnderTwoNames,
    InABlockWithoutConfig,
    TiedWeights,
]


def made(kind, trainable=True):
    model = kind()
    model(X)
    for variable in model.weights:  # Nothing that initializers give.
        variable.assign(np.full(variable.shape, 8.0))
    return model


@pytest.fixture
def draws_of_two(monkeypatch):
    """Every new draw is 2."""
    draw = Part.draw
    monkeypatch.setattr(Part, "draw", lambda part: [np.full_like(a, 2) for a in draw(part)])


@pytest.mark.usefixtures("draws_of_two")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shrink", [0.5, 0.25])
def test_each_variable_is_mixed_once(kind, shrink):
    model = made(kind)
    assert Restarter(shrink).restart(model, Progress()) == shrink
    for value in model.get_weights():
        np.testing.assert_array_equal(value, np.full_like(value, shrink * 8 + (1 - shrink) * 2))


@pytest.mark.usefixtures("draws_of_two")
@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_shared_layer_is_carried_over(kind):
    model = made(kind)
    model.trainable = False
    Restarter(0.5).restart(model, Progress())
    assert all((value == 8).all() for value in model.get_weights())


@pytest.mark.usefixtures("draws_of_two")
@pytest.mark.parametrize(
    ("shrink", "expected"),
    [
        ({"one": 0.5}, {"shared": 5, "a": 5, "b": 8}),
        ({"other": 0.5}, {"shared": 5, "a": 8, "b": 5}),
        ({"one": 0.5, "other": 0.5}, {"shared": 5, "a": 5, "b": 5}),
        ({"one": 0.5, "other": 0.25, "shared": 1.0}, {"shared": 8, "a": 5, "b": 3.5}),
    ],
    ids=str,
)
def test_shares_by_the_name_of_any_enclosing_model(shrink, expected):
    model = made(in_two_nested_models)
    restarter = Restarter(check_shrink(shrink))
    restarter.prepare(model, None)
    restarter.restart(model, Progress())
    for layer in model._flatten_layers():
        if layer.name in expected:
            assert {float(v) for a in layer.get_weights() for v in a.flat} == {expected[layer.name]}


@pytest.mark.parametrize(
    ("kind", "shrink", "shares"),
    [
        (in_two_nested_models, {"one": 0.5, "other": 0.25}, "0.5 and 0.25"),
        (TiedWeights, {"shared": 0.5, "tied": 0.0}, "0.5 and 0.0"),
    ],
)
def test_two_shares_for_one_variable_are_refused_before_training(kind, shrink, shares):
    model = kind()
    model(X)
    model.compile("sgd", "mse")
    before = model.get_weights()
    message = rf"one share for weights that layers share\. Received: .* gives {shares} for .*kernel"
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble(model, cycles=2, shrink=shrink).fit(X, X, epochs=2, verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("draws_of_two")
def test_a_pretrained_layer_that_a_new_one_shares_is_carried_over():
    model = made(TiedWeights)
    assert Restarter(0.5).restart(model, Progress(pretrained=[0])) == 1
    assert all((value == 8).all() for value in model.get_weights())
