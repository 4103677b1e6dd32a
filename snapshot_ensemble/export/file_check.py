"""Runs an exported file in the runtime that will serve it, and compares it with the ensemble."""

import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.export.runtimes import RUNTIMES
from snapshot_ensemble.export.served import Outputs, Served
from snapshot_ensemble.inference.sample import random_array
from snapshot_ensemble.inference.task_words import Output

# How far a runtime's outputs may differ from Keras's, relative to the largest output: runtimes
# evaluate sums in different orders.
TOLERANCE = {"tf_saved_model": 1e-5, "onnx": 1e-4, "litert": 1e-4, "openvino": 1e-4}
# Weights and activations of 8 bits are off by some per cent after a few layers.
_QUANTIZED_TOLERANCE = 0.1
# A weight in float16 is off by up to 0.05 per cent, if it is not close to 0.
_FLOAT16_TOLERANCE = 0.01
QUANTIZING = ("optimizations", "representative_dataset", "target_spec", "inference_type")


def check_file(
    served: Served,
    path: pathlib.Path,
    format: str,
    arguments: Mapping[str, Any],
    sample: Any = None,
    x: Any = None,
    weights: str | None = None,
) -> None:
    """Compares an exported file with the ensemble on one batch.

    Where the ensemble can predict no batch that is at hand, this warns and the file stays.

    Args:
        served: What was exported.
        path: The file or folder.
        format: A Keras export format.
        arguments: What it was exported with.
        sample: Inputs that `fit` saw, or None.
        x: A batch of the user's to compare with, or None.
        weights: The dtype of the file's weights, if it is another than the model's. What that
            changes is printed, unless `verbose=False` was passed.

    Raises:
        ValueError: If the runtime cannot run the file, or its outputs differ.
    """
    if any(name.startswith("inference_") for name in arguments):
        _warn("its inputs or outputs are quantized")
        return
    try:
        inputs, expected = _reference(served, sample, x)
    except _NoBatchError as error:
        _warn(f"the ensemble cannot predict random inputs, which were made up: {error}")
        return
    try:
        actual = RUNTIMES[format](path, lambda names: _renamed(inputs, names))
    except ModuleNotFoundError:
        return  # Without its runtime, the file cannot be checked.
    except Exception as error:
        raise ValueError(
            f"The runtime cannot run the exported file. Received: format={format!r}: "
            f"{error}\n{advice(format, error)}"
        ) from error
    is_quantized = any(arguments.get(name) for name in QUANTIZING)
    tolerance = _QUANTIZED_TOLERANCE if is_quantized else TOLERANCE[format]
    actual = _renamed(actual, list(expected))
    lost = ""
    if weights is not None:
        tolerance, lost = _FLOAT16_TOLERANCE, _loss(served, expected, actual, weights)
    is_compared = _compare(served, inputs, expected, actual, tolerance, format, lost)
    if lost and is_compared and arguments.get("verbose") is not False:
        print(lost)


def _loss(served: Served, expected: Outputs, actual: Outputs, weights: str) -> str:
    """How far the outputs differ, and how often the most probable class is another one."""
    largest, changed, items = 0.0, 0, 0
    for name, output in expected.items():
        one, other = np.asarray(actual.get(name)), np.asarray(output)
        meaning = served.meanings[name]
        if meaning.is_passed or one.shape != other.shape:
            continue
        # Log-probabilities may be infinite in both.
        gap = np.subtract(one, other, out=np.zeros_like(other), where=one != other)
        largest = max(largest, float(np.max(np.abs(gap), initial=0.0)))
        if meaning.is_classes:
            differs = _classes(one, meaning) != _classes(other, meaning)
            changed, items = changed + int(differs.sum()), items + differs.size
    share = f", and the class in {changed} of {items} predictions" if items else ""
    return f"Weights in {weights} change the outputs by at most {largest:.2g}{share}."


def _classes(output: np.ndarray, meaning: Output) -> np.ndarray:
    if meaning.task == "multiclass":
        return np.asarray(output.argmax(axis=-1))
    return np.asarray(output > (0.0 if meaning.logits else 0.5))


def _warn(reason: str) -> None:
    warnings.warn(
        f"The exported file was not compared with the ensemble, since {reason}. "
        "Pass a batch to compare them on: `export(..., x=batch)`.",
        stacklevel=6,
    )


class _NoBatchError(Exception):
    """The ensemble can predict no batch that is at hand."""


def _reference(served: Served, sample: Any, x: Any) -> tuple[dict[str, Any], Outputs]:
    """The inputs by name of the first batch that the ensemble can predict, and the outputs."""
    if x is not None:
        try:
            inputs = _fitted(x, served.signature)
            return inputs, _outputs(served, inputs)
        except Exception as error:
            shapes = keras.tree.map_structure(lambda a: getattr(a, "shape", type(a).__name__), x)
            raise ValueError(
                f"The ensemble cannot predict the batch to check the export with: {error}\n"
                f"Received: x of shape {shapes}. Pass inputs as for `predict`, of few rows."
            ) from error
    failure: Exception | None = None
    for batch in _batches(served.signature, sample):
        try:
            inputs = _fitted(batch, served.signature)
            return inputs, _outputs(served, inputs)
        except Exception as error:  # Anything may go wrong in a user's layers.
            failure = error
    raise _NoBatchError(str(failure)) from failure


def _batches(signature: Any, sample: Any) -> Iterator[Any]:
    if sample is not None:
        yield sample
    # Some layers need open dimensions of at least a certain size.
    for size in (16, 64):
        yield keras.tree.map_structure(lambda spec, size=size: _made_up(spec, size), signature)


