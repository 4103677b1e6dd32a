"""The scikit-learn estimators, compared with the ensemble itself, NumPy and scikit-learn."""

import copy
import gc
import io
import pickle
import random

import joblib
import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf
from joblib.externals.loky import get_reusable_executor
from models import assert_close, assert_same, member_weights, three_classes
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn_cases import net, values

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble
from snapshot_ensemble.sklearn import SnapshotEnsembleClassifier, SnapshotEnsembleRegressor

X, CODES = three_classes(60)
NAMES = np.array(["ash", "birch", "elm"])
LABELS = NAMES[CODES]
SUMS = X.sum(axis=1)
SETTINGS = {"cycles": 2, "epochs": 2, "lr_init": 0.1, "batch_size": 60, "random_state": 0}
# Enough to learn something.
LEARNING = {"epochs": 8, "lr_init": 0.5}
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def classifier(model=net, **arguments):
    return SnapshotEnsembleClassifier(model, **{**SETTINGS, **arguments})


def regressor(model=values, **arguments):
    return SnapshotEnsembleRegressor(model, **{**SETTINGS, **arguments})


@pytest.fixture(scope="module")
def fitted():
    return classifier().fit(X, LABELS)


# Training and predicting


@pytest.mark.slow
def test_it_trains_the_ensemble_that_one_would_train_by_hand():
    actual = classifier(batch_size=20, cycles=3, epochs=4, lr_min=0.01, random_state=None)
    keras.utils.set_random_seed(1)
    actual.fit(X, LABELS)
    keras.utils.set_random_seed(1)
    ens = SnapshotEnsemble(net(X, np.eye(3)[CODES]), cycles=3, lr_init=0.1, lr_min=0.01)
    history = ens.fit(X, CODES, epochs=4, batch_size=20, verbose=0)
    assert_same(member_weights(actual.ensemble_), member_weights(ens))
    assert actual.history_ == history.history
    np.testing.assert_array_equal(actual.predict_proba(X), ens.predict(X, batch_size=20, verbose=0))


def test_labels_are_the_most_probable_classes(fitted):
    probabilities = fitted.ensemble_.predict(X, verbose=0)
    assert fitted.classes_.tolist() == NAMES.tolist()
    predicted = fitted.predict(X)
    assert predicted.tolist() == NAMES[probabilities.argmax(axis=1)].tolist()
    assert fitted.score(X, LABELS) == accuracy_score(LABELS, predicted)
    weights = np.arange(60.0)
    expected = accuracy_score(LABELS, predicted, sample_weight=weights)
    assert fitted.score(X, LABELS, weights) == expected
    assert is_classifier(fitted)
    assert not is_regressor(fitted)


@pytest.mark.parametrize("labels", [NAMES, np.array([3, 5, -1]), np.array([0.0, 1.0, 2.0])])
def test_labels_keep_their_type(labels):
    predicted = classifier().fit(X, labels[CODES]).predict(X)
    assert predicted.dtype == labels.dtype
    assert set(predicted) <= set(labels)


def test_bools_are_labels():
    estimator = classifier(net, model_kwargs={"units": 4}).fit(X, CODES == 1)
    assert estimator.classes_.tolist() == [False, True]
    assert estimator.predict(X).dtype == bool


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


FORMS = {
    "integers": ("sparse_categorical_crossentropy", "softmax", CODES),
    "by shape": ("crossentropy", "softmax", CODES),
    "logits": (LOGITS, None, CODES),
    "one-hot": ("categorical_crossentropy", "softmax", np.eye(3)[CODES]),
    "brier": ("mse", "softmax", np.eye(3)[CODES]),
    "one against the rest": ("binary_crossentropy", "sigmoid", np.eye(3)[CODES]),
    "own loss": (lambda y, p: -(y * keras.ops.log(p)), "softmax", np.eye(3)[CODES]),
}


@pytest.mark.sampled(4, 2)
@pytest.mark.parametrize("form", FORMS)
def test_targets_have_the_form_that_the_loss_takes(form):
    loss, activation, targets = FORMS[form]
    kwargs = {"loss": loss, "activation": activation}
    estimator = classifier(model_kwargs=kwargs).fit(X, LABELS)
    keras.utils.set_random_seed(np.random.RandomState(0).randint(2**31 - 1))
    ens = SnapshotEnsemble(net(X, np.eye(3), **kwargs), cycles=2, lr_init=0.1)
    ens.fit(X, targets, epochs=2, batch_size=60, verbose=0)
    assert_same(member_weights(estimator.ensemble_), member_weights(ens))
    probabilities = np.mean([member.predict(X, verbose=0) for member in ens], axis=0)
    if activation is None:
        members = ens.predict_members(X, verbose=0).astype("float64")
        probabilities = np.mean([softmax(logits) for logits in members], axis=0)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    assert_close(estimator.predict_proba(X), probabilities)


