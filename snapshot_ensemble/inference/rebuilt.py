"""Whether a model that was made anew computes the same as the user's.

A model made from a config loses whatever is neither configuration nor a weight, such as a constant
that a layer draws in its constructor. So it is compared with the original before it is used.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.sample import made_up_batch
from snapshot_ensemble.keras_compat.composites import dense_parts
from snapshot_ensemble.keras_compat.layer_graph import all_layers
from snapshot_ensemble.keras_compat.layer_states import state_variables
from snapshot_ensemble.keras_compat.stateless_call import with_weights

# How far outputs may differ, relative to the largest one: a sum may be evaluated in another order.
_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2


def computes_the_same(
    model: keras.Model, weights: Sequence[Any], rebuilt: keras.Model, sample: Any = None
) -> bool:
    """Whether a rebuilt model gives the outputs of the user's model for a batch.

    Neither model changes. Both draw the same random numbers.

    Args:
        model: The user's model, built.
        weights: The weights that `rebuilt` has, in the order of `model.weights`.
        rebuilt: The other model.
        sample: Inputs, as `predict_step` takes them. Defaults to `None`: they are made up.

    Returns:
        False also if there is no batch that the user's model can predict.
    """
    own = [v.numpy() for v in rebuilt.weights]
    return compute_the_same(model, weights, rebuilt, own, sample) or False


def compute_the_same(
    model: keras.Model,
    weights: Sequence[Any],
    other: keras.Model,
    weights_of_other: Sequence[Any],
    sample: Any = None,
) -> bool | None:
    """Like `computes_the_same`, with weights for both models; None if there is no such batch."""
    states = [state.numpy() for state in state_variables(model)]
    # What a model trains on need not be what it predicts, if it has a training step of its own.
    for batch in (sample, made_up_batch(model)):
        expected = outputs_on(model, weights, batch, states)
        if expected is not None:
            actual = outputs_on(other, weights_of_other, batch, states)
            return actual is not None and are_close(expected, actual)
    return None


def outputs_on(
    model: keras.Model, weights: Sequence[Any], batch: Any, states: Sequence[np.ndarray] = ()
) -> Any:
    """What a model predicts for a batch with these weights; it does not change.

    Args:
        model: A built model.
        weights: In the order of `model.weights`.
        batch: Inputs, as `predict_step` takes them, or None.
        states: What its random generators and recurrent states start with, if there are as many.

    Returns:
        The outputs; None if there is no batch, or the model cannot predict it.
    """
    if batch is None:
        return None
    try:
        batch = keras.tree.map_structure(keras.ops.convert_to_tensor, batch)
        with with_weights(model, weights):
            # Inside the context, assignments are seen only there.
            for state, value in zip(state_variables(model), states, strict=False):
                state.assign(value)
            return model.predict_step((batch,))
    except Exception:  # Anything may go wrong in a user's model, or one that was made anew.
        return None


def in_half_precision(model: keras.Model) -> bool:
    """Whether a layer computes with 16 bits, whatever the model's outputs have."""
    return any(layer.compute_dtype in ("float16", "bfloat16") for layer in all_layers(model))


def are_close(expected: Any, actual: Any, roughly: bool = False) -> bool:
    """Whether two structures of outputs are equal but for the order of summation.

    Args:
        expected: A structure of tensors.
        actual: Another one.
        roughly: Whether they were computed with 16 bits. Defaults to `False`, unless they have 16.
    """
    pairs = [dense_parts(outputs) for outputs in (expected, actual)]
    return len(pairs[0]) == len(pairs[1]) and all(
        _is_close(one, other, roughly) for one, other in zip(*pairs, strict=True)
    )


def _is_close(expected: Any, actual: Any, roughly: bool) -> bool:
    one, other = np.asarray(expected), np.asarray(actual)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind in "OSUbiu":
        return bool(np.array_equal(one, other))
    tolerance = _HALF_TOLERANCE if roughly or one.itemsize <= 2 else _TOLERANCE
    one, other = one.astype("float64"), other.astype("float64")
    scale = max(1.0, float(np.max(np.abs(one), initial=0.0, where=np.isfinite(one))))
    return bool(np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True))
