"""Temperature scaling: one number for the combined probabilities, learned on held-out data."""

from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.targets import Truth

# The lowest and the highest temperature.
TEMPERATURES = (0.05, 20.0)


def learn_temperature(items: list[np.ndarray], truths: list[Truth], shares: list[float]) -> float:
    """The temperature of least negative log-likelihood, between 0.05 and 20.

    Args:
        items: Log-probabilities `(items, classes)` of each output of classes.
        truths: What is true of each.
        shares: How much each counts.
    """
    from scipy import optimize, special  # noqa: PLC0415  Loaded where it is used.

    def value(log_temperature: float) -> float:
        cooled = [special.log_softmax(logs / np.exp(log_temperature), axis=-1) for logs in items]
        parts = zip(cooled, truths, shares, strict=True)
        return sum(share * loss(logs, truth) for logs, truth, share in parts)

    found = optimize.minimize_scalar(
        value, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-7}
    )
    # The search never looks at the ends themselves, nor at no change.
    best = min([0.0, *np.log(TEMPERATURES), float(found.x)], key=value)
    return float(np.clip(np.exp(best), *TEMPERATURES))


def temperature_of(held: HeldOut, combined: Any) -> float:
    """The temperature of combined outputs; those of a regression have no say."""
    held.check_for_fitting()
    chosen = [i for i, meaning in enumerate(held.meanings) if meaning.is_classes]
    if not chosen:
        raise ValueError(
            "A temperature is for classes: it sharpens or flattens probabilities, and values "
            "have none. Received: a model whose outputs are all regressions. Look at `std` of "
            "`predict_uncertainty`."
        )
    outputs = keras.tree.flatten(combined)
    items = [items_of(outputs[i], held.meanings[i]) for i in chosen]
    truths = [held.truths[i] for i in chosen]
    return learn_temperature(items, truths, [held.loss_weights[i] for i in chosen])
