"""Held-out data: one pass over the data, targets of every shape, and items that are left out."""

import numpy as np
import pytest
import tensorflow as tf
from held_out_cases import AMOUNTS, BY_NAME, LABELS, PIXELS, RNG, ROWS, YES, gathered, two_headed
from models import (
    BINARY,
    MULTICLASS,
    MULTILABEL,
    REGRESSION,
    Batches,
    dense,
    eager,
    ensemble_of,
    one_batch,
)

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.inference.task_words import Output

# One pass


@pytest.fixture(scope="module")
def classifier():
    return ensemble_of(eager(dense(), "sparse_categorical_crossentropy"), 3)


def test_data_are_read_as_often_as_for_one_model(classifier):
    alone, together = Batches(ROWS, LABELS, size=4), Batches(ROWS, LABELS, size=4)
    classifier.model.predict(alone, verbose=0)
    held = gathered(classifier, together)
    assert together.asked == alone.asked
    np.testing.assert_array_equal(held.y, LABELS)
    own = classifier.predict_members(ROWS, verbose=0)
    np.testing.assert_allclose(held.outputs[0], own, rtol=1e-5, atol=1e-7)
    assert held.rows == len(ROWS)
    assert held.sample_weight is None


def test_data_that_can_be_read_only_once_are_enough(classifier):
    weights = RNG.uniform(0.5, 1.5, len(ROWS))
    columns = (ROWS, LABELS, weights)
    stream = ([column[i : i + 4] for column in columns] for i in range(0, len(ROWS), 4))
    held = gathered(classifier, (tuple(batch) for batch in stream), steps=3)
    np.testing.assert_array_equal(held.y, LABELS)
    np.testing.assert_allclose(held.sample_weight, weights)
    whole = gathered(classifier, one_batch(*columns))
    np.testing.assert_allclose(held.outputs[0], whole.outputs[0], rtol=1e-5, atol=1e-7)


def test_targets_stay_with_their_rows_if_data_are_shuffled(classifier):
    ordered = tf.data.Dataset.from_tensor_slices((ROWS, LABELS))
    shuffled = gathered(classifier, ordered.shuffle(11, seed=1).batch(4))
    assert not np.array_equal(shuffled.y, LABELS)
    plain = gathered(classifier, ordered.batch(4))
    for member in range(3):
        actual = shuffled.loss(shuffled.outputs[0][member])
        assert actual == pytest.approx(plain.loss(plain.outputs[0][member]), rel=1e-5)


def test_attributes_for_arrays(classifier):
    given = LABELS[:, None].tolist()
    held = gathered(classifier, ROWS, given, np.ones(11), batch_size=4)
    assert held.y is given
    assert held.model is classifier.model
    assert held.meanings == [MULTICLASS]
    assert held.names == ["answer"]
    assert len(held.members()) == 3
    np.testing.assert_array_equal(held.members()[1], held.outputs[0][1])
    [block] = held.blocks()
    np.testing.assert_allclose(block.items[0], np.log(held.outputs[0]), rtol=1e-5, atol=1e-6)


# Targets of every shape that Keras accepts


@pytest.fixture(scope="module")
def model():
    return dense()


def held_of(model, shape, y, meaning, sample_weight=None, masks=None):
    """Held-out data of two members, whose predictions do not matter for the targets."""
    output = np.full((2, *shape), 1 / shape[-1], "float32")
    return HeldOut(model, [output], None, [meaning], y, sample_weight, masks or {})


def check_truth(held, targets, weights=None):
    [truth] = held.truths
    targets = np.asarray(targets, "float64")
    np.testing.assert_allclose(truth.targets, targets, atol=1e-7)
    assert truth.targets.dtype == truth.weights.dtype == "float64"
    weights = np.ones(len(targets)) if weights is None else np.reshape(weights, -1)
    np.testing.assert_allclose(truth.weights, weights / weights.sum(), rtol=1e-6)


SPOTS = RNG.integers(0, 2, (2, 4, 5))
VALUES = RNG.normal(size=(6, 3, 2))
SOFT = RNG.dirichlet(np.ones(3), 11)


def no_and_yes(yes):
    yes = np.reshape(yes, -1)
    return np.stack([1 - yes, yes], axis=1)


@pytest.mark.parametrize(
    "y",
    [
        LABELS,
        LABELS[:, None],
        np.eye(3)[LABELS],
        LABELS.tolist(),
        list(LABELS),
        tuple(LABELS.tolist()),
        LABELS[:, None].tolist(),
        np.eye(3)[LABELS].tolist(),
        LABELS.astype("uint8"),
        LABELS.astype("float32"),
        LABELS.astype(object),
        tf.constant(LABELS),
        [LABELS],
        (LABELS[:, None],),
        {"answer": LABELS},
    ],
)
def test_labels_of_rows(y, model):
    check_truth(held_of(model, (11, 3), y, MULTICLASS), np.eye(3)[LABELS])