def _made_up(spec: Any, size: int) -> Any:
    rows, *others = (*spec.shape, 2)[: max(1, len(spec.shape))]
    shape = (rows, *(size if n is None else n for n in others))
    return random_array(keras.layers.InputSpec(spec.dtype, shape), rows or 2)


def _fitted(batch: Any, signature: Any) -> dict[str, Any]:
    """The inputs of a batch by name, as arrays of the signature's types; an error if they differ.

    A batch may be a dict of a list's names.
    """
    specs = keras.tree.flatten(signature)
    names = [spec.name for spec in specs]
    if isinstance(batch, Mapping) and not isinstance(signature, Mapping):
        batch = [batch[name] for name in names]
    return {
        spec.name: _as_array(array, spec)
        for spec, array in zip(specs, keras.tree.flatten(batch), strict=True)
    }


def _as_array(array: Any, spec: Any) -> Any:
    dtype = keras.backend.standardize_dtype(spec.dtype)
    tensor = keras.ops.convert_to_tensor(array)
    if dtype == "string":
        return tensor
    array = np.asarray(keras.ops.convert_to_numpy(tensor))
    if array.ndim + 1 == len(spec.shape):  # Keras adds a last axis to rows of single numbers.
        array = array[..., None]
    if len(array.shape) != len(spec.shape) or any(
        known not in (None, size) for known, size in zip(spec.shape, array.shape, strict=True)
    ):
        raise ValueError(f"An input of shape {array.shape} does not fit {tuple(spec.shape)}.")
    return array.astype(dtype)


def _outputs(served: Served, inputs: Mapping[str, Any]) -> Outputs:
    return served.expected(keras.tree.pack_sequence_as(served.signature, list(inputs.values())))


def _renamed(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Values with the same names as they are written elsewhere: `a-b.c` may be `a_b_c` there."""
    plain = {_plain(name): value for name, value in values.items()} | dict(values)
    # An input that the model does not use may be left out.
    known = {name: name if name in plain else _plain(name) for name in names}
    return {name: plain[key] for name, key in known.items() if key in plain}


def _plain(name: str) -> str:
    """The name as an argument of a function in TensorFlow."""
    plain = re.sub(r"[^\w]", "_", name)
    return plain if plain[:1].isalpha() else f"arg_{plain}"


def _compare(
    served: Served,
    inputs: Mapping[str, Any],
    expected: Outputs,
    actual: Outputs,
    tolerance: float,
    format: str,
    lost: str = "",
) -> bool:
    """Whether the outputs are equal; False if they are drawn at random."""
    differing = [n for n, o in expected.items() if not _is_close(actual.get(n), o, tolerance)]
    if not differing:
        return True
    again = _outputs(served, inputs)
    if not all(_is_close(again[name], expected[name], tolerance) for name in expected):
        # The ensemble draws random numbers, so that only the kind of outputs can be compared.
        differing = [n for n, o in expected.items() if not _is_alike(actual.get(n), o)]
    is_complete = all(np.shape(actual.get(n, ())) == np.shape(o) for n, o in expected.items())
    if differing and lost and is_complete:
        raise ValueError(
            f"{lost} That is more than {tolerance:.0%} of the largest output. Received: "
            f"format={format!r}. Export with `weights=None`."
        )
    if differing:
        raise ValueError(
            f"The exported file and the ensemble disagree on output {differing[0]!r}. "
            f"Received: format={format!r}. {advice(format)}"
        )
    return False


def _is_close(actual: Any, expected: Any, tolerance: float) -> bool:
    if actual is None or np.shape(actual) != np.shape(expected):
        return False
    one, other = np.asarray(actual), np.asarray(expected)
    if other.dtype.kind in "OSU":
        return bool(np.array_equal(one, other))
    if other.dtype.kind == "b":  # Where numbers may differ a little, a few bools may.
        return bool(np.mean(one != other) <= 10 * tolerance)
    scale = max(1.0, float(np.max(np.abs(other), initial=0.0, where=np.isfinite(other))))
    return bool(np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True))


def _is_alike(actual: Any, expected: Any) -> bool:
    """Whether outputs of random numbers have the same shape and type, and are finite as often."""
    if actual is None or np.shape(actual) != np.shape(expected):
        return False
    one, other = np.asarray(actual), np.asarray(expected)
    if one.dtype != other.dtype:
        return False
    return one.dtype.kind != "f" or bool(np.isfinite(one).all() or not np.isfinite(other).all())


def advice(format: str, error: Exception | None = None) -> str:
    """What can be done about an export that failed."""
    message = str(error)
    if "Erfc" in message:
        return (
            "The cause is the exact GELU, which tf2onnx converts to an operator that ONNX does not "
            "have: use `keras.activations.gelu(x, approximate=True)`, or export a SavedModel."
        )
    if "Random" in message:
        return (
            "The model draws random numbers when it predicts, for which this format has no "
            "operation: export a SavedModel."
        )
    if "Select TensorFlow op" in message:
        return (
            "The model uses operations that LiteRT does not support. A common cause is a recurrent "
            "layer: make it with `unroll=True`, or export a SavedModel."
        )
    if format == "tf_saved_model":
        return (
            "A layer may compute something else in a graph, or keep what it computed before: "
            "compare `model.export` of a member, `ens[0]`."
        )
    return "A SavedModel (format='tf_saved_model') supports every TensorFlow operation."
