"""Exports to files that run without Keras, each checked in the runtime that will serve it."""

import contextlib
import importlib.util
import logging
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from snapshot_ensemble.export.file_check import QUANTIZING, TOLERANCE, advice, check_file
from snapshot_ensemble.export.replacing import replaced
from snapshot_ensemble.export.served import Beside, Served, served
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.keras_compat.onnx_export import prepare_for_tf2onnx
from snapshot_ensemble.keras_compat.saved_model import optimizers_left_out
from snapshot_ensemble.keras_compat.stateless_call import losses_left_alone
from snapshot_ensemble.storage.file_names import check_is_local

_ENDINGS = {"onnx": ".onnx", "litert": ".tflite", "openvino": ".xml"}
_LITERT_FLOAT16 = {
    "optimizations": [tf.lite.Optimize.DEFAULT],
    "target_spec": {"supported_types": [tf.float16]},
}
_PACKAGES = {"onnx": ("tf2onnx", "onnx"), "openvino": ("openvino",)}


def check_format(filepath: Any, format: str) -> pathlib.Path:
    """The path; raises `ValueError` or `ImportError` if the format cannot be exported to it."""
    check_is_local(filepath, "filepath")
    path = pathlib.Path(filepath)
    if format not in TOLERANCE:
        raise ValueError(f"`format` must be one of {tuple(TOLERANCE)}. Received: format={format!r}")
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


def check_weights_dtype(weights: Any, format: str, arguments: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless files of the format can have weights of this dtype."""
    if weights is None:
        return
    if weights != "float16":
        raise ValueError(
            f"`weights` must be 'float16' or None. Received: weights={weights!r}. For weights of 8 "
            "bits, use format='litert' with `optimizations=[tf.lite.Optimize.DEFAULT]`."
        )
    if format == "onnx":
        raise ValueError(
            "The tools of ONNX that make weights float16 make the computation float16, too. "
            f"Received: weights={weights!r}, format={format!r}. Use one of the other formats."
        )
    if given := sorted(set(QUANTIZING) & set(arguments)):
        raise ValueError(
            "`weights` sets how LiteRT's converter quantizes. Received: "
            f"weights={weights!r}, {', '.join(given)}. Leave out one of them."
        )


def _compress(path: pathlib.Path) -> None:
    """Rewrites an OpenVINO file with its constants in float16."""
    import openvino  # noqa: PLC0415

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # The file is replaced.
    openvino.save_model(core.read_model(str(path)), str(path), compress_to_fp16=True)


def export_members(
    pool: MemberPool,
    combiner: Combiner,
    filepath: pathlib.Path,
    format: str,
    overwrite: bool,
    x: Any,
    weights: str | None,
    arguments: dict[str, Any],
    beside: Beside,
) -> None:
    """Exports one model that combines members to a temporary folder, checks it, and moves it.

    Args:
        pool: The members.
        combiner: Which of them, and how they are combined.
        filepath: A path that `check_format` has passed.
        format: A Keras export format.
        overwrite: Whether an earlier export at the path may be replaced.
        x: A batch to check the file with, or None.
        weights: What `check_weights_dtype` has passed.
        arguments: For `keras.Model.export`.
        beside: What is served beside the combined outputs.

    Raises:
        ValueError: If there is something at the path that may not be replaced, or if the runtime
            cannot run the file or its outputs differ. No new file is left behind in these cases.
    """
    files = [filepath.name]
    if format == "openvino":
        files.append(filepath.with_suffix(".bin").name)
    with replaced(filepath, files, format, overwrite=overwrite) as path:
        # The other formats have a tool of their own for it.
        halved = weights is not None and format == "tf_saved_model"
        signature = arguments.get("input_signature")
        combined = served(pool, combiner, format, signature, halved, beside)
        more = _LITERT_FLOAT16 if weights is not None and format == "litert" else {}
        _write(combined, path, format, arguments | more)
        if weights is not None and format == "openvino":
            _compress(path)
        check_file(combined, path, format, arguments, pool.sample, x, weights)


def _write(combined: Served, path: pathlib.Path, format: str, arguments: dict[str, Any]) -> None:
    arguments = {"verbose": False, **arguments, "input_signature": [combined.signature]}
    try:
        if format == "onnx":
            prepare_for_tf2onnx()
        # TensorFlow traces the model itself, too, when it looks for resources to save.
        with losses_left_alone(), optimizers_left_out(), _quiet(not arguments["verbose"]):
            combined.model.export(str(path), format=format, **arguments)
    except Exception as error:
        raise ValueError(
            f"The ensemble cannot be exported as {format!r}: {error}\n{advice(format, error)}"
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
