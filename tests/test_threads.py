"""Two ensembles in two threads: each gets its own results, and no patch stays active."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from snapshot_ensemble import SnapshotEnsemble

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)


def compiled(seed):
    keras.utils.set_random_seed(seed)
    initializer = keras.initializers.GlorotUniform(seed=seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(6, "relu", kernel_initializer=initializer),
            keras.layers.Dense(3, "softmax", kernel_initializer=initializer),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def patched():
    """The methods that the package patches temporarily."""
    kind = type(tf.function(lambda: None))
    functional = type(keras.Model(i := keras.Input((2,)), keras.layers.Dense(1)(i)))
    return kind.__call__, keras.layers.Layer.add_weight, functional._run_through_graph


def work(model, directory):
    """Trains, predicts, builds members, averages and loads, and returns all results."""
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1, directory=directory, shrink=0.5)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    history = ens.fit(data, epochs=4, verbose=0, shuffle=False)
    again = SnapshotEnsemble.load(directory)
    return {
        "loss": history.history["loss"],
        "mean": ens.predict(X, verbose=0),
        "loaded": again.predict(X, verbose=0),
        "member": ens[0].predict(X, verbose=0),
        "average": ens.average_weights().predict(X, verbose=0),
        "one model": ens.to_keras().predict(X, verbose=0),
    }


@pytest.mark.slow
def test_two_ensembles_in_two_threads(tmp_path):
    before = patched()
    models = [compiled(seed) for seed in (1, 2)]
    results, begin = [{}, {}], threading.Barrier(3)

    def run(number):
        begin.wait()
        results[number] = work(models[number], tmp_path / f"at once {number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    begin.wait()
    fresh = []
    while any(thread.is_alive() for thread in threads):
        # Other code that runs at the same time draws its weights as usual.
        layer = keras.layers.Dense(8)
        layer.build((None, 8))
        fresh.append(float(np.abs(layer.kernel.numpy()).max()))
        threads[0].join(0.01)
    assert patched() == before
    assert min(fresh) > 0
    for number, result in enumerate(results):
        ens = SnapshotEnsemble.load(tmp_path / f"at once {number}")
        weights = [member.get_weights() for member in ens]
        outputs = [_forward(member, X) for member in weights]
        np.testing.assert_allclose(result["mean"], np.mean(outputs, axis=0), atol=1e-5)
        np.testing.assert_allclose(result["loaded"], result["mean"], atol=1e-6)
        np.testing.assert_allclose(result["member"], outputs[0], atol=1e-5)
        np.testing.assert_allclose(result["one model"], result["mean"], atol=1e-5)
        average = [np.mean(arrays, axis=0) for arrays in zip(*weights, strict=True)]
        np.testing.assert_allclose(result["average"], _forward(average, X), atol=1e-5)
        assert len(result["loss"]) == 4


def _forward(weights, x):
    """The model written out in NumPy."""
    first, bias, second, last_bias = weights
    logits = np.maximum(x @ first + bias, 0) @ second + last_bias
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)