def test_soft_labels_of_rows(model):
    check_truth(held_of(model, (11, 3), SOFT.astype("float32"), MULTICLASS), SOFT)
    smooth = 0.9 * np.eye(3)[LABELS] + 0.1 / 3
    check_truth(held_of(model, (11, 3), smooth, MULTICLASS), smooth)


@pytest.mark.parametrize("y", [PIXELS, PIXELS[..., None], np.eye(3)[PIXELS], [PIXELS]])
def test_labels_of_pixels(y, model):
    check_truth(held_of(model, (2, 4, 5, 3), y, MULTICLASS), np.eye(3)[PIXELS.reshape(-1)])


def test_labels_of_as_many_steps_as_classes(model):
    labels = RNG.integers(0, 3, (4, 3))
    expected = np.eye(3)[labels.reshape(-1)]
    for y in (labels, labels[..., None], np.eye(3)[labels]):
        check_truth(held_of(model, (4, 3, 3), y, MULTICLASS), expected)


@pytest.mark.parametrize("shape", [(11, 1), (11,)])
@pytest.mark.parametrize("y", [YES[:, 0], YES[:, :1], YES[:, 0] > 0, YES[:, 0].tolist()])
def test_binary_labels_of_rows(y, shape, model):
    check_truth(held_of(model, shape, y, BINARY), no_and_yes(YES[:, 0]))


@pytest.mark.parametrize("y", [SPOTS, SPOTS[..., None], SPOTS.astype(bool)])
def test_binary_labels_of_pixels(y, model):
    check_truth(held_of(model, (2, 4, 5, 1), y, BINARY), no_and_yes(SPOTS))


def test_multilabel_targets_of_rows(model):
    for y in (YES, YES.astype(bool), YES.tolist()):
        check_truth(held_of(model, (11, 3), y, MULTILABEL), no_and_yes(YES))
    check_truth(held_of(model, (11, 3), 0.25 * YES, MULTILABEL), no_and_yes(0.25 * YES))


@pytest.mark.parametrize("shape", [(6, 3, 2), (6, 3), (6, 1), (6,)])
def test_values_of_every_shape(shape, model):
    values = VALUES.reshape(-1)[: np.prod(shape)].reshape(shape)
    given = [values, values.tolist(), values[..., None]]
    if shape[1:] == (1,):
        given.append(values[:, 0])
    for y in given:
        check_truth(held_of(model, shape, y, REGRESSION), values.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "y", "meaning", "message"),
    [
        ((11, 3), YES[:, :2], MULTICLASS, "y of shape (11, 2), where (11,) is needed"),
        ((2, 4, 5, 3), PIXELS[..., :2], MULTICLASS, "shape (2, 4, 2), where (2, 4, 5) is needed"),
        ((2, 4, 5, 3), PIXELS[:, 0, 0], MULTICLASS, "shape (2,), where (2, 4, 5) is needed"),
        ((11, 1), YES, BINARY, "y of shape (11, 3), where (11, 1) is needed"),
        ((11, 3), YES[:, :1], MULTILABEL, "where (11, 3) is needed"),
        ((11, 3), YES[:, 0], MULTILABEL, "y of shape (11,), where (11, 3) is needed"),
        ((6, 3, 2), VALUES[:, :, 0], REGRESSION, "shape (6, 3), where (6, 3, 2) is needed"),
        ((6, 2), VALUES[:5, 0], REGRESSION, "y of shape (5, 2), x with 6 rows"),
        ((6, 1), 1.5, REGRESSION, "y of shape (), x with 6 rows"),
    ],
)
def test_targets_of_another_shape(shape, y, meaning, message, model):
    with pytest.raises(ValueError) as caught:
        _ = held_of(model, shape, y, meaning).truths
    assert message in str(caught.value)


# Sample weights, masks and ignored classes


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1), (2, 4, 5), (2, 4, 5, 1)])
def test_sample_weights_of_pixels(shape, model):
    weights = RNG.uniform(0.1, 1, shape)
    aligned = weights.reshape(shape[:3] + (1,) * (3 - len(shape)))
    held = held_of(model, (2, 4, 5, 3), PIXELS, MULTICLASS, weights)
    check_truth(held, np.eye(3)[PIXELS.reshape(-1)], np.broadcast_to(aligned, (2, 4, 5)))


@pytest.mark.parametrize("shape", [(11,), (11, 1), (11, 3)])
def test_sample_weights_of_labels(shape, model):
    weights = RNG.uniform(0.1, 1, shape)
    held = held_of(model, (11, 3), YES, MULTILABEL, weights)
    expected = np.broadcast_to(weights.reshape(11, -1), (11, 3))
    check_truth(held, no_and_yes(YES), expected)


@pytest.mark.parametrize("weights", [np.arange(11), (np.arange(11) > 3).tolist(), [np.ones(11)]])
def test_sample_weights_of_rows(weights, model):
    held = held_of(model, (11, 3), LABELS, MULTICLASS, weights)
    check_truth(held, np.eye(3)[LABELS], np.reshape(weights, -1).astype("float64"))