@pytest.mark.parametrize("from_logits", [False, True])
def test_two_classes_may_have_one_sigmoid(from_logits):
    def one_sigmoid(X, y):
        loss = keras.losses.BinaryCrossentropy(from_logits=from_logits)
        return net(X, y[:, :1], loss=loss, activation=None if from_logits else "sigmoid")

    estimator = classifier(one_sigmoid, **LEARNING).fit(X, np.where(CODES, "yes", "no"))
    members = estimator.ensemble_.predict_members(X, verbose=0)[..., 0]
    expected = np.mean(sigmoid(members) if from_logits else members, axis=0)
    assert_close(estimator.predict_proba(X), np.stack([1 - expected, expected], axis=1))
    assert estimator.score(X, np.where(CODES, "yes", "no")) > 0.7 > np.mean(CODES > 0)


def test_sigmoids_that_all_vanish_give_even_probabilities():
    kwargs = {"loss": "binary_crossentropy", "activation": "sigmoid"}
    estimator = classifier(model_kwargs=kwargs, cycles=1, epochs=1).fit(X, LABELS)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "sigmoid")])
    model.compile("sgd", "binary_crossentropy")
    model.set_weights([np.zeros((4, 3)), np.full(3, -1e9)])
    ens = SnapshotEnsemble(model, cycles=1, lr_init=1e-9)
    ens.fit(X, np.eye(3)[CODES], epochs=1, verbose=0)
    estimator.ensemble_ = ens
    assert_close(estimator.predict_proba(X), np.full((60, 3), 1 / 3))


@pytest.mark.slow
def test_a_regressor_predicts_values():
    estimator = regressor(**LEARNING).fit(X, SUMS)
    predicted = estimator.predict(X)
    assert predicted.shape == (60,)
    members = estimator.ensemble_.predict_members(X, verbose=0)
    assert_close(predicted, members.mean(axis=0)[:, 0])
    assert estimator.score(X, SUMS) == r2_score(SUMS, predicted) > 0.5
    assert is_regressor(estimator)
    median = copy.deepcopy(estimator).set_params(combine="median").predict(X)
    assert_close(median, np.median(members, axis=0)[:, 0])


@pytest.mark.parametrize("columns", [1, 2])
def test_a_regressor_keeps_the_shape_of_its_targets(columns):
    estimator = regressor().fit(X, X[:, :columns])
    assert estimator.predict(X).shape == (60, columns)


def test_images_are_taken_as_they_are():
    images = np.random.default_rng(0).normal(size=(30, 4, 4, 1))
    estimator = classifier().fit(images, LABELS[:30])
    assert estimator.ensemble_.model.input_shape == (None, 4, 4, 1)
    assert estimator.predict(images).shape == (30,)


# What the model is made from


def test_the_model_function_gets_columns_and_its_own_arguments():
    received = {}

    def watching(X, y, **kwargs):
        received.update(x=X, y=y, kwargs=kwargs)
        return net(X, y)

    classifier(watching, model_kwargs={"units": 3}).fit(X, LABELS)
    np.testing.assert_array_equal(received["x"], X)
    np.testing.assert_array_equal(received["y"], np.eye(3)[CODES])
    assert received["kwargs"] == {"units": 3}


class OwnModel(keras.Model):
    """Compiles itself; its outputs are known only when it runs."""

    def __init__(self, X, y):
        super().__init__()
        self.dense = keras.layers.Dense(y.shape[1], "softmax")
        self.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)

    def call(self, inputs):
        return self.dense(inputs)


def test_the_model_may_be_made_by_a_class():
    estimator = classifier(OwnModel).fit(X, LABELS)
    assert isinstance(estimator.ensemble_.model, OwnModel)
    assert_close(estimator.predict_proba(X), estimator.ensemble_.predict(X, verbose=0))


