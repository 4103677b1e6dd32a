"""Contract tests for private names in Keras's graph of layers."""

import keras
import numpy as np
import pytest

from snapshot_ensemble.keras_compat import layer_graph

layers = keras.layers


def functional():
    inputs = keras.Input((3,), name="in")
    hidden = layers.Dense(4, name="first")(inputs)
    outputs = layers.Dropout(0.5, name="drop")(hidden, training=True)
    return keras.Model(inputs, layers.Dense(2, name="last")(outputs))


class OwnCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(2)

    def call(self, x):
        return self.inner(x)


class OverridesCall(type(functional())):
    def call(self, inputs, training=None, mask=None):
        return super().call(inputs) * 2


def test_graph_of():
    model = functional()
    assert layer_graph.graph_of(model) is model
    sequential = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    graph = layer_graph.graph_of(sequential)
    assert graph.output.shape == (None, 2)
    x = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(graph(x), sequential(x))
    assert layer_graph.graph_of(OwnCall()) is None
    assert layer_graph.graph_of(layers.Dense(2)) is None
    inputs = keras.Input((3,))
    assert layer_graph.graph_of(OverridesCall(inputs, layers.Dense(2)(inputs))) is None


def test_layers_at_any_depth_and_direct_ones():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="deep")], name="inner")
    model = keras.Sequential([keras.Input((3,)), inner, layers.Dense(1, name="top")])
    every = [layer.name for layer in layer_graph.all_layers(model)]
    assert every[0] == model.name
    assert {"inner", "deep", "top"} < set(every)
    assert len(every) == len(set(every))
    direct = [layer.name for layer in layer_graph.direct_layers(model)]
    assert {"inner", "top"} <= set(direct)
    assert "deep" not in direct


def test_own_trainable_variables():
    class Holder(layers.Layer):
        def __init__(self):
            super().__init__()
            self.own = self.add_weight(shape=(2,), name="own")
            self.fixed = self.add_weight(shape=(2,), name="fixed", trainable=False)
            self.inner = layers.Dense(1)

        def call(self, x):
            return self.inner(x) * self.own[0]

    holder = Holder()
    holder(np.ones((1, 3), "float32"))
    assert [v.name for v in layer_graph.own_trainable_variables(holder)] == ["own"]


def test_source_of_a_tensor():
    model = functional()
    operation, node, index = layer_graph.source_of(model.output)
    assert (operation.name, node, index) == ("last", 0, 0)
    (before,) = layer_graph.inputs_of_call(operation, node)
    assert layer_graph.source_of(before)[0].name == "drop"
    assert layer_graph.source_of(model.input)[0].name == "in"


def test_calls_of_an_operation():
    model = functional()
    shared = model.get_layer("first")
    shared(keras.Input((3,)))
    assert len(list(layer_graph.calls_of(shared))) == 2
    ((arguments, outputs),) = layer_graph.calls_of(model.get_layer("drop"))
    assert arguments["training"] is True
    assert [tuple(tensor.shape) for tensor in outputs] == [(None, 4)]


def test_takes_training():
    class Plain(layers.Layer):
        def call(self, x):
            return x

    assert layer_graph.takes_training(layers.Dropout(0.5))
    assert not layer_graph.takes_training(Plain())
    assert not layer_graph.takes_training(keras.ops.add)


def test_run_graph_calls_each_operation():
    model, names = functional(), []

    def call(operation, *args, **kwargs):
        names.append((operation.name, kwargs.get("training")))
        return operation(*args, **{**kwargs, "training": False} if kwargs else kwargs)

    x = np.ones((2, 3), "float32")
    outputs = layer_graph.run_graph(model, keras.ops.convert_to_tensor(x), call)
    assert names == [("first", None), ("drop", True), ("last", None)]
    first, last = model.get_layer("first"), model.get_layer("last")
    np.testing.assert_allclose(outputs, last(first(x)), rtol=1e-6)


@pytest.mark.parametrize("how", ["model", "nested", "predict"])
def test_operations_are_replaced_inside_the_context(how):
    model = functional()
    if how == "nested":
        outer = keras.Input((3,))
        model = keras.Model(outer, model(outer))
    seen = []

    def wrap(graph, inputs, call_of):
        def replaced(operation):
            seen.append(operation.name)
            return call_of(operation)

        return inputs, replaced

    x = np.ones((2, 3), "float32")
    with layer_graph.operations_replaced(wrap):
        model.predict(x, verbose=0) if how == "predict" else model(x)
    assert {"first", "drop", "last"} <= set(seen)
    before = len(seen)
    model(x)
    assert len(seen) == before
