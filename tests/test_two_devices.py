"""An ensemble of a model that is trained on two devices."""

import pathlib
import subprocess
import sys

import pytest

SCORES = """
import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import keras
from snapshot_ensemble import SnapshotEnsemble

rng = np.random.default_rng(0)
x, y = rng.random((16, 4), "float32"), rng.random((16, 3), "float32")
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[keras.metrics.RootMeanSquaredError()])
    ens = SnapshotEnsemble(model, cycles=1)
ens.fit(x, y, epochs=1, verbose=0)
expected = model.evaluate(x, y, verbose=0)
error = model.predict(x, verbose=0) - y
np.testing.assert_allclose(expected[1], np.sqrt(np.mean(error**2)), rtol=1e-5)
for scored in (ens, ens[0], ens.to_keras()):
    np.testing.assert_allclose(scored.evaluate(x, y, verbose=0), expected, rtol=1e-5)
row = ens.report(x, y, verbose=0).rows["mean"]
np.testing.assert_allclose(row["root_mean_squared_error"], expected[1], rtol=1e-5)
"""


@pytest.mark.slow
def test_scores_by_metrics_that_are_objects():
    # Devices must be configured before TensorFlow starts, which needs a new process.
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", SCORES]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
