"""Snapshot ensembles as scikit-learn estimators: `pip install 'snapshot-ensemble[sklearn]'`.

A model function in the form of `keras.wrappers` makes the net. Pipelines, cross-validation,
searches, voting and pickling work as with any estimator, also in several processes (`n_jobs`).
"""

from collections.abc import Callable
from typing import Any, Self

import keras
import numpy as np
import scipy.special

# First, since it says what to do if scikit-learn is missing.
from snapshot_ensemble.sklearn_base import SnapshotEstimator, checked_weights  # isort: skip
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import check_array, compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from snapshot_ensemble.inference.output_specs import read_outputs
from snapshot_ensemble.training.target_forms import check_values, encode_classes, one_hot

__all__ = ["SnapshotEnsembleClassifier", "SnapshotEnsembleRegressor"]


class SnapshotEnsembleClassifier(ClassifierMixin, SnapshotEstimator):
    """A snapshot ensemble as a scikit-learn classifier.

    Labels may be strings, integers or bools. They reach the model in the form that its compiled
    loss takes: integers for sparse losses, a column of zeros and ones for a single sigmoid, and
    otherwise one-hot.

    Example:

    >>> import keras, numpy as np
    >>> from snapshot_ensemble.sklearn import SnapshotEnsembleClassifier
    >>> def net(X, y, units=8):
    ...     layers = keras.layers
    ...     hidden = layers.Dense(units, "relu")
    ...     head = layers.Dense(y.shape[1], "softmax")
    ...     model = keras.Sequential([keras.Input(X.shape[1:]), hidden, head])
    ...     model.compile("sgd", "sparse_categorical_crossentropy")
    ...     return model
    >>> x = np.random.rand(64, 4)
    >>> labels = np.where(x[:, 0] > 0.5, "high", "low")
    >>> classifier = SnapshotEnsembleClassifier(net, cycles=3, epochs=6, lr_init=0.1)
    >>> classifier.fit(x, labels).predict_proba(x).shape
    (64, 2)
    >>> len(classifier.ensemble_)
    3

    Args:
        model: A function (or a class) that gets `X`, `y` and `model_kwargs` by name and returns a
            compiled model, as in `keras.wrappers`. `y` has one column of zeros and ones for each
            class. Or a compiled model: each `fit` trains a copy that starts from its weights.
            With `n_jobs`, a model with layers of your own must come from a function.
        model_kwargs: Further arguments of the model function. Defaults to `None`.
        cycles: As for `SnapshotEnsemble`, which also explains `lr_init`, `lr_min`, `shrink`,
            `schedule` and `task`.
        epochs: The budget. Defaults to `None`: ten epochs a cycle.
        batch_size: As for `model.fit` and `SnapshotEnsemble.predict`. Defaults to `None`.
        lr_init, lr_min, shrink, schedule, task: As for `SnapshotEnsemble`.
        combine: How predictions combine the members, as for `SnapshotEnsemble.predict`.
            `"weighted"` needs validation data. Defaults to `"mean"`.
        validation_split: The share of rows that are held out to choose the members, drawn at
            random and in proportion to the classes. Defaults to `0.0`.
        random_state: An int or a `RandomState` makes `fit` reproducible, and leaves the global
            generators as they were. Defaults to `None`: Keras's global generators are used.
            Threads share these, so results of several threads differ from run to run.
        verbose: As for `model.fit`. Defaults to `0`.

    Attributes:
        ensemble_: The `SnapshotEnsemble`.
        history_: The history of `fit`, a dict.
        classes_: The labels, sorted.
        n_features_in_: The number of features.
        feature_names_in_: The names of the features, if `X` is a DataFrame.

    Raises:
        ImportError: On import, if scikit-learn is not installed.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **fit_arguments: Any) -> Self:
        """Trains an ensemble from scratch.

        A pickled estimator holds the files of `SnapshotEnsemble.save`.

        Args:
            X: An array with one row for each example, of two or more dimensions.
            y: The labels, one for each row.
            sample_weight: The weight of each row. Defaults to `None`.
            **fit_arguments: Arguments of `SnapshotEnsemble.fit`, such as `callbacks`. They come
                before those of the constructor. `validation_data` are as `X` and `y`, and
                `class_weight` has a number for each label, or is `"balanced"`.

        Returns:
            The classifier itself.

        Raises:
            ValueError: If there is only one class, or the model does not fit the data.
            TypeError: If `model` does not make a Keras model.
        """
        x, y = validate_data(self, X, y, allow_nd=True)
        check_classification_targets(y)
        weights = checked_weights(sample_weight, x)
        self._labels = LabelEncoder()
        codes = self._labels.fit_transform(y)
        self.classes_ = self._labels.classes_
        if len(self.classes_) < 2:
            raise ValueError(
                "A classifier needs more than one class. Received: only one class, "
                f"{self.classes_.tolist()[0]!r}, in `y`"
            )
        with self._generators():
            self._train(x, codes, weights, fit_arguments)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, also if the model outputs logits.

        Args:
            X: As for `fit`.

        Returns:
            An array with one column for each of `classes_`. Each row sums to 1.

        Raises:
            NotFittedError: If `fit` has not been called.
        """
        raw = self._raw_predictions(X)
        ensemble = self.ensemble_
        [meaning] = read_outputs(ensemble.model, ensemble.task, raw)
        if meaning.task == "multiclass":
            return scipy.special.softmax(raw, axis=1) if meaning.logits else raw
        shares = scipy.special.expit(raw) if meaning.logits else raw
        if meaning.task == "binary":
            return np.concatenate([1 - shares, shares], axis=1)
        # One sigmoid for each class, as from classifiers of one class against the rest.
        sums = shares.sum(axis=1, keepdims=True)
        even = np.full_like(shares, 1 / shares.shape[1])
        return np.where(sums > 0, shares / np.where(sums > 0, sums, 1), even)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row.

        Args:
            X: As for `fit`.

        Returns:
            An array of labels.

        Raises:
            NotFittedError: If `fit` has not been called.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[np.argmax(probabilities, axis=1)]

    def _columns(self, y: np.ndarray) -> np.ndarray:
        return one_hot(y, len(self.classes_))

    def _training_weights(
        self, weights: np.ndarray | None, y: np.ndarray, arguments: dict[str, Any]
    ) -> np.ndarray | None:
        class_weight = arguments.pop("class_weight", None)
        if class_weight is None:
            return weights
        # Keras takes weights of classes or of rows, but not both.
        by_class = compute_sample_weight(class_weight, self.classes_[y]).astype("float32")
        return by_class if weights is None else weights * by_class

    def _strata(self, y: np.ndarray, share: float) -> np.ndarray | None:
        counts = np.bincount(y)
        smallest_part = len(y) * min(share, 1 - share)
        is_possible = counts.min() >= 2 and smallest_part >= len(self.classes_)
        return y if is_possible else None

    def _held_out_targets(self, y: Any) -> np.ndarray:
        return self._labels.transform(np.asarray(y))

    def _encoder(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[..., Any]:
        return encode_classes(model, self.task, x, len(self.classes_))


class SnapshotEnsembleRegressor(RegressorMixin, SnapshotEstimator):
    """A snapshot ensemble as a scikit-learn regressor.

    The targets are used as they are: to scale them, use scikit-learn's
    `TransformedTargetRegressor`.

    Example:

    >>> import keras, numpy as np
    >>> from snapshot_ensemble.sklearn import SnapshotEnsembleRegressor
    >>> def net(X, y):
    ...     inputs, head = keras.Input(X.shape[1:]), keras.layers.Dense(y.shape[1])
    ...     model = keras.Sequential([inputs, head])
    ...     model.compile("sgd", "mse")
    ...     return model
    >>> x = np.random.rand(64, 4)
    >>> regressor = SnapshotEnsembleRegressor(net, cycles=3, epochs=6, lr_init=0.1)
    >>> regressor.fit(x, x.sum(axis=1)).predict(x).shape
    (64,)

    Args:
        model: As for `SnapshotEnsembleClassifier`, as are all other arguments. `y` has one column
            for each target. The model must have as many outputs.
        model_kwargs, cycles, epochs, batch_size, lr_init, lr_min, shrink, schedule, task: As for
            `SnapshotEnsembleClassifier`.
        combine: `"mean"`, `"median"` or `"weighted"`. Defaults to `"mean"`.
        validation_split, random_state, verbose: As for `SnapshotEnsembleClassifier`.

    Attributes:
        ensemble_: The `SnapshotEnsemble`.
        history_: The history of `fit`, a dict.
        n_features_in_: The number of features.
        feature_names_in_: The names of the features, if `X` is a DataFrame.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **fit_arguments: Any) -> Self:
        """Trains an ensemble from scratch.

        Args:
            X: An array with one row for each example, of two or more dimensions.
            y: The values: one for each row, or one for each row and column.
            sample_weight: The weight of each row. Defaults to `None`.
            **fit_arguments: As for `SnapshotEnsembleClassifier.fit`.

        Returns:
            The regressor itself.

        Raises:
            ValueError: If the model does not fit the data.
            TypeError: If `model` does not make a Keras model.
        """
        x, y = validate_data(self, X, y, allow_nd=True, multi_output=True, y_numeric=True)
        weights = checked_weights(sample_weight, x)
        self._is_flat = y.ndim == 1
        with self._generators():
            self._train(x, self._columns(y), weights, fit_arguments)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The predicted values.

        Args:
            X: As for `fit`.

        Returns:
            An array of float64 of the shape of `y` in `fit`, with one value or row for each row.

        Raises:
            NotFittedError: If `fit` has not been called.
        """
        # As scikit-learn's own regressors return them.
        raw = self._raw_predictions(X).astype("float64")
        return raw[:, 0] if self._is_flat else raw

    def _columns(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(y, "float32").reshape(len(y), -1)

    def _held_out_targets(self, y: Any) -> np.ndarray:
        return self._columns(check_array(y, ensure_2d=False, input_name="y"))

    def _encoder(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[..., Any]:
        check_values(model, self.task, x, y.shape[1])
        return np.asarray

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
