"""Exports to files that run without Keras, each checked in the runtime that will serve it."""

import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from snapshot_ensemble.export.merged_model import merge
from snapshot_ensemble.export.replacing import replaced
from snapshot_ensemble.inference.cloning import Member
from snapshot_ensemble.inference.member_pool import Combiner, MemberPool
from snapshot_ensemble.keras_compat.layer_graph import graph_of
from snapshot_ensemble.keras_compat.onnx_export import prepare_for_tf2onnx
from snapshot_ensemble.keras_compat.serving_signature import input_signature
from snapshot_ensemble.keras_compat.stateless_call import losses_left_alone
from snapshot_ensemble.keras_compat.twins import twin_of
from snapshot_ensemble.storage.snapshot import Weights

Outputs = dict[str, np.ndarray]

# How far a runtime's outputs may differ from Keras's, relative to the largest output: runtimes
# evaluate sums in different orders.
_TOLERANCE = {"tf_saved_model": 1e-5, "onnx": 1e-4, "litert": 1e-4, "openvino": 1e-4}
_ENDINGS = {"onnx": ".onnx", "litert": ".tflite", "openvino": ".xml"}
_PACKAGES = {"onnx": ("tf2onnx", "onnx"), "openvino": ("openvino",)}


def check_format(filepath: Any, format: str) -> pathlib.Path:
    """The path; raises `ValueError` or `ImportError` if the format cannot be exported to it."""
    path = pathlib.Path(filepath)
    if format not in _TOLERANCE:
        raise ValueError(
            f"`format` must be one of {tuple(_TOLERANCE)}. Received: format={format!r}"
        )
    ending = _ENDINGS.get(format)
    if ending and path.suffix != ending:
        raise ValueError(
            f"A file of format {format!r} must end with '{ending}'. Received: filepath='{path}'"
        )
    for package in _PACKAGES.get(format, ()):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"Exporting to {format!r} needs the package {package}. Received: "
                f"format={format!r}. Install it with: pip install 'snapshot-ensemble[serving]'"
            )
    return path


@dataclasses.dataclass(frozen=True)
class Served:
    """What is exported, and what the exported file is compared with.

    Attributes:
        model: A model whose output is a dict with output names as keys.
        signature: A named `keras.layers.InputSpec` for each input, in the inputs' structure.
        expected: Returns the expected outputs by name for a batch in the inputs' structure.
    """

    model: keras.Model
    signature: Any
    expected: Callable[[Any], Outputs]


class _NamedOutputs(keras.Model):
    """Combines members that are not graphs of layers; the outputs are a dict by name."""

    def __init__(
        self,
        model: keras.Model,
        members: Sequence[Weights],
        combine: Callable[[list[Any]], Any],
    ) -> None:
        super().__init__(name=model.name, autocast=False)
        # Tracked, so that its lookup tables are saved, too. A twin, since TensorFlow takes away the
        # compiled functions while it saves, and another thread may be training with them.
        self._resources = twin_of(model)
        self._members = [Member(model) for _ in members]
        for member, weights in zip(self._members, members, strict=True):
            member.set_weights(weights)
        self._combine = combine
        self.built = True

    def call(self, inputs: Any) -> Any:
        return by_name(self._combine([member(inputs) for member in self._members]), None)


def by_name(outputs: Any, names: Sequence[str] | None) -> dict[str, Any]:
    """Outputs as a dict, named by their keys, by `names`, or `output_0`, `output_1` and so on."""
    flat = keras.tree.flatten(outputs)
    if isinstance(outputs, dict) and len(outputs) == len(flat):
        return dict(zip(sorted(outputs), flat, strict=True))
    return dict(zip(names or [f"output_{i}" for i in range(len(flat))], flat, strict=True))


def export_members(
    pool: MemberPool,
    combiner: Combiner,
    filepath: pathlib.Path,
    format: str,
    overwrite: bool,
    arguments: dict[str, Any],
) -> None:
    """Exports one model that combines members: as a merged graph or, for subclasses, as traced.

    Args:
        pool: The members.
        combiner: Which of them, and how they are combined.
        filepath: A path that `check_format` has passed.
        format: A Keras export format.
        overwrite: Whether an earlier export at the path may be replaced.
        arguments: For `keras.Model.export`.
    """
    reference = pool.members_model(combiner)
    parts = pool.weights(combiner.members), combiner.combine
    if graph_of(pool.model) is not None:
        served = serving_graph(merge(pool.model, *parts), reference)
    else:
        served = serving_function(pool.model, *parts, reference)
    export_model(served, filepath, format, overwrite=overwrite, **arguments)


def serving_graph(merged: keras.Model, reference: keras.Model) -> Served:
    """A Functional model for export, whose output is a dict by output name."""
    names = merged.output_names
    inputs = merged.input
    named = keras.Model(inputs, by_name(merged.output, names), name=merged.name)
    signature = keras.tree.map_structure(
        lambda tensor: keras.layers.InputSpec(tensor.dtype, tensor.shape, name=tensor.name), inputs
    )
    return Served(named, signature, lambda x: by_name(reference.predict(x, verbose=0), names))


def serving_function(
    model: keras.Model,
    members: Sequence[Weights],
    combine: Callable[[list[Any]], Any],
    reference: keras.Model,
) -> Served:
    """Members of a subclassed model for export, with the input signature it was built with."""
    signature = input_signature(model)
    if isinstance(signature, dict):
        signature = {key: _named(spec, key) for key, spec in signature.items()}
    elif isinstance(signature, (list, tuple)):
        signature = [_named(spec, f"inputs_{i}") for i, spec in enumerate(signature)]
    else:
        signature = _named(signature, "inputs")
    named = _NamedOutputs(model, members, combine)
    return Served(named, signature, lambda x: by_name(reference.predict(x, verbose=0), None))


