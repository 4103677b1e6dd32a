"""Runs exported models in their own runtimes."""

import importlib.util

import keras
import numpy as np
import tensorflow as tf

from kinds.kind import BATCH, first_rows
from kinds.verdicts import Skip

FORMATS = {
    "tf_saved_model": ("served", "tensorflow", "tf2onnx"),
    "onnx": ("served.onnx", "onnxruntime"),
    "litert": ("served.tflite", "ai_edge_litert"),
    "openvino": ("served.xml", "openvino"),
}


def exported(case, name):
    """The outputs of the exported ensemble."""
    filename, runtime, *_ = FORMATS[name]
    if importlib.util.find_spec(runtime) is None:
        raise Skip(f"{runtime} is not installed")
    path = case.new_path(filename)
    case.ens.export(path, name)
    outputs = _RUN[name](str(path), lambda names: _feed(case, names))
    return _structured(outputs, served_rows(case))


def served_rows(case):
    """What a file must give for the first batch: rows of one batch may depend on each other."""
    return first_rows(case.served, BATCH)


def exported_by_keras(case, name):
    """Whether Keras exports one member; its error is raised."""
    filename = FORMATS[name][0]
    case.copy(-1).export(str(case.new_path(f"plain-{filename}")), format=name, verbose=False)


def _feed(case, names):
    """The inputs by the names that the file gives them."""
    x = first_rows(case.kind.x, BATCH)
    if isinstance(x, dict) and set(names) == set(x):
        return dict(x)
    leaves = keras.tree.flatten(x)
    own = [tensor.name for tensor in getattr(case.ens.model, "inputs", None) or []]
    order = own if set(own) == set(names) else sorted(names)
    return dict(zip(order, leaves, strict=True))


def _structured(outputs, like):
    """Outputs by name in the structure of the expected ones."""
    flat = keras.tree.flatten(like)
    if isinstance(like, dict):
        assert set(outputs) == set(like), f"outputs {sorted(outputs)}, not {sorted(like)}"
        return {name: outputs[name] for name in like}
    arrays = [outputs[name] for name in outputs]
    assert len(arrays) == len(flat), f"outputs {sorted(outputs)}"
    # The runtime's order need not be the model's.
    arrays = sorted(arrays, key=lambda array: _distance(array, flat))
    return keras.tree.pack_sequence_as(like, arrays)


def _distance(array, flat):
    shapes = [index for index, each in enumerate(flat) if each.shape == array.shape]
    if len(shapes) < 2:
        return min(shapes, default=0)
    return min(shapes, key=lambda index: float(np.abs(array - flat[index]).max()))


def _saved_model(path, feed):
    signature = tf.saved_model.load(path).signatures["serving_default"]
    specs = signature.structured_input_signature[1]
    tensors = {k: tf.constant(v, specs[k].dtype) for k, v in feed(list(specs)).items()}
    return {k: v.numpy() for k, v in signature(**tensors).items()}


_OF_ONNX = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(int64)": "int64"}


def _onnx(path, feed):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    fed = feed([each.name for each in session.get_inputs()])
    for each in session.get_inputs():  # Unlike Keras, the runtime casts nothing.
        if each.type in _OF_ONNX:
            fed[each.name] = np.asarray(fed[each.name], _OF_ONNX[each.type])
    return dict(zip(names, session.run(names, fed), strict=True))


def _litert(path, feed):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=path).get_signature_runner()
    details = runner.get_input_details()
    fed = feed(list(details))
    return runner(**{k: np.asarray(v, details[k]["dtype"]) for k, v in fed.items()})


def _openvino(path, feed):
    import openvino

    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", precise)
    results = compiled(feed([each.any_name for each in compiled.inputs]))
    return {output.any_name: results[output] for output in compiled.outputs}


_RUN = {"tf_saved_model": _saved_model, "onnx": _onnx, "litert": _litert, "openvino": _openvino}
