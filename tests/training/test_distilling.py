"""`distill`: its loss written out in NumPy, what it leaves alone, and what it refuses."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import TASKS, dense, ensemble_of, member_weights

layers = keras.layers
RNG = np.random.default_rng(5)
X = RNG.normal(size=(24, 4)).astype("float32")
WHOLE = {"epochs": 1, "batch_size": 24, "verbose": 0}


def targets(task):
    if task == "regression":
        return RNG.normal(size=(24, 2)).astype("float32")
    if task == "multilabel":
        return RNG.integers(0, 2, (24, 3)).astype("float32")
    return (
        RNG.integers(0, 2, (24, 1)) if task in ("sigmoid", "log-odds") else RNG.integers(0, 3, 24)
    )


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def log_odds(outputs, task):
    """What comes before the last activation, up to a constant that a softmax ignores."""
    outputs = np.asarray(outputs, "float64")
    if task == "softmax":
        return np.log(outputs)
    return np.log(outputs / (1 - outputs)) if task in ("sigmoid", "multilabel") else outputs


def loss_of_rows(target, z, task):
    """The loss of each row for targets that are probabilities or values."""
    if task == "regression":
        return np.mean((target - z) ** 2, -1)
    if task in ("softmax", "logits"):
        return -np.sum(target * np.log(softmax(z)), -1)
    return -np.mean(target * np.log(sigmoid(z)) + (1 - target) * np.log(sigmoid(-z)), -1)


def written_out(task, ens, y, alpha, temperature, weight=1.0):
    """The first loss of `distill`, for the newest member as the student."""
    own, taught = (log_odds(m.predict(X, verbose=0), task) for m in (ens[-1], ens))
    one_hot = np.eye(3)[y] if task in ("softmax", "logits") else y
    hard = loss_of_rows(one_hot, own, task)
    if task == "regression":
        soft = loss_of_rows(taught, own, task)
    else:
        squash = softmax if task in ("softmax", "logits") else sigmoid
        soft = loss_of_rows(squash(taught / temperature), own / temperature, task)
        soft = soft * temperature**2
    return np.mean(weight * (alpha * hard + (1 - alpha) * soft))


@pytest.mark.sampled(6, 2)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_written_out(task, temperature):
    ens, y = ensemble_of(dense(*TASKS[task]), 3), targets(task)
    student = ens.distill(X, y, alpha=0.3, temperature=temperature, **WHOLE)
    expected = written_out(task, ens, y, 0.3, temperature)
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)


def test_weights_of_rows_and_classes_count_in_both_parts():
    ens, y = ensemble_of(dense(), 2), targets("softmax")
    weight = RNG.uniform(0.5, 2, 24).astype("float32")
    student = ens.distill(X, y, alpha=0.3, temperature=2, sample_weight=weight, **WHOLE)
    expected = written_out("softmax", ens, y, 0.3, 2, weight)
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)
    of_class = {0: 1.0, 1: 3.0, 2: 0.5}
    student = ens.distill(X, y, alpha=0.3, temperature=2, class_weight=of_class, **WHOLE)
    expected = written_out("softmax", ens, y, 0.3, 2, np.asarray([of_class[k] for k in y]))
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)


def test_datasets_and_one_hot_targets_give_the_same_loss():
    ens, y = ensemble_of(dense(), 3), targets("softmax")
    data = tf.data.Dataset.from_tensor_slices((X, y)).batch(24)
    given = {"alpha": 0.3, "epochs": 1, "verbose": 0, "shuffle": False}
    student = ens.distill(data, **given)
    expected = written_out("softmax", ens, y, 0.3, 2)
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)
    # The graphs of the ensemble were first made inside another one.
    assert np.isfinite(np.asarray(ens(X))).all()
    same = ensemble_of(dense("categorical_crossentropy"), 3)
    student = same.distill(X, np.eye(3)[y], alpha=0.3, **WHOLE)
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)


def test_without_targets_it_learns_from_the_ensemble_alone():
    ens = ensemble_of(dense(metrics=["accuracy"]), 3)
    student = ens.distill(X, alpha=0.3, **WHOLE)
    expected = written_out("softmax", ens, targets("softmax"), 0, 2)
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)
    assert set(student.history.history) == {"loss", "learning_rate", "cycle"}


def two_headed():
    inputs = keras.Input((4,))
    hidden = layers.Dense(5, kernel_regularizer=keras.regularizers.L2(0.1))(inputs)
    kind = layers.Dense(3, "softmax", name="kind")(hidden)
    size = layers.Dense(2, name="size")(hidden)
    model = keras.Model(inputs, [kind, size])
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mae"}
    model.compile("sgd", losses, loss_weights={"kind": 1.0, "size": 0.5})
    return model


def test_several_outputs_with_loss_weights_and_penalties():
    ens = ensemble_of(two_headed(), 2)
    y = [targets("softmax"), targets("regression")]
    student = ens.distill(X, y, alpha=0.0, temperature=1.0, **WHOLE)
    own, taught = ens[-1].predict(X, verbose=0), ens.predict(X, verbose=0)
    expected = np.mean(-np.sum(taught[0] * np.log(own[0]), -1))
    expected += 0.5 * np.mean(np.abs(own[1] - taught[1]))
    expected += 0.1 * np.sum(np.square(member_weights(ens)[-1][0]))
    np.testing.assert_allclose(student.history.history["loss"], expected, rtol=1e-4)


def test_everything_else_stays_as_it_is():
    model = dense(metrics=["accuracy"])
    ens, y = ensemble_of(model, 3), targets("softmax")
    keras.utils.set_random_seed(1)
    before = ens.predict(X, verbose=0)
    weights, slots = model.get_weights(), [v.numpy() for v in model.optimizer.variables]
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    student = ens.distill(X, y, epochs=3, verbose=0)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(slots, [v.numpy() for v in model.optimizer.variables], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(before, ens.predict(X, verbose=0))
    assert len(ens) == 3
    assert not np.array_equal(student.get_weights()[0], member_weights(ens)[-1][0])


@pytest.mark.slow
def test_the_student_is_compiled_like_the_model_and_saved_by_keras_alone(tmp_path):
    model = dense(metrics=["accuracy"])
    model.optimizer.learning_rate = 0.25
    ens, y = ensemble_of(model, 2), targets("softmax")
    validation = {"validation_data": (X, y)}
    student = ens.distill(X, y, epochs=4, batch_size=6, verbose=0, **validation)
    assert student.count_params() == model.count_params()
    assert type(student) is type(model)
    assert float(student.optimizer.learning_rate.numpy()) == 0.25
    loss, accuracy = student.evaluate(X, y, verbose=0)
    outputs = student.predict(X, verbose=0)
    np.testing.assert_allclose(loss, -np.mean(np.log(outputs[np.arange(24), y])), rtol=1e-5)
    np.testing.assert_allclose(accuracy, np.mean(outputs.argmax(-1) == y))
    history = student.history.history
    np.testing.assert_allclose(history["val_loss"][-1], loss, rtol=1e-5)
    # The last of 4 steps in each of 4 epochs.
    steps = np.asarray([3, 7, 11, 15])
    rates = 0.125 * (1 + np.cos(np.pi * steps / 16))
    np.testing.assert_allclose(history["learning_rate"], rates, rtol=1e-5)
    student.save(tmp_path / "student.keras")
    again = keras.models.load_model(tmp_path / "student.keras")
    np.testing.assert_allclose(again.predict(X, verbose=0), outputs, rtol=1e-6)


def test_layers_that_augment_do_so_in_training_alone():
    def model(*inside):
        built = keras.Sequential([keras.Input((4,)), *inside, layers.Dense(3, "softmax")])
        built.compile("sgd", "sparse_categorical_crossentropy")
        return built

    losses = []
    for inside in ((), (layers.GaussianNoise(0.9, seed=1),)):
        ens = ensemble_of(model(*inside), 2)
        student = ens.distill(X, **WHOLE)
        losses.append(student.history.history["loss"][0])
        once, again = (student.predict(X, verbose=0) for _ in range(2))
        np.testing.assert_array_equal(once, again)
    assert abs(losses[0] - losses[1]) > 0.01


def small(units=3):
    return keras.Sequential([keras.Input((4,)), layers.Dense(units, "softmax")])


def test_a_student_of_another_size_is_trained_in_place():
    ens, y = ensemble_of(dense(), 3), targets("softmax")
    own = small()
    before = own.get_weights()[0]
    assert ens.distill(X, y, student=own, **WHOLE) is own
    assert own.loss == "sparse_categorical_crossentropy"
    assert not np.array_equal(before, own.get_weights()[0])
    # A compiled one keeps its optimizer, whose rate is the peak, and may end in logits.
    own = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    own.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    taught, logits = ens.predict(X, verbose=0), own.predict(X, verbose=0)
    ens.distill(X, y, student=own, temperature=1.0, **WHOLE)
    expected = np.mean(-np.sum(taught * np.log(softmax(logits)), -1))
    np.testing.assert_allclose(own.history.history["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(own.history.history["learning_rate"], 1e-3, rtol=1e-5)


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


@keras.saving.register_keras_serializable("test_distilling")
class Drawn(layers.Layer):
    """Its constructor draws a constant, so that its config does not describe it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.shift = np.random.default_rng().normal()

    def call(self, inputs):
        return inputs + self.shift