def _named(spec: Any, name: str) -> Any:
    return keras.layers.InputSpec(spec.dtype, spec.shape, name=name)


def export_model(
    served: Served,
    filepath: pathlib.Path,
    format: str,
    *,
    overwrite: bool,
    **arguments: Any,
) -> None:
    """Exports to a temporary folder, checks the file in its runtime, and moves it into place.

    Args:
        served: What to export.
        filepath: A path that `check_format` has passed.
        format: A Keras export format.
        overwrite: Whether an earlier export at the path may be replaced.
        **arguments: For `keras.Model.export`.

    Raises:
        ValueError: If there is something at the path that may not be replaced, or if the runtime
            cannot run the file or its outputs differ. No new file is left behind in these cases.
    """
    files = [filepath.name]
    if format == "openvino":
        files.append(filepath.with_suffix(".bin").name)
    with replaced(filepath, files, format, overwrite=overwrite) as path:
        _write(served, path, format, arguments)
        _compare(served, path, format)


def _write(served: Served, path: pathlib.Path, format: str, arguments: dict[str, Any]) -> None:
    arguments = {"verbose": False, "input_signature": [served.signature], **arguments}
    try:
        if format == "onnx":
            prepare_for_tf2onnx()
        # TensorFlow traces the model itself, too, when it looks for resources to save.
        with losses_left_alone(), _quiet(not arguments["verbose"]):
            served.model.export(str(path), format=format, **arguments)
    except Exception as error:
        raise ValueError(
            f"The ensemble cannot be exported as {format!r}: {error}\nA SavedModel "
            "(format='tf_saved_model') supports every TensorFlow operation."
        ) from error


@contextlib.contextmanager
def _quiet(enabled: bool) -> Iterator[None]:
    """Hides TensorFlow's log of where it writes, since the file is moved afterwards.

    Not by the logger's level, which is the same for all threads.
    """
    logger, thread = tf.get_logger(), threading.get_ident()

    def is_shown(record: logging.LogRecord) -> bool:
        is_other = record.thread != thread
        return not enabled or is_other or record.levelno >= logging.WARNING

    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def _compare(served: Served, path: pathlib.Path, format: str) -> None:
    specs = keras.tree.flatten(served.signature)
    batch = {spec.name: random_array(spec) for spec in specs}
    expected = served.expected(keras.tree.pack_sequence_as(served.signature, list(batch.values())))
    try:
        actual = _RUNTIMES[format](path, batch)
    except ModuleNotFoundError:
        return  # Without its runtime, the file cannot be checked.
    except Exception as error:
        raise ValueError(
            f"The runtime cannot run the exported file. Received: format={format!r}: "
            f"{error}\n{_advice(error)}"
        ) from error
    for name, output in expected.items():
        scale = max(1.0, float(np.max(np.abs(output), initial=0.0)))
        if name not in actual or not np.allclose(
            actual[name], output, rtol=0, atol=_TOLERANCE[format] * scale, equal_nan=True
        ):
            raise ValueError(
                f"The exported file and the ensemble disagree on output {name!r}. "
                f"Received: format={format!r}. Export a SavedModel instead."
            )


def _advice(error: Exception) -> str:
    if "Erfc" in str(error):
        return (
            "The cause is the exact GELU, which tf2onnx converts to an operator that ONNX does not "
            "have: use `keras.activations.gelu(x, approximate=True)`, or export a SavedModel."
        )
    if "Select TensorFlow op" in str(error):
        return (
            "The model uses operations that LiteRT does not support. A common cause is a recurrent "
            "layer: make it with `unroll=True`, or export a SavedModel."
        )
    return "A SavedModel (format='tf_saved_model') supports every TensorFlow operation."


def _run_saved_model(path: pathlib.Path, inputs: dict[str, np.ndarray]) -> Outputs:
    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    tensors = {name: tf.constant(array, specs[name].dtype) for name, array in inputs.items()}
    return {name: value.numpy() for name, value in signature(**tensors).items()}


def _run_onnx(path: pathlib.Path, inputs: dict[str, np.ndarray]) -> Outputs:
    if importlib.util.find_spec("onnxruntime") is None:
        import onnx  # noqa: PLC0415

        # The checker does not run the file, but it rejects unknown operators.
        onnx.checker.check_model(str(path), full_check=True)
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _run_litert(path: pathlib.Path, inputs: dict[str, np.ndarray]) -> Outputs:
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415

    return Interpreter(model_path=str(path)).get_signature_runner()(**inputs)


def _run_openvino(path: pathlib.Path, inputs: dict[str, np.ndarray]) -> Outputs:
    import openvino  # noqa: PLC0415

    # On some processors the default is bfloat16, which has about three significant digits.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    results = openvino.Core().compile_model(str(path), "CPU", precise)(inputs)
    return {name: array for output, array in results.items() for name in output.get_names()}


_RUNTIMES: dict[str, Callable[[pathlib.Path, dict[str, np.ndarray]], Outputs]] = {
    "tf_saved_model": _run_saved_model,
    "onnx": _run_onnx,
    "litert": _run_litert,
    "openvino": _run_openvino,
}


def random_array(spec: Any, rows: int = 2) -> Any:
    """A random batch for one input.

    Unknown dimensions are set to 16; integers are 0 or 1, which are valid in every vocabulary.
    """
    rng = np.random.default_rng(0)
    shape = (rows, *(16 if size is None else size for size in spec.shape[1:]))
    dtype = keras.backend.standardize_dtype(spec.dtype)
    if dtype == "string":
        return tf.constant(rng.choice(["a", "the b"], shape))
    if dtype == "bool" or "int" in dtype:
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)
