"""The rows of training data that are kept in memory, whatever kind of data `fit` is given."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import three_classes

from snapshot_ensemble import SnapshotEnsemble

X, Y = three_classes(64)


def small_model(steps_per_execution=1, **arguments):
    model = keras.Sequential([keras.Input((4,), **arguments), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", steps_per_execution=steps_per_execution)
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[16 * index :][:16], Y[16 * index :][:16]


def generator():
    while True:
        yield from (Batches()[i] for i in range(4))


DATASET = tf.data.Dataset.from_tensor_slices((X, Y))
KINDS = {
    "arrays": lambda: ((X, Y), {"shuffle": False, "batch_size": 16}),
    "dataset": lambda: ((DATASET.batch(16),), {"shuffle": False}),
    "fixed batches": lambda: ((DATASET.batch(16, drop_remainder=True),), {"shuffle": False}),
    "PyDataset": lambda: ((Batches(),), {"shuffle": False}),
    "generator": lambda: ((generator(),), {"steps_per_epoch": 4, "shuffle": False}),
}


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("steps_per_execution", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_is_the_first_rows_and_training_is_unchanged(kind, steps_per_execution):
    plain, model = small_model(steps_per_execution), small_model(steps_per_execution)
    model.set_weights(plain.get_weights())
    (data, arguments) = KINDS[kind]()
    plain.fit(*data, epochs=2, verbose=0, **arguments)
    ens = SnapshotEnsemble(model, cycles=1, lr_init=0.01, lr_min=0.01, shrink=1.0)
    (data, arguments) = KINDS[kind]()
    ens.fit(*data, epochs=2, verbose=0, **arguments)
    np.testing.assert_array_equal(ens._pool.sample, X[:8])
    for mine, keras_own in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, keras_own)


def test_of_fixed_batches_all_rows_are_kept():
    ens = SnapshotEnsemble(small_model(batch_size=16), cycles=1)
    ens.fit(X, Y, epochs=1, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_array_equal(ens._pool.sample, X[:16])


def test_with_data_that_yield_nothing_to_slice_there_is_no_sample():
    model = small_model()
    ens = SnapshotEnsemble(model, cycles=1)
    ens._pool.keep_sample(({"a": object()},))
    assert ens._pool.sample is None


def test_it_is_the_first_batch_that_is_kept_and_it_is_never_written(tmp_path):
    ens = SnapshotEnsemble(small_model(), cycles=1, directory=tmp_path / "ensemble")
    ens.fit(X, Y, epochs=1, shuffle=False, verbose=0)
    ens.fit(X[::-1], Y[::-1], epochs=1, shuffle=False, verbose=0)
    np.testing.assert_array_equal(ens._pool.sample, X[:8])
    assert SnapshotEnsemble.load(tmp_path / "ensemble")._pool.sample is None
