"""A few rows of inputs on which models can be compared: seen in training, or made up."""

from typing import Any

import keras
import numpy as np

from snapshot_ensemble.keras_compat.composites import is_sparse
from snapshot_ensemble.keras_compat.serving_signature import input_signature

# Enough for two models that differ to show it, and few enough to be kept.
ROWS = 8


def first_rows(model: keras.Model, batch: Any) -> Any:
    """The inputs of the first rows of a batch, as `predict_step` takes them.

    Args:
        model: The model that the batch is for.
        batch: What the data yielded: inputs, or a tuple that begins with them.
    """
    inputs = keras.utils.unpack_x_y_sample_weight(batch)[0]
    rows = _fixed_rows(model) or ROWS

    def first(leaf: Any) -> Any:
        return leaf if is_sparse(leaf) or not len(leaf.shape) else leaf[:rows]

    return keras.tree.map_structure(first, inputs)


def _fixed_rows(model: keras.Model) -> int | None:
    """The only size of batches that a model takes, if there is one."""
    shapes = [getattr(tensor, "shape", ()) for tensor in getattr(model, "inputs", None) or ()]
    return next((shape[0] for shape in shapes if shape and shape[0] is not None), None)


def made_up_batch(model: keras.Model) -> Any:
    """Random inputs that fit what the model was built with; None if that is not known."""
    try:
        rows = _fixed_rows(model) or 2
        return keras.tree.map_structure(
            lambda spec: random_array(spec, rows), input_signature(model)
        )
    except Exception:  # Keras raises several classes of errors for models that were never called.
        return None


def random_array(spec: Any, rows: int = 2) -> Any:
    """A random batch for one input.

    Unknown dimensions are set to 16; integers are 0 or 1, which are valid in every vocabulary.
    """
    rng = np.random.default_rng(0)
    shape = (rows, *(16 if size is None else size for size in spec.shape[1:]))
    dtype = keras.backend.standardize_dtype(spec.dtype)
    if dtype == "string":
        return keras.ops.convert_to_tensor(rng.choice(["a", "the b"], shape), "string")
    if dtype == "bool" or "int" in dtype:
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)
