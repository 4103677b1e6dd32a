"""After a fit, the model and the ensemble can be exported and saved, whatever the rate was."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD, Adam
from keras.optimizers.schedules import CosineDecay

from snapshot_ensemble import SnapshotEnsemble

X = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
Y = np.argmax(X[:, :3], axis=1)
OPTIMIZERS = {
    "a number": lambda: Adam(0.01),
    "a schedule": lambda: Adam(CosineDecay(0.01, 99)),
    "a function": lambda: SGD(lambda: 0.01, momentum=0.9),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(Adam(CosineDecay(0.01, 99))),
}


def trained(optimizer, **arguments):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(inputs))
    model.compile(optimizer, "sparse_categorical_crossentropy")
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1)
    ens.fit(X, Y, epochs=2, verbose=0, **arguments)
    return ens


def served(path):
    return tf.saved_model.load(str(path)).signatures["serving_default"](tf.constant(X))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_model_and_the_ensemble_are_exported_and_saved(kind, tmp_path):
    ens = trained(OPTIMIZERS[kind]())
    (output,) = ens.model.output_names
    ens.model.export(tmp_path / "model", verbose=False)
    (actual,) = served(tmp_path / "model").values()
    np.testing.assert_allclose(actual, ens.model.predict(X, verbose=0), atol=1e-6)
    ens.export(tmp_path / "ensemble")
    actual = served(tmp_path / "ensemble")[output]
    np.testing.assert_allclose(actual, ens.predict(X, verbose=0), atol=1e-6)
    tf.train.Checkpoint(model=ens.model).write(str(tmp_path / "checkpoint"))


def test_during_training(tmp_path):
    class Export(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            ens.model.export(tmp_path / str(epoch), verbose=False)
            if epoch:
                ens.export(tmp_path / f"ensemble {epoch}")

    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(inputs))
    model.compile(OPTIMIZERS["a schedule"](), "sparse_categorical_crossentropy")
    ens = SnapshotEnsemble(model, cycles=2, lr_init=0.1)
    ens.fit(X, Y, epochs=2, verbose=0, callbacks=[Export()])
    np.testing.assert_allclose(
        served(tmp_path / "1")["output_0"], ens[1].predict(X, verbose=0), atol=1e-6
    )


def test_a_rate_that_the_user_replaces_by_a_schedule(tmp_path):
    ens = trained(Adam(0.01))
    # Keras removes the variable, after which TensorFlow does not save the model.
    ens.model.optimizer.learning_rate = CosineDecay(0.01, 99)
    with pytest.raises(ValueError, match="Unable to save the object ListWrapper"):
        ens.model.export(tmp_path / "model", verbose=False)
    ens.export(tmp_path / "ensemble")
    (actual,) = served(tmp_path / "ensemble").values()
    np.testing.assert_allclose(actual, ens.predict(X, verbose=0), atol=1e-6)
