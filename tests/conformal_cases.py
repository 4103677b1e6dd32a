"""MAPIE on predictions that are known, for tests of conformal prediction."""

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin


class Known(ClassifierMixin, BaseEstimator):
    """Its inputs are its probabilities."""

    def __init__(self, classes=3):
        self.classes = classes

    def fit(self, X, y):
        return self

    @property
    def classes_(self):
        return np.arange(self.classes)

    def predict_proba(self, X):
        return np.asarray(X)

    def predict(self, X):
        return np.argmax(X, axis=1)


class Column(RegressorMixin, BaseEstimator):
    """Its inputs have its predictions in one of their columns."""

    def __init__(self, column=0):
        self.column = column

    def fit(self, X, y):
        return self

    @property
    def is_fitted(self):
        return True

    def predict(self, X):
        return np.asarray(X)[:, self.column]


class Shares(np.random.RandomState):
    """Draws the shares that it was made with."""

    def __init__(self, shares):
        super().__init__(0)
        self.shares = shares

    def uniform(self, low=0.0, high=1.0, size=None):
        assert np.prod(size) == len(self.shares)
        return self.shares.copy()


def shares_of(rows):
    """What the package takes off the scores of APS."""
    return np.random.default_rng(0).random(rows)


def set_aside(rows):
    """Which rows the package sets aside for RAPS."""
    tuning = np.zeros(rows, bool)
    tuning[np.random.default_rng(0).permutation(rows)[: round(0.2 * rows)]] = True
    return tuning


def raps_split_as_here():
    """MAPIE's score, on the rows that the package sets aside.

    MAPIE 1 looks for the penalty with the penalty in the place of the number of free classes.
    """
    from mapie.conformity_scores import RAPSConformityScore

    class Raps(RAPSConformityScore):
        def split_data(self, X, y, y_enc, sample_weight=None, groups=None):
            tuning = set_aside(len(X))
            self.X_raps, self.y_raps = X[tuning], y_enc[tuning]
            self.y_raps_no_enc = self.label_encoder_.inverse_transform(self.y_raps)
            self.n_samples_ = int((~tuning).sum())
            return X[~tuning], y[~tuning], y_enc[~tuning], sample_weight, groups

        def _add_regularization(
            self, sums, lambda_=None, k_star=None, prediction_phase=False, **kwargs
        ):
            if prediction_phase:
                lambda_, k_star = self.lambda_star, self.k_star
            ranks = np.arange(1, sums.shape[1] + 1)[None, :, None]
            return sums + lambda_ * np.maximum(0, ranks - k_star)

    return Raps()


def mapie_sets(method, p, y, new, levels):
    """MAPIE's sets for rows of probabilities: `(rows, classes, levels)`."""
    from mapie.classification import SplitConformalClassifier

    shares, score = shares_of(len(y)), method
    if method == "raps":
        shares, score = shares[~set_aside(len(y))], raps_split_as_here()
    mapie = SplitConformalClassifier(
        Known(p.shape[1]), levels, score, prefit=True, random_state=Shares(shares)
    )
    return mapie.conformalize(p, y).predict_set(new)[1]


def mapie_intervals(predictions, y, new, levels, scale=None, new_scale=None):
    """MAPIE's intervals `(rows, 2, levels)`, from predictions and what errors are divided by."""
    from mapie.conformity_scores import ResidualNormalisedScore
    from mapie.regression import SplitConformalRegressor

    score = "absolute"
    if scale is not None:
        score = ResidualNormalisedScore(Column(1), prefit=True)
    ones = np.ones_like(predictions), np.ones_like(new)
    scale, new_scale = ones if scale is None else (scale, new_scale)
    mapie = SplitConformalRegressor(Column(), levels, score, prefit=True)
    mapie.conformalize(np.column_stack([predictions, scale]), y)
    return mapie.predict_interval(np.column_stack([new, new_scale]))[1]
