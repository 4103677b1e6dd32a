"""Members are chosen from sums over batches, in little memory, and never at a run's expense.

Choosing held every member's outputs of all validation data: 869 MB, where `fit` takes 3.
"""

import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from held_out_cases import gathered
from keras import layers
from models import TASKS, compiled, dense, ensemble_of, pool_of

from snapshot_ensemble import SnapshotEnsemble
from snapshot_ensemble.evaluation import streamed_choice
from snapshot_ensemble.evaluation.gathering import predict_one_by_one
from snapshot_ensemble.evaluation.member_counts import most_members
from snapshot_ensemble.evaluation.streamed_choice import count_of_members
from snapshot_ensemble.inference.member_pool import PredictArguments

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(60, 4)).astype("float32")
LABELS = RNG.integers(0, 3, 60)
TARGETS = {
    "softmax": LABELS,
    "logits": LABELS,
    "sigmoid": LABELS[:, None] % 2,
    "log-odds": LABELS[:, None] % 2,
    "multilabel": np.eye(3)[LABELS],
    "regression": RNG.normal(size=(60, 2)),
}


def as_unstreamed(ens, x, y=None, weight=None):
    expected = most_members(gathered(ens, x, y, weight), ens.snapshots)
    assert ens.choose_members(x, y, sample_weight=weight, verbose=0, batch_size=None) == expected
    return expected


@pytest.mark.sampled(5, 2)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_it_is_the_choice_from_all_outputs_at_once(task, weighted):
    loss, units, activation = TASKS[task]
    weight = RNG.integers(0, 3, 60).astype("float32") if weighted else None
    as_unstreamed(ensemble_of(dense(loss, units, activation), 5), ROWS, TARGETS[task], weight)


@pytest.mark.slow
def test_choices_differ_from_case_to_case():
    counts = set()
    for seed in range(6):
        x = np.random.default_rng(seed).normal(size=(60, 4)).astype("float32") * 3
        counts.add(as_unstreamed(ensemble_of(dense(), 5), x, LABELS))
    assert len(counts) > 1


@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_of_any_size_give_the_same(size):
    ens = ensemble_of(dense(), 5)
    data = tf.data.Dataset.from_tensor_slices((ROWS, LABELS)).batch(size)
    assert ens.choose_members(data, verbose=0) == most_members(
        gathered(ens, ROWS, LABELS), ens.snapshots
    )


def test_several_outputs_with_loss_weights_and_a_batch_of_weight_0():
    inputs = keras.Input((4,))
    outputs = {"a": layers.Dense(3, "softmax")(inputs), "b": layers.Dense(2)(inputs)}
    losses = {"a": "sparse_categorical_crossentropy", "b": "mse"}
    model = compiled(keras.Model(inputs, outputs), losses, loss_weights={"a": 2.0, "b": 0.5})
    ens = ensemble_of(model, 5)
    y = {"a": LABELS, "b": TARGETS["regression"].astype("float32")}
    weight = {"a": np.repeat([0.0, 1, 3], 20), "b": np.ones(60)}
    data = tf.data.Dataset.from_tensor_slices((ROWS, y, weight)).batch(20)
    expected = most_members(gathered(ens, ROWS, y, weight), ens.snapshots)
    assert ens.choose_members(data, verbose=0) == expected


