"""Outputs that are passed through: ids, labels, strings, equal in all members."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.graphs import first_if_equal, is_in_graph, unstacked

# The key of the members' own values beside the combined outputs.
_APART = "values passed through, of each member"


def _refusal(name: str) -> str:
    return (
        f"Output '{name}' differs between members. Received: an output that is passed through, "
        "which must be equal in all members. Let the model return probabilities instead of "
        "labels, or take each member's own output from `predict_members`."
    )


def _are_equal(stack: np.ndarray, axis: int) -> bool:
    first = np.take(stack, [0], axis=axis)
    same = stack == first
    if stack.dtype.kind == "f":
        same |= np.isnan(stack) & np.isnan(first)
    return bool(np.all(same))


def passed_through(values: Sequence[Any], name: str) -> Any:
    """The one value that all members give.

    Args:
        values: Each member's value: arrays, tensors of a graph, or symbolic tensors.
        name: The output's name.

    Raises:
        ValueError: If values differ, or symbolic ones come from different computations. In a
            graph, that is `InvalidArgumentError` when it runs.
    """
    first = values[0]
    if all(value is first for value in values):
        return first
    if keras.backend.is_keras_tensor(first):
        raise ValueError(_refusal(name))
    if is_in_graph(first):
        return first_if_equal(values, _refusal(name))
    check_equal(np.stack([np.asarray(value) for value in values]), name)
    return first


def check_equal(stack: np.ndarray, name: str) -> None:
    """Raises `ValueError` if the values of members, which are on the first axis, differ."""
    if not _are_equal(stack, 0):
        raise ValueError(_refusal(name))


def refusal_in(error: Exception) -> str | None:
    """The message of `passed_through` in an error that a graph raised, or None."""
    text = str(error).replace("\\'", "'")  # TensorFlow escapes quotes.
    found = re.search(r"Output '[^']*' differs between members\..*?`predict_members`\.", text)
    return None if found is None else found.group()


def kept_apart(
    combine: Callable[[list[Any]], Any], outputs: list[Any], meanings: Sequence[Output]
) -> Any:
    """What `combine` returns for the members' outputs, with the values to compare beside it.

    Values cannot be compared inside a graph everywhere: compilers drop assertions.
    """
    flat = [keras.tree.flatten(member) for member in outputs]
    apart = {}
    for i, meaning in enumerate(meanings):
        if meaning.is_passed and any(member[i] is not flat[0][i] for member in flat):
            apart[str(i)] = ops.stack([member[i] for member in flat], axis=1)
            for member in flat:
                member[i] = flat[0][i]
    if not apart:
        return combine(outputs)
    packed = [keras.tree.pack_sequence_as(outputs[0], member) for member in flat]
    return {"combined": combine(packed), _APART: apart}


def compared(result: Any, names: Callable[[], Sequence[str]]) -> Any:
    """The combined outputs of `kept_apart`, once they have been compared.

    Args:
        result: What `kept_apart` returned, for all rows.
        names: Returns the name of each flat output.

    Raises:
        ValueError: If members differ.
    """
    if not isinstance(result, dict) or _APART not in result:
        return result
    for i, stack in result[_APART].items():
        if is_in_graph(stack):  # Inside a user's `tf.function`.
            passed_through(unstacked(stack, 1), names()[int(i)])
        elif not _are_equal(np.asarray(stack), 1):
            raise ValueError(_refusal(names()[int(i)]))
    return result["combined"]
