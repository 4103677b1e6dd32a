"""Model functions for the scikit-learn estimators."""

import keras


def net(X, y, units=16, loss="sparse_categorical_crossentropy", activation="softmax"):
    """A small classifier, with one output for each column of `y`."""
    return _compiled(X, units, y.shape[1], activation, loss)


def values(X, y, units=16, loss="mse"):
    """A small regressor, with one output for each column of `y`."""
    return _compiled(X, units, y.shape[1], None, loss)


def _compiled(x, units, outputs, activation, loss):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Flatten(),
            layers.Dense(units, "relu"),
            layers.Dense(outputs, activation),
        ]
    )
    # Eager: a few steps of a small model are done before a graph would be traced.
    model.compile(keras.optimizers.SGD(momentum=0.9, clipnorm=1.0), loss, run_eagerly=True)
    return model


class Named:
    """A model function that is shown by its name, without an address that differs each time."""

    def __init__(self, function):
        self.function = function

    def __call__(self, X, y):
        return self.function(X, y)

    def __repr__(self):
        return self.function.__name__
