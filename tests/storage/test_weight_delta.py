"""Weights that training does not change are stored once, and computed once in predictions."""

import shutil

import keras
import numpy as np
import pytest
from models import SimulatedCrashError, assert_same, member_weights, three_classes
from storage_cases import manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage import weight_delta as sharing
from snapshot_ensemble.storage.directory import DirectoryStore

X, Y = three_classes(features=6)
WIDTH = 200


def frozen(trainable=False, dtype=None):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    backbone = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(WIDTH, "relu", dtype=dtype),
            layers.Dense(WIDTH, "tanh", dtype=dtype),
        ],
        name="backbone",
    )
    backbone.trainable = trainable
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dropout(0.1, dtype=dtype)(backbone(inputs, training=False))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="y")(hidden))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    return model


def trained(directory, *, model=None, cycles=3, epochs=6, **arguments):
    fit = {name: arguments.pop(name) for name in ("resume", "callbacks") if name in arguments}
    ens = SnapshotEnsemble(
        frozen() if model is None else model, cycles=cycles, directory=directory, **arguments
    )
    keras.utils.set_random_seed(1)
    ens.fit(X, Y, epochs=epochs, batch_size=16, verbose=0, **fit)
    return ens


def bytes_of(arrays):
    return sum(array.nbytes for array in arrays)


@pytest.mark.slow
def test_a_directory_stores_a_frozen_backbone_once(tmp_path):
    ens = trained(tmp_path / "run")
    backbone = bytes_of(ens.model.get_layer("backbone").get_weights())
    kinds = sorted(path.suffix for path in (tmp_path / "run").iterdir())
    assert kinds == [".json", ".keras", ".lock", ".npz", ".npz", ".npz", ".npz"]
    others = [p.stat().st_size for p in (tmp_path / "run").iterdir() if p.suffix == ".npz"]
    assert sum(others) < 0.3 * backbone
    assert_same(member_weights(ens), member_weights(trained(None)))
    loaded = SnapshotEnsemble.load(tmp_path / "run")
    assert_same(member_weights(loaded), member_weights(ens))
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), ens.predict(X, verbose=0))
    # The very same arrays, not copies.
    store = DirectoryStore.open(tmp_path / "run")
    first, last = (store.view().weights(loaded.model, i) for i in (0, 2))
    assert [a is b for a, b in zip(first, last, strict=True)].count(True) == 4


def test_a_saved_ensemble_stores_a_frozen_backbone_once(tmp_path):
    ens = trained(None)
    ens.save(tmp_path / "saved")
    size = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
    assert size < 1.5 * bytes_of(ens.model.get_weights())
    assert_same(member_weights(SnapshotEnsemble.load(tmp_path / "saved")), member_weights(ens))


@pytest.mark.sampled(4, 2)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, dtype):
    expected = trained(tmp_path / "whole", model=frozen(dtype=dtype))

    def crash(epoch, logs):
        if epoch == 3:
            raise SimulatedCrashError

    callback = keras.callbacks.LambdaCallback(on_epoch_end=crash)
    with pytest.raises(SimulatedCrashError):
        trained(tmp_path / "run", model=frozen(dtype=dtype), callbacks=[callback])
    model = frozen(dtype=dtype)
    ens = trained(tmp_path / "run", model=model, resume=True)
    assert_same(member_weights(ens), member_weights(expected))
    assert_same([model.get_weights()], [expected.model.get_weights()])


def test_resuming_restores_the_saved_backbone(tmp_path):
    expected = trained(tmp_path / "run")
    other = frozen()
    for variable in other.weights:
        variable.assign(variable + 1.0)
    trained(tmp_path / "run", model=other, resume=True)
    assert_same([other.get_weights()], [expected.model.get_weights()])


@pytest.mark.slow
def test_the_base_is_kept_when_its_snapshot_is_dropped(tmp_path):
    expected = trained(None, model=NoConfig(frozen()))
    # A model that cannot be saved: the first snapshot is the base.
    with pytest.warns(UserWarning, match="The model cannot be saved"):
        ens = trained(tmp_path / "run", model=NoConfig(frozen()), max_snapshots=1)
    assert_same(member_weights(ens), member_weights(expected)[-1:])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert sum(name.startswith("snapshot") for name in names) == 2
    loaded = SnapshotEnsemble.load(tmp_path / "run", model=NoConfig(frozen()))
    assert_same(member_weights(loaded), member_weights(expected)[-1:])
    listed = {entry["name"] for entry in DirectoryStore.open(tmp_path / "run").inspect()["files"]}
    assert names - listed == {"ensemble.json", "ensemble.lock"}


