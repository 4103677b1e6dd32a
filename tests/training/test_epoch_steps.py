"""The steps that Keras really takes in each epoch, for every kind of data and `steps_per_epoch`."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from training_cases import Recorder, X, cosine, descend, ensemble, members, one_weight

from snapshot_ensemble.training.epoch_steps import EpochSteps

CASES = list(itertools.product([1, 3, 5, 8, 10, 16], [1, 3]))  # of 8 batches
out_of_data = pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")


class Iterations(keras.callbacks.Callback):
    """The optimizer's own count of its steps in each epoch."""

    def on_train_begin(self, logs=None):
        self.counts = [0]

    def on_epoch_end(self, epoch, logs=None):
        self.counts.append(int(self.model.optimizer.iterations))

    @property
    def steps(self):
        return np.diff(self.counts).tolist()


def data(kind):
    if kind == "arrays":
        return {"x": X, "y": X, "batch_size": 4, "shuffle": False}
    return {"x": tf.data.Dataset.from_tensor_slices((X, X)).batch(4), "shuffle": False}


def of_keras(kind, steps_per_epoch, per_execution, epochs=4):
    counter = Iterations()
    model = one_weight(steps_per_execution=per_execution)
    given = {**data(kind), "steps_per_epoch": steps_per_epoch, "callbacks": [counter]}
    model.fit(**given, epochs=epochs, verbose=0)
    return counter.steps


@out_of_data
@pytest.mark.sampled(6, 3)
@pytest.mark.parametrize(("steps_per_epoch", "per_execution"), CASES)
@pytest.mark.parametrize("kind", ["arrays", "tf.data"])
def test_rates_are_exact_and_end_at_the_floor(kind, steps_per_epoch, per_execution):
    steps = of_keras(kind, steps_per_epoch, per_execution)
    assert EpochSteps(steps_per_epoch, per_execution, held=8).of(0, 3) == steps
    ens = ensemble(one_weight(steps_per_execution=per_execution))
    ens.fit(**data(kind), epochs=4, steps_per_epoch=steps_per_epoch, verbose=0)
    first, second = sum(steps[:2]), sum(steps[2:])
    assert members(ens) == descend(cosine(first), cosine(second))
    assert [s.step for s in ens.snapshots] == [first, first + second]
    last = [cosine(first)[-1], cosine(second)[-1]]
    assert [s.learning_rate for s in ens.snapshots] == np.float32(last).tolist()


@out_of_data
def test_a_resumed_run_counts_from_the_beginning_of_the_data(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    given = {**data("arrays"), "steps_per_epoch": 5, "epochs": 6, "verbose": 0}
    crash = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: e == 3 and stop())
    with pytest.raises(KeyboardInterrupt):
        ensemble(one_weight(), 1, directory=tmp_path).fit(**given, callbacks=[crash])
    recorder = Recorder()
    ens = ensemble(one_weight(), 1, directory=tmp_path)
    ens.fit(**given, resume=True, callbacks=[recorder])
    steps = [5, 3, 5, 5, 3, 5]
    assert EpochSteps(5, 1, held=8, resumed_at=3).of(0, 5) == steps
    assert EpochSteps(5, 1, held=8, resumed_at=3).of(2, 4) == steps[2:5]
    assert EpochSteps(5, 1, held=8, resumed_at=3).of(3, 5) == steps[3:]
    # Uninterrupted, the cycle would have had 5 + 3 + 5 + 3 + 5 + 3 steps.
    before, after = (cosine(n)[np.cumsum(steps)[:6] % n - 1] for n in (24, 26))
    expected = np.float32([*before[:3], *after[3:]]).tolist()
    assert ens.history["learning_rate"] == expected


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["distribute_dataset", "from_function"])
@pytest.mark.parametrize("steps_per_epoch", [None, 4])
def test_distributed_datasets(kind, steps_per_epoch):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    batches = tf.data.Dataset.from_tensor_slices((X, X)).batch(4)
    if kind == "distribute_dataset":
        dataset = strategy.experimental_distribute_dataset(batches)
    else:
        dataset = strategy.distribute_datasets_from_function(lambda _: batches)
    with strategy.scope():
        model = one_weight()
    ens = ensemble(model)
    given = {"epochs": 4, "steps_per_epoch": steps_per_epoch, "verbose": 0, "shuffle": False}
    ens.fit(dataset, **given)
    assert members(ens) == descend(*[cosine(2 * (steps_per_epoch or 8))] * 2)