def test_masked_steps_do_not_count(model):
    mask = RNG.random((2, 4, 5)) < 0.6
    weights = RNG.uniform(0.1, 1, 2)
    held = held_of(model, (2, 4, 5, 3), PIXELS, MULTICLASS, weights, {"0": mask})
    check_truth(held, np.eye(3)[PIXELS.reshape(-1)], mask * weights[:, None, None])
    held = held_of(model, (2, 4, 5, 3), np.eye(3)[PIXELS], MULTILABEL, None, {"0": mask})
    check_truth(held, no_and_yes(np.eye(3)[PIXELS]), np.repeat(mask.reshape(-1), 3))


@pytest.mark.parametrize("ignored", [-1, 255, 2])
def test_ignored_labels_do_not_count(ignored, model):
    is_ignored = RNG.random(PIXELS.shape) < 0.3
    labels = np.where(is_ignored, ignored, PIXELS % 2)
    meaning = Output("multiclass", ignored=ignored)
    [plain] = held_of(model, (2, 4, 5, 3), PIXELS % 2, MULTICLASS).truths
    for y in (labels, labels[..., None], labels.astype("float32")):
        held = held_of(model, (2, 4, 5, 3), y, meaning)
        [truth] = held.truths
        np.testing.assert_allclose(truth.weights, ~is_ignored.reshape(-1) / (~is_ignored).sum())
        counted = truth.weights > 0
        np.testing.assert_array_equal(truth.targets[counted], plain.targets[counted])


def test_weights_or_masks_of_all_zeros_are_refused(model):
    for arguments in ({"sample_weight": np.zeros(11)}, {"masks": {"0": np.zeros(11, bool)}}):
        with pytest.raises(ValueError, match="at least 0 and not 0 everywhere"):
            _ = held_of(model, (11, 3), LABELS, MULTICLASS, **arguments).truths


# Several outputs


@pytest.fixture(scope="module")
def heads():
    """For each structure a model, its outputs, their structure and their meanings."""
    made = {}
    for structure in (list, dict):
        model = two_headed(structure)
        names = ["kind", "amount"] if structure is list else ["amount", "kind"]
        shapes = {"kind": (2, 11, 3), "amount": (2, 11, 2)}
        meanings = {"kind": MULTICLASS, "amount": REGRESSION}
        outputs = [np.full(shapes[name], 1 / 3, "float32") for name in names]
        pattern = dict.fromkeys(names, 0) if structure is dict else [0, 0]
        made[structure] = model, outputs, pattern, [meanings[name] for name in names]
    return made


ROW_WEIGHTS = {"kind": np.arange(11.0), "amount": np.arange(11.0) % 3}


@pytest.mark.parametrize(
    ("structure", "y"),
    [
        (list, [LABELS, AMOUNTS]),
        (list, (LABELS[:, None], AMOUNTS)),
        (list, BY_NAME),
        (dict, BY_NAME),
        (dict, {"amount": AMOUNTS, "kind": np.eye(3)[LABELS]}),
    ],
)
@pytest.mark.parametrize("weights", [None, "one for all", "by position", "by name"])
def test_targets_of_several_outputs(structure, y, weights, heads):
    model, outputs, pattern, meanings = heads[structure]
    each = ROW_WEIGHTS
    if weights in (None, "one for all"):
        each = dict.fromkeys(ROW_WEIGHTS, np.ones(11) if weights is None else ROW_WEIGHTS["kind"])
    given = {
        None: None,
        "one for all": ROW_WEIGHTS["kind"],
        # In the order of the outputs; for a dict, that of its sorted keys.
        "by position": [
            ROW_WEIGHTS[name] for name in sorted(ROW_WEIGHTS, reverse=structure is list)
        ],
        "by name": ROW_WEIGHTS,
    }[weights]
    held = HeldOut(model, outputs, pattern, meanings, y, given, {})
    for meaning, truth in zip(meanings, held.truths, strict=True):
        name = "kind" if meaning.is_classes else "amount"
        expected = np.eye(3)[LABELS] if name == "kind" else AMOUNTS.reshape(-1)
        np.testing.assert_allclose(truth.targets, expected)
        counts = np.repeat(each[name], len(expected) // 11)
        np.testing.assert_allclose(truth.weights, counts / counts.sum())


@pytest.mark.parametrize("structure", [list, dict])
@pytest.mark.parametrize(
    "y",
    [
        LABELS,
        [LABELS],
        [LABELS, AMOUNTS, AMOUNTS],
        {"kind": LABELS},
        {"kind": LABELS, "amount": None},
        {"kind": LABELS, "size": AMOUNTS},
        {"amount": AMOUNTS, "sort": LABELS},
    ],
)
def test_targets_that_are_not_one_for_each_output(structure, y, heads):
    model, outputs, pattern, meanings = heads[structure]
    with pytest.raises(ValueError) as caught:
        _ = HeldOut(model, outputs, pattern, meanings, y, None, {}).truths
    assert "`y` must have one array for each of the model's 2 outputs" in str(caught.value)
