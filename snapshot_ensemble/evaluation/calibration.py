"""Temperature scaling of the combined probabilities, fitted on held-out data."""

from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.targets import Truth

# The lowest and the highest temperature that can be learned.
TEMPERATURES = (0.05, 20.0)


def learn_temperature(items: list[np.ndarray], truths: list[Truth], shares: list[float]) -> float:
    """The temperature with the lowest negative log-likelihood, between 0.05 and 20.

    Args:
        items: Log-probabilities `(items, classes)` of each classification output.
        truths: The targets of each of these outputs.
        shares: The loss weight of each of these outputs.
    """
    from scipy import optimize, special  # noqa: PLC0415  Loaded where it is used.

    def loss_at(log_temperature: float) -> float:
        tempered = [special.log_softmax(logs / np.exp(log_temperature), axis=-1) for logs in items]
        parts = zip(tempered, truths, shares, strict=True)
        return sum(share * loss(logs, truth) for logs, truth, share in parts)

    minimum = optimize.minimize_scalar(
        loss_at, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-7}
    )
    # The bounded search never evaluates its bounds, nor a temperature of exactly 1.
    best = min([0.0, *np.log(TEMPERATURES), float(minimum.x)], key=loss_at)
    return float(np.clip(np.exp(best), *TEMPERATURES))


def temperature_of(held: HeldOut, combined: Any) -> float:
    """The temperature fitted to combined outputs; regression outputs are left out."""
    held.check_for_fitting()
    chosen = [i for i, meaning in enumerate(held.meanings) if meaning.is_classes]
    if not chosen:
        raise ValueError(
            "A temperature applies only to class probabilities. Received: a model whose outputs "
            "are all regressions. Use `std` of `predict_uncertainty` instead."
        )
    outputs = keras.tree.flatten(combined)
    items = [items_of(outputs[i], held.meanings[i]) for i in chosen]
    truths = [held.truths[i] for i in chosen]
    return learn_temperature(items, truths, [held.loss_weights[i] for i in chosen])
