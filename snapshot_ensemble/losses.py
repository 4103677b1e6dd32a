"""Losses of models that predict their own noise."""

import math
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("snapshot_ensemble")
class GaussianNLL(keras.losses.Loss):
    """The negative log-likelihood of a normal distribution, in nats.

    The last axis of the model's output is twice as long as that of the targets: first the means
    `mu`, then the logarithms of the variances `s2`. The loss of a row is the mean over its values
    `y` of `(log(2 pi) + log s2 + (y - mu)^2 / s2) / 2`.

    An ensemble of such a model reads the task `"gaussian"` off this loss. Its members form a
    mixture, and its predictions are the mean and the log-variance of that mixture. A model that is
    compiled with it is loaded where this package is not imported with `compile=False`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile("adam", GaussianNLL())
    >>> history = model.fit(np.zeros((8, 4)), np.zeros(8), verbose=0)

    Args:
        reduction: As for `keras.losses.Loss`. Defaults to `"sum_over_batch_size"`.
        name: As for `keras.losses.Loss`. Defaults to `"gaussian_nll"`.
        dtype: As for `keras.losses.Loss`. Defaults to `None`.

    Raises:
        ValueError: If the last axis of the output is not twice as long as that of the targets.

    References:
        - [Nix & Weigend, 1994](https://doi.org/10.1109/ICNN.1994.374138)
        - [Lakshminarayanan et al., 2017](https://arxiv.org/abs/1612.01474)
    """

    def __init__(
        self,
        reduction: str = "sum_over_batch_size",
        name: str = "gaussian_nll",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The loss of each row, or of each pixel or step of a row."""
        if len(y_true.shape) == len(y_pred.shape) - 1:
            y_true = ops.expand_dims(y_true, -1)
        values, units = y_true.shape[-1], y_pred.shape[-1]
        if len(y_true.shape) != len(y_pred.shape) or values not in (None, units / 2):
            raise ValueError(
                "The last axis of the output must hold a mean and a log-variance for each value of "
                f"the targets. Received: targets of shape {tuple(y_true.shape)}, output of shape "
                f"{tuple(y_pred.shape)}"
            )
        return ops.mean(gaussian_nll(y_true, *mean_and_log_variance(y_pred)), axis=-1)


def mean_and_log_variance(output: Any) -> tuple[Any, Any]:
    """The two halves of the last axis."""
    units = output.shape[-1] // 2
    return output[..., :units], output[..., units:]


def gaussian_nll(values: Any, mean: Any, log_variance: Any) -> Any:
    """The negative log-likelihood of each value, in nats."""
    squares = ops.square(values - mean) * ops.exp(-log_variance)
    return (math.log(2 * math.pi) + log_variance + squares) / 2