def test_what_cannot_be_distilled_is_refused():
    model = dense()
    ens, y = ensemble_of(model, 2), targets("softmax")
    own_step = OwnStep([keras.Input((4,)), layers.Dense(3, "softmax")])
    for arguments, kind, message in (
        ({"alpha": 1.5}, ValueError, "between 0 and 1. Received: alpha=1.5"),
        ({"temperature": 0}, ValueError, "`temperature` must be finite and above 0"),
        ({"student": "small"}, TypeError, "must be a `keras.Model`. Received: student='small'"),
        ({"student": model}, ValueError, "must not be the ensemble's own model"),
        ({"student": own_step}, ValueError, "own `train_step` would not run.*OwnStep"),
        ({"student": small(4)}, ValueError, r"outputs of the ensemble's model.*\(4,\).*\(3,\)"),
        ({"epoch": 3}, TypeError, "no argument `epoch`"),
    ):
        with pytest.raises(kind, match=message):
            ens.distill(X, y, **WHOLE | arguments)
    inputs = keras.Input((4,))
    drawn = keras.Model(inputs, layers.Dense(3, "softmax")(Drawn()(inputs)))
    drawn.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="config does not give its outputs.*as `student`"):
        ensemble_of(drawn, 2).distill(X, y, **WHOLE)


def test_the_default_budget_is_that_of_two_cycles():
    from snapshot_ensemble import SnapshotEnsemble

    ens = SnapshotEnsemble(dense(), cycles=4)
    ens.fit(X, targets("softmax"), epochs=8, verbose=0)
    assert ens.distill(X, verbose=0).history.epoch == [0, 1, 2, 3]
