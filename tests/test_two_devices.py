"""An ensemble of a model that is trained on two devices, and what is refused on two machines."""

import pathlib
import subprocess
import sys

import pytest

START = """
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
"""

SCORES = """
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


FITS = """
import contextlib, pathlib, sys

class Stop(Exception):
    pass

def stop(epoch, logs):
    if epoch == 2:
        raise Stop

def run(scope, directory=None, callbacks=()):
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    with scope:
        layers = [keras.layers.Dense(8, "relu"), keras.layers.Dropout(DROPOUT)]
        model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(3)])
        model.compile(keras.optimizers.Adam(0.05), "mse")
    ens = SnapshotEnsemble(model, cycles=2, directory=directory)
    arguments = {"callbacks": list(callbacks), "resume": directory is not None, "verbose": 0}
    ens.fit(x, y, epochs=4, batch_size=8, shuffle=False, **arguments)
    return ens

def weights(ens):
    return [array for member in ens for array in member.get_weights()]

# As on one device, but for the order of sums.
DROPOUT = 0.0
mirrored, plain = run(strategy.scope()), run(contextlib.nullcontext())
assert [s.step for s in mirrored.snapshots] == [s.step for s in plain.snapshots] == [4, 8]
assert mirrored.history["learning_rate"] == plain.history["learning_rate"]
for one, other in zip(weights(mirrored), weights(plain), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
members = [member.predict(x, verbose=0) for member in mirrored]
np.testing.assert_allclose(mirrored.predict(x, verbose=0), np.mean(members, axis=0), atol=1e-6)

# Interrupted, it goes on to the result of the unbroken run, bit for bit.
DROPOUT = 0.3
home = pathlib.Path(sys.argv[1])
unbroken = run(strategy.scope(), home / "unbroken")
try:
    run(strategy.scope(), home / "resumed", [keras.callbacks.LambdaCallback(on_epoch_begin=stop)])
except Stop:
    pass
assert len(SnapshotEnsemble.load(home / "resumed")) == 1
resumed = run(strategy.scope(), home / "resumed")
assert resumed.snapshots == unbroken.snapshots
for one, other in zip(weights(resumed), weights(unbroken), strict=True):
    np.testing.assert_array_equal(one, other)

# It is loaded where there is one device, which runs larger batches.
loaded = SnapshotEnsemble.load(home / "resumed")
expected = resumed.predict(x, verbose=0)
np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
"""

REFUSED = """
import numpy as np
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras
from snapshot_ensemble import SnapshotEnsemble

with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
before = model.get_weights()
try:
    SnapshotEnsemble(model, cycles=1).fit(np.zeros((4, 4)), np.zeros((4, 3)), epochs=1, verbose=0)
except ValueError as error:
    message = str(error)
assert "`MultiWorkerMirroredStrategy` fails there (keras-team/keras, issue 20585)" in message
assert "Received: model='sequential'" in message
assert "Train independent chains instead" in message
assert "`snapshot_ensemble.ray.fit_chains`" in message
for one, other in zip(model.get_weights(), before, strict=True):
    np.testing.assert_array_equal(one, other)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [START + SCORES, START + FITS, REFUSED],
    ids=["scores by metrics that are objects", "fits and resumes", "two machines are refused"],
)
def test_on_two_devices(script, tmp_path):
    # Devices must be configured before TensorFlow starts, which needs a new process.
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
