"""Contract tests for private names of models and layers, and for saving and loading."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapshot_ensemble.keras_compat import (
    batch_statistics,
    compile_arguments,
    composites,
    initializers,
    masks,
    optimizers,
    serving_signature,
    stateless_call,
    stock_layers,
)

layers = keras.layers


def test_compile_arguments():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    metric = keras.metrics.MeanSquaredError()
    model.compile("sgd", "mse", metrics=[metric], loss_weights=[0.5])
    arguments = compile_arguments.compile_arguments(model)
    assert arguments["loss"] == "mse"
    assert arguments["loss_weights"] == [0.5]
    assert arguments["metrics"][0] is metric
    before = compile_arguments.compilation(model)
    assert compile_arguments.compilation(model) is before
    model.compile("sgd", "mae")
    assert compile_arguments.compilation(model) is not before


def test_stock_classes_are_recognised():
    class Own(layers.Dense):
        pass

    class OwnStep(keras.Model):
        def predict_step(self, data):
            return data

    class OwnCallback(keras.callbacks.EarlyStopping):
        pass

    assert stock_layers.is_stock_layer(layers.Dense(1))
    assert not stock_layers.is_stock_layer(Own(1))
    assert not stock_layers.is_stock_layer(keras.Sequential())
    assert stock_layers.is_stock_callback(keras.callbacks.EarlyStopping())
    assert not stock_layers.is_stock_callback(OwnCallback())
    assert stock_layers.has_own_predict_step(OwnStep())
    assert not stock_layers.has_own_predict_step(keras.Sequential())


def test_random_initializers_are_replaced_and_others_are_not():
    given = layers.Dense(2, bias_initializer="random_normal")
    ones = layers.Dense(2, kernel_initializer="ones")
    with initializers.random_initializers_replaced(lambda _: keras.initializers.Zeros()):
        given.build((None, 3))
        ones.build((None, 3))
    assert not np.any(given.kernel)
    assert not np.any(given.bias)
    assert np.all(ones.kernel)
    after = layers.Dense(2)
    after.build((None, 3))
    assert np.any(after.kernel)


def test_masks():
    embedded = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(masks.mask_of(embedded), [[True, False]])
    tensor = keras.ops.ones((1, 2))
    assert masks.mask_of(tensor) is None
    masks.set_mask(tensor, keras.ops.convert_to_tensor([[True, False]]))

    class Sees(layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            self.seen = mask
            return x

    layer = Sees()
    layer(tensor)
    np.testing.assert_array_equal(layer.seen, [[True, False]])


def test_input_signature_of_a_subclass():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs["a"]) + inputs["b"]

    model = Own()
    model({"a": np.ones((2, 3), "float32"), "b": np.ones((2, 1), "float32")})
    signature = serving_signature.input_signature(model)
    assert {name: spec.shape for name, spec in signature.items()} == {
        "a": (None, 3),
        "b": (None, 1),
    }


def test_statistics_of_each_batch():
    norm = layers.BatchNormalization(momentum=0.9)
    model = keras.Sequential([keras.Input((2,)), norm, layers.Dropout(0.9)])
    frozen = layers.BatchNormalization(trainable=False)
    assert batch_statistics.normalizing_layers(model) == [norm]
    assert batch_statistics.normalizing_layers(keras.Sequential([keras.Input((2,)), frozen])) == []
    x = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
    with batch_statistics.recorded_by_batch([norm]) as calls:
        outputs = model(x, training=False)
    ((recorded,),) = calls
    assert float(recorded["count"]) == 6
    np.testing.assert_allclose(recorded["mean"], x.mean(0), atol=1e-6)
    np.testing.assert_allclose(recorded["variance"], x.var(0), atol=1e-6)
    # The layer normalised with these statistics, and dropout was inactive.
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert norm.momentum == 0.9
    assert "call" not in vars(norm)


class WithFunction(keras.Model):
    """Its `call` is a `tf.function`, which keeps the variables that it was traced with."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
        self.dense.build((None, 3))
        self.built = True

    @tf.function
    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("kind", ["plain", "a tf.function", "normalization"])
def test_a_model_runs_with_other_weights(kind):
    x = np.arange(6, dtype="float32").reshape(2, 3)
    if kind == "a tf.function":
        model = WithFunction()
        model(x)
    else:
        first = [layers.Normalization()] if kind == "normalization" else []
        for layer in first:
            layer.adapt(x)
        model = keras.Sequential([keras.Input((3,)), *first, layers.Dense(1)])
    own, before = model.get_weights(), np.asarray(model(x))
    weights = [weight + 1 if weight.dtype.kind == "f" else weight for weight in own]
    with stateless_call.with_weights(model, weights):
        other = np.asarray(model(x))
    np.testing.assert_array_equal(model(x), before)
    model.set_weights(weights)
    for layer in model.layers:
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()
    np.testing.assert_allclose(other, model(x), rtol=1e-5)


def test_the_patch_of_tf_function_is_removed():
    kind = type(tf.function(lambda: None))
    call = kind.__call__
    model = keras.Sequential([keras.Input((3,)), layers.Dense(1)])
    with stateless_call.with_weights(model, model.get_weights()):
        pass
    assert kind.__call__ is call


def test_a_model_saved_without_its_optimizers_slots_is_loaded_without_a_warning(tmp_path):
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    inner.compile("adam", "mse")
    model = keras.Sequential([keras.Input((3,)), inner])
    model.compile(keras.optimizers.Adam(0.25), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    path = tmp_path / "model.keras"
    with optimizers.optimizers_hidden():
        model.save(path)
        loaded = keras.models.load_model(path)
    assert float(loaded.optimizer.learning_rate) == 0.25
    loaded.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    with pytest.warns(UserWarning, match="Skipping variable loading for optimizer"):
        keras.models.load_model(path)


def test_ragged_and_sparse_tensors_consist_of_dense_ones():
    ragged = tf.ragged.constant([[1, 2], [3]])
    sparse = tf.sparse.from_dense([[0, 5]])
    parts = [part.numpy().tolist() for part in composites.dense_parts([ragged, {"a": sparse}])]
    assert parts == [[1, 2, 3], [0, 2, 3], [[0, 1]], [5], [1, 2]]
    assert composites.is_sparse(sparse)
    assert not composites.is_sparse(ragged)


def test_rows_of_dense_ragged_and_sparse_tensors():
    dense = np.array([[1, 0, 2], [0, 0, 0], [0, 3, 0], [4, 0, 5]])
    structure = {
        "dense": dense,
        "ragged": tf.ragged.constant([[1], [], [2, 3], [4]]),
        "sparse": tf.sparse.from_dense(dense),
    }
    for rows in ([], [0], [1, 3], [0, 1, 2, 3]):
        some = composites.rows_of(structure, tf.constant(rows, "int32"))
        np.testing.assert_array_equal(some["dense"], dense[rows])
        assert some["ragged"].to_list() == [structure["ragged"].to_list()[row] for row in rows]
        np.testing.assert_array_equal(tf.sparse.to_dense(some["sparse"]), dense[rows])
        assert some["sparse"].shape[1] == 3