@pytest.mark.slow
def test_its_memory_does_not_grow_with_the_rows(monkeypatch):
    inputs = keras.Input((64, 64, 2))
    model = compiled(keras.Model(inputs, layers.Conv2D(4, 1, activation="softmax")(inputs)))
    ens = ensemble_of(model, 4)
    x, y = np.zeros((64, 64, 64, 2), "float32"), np.zeros((64, 64, 64), "int32")
    of_all = 64 * 64 * 64 * 4 * 4 * 4
    monkeypatch.setattr(streamed_choice, "MEMORY", of_all // 32)
    pool = pool_of(ens).now()
    count_of_members(pool, x, y, None, PredictArguments(verbose=0))
    tracemalloc.start()
    count_of_members(pool, x, y, None, PredictArguments(verbose=0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < of_all


@pytest.mark.slow
@pytest.mark.parametrize("task", ["softmax", "regression"])
@pytest.mark.parametrize("weighted", [False, True])
def test_members_one_after_another_give_the_same_choice_in_parts(task, weighted, monkeypatch):
    ens = ensemble_of(dense(*TASKS[task]), 5)
    weight = RNG.integers(0, 3, 60).astype("float32") if weighted else None
    expected = most_members(gathered(ens, ROWS, TARGETS[task], weight), ens.snapshots)
    of_some = most_members(gathered(ens, ROWS[:21], TARGETS[task][:21]), ens.snapshots)
    units = TASKS[task][1]
    monkeypatch.setattr(streamed_choice, "MEMORY", 4 * 5 * units * 29)
    parts = []

    def predict(pool, combiner, x, **options):
        parts.append(len(x))
        return predict_one_by_one(pool, combiner, x, **options)

    monkeypatch.setattr(streamed_choice, "predict_one_by_one", predict)
    ens.memory_limit = 0
    data = {"x": ROWS, "y": TARGETS[task], "batch_size": 7, "verbose": 0}
    assert ens.choose_members(**data, sample_weight=weight) == expected
    assert parts == [28, 28, 4]
    assert ens.choose_members(**data, steps=3) == of_some
    for wrong in (TARGETS[task][:50], np.concatenate([TARGETS[task]] * 2)):
        with pytest.raises(ValueError, match="`y` must be as long as `x`"):
            ens.choose_members(**{**data, "y": wrong})


@pytest.mark.parametrize("kind", ["arrays", "a dataset"])
def test_fit_chooses_by_arrays_if_members_exceed_the_memory_limit(kind, monkeypatch):
    chosen = []
    monkeypatch.setattr(SnapshotEnsemble, "choose_members", lambda ens, **_: chosen.append(1))
    ens = SnapshotEnsemble(dense(), cycles=2, memory_limit=0)
    data = tf.data.Dataset.from_tensor_slices((ROWS, LABELS)).batch(20)
    held_out = (ROWS, LABELS) if kind == "arrays" else data
    ens.fit(ROWS, LABELS, epochs=2, verbose=0, validation_data=held_out)
    assert len(chosen) == (kind == "arrays")


def test_a_choice_that_fails_does_not_cost_the_run():
    model = dense("mse", 2, None)
    ens = SnapshotEnsemble(model, cycles=2)
    y = np.ones((60, 2), "float32")
    invalid = {"validation_data": (ROWS, np.full((60, 2), np.nan, "float32"))}
    with pytest.warns(UserWarning, match="could not be chosen") as caught:
        history = ens.fit(ROWS, y, epochs=2, verbose=0, **invalid)
    assert str(caught[-1].message) == (
        "Members could not be chosen by the validation data: ValueError: `y` must be finite. "
        "Received: y with NaN or infinity. All annealed members predict."
    )
    assert len(history.epoch) == len(ens) == 2
    assert ens.members is None


class OnlySteps(keras.Model):
    """A model without `call`, such as a VAE with its own steps."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)
        self.dense.build((None, 4))
        self.built = True

    def train_step(self, data):
        x, y = data[:2]
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.ops.square(self.dense(x) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}

    def test_step(self, data):
        return {"loss": keras.ops.mean(keras.ops.square(self.dense(data[0]) - data[1]))}


def test_a_model_without_a_call_keeps_its_history():
    model = OnlySteps()
    model.compile("sgd")
    ens = SnapshotEnsemble(model, cycles=2, task="regression")
    y = np.ones((60, 2), "float32")
    with pytest.warns(UserWarning, match="Members could not be chosen by the validation data"):
        history = ens.fit(ROWS, y, epochs=2, verbose=0, validation_data=(ROWS, y))
    assert len(history.history["val_loss"]) == len(ens) == 2
