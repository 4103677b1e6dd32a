"""The runtimes that serve exported files."""

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

Outputs = dict[str, Any]
# Returns the inputs under the names that the file has for them.
Named = Callable[[Sequence[str]], dict[str, Any]]


def _run_saved_model(path: pathlib.Path, inputs: Named) -> Outputs:
    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    named = inputs(list(specs))
    tensors = {name: tf.constant(array, specs[name].dtype) for name, array in named.items()}
    return {name: value.numpy() for name, value in signature(**tensors).items()}


def _run_onnx(path: pathlib.Path, inputs: Named) -> Outputs:
    if importlib.util.find_spec("onnxruntime") is None:
        import onnx  # noqa: PLC0415

        # The checker does not run the file, but it rejects unknown operators.
        onnx.checker.check_model(str(path), full_check=True)
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = inputs([tensor.name for tensor in session.get_inputs()])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, named), strict=True))


def _run_litert(path: pathlib.Path, inputs: Named) -> Outputs:
    from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415

    runner = Interpreter(model_path=str(path)).get_signature_runner()
    return dict(runner(**inputs(list(runner.get_input_details()))))


def _run_openvino(path: pathlib.Path, inputs: Named) -> Outputs:
    import openvino  # noqa: PLC0415

    # On some processors the default is bfloat16, which has about three significant digits.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", precise)
    results = compiled(inputs([tensor.get_any_name() for tensor in compiled.inputs]))
    return {name: array for output, array in results.items() for name in output.get_names()}


RUNTIMES: dict[str, Callable[[pathlib.Path, Named], Outputs]] = {
    "tf_saved_model": _run_saved_model,
    "onnx": _run_onnx,
    "litert": _run_litert,
    "openvino": _run_openvino,
}