@pytest.mark.parametrize("is_built", [True, False])
def test_a_compiled_model_is_copied(is_built):
    model = net(X, np.eye(3))
    if not is_built:
        model = keras.Sequential([keras.layers.Dense(3, "softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    before = model.get_weights()
    first = classifier(model).fit(X, LABELS)
    assert first.ensemble_.model is not model
    assert_same(model.get_weights(), before)
    assert model.built is is_built
    again = clone(first)
    assert again.model is model
    assert_same(member_weights(again.fit(X, LABELS).ensemble_), member_weights(first.ensemble_))


def test_a_copy_starts_from_the_weights_of_the_model():
    model = net(X, np.eye(3))
    start = model.get_weights()
    estimator = classifier(model, cycles=1, lr_init=1e-9, epochs=1).fit(X, LABELS)
    for actual, expected in zip(member_weights(estimator.ensemble_)[0], start, strict=True):
        assert_close(actual, expected, 1e-6)


# Held-out data and weights


def test_the_validation_split_is_random_and_has_the_shares_of_the_classes():
    order = np.argsort(CODES, kind="stable")
    seen = {}

    class Watching(SnapshotEnsembleClassifier):
        def _encoder(self, model, x, y):
            seen.update(x=x, y=y)
            return super()._encoder(model, x, y)

    estimator = Watching(net, **SETTINGS, validation_split=0.25)
    estimator.fit(X[order], LABELS[order])
    assert "val_loss" in estimator.history_
    expected = np.bincount(CODES) * 0.75
    assert np.abs(np.bincount(seen["y"]) - expected).max() < 1
    rows = {tuple(row) for row in X}
    assert {tuple(row) for row in seen["x"]} < rows


def test_a_class_too_small_to_be_split_is_no_obstacle():
    labels = LABELS.copy()
    labels[0] = "oak"
    estimator = classifier(validation_split=0.25).fit(X, labels)
    assert "val_loss" in estimator.history_
    assert estimator.classes_.tolist() == [*NAMES, "oak"]


def test_validation_data_choose_the_members():
    weights = np.linspace(0, 1, 20)
    estimator = classifier(cycles=3, epochs=3, combine="weighted")
    estimator.fit(X[:40], LABELS[:40], validation_data=(X[40:], LABELS[40:], weights))
    ens = estimator.ensemble_
    loss = ens.evaluate(X[40:], CODES[40:], members=1, sample_weight=weights, verbose=0)
    assert_close(estimator.history_["val_loss"][-1], loss, 1e-4)
    assert ens.weights.shape == (3,)
    expected = ens.predict(X, combine="weighted", batch_size=60, verbose=0)
    np.testing.assert_array_equal(estimator.predict_proba(X), expected)


def test_validation_data_of_a_regressor():
    estimator = regressor().fit(X[:40], SUMS[:40], validation_data=(X[40:], SUMS[40:]))
    last = estimator.ensemble_.predict(X[40:], members=1, verbose=0)[:, 0]
    assert_close(estimator.history_["val_loss"][-1], np.square(last - SUMS[40:]).mean(), 1e-4)


@pytest.mark.slow
def test_weights_of_rows_count():
    weights = np.where(CODES == 2, 0.0, 1.0)
    estimator = classifier(**LEARNING).fit(X, LABELS, weights)
    assert "elm" not in estimator.predict(X)
    by_class = classifier(**LEARNING).fit(X, LABELS, class_weight={"elm": 0.0})
    assert_same(member_weights(by_class.ensemble_), member_weights(estimator.ensemble_))


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.where(np.arange(60) < 45, "many", "few")
    weights = np.where(labels == "many", 60 / (2 * 45), 60 / (2 * 15))
    one = classifier().fit(X, labels, class_weight="balanced")
    other = classifier().fit(X, labels, weights)
    for left, right in zip(
        member_weights(one.ensemble_), member_weights(other.ensemble_), strict=True
    ):
        for a, b in zip(left, right, strict=True):
            assert_close(a, b, 1e-6)


# Random generators


@pytest.mark.slow
def test_a_random_state_reproduces_and_leaves_the_generators_as_they_were():
    def draws():
        numpy = np.random.rand()  # noqa: NPY002
        return random.random(), numpy, float(keras.random.uniform(())), float(tf.random.uniform(()))

    expected = [draws() for _ in range(2)]
    keras.utils.set_random_seed(0)
    actual = [draws()]
    first = classifier(validation_split=0.2).fit(X, LABELS)
    actual.append(draws())
    assert actual == expected
    second = classifier(validation_split=0.2).fit(X, LABELS)
    other = classifier(validation_split=0.2, random_state=1).fit(X, LABELS)
    assert_same(member_weights(first.ensemble_), member_weights(second.ensemble_))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


def test_a_generator_gives_another_seed_each_time():
    generator = np.random.RandomState(0)
    one, other = (classifier(random_state=generator).fit(X, LABELS) for _ in range(2))
    assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


# Cloning and pickling


def test_parameters_can_be_read_and_set():
    schedule = CosineAnnealing(lr_init=0.1, cycle_length=2)
    estimator = classifier(net, schedule=schedule, lr_init=None)
    assert estimator.get_params()["schedule"] is schedule
    estimator.set_params(schedule=None, cycles=3, lr_init=0.2)
    assert clone(estimator).get_params() == estimator.get_params()
    assert len(clone(estimator).set_params(epochs=3).fit(X, LABELS).ensemble_) == 3


def through_joblib(estimator, directory):
    joblib.dump(estimator, directory / "estimator.joblib")
    return joblib.load(directory / "estimator.joblib")


WAYS = {
    "pickle": lambda estimator, _: pickle.loads(pickle.dumps(estimator)),
    "joblib": through_joblib,
    "copy": lambda estimator, _: copy.deepcopy(estimator),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_predicts_the_same(fitted, way, tmp_path):
    copied = WAYS[way](WAYS[way](fitted, tmp_path), tmp_path)
    np.testing.assert_array_equal(copied.predict_proba(X), fitted.predict_proba(X))
    assert copied.predict(X).tolist() == fitted.predict(X).tolist()
    assert copied.get_params() == fitted.get_params()
    assert copied.ensemble_.history == fitted.ensemble_.history
    assert_same(member_weights(copied.ensemble_), member_weights(fitted.ensemble_))


def test_a_pickle_holds_no_keras_objects(fitted):
    class Strict(pickle.Unpickler):
        def find_class(self, module, name):
            assert not module.startswith(("keras", "tensorflow"))
            return super().find_class(module, name)

    built = classifier(net(X, np.eye(3))).fit(X, LABELS)
    for estimator in (fitted, built):
        copied = Strict(io.BytesIO(pickle.dumps(estimator))).load()
        np.testing.assert_array_equal(copied.predict_proba(X), estimator.predict_proba(X))
    assert_same(copied.model.get_weights(), built.model.get_weights())


def test_the_files_of_a_copy_are_removed_with_it(fitted):
    copied = pickle.loads(pickle.dumps(fitted))
    directory = copied.ensemble_.directory
    assert directory.is_dir()
    del copied
    gc.collect()
    assert not directory.exists()


class Unregistered(keras.layers.Dense):
    pass


def test_an_unknown_class_in_a_pickle_is_explained():
    def with_own_layer(X, y):
        model = keras.Sequential([keras.Input((4,)), Unregistered(3, "softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
        return model

    estimator = classifier()
    estimator.set_params(model=with_own_layer).fit(X, LABELS)
    # A local function cannot be pickled.
    content = pickle.dumps(estimator.set_params(model=net))
    with pytest.raises(Exception, match="Unregistered") as caught:
        pickle.loads(content)
    note = caught.value.__notes__[0]
    assert "register_keras_serializable" in note
    assert "pass a function that makes the model" in note


# Where scikit-learn uses estimators


@pytest.mark.slow
def test_a_grid_search_finds_the_number_of_cycles():
    folds = StratifiedKFold(2)
    search = GridSearchCV(classifier(), {"cycles": [1, 2]}, cv=folds).fit(X, LABELS)
    scores = []
    for train, test in folds.split(X, LABELS):
        one = classifier().fit(X[train], LABELS[train])
        scores.append(accuracy_score(LABELS[test], one.predict(X[test])))
    assert search.cv_results_["mean_test_score"][1] == np.mean(scores)
    assert isinstance(search.best_estimator_.ensemble_, SnapshotEnsemble)
    assert len(search.best_estimator_.ensemble_) == search.best_params_["cycles"]


@pytest.fixture
def loky():
    yield
    # They would wait for more work for minutes.
    get_reusable_executor().shutdown()


@keras.saving.register_keras_serializable("test_sklearn")
class Halved(keras.layers.Layer):
    def call(self, inputs):
        return inputs / 2


def halving(X, y):
    parts = [keras.Input(X.shape[1:]), Halved(), keras.layers.Dense(y.shape[1], "softmax")]
    model = keras.Sequential(parts)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


@pytest.mark.slow  # Each new process imports TensorFlow.
@pytest.mark.usefixtures("loky")
def test_a_grid_search_in_several_processes_finds_the_same():
    scores, outputs = [], []
    for jobs in (1, 2):
        own = classifier(halving, **LEARNING)
        search = GridSearchCV(own, {"cycles": [1, 2]}, cv=2, n_jobs=jobs, error_score="raise")
        outputs.append(search.fit(X, LABELS).predict_proba(X))
        scores.append(search.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(*outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("loky")
def test_a_model_goes_to_several_processes_and_ensembles_come_back():
    arguments = {"cv": 2, "return_estimator": True, "error_score": "raise"}
    given = classifier(net(X, np.eye(3)))
    alone, apart = (
        cross_validate(given, X, LABELS, n_jobs=jobs, **arguments)["estimator"] for jobs in (1, 2)
    )
    for one, other in zip(alone, apart, strict=True):
        assert_same(member_weights(one.ensemble_), member_weights(other.ensemble_))


@pytest.mark.slow
def test_it_is_a_step_of_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), classifier(**LEARNING))
    scores = cross_val_score(pipeline, 100 * X + 50, LABELS, cv=2)
    assert scores.min() > 0.6
    pipeline.fit(100 * X + 50, LABELS)
    scaled = StandardScaler().fit_transform(100 * X + 50)
    assert_close(pipeline.predict_proba(100 * X + 50), pipeline[-1].predict_proba(scaled))


def test_it_votes_with_other_classifiers():
    members = [("nets", classifier()), ("linear", LogisticRegression())]
    voting = VotingClassifier(members, voting="soft").fit(X, LABELS)
    parts = [classifier().fit(X, CODES), LogisticRegression().fit(X, LABELS)]
    expected = np.mean([part.predict_proba(X) for part in parts], axis=0)
    assert_close(voting.predict_proba(X), expected)


def test_targets_can_be_scaled():
    y = 1000 * SUMS + 5000
    scaled = TransformedTargetRegressor(regressor(), transformer=StandardScaler()).fit(X, y)
    alone = regressor().fit(X, (y - y.mean()) / y.std())
    assert_close(scaled.predict(X), alone.predict(X) * y.std() + y.mean(), 1e-4)


def test_the_names_of_columns_are_kept():
    frame = pandas.DataFrame(X, columns=list("abcd"))
    estimator = classifier().fit(frame, LABELS)
    assert estimator.feature_names_in_.tolist() == list("abcd")
    assert estimator.n_features_in_ == 4
    with pytest.raises(ValueError, match="feature names"):
        estimator.predict(frame[list("dcba")])


def test_arguments_of_fit_come_first():
    class Count(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1

    count = Count()
    estimator = classifier().fit(X, LABELS, epochs=3, callbacks=[count], validation_split=0.5)
    assert count.epochs == 3
    assert "val_loss" in estimator.history_


# Refusals


def wrong(match, estimator, y=LABELS, error=ValueError, **arguments):
    with pytest.raises(error, match=match):
        estimator.fit(X, y, **arguments)


def test_refusals_say_what_would_be_right():
    wrong(r"only one class, 'a', in `y`", classifier(), ["a"] * 60)
    wrong(r"`model` must be a function .* Received: model=3", classifier(3), error=TypeError)
    wrong(r"model function must return .* Received: 4", classifier(lambda X, y: 4), error=TypeError)
    wrong("`sample_weight` must have one number", classifier(), sample_weight=np.ones((60, 1)))
    wrong("at least one non-zero number.*60 zeros", classifier(), sample_weight=np.zeros(60))
    wrong("`combine='weighted'` learns", classifier(combine="weighted"))
    two = classifier(lambda X, y: net(X, y[:, :2]))
    wrong(r"one output for each class, .* Received: 3 classes .*\(None, 2\)", two)
    linear = classifier(model_kwargs={"loss": "mse", "activation": None})
    wrong("of a classifier must output classes. Received: loss='mse'", linear)
    wrong("of a regressor must output values. Received: loss='sparse", regressor(net), SUMS)
    one = regressor(lambda X, y: values(X, y[:, :1]))
    wrong(r"one output for each column of `y`\. Received: 2 columns", one, X[:, :2])
    wrong(r"one row for each row .* Received: outputs of shapes", classifier(two_outputs))
    wrong("must be compiled", classifier(keras.Sequential([keras.layers.Dense(3)])))
    wrong("y should be a 1d array", classifier(), np.eye(3)[CODES])
    with pytest.raises(NotFittedError):
        classifier().predict(X)


def two_outputs(X, y):
    inputs = keras.Input((4,))
    heads = [keras.layers.Dense(3, "softmax")(inputs) for _ in range(2)]
    model = keras.Model(inputs, heads)
    model.compile("sgd", ["sparse_categorical_crossentropy"] * 2)
    return model


class DrawsConstant(keras.layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.constant = float(np.random.rand())  # noqa: NPY002

    def call(self, inputs):
        return inputs * self.constant


def test_a_model_that_its_config_does_not_describe_is_refused():
    model = keras.Sequential([keras.Input((4,)), DrawsConstant(), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    wrong("cannot be copied: .* Pass a function that returns", classifier(model))