class NoConfig(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.compile(inner.optimizer, inner.loss)
        self(X)

    def call(self, x):
        return self.inner(x)

    def get_config(self):
        raise NotImplementedError


@pytest.mark.slow
def test_weights_that_are_unfrozen_later_are_written(tmp_path):
    trained(tmp_path / "run")
    ens = SnapshotEnsemble.load(tmp_path / "run")
    before = ens[2].get_weights()
    for layer in ens.model.get_layer("backbone").layers:
        layer.trainable = True
    ens.model.compile("sgd", "sparse_categorical_crossentropy")
    ens.fit(X, Y, epochs=3, verbose=0)
    assert len(ens) == 6
    loaded = SnapshotEnsemble.load(tmp_path / "run")
    assert_same(member_weights(loaded), member_weights(ens))
    assert_same([before], [loaded[2].get_weights()])
    assert not np.array_equal(loaded[5].get_weights()[0], before[0])


@pytest.mark.slow
def test_a_model_without_frozen_weights_is_saved_in_plain_keras_files(tmp_path):
    trained(tmp_path / "run", model=frozen(trainable=True))
    assert len(list((tmp_path / "run").glob("snapshot-*.weights.h5"))) == 3


def test_a_damaged_base_is_refused_by_name(tmp_path):
    trained(tmp_path / "run")
    (path,) = (tmp_path / "run").glob("*.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for model in (None, frozen()):
        with pytest.raises(SnapshotError, match=path.name):
            SnapshotEnsemble.load(tmp_path / "run", model=model)


def test_a_difference_of_another_model_is_refused(tmp_path):
    base = [np.zeros(3), np.ones((2, 2))]
    sharing.write_difference(tmp_path / "d.npz", [np.zeros(3), np.eye(2)], base)
    np.testing.assert_array_equal(sharing.read_difference(tmp_path / "d.npz", base)[1], np.eye(2))
    for other in ([np.zeros(3), np.ones(4)], [np.zeros(3)], [np.zeros(3), np.ones((2, 2), "f4")]):
        with pytest.raises(SnapshotError, match=r"d\.npz' does not hold weights of this model"):
            sharing.read_difference(tmp_path / "d.npz", other)


def test_a_manifest_without_its_base_is_refused(tmp_path):
    trained(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    write_manifest(tmp_path / "copy", {**manifest_of(tmp_path / "copy"), "base": None})
    with pytest.raises(SnapshotError, match="names no base file"):
        SnapshotEnsemble.load(tmp_path / "copy")


@pytest.mark.slow
def test_the_optimizer_of_a_pretrained_backbone_is_not_saved(tmp_path):
    model = frozen()
    backbone = model.get_layer("backbone")
    backbone.trainable = True
    backbone.compile("adam", "mse")
    backbone.fit(X, np.zeros((len(X), WIDTH)), verbose=0)
    for layer in (backbone, *backbone.layers):
        layer.trainable = False
    slots = backbone.optimizer.variables
    ens = trained(tmp_path / "run", model=model)
    assert backbone.optimizer.variables == slots
    size = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert size < 1.6 * bytes_of(model.get_weights())
    loaded = SnapshotEnsemble.load(tmp_path / "run")
    assert_same(member_weights(loaded), member_weights(ens))


# In predictions


def counting(layer, calls):
    """Records the calls of a layer."""
    call = layer.call

    def counted(*args, **kwargs):
        calls.append(layer.name)
        return call(*args, **kwargs)

    object.__setattr__(layer, "call", counted)


@pytest.mark.sampled(4, 2)
@pytest.mark.parametrize("kind", ["nested", "flat", "sequential", "cast"])
def test_shared_layers_run_once(kind):
    model = made(kind)
    ens = trained(None, model=model)
    expected = [member.predict(X, verbose=0) for member in ens]
    calls = []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            counting(layer, calls)
    x = X.astype("float64") if kind == "cast" else X
    np.testing.assert_allclose(ens.predict_members(x, verbose=0), expected, atol=1e-6)
    assert calls.count(calls[0]) == 1
    assert calls.count(model.layers[-1].name) == 3
    np.testing.assert_allclose(ens(x), np.mean(expected, axis=0), atol=1e-6)


def made(kind):
    if kind in ("nested", "cast"):
        return frozen()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), *(keras.layers.Dense(8, "tanh") for _ in range(2))]
    )
    model.trainable = False
    if kind == "sequential":
        model.add(keras.layers.Dense(3, "softmax"))
    else:
        # The input also bypasses the frozen layers, and one layer is called twice.
        shared, inputs = keras.layers.Dense(8, "relu"), model.inputs[0]
        once = shared(model.outputs[0])
        merged = keras.layers.concatenate([shared(once), inputs])
        model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(merged))
    model.trainable = True
    for layer in model.layers:
        layer.trainable = layer not in model.layers[: len(model.layers) // 2]
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def test_predicting_leaves_the_model_unchanged():
    model = frozen()
    ens = trained(None, model=model)
    before = model.predict(X, verbose=0)
    ens.predict(X, verbose=0)
    for graph in (model, model.get_layer("backbone")._functional):
        assert "_run_through_graph" not in vars(graph)
    np.testing.assert_array_equal(model.predict(X, verbose=0), before)
