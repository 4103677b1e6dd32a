"""The SavedModel in TensorFlow without Keras, in a C program without Python, and in OpenVINO."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from models import ensemble_of, with_backbone

PLAIN_TENSORFLOW = """
import sys
sys.modules["keras"] = sys.modules["snapshot_ensemble"] = None  # Importing them is an error.
import numpy as np
import tensorflow as tf
signature = tf.saved_model.load(sys.argv[1] + "/served").signatures["serving_default"]
x = tf.constant(np.load(sys.argv[1] + "/x.npy"))
np.save(sys.argv[1] + "/y.npy", signature(image=x)["head"].numpy())
assert sys.modules["keras"] is None
"""

# Reads 5 images of 6 x 6 x 3 floats, and prints 5 x 4 probabilities.
C_PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <tensorflow/c/c_api.h>

static void check(TF_Status *s) {
  if (TF_GetCode(s) != TF_OK) { fprintf(stderr, "%s\n", TF_Message(s)); exit(1); }
}

int main(int argc, char **argv) {
  const char *tags[] = {"serve"};
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  TF_SessionOptions *options = TF_NewSessionOptions();
  TF_Session *session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(status);
  int64_t shape[] = {5, 6, 6, 3};
  TF_Tensor *input = TF_AllocateTensor(TF_FLOAT, shape, 4, 5 * 6 * 6 * 3 * sizeof(float));
  FILE *file = fopen(argv[2], "rb");
  if (fread(TF_TensorData(input), sizeof(float), 540, file) != 540) return 1;
  TF_Output from = {TF_GraphOperationByName(graph, "serving_default_image"), 0};
  TF_Output to = {TF_GraphOperationByName(graph, "StatefulPartitionedCall_1"), 0};
  if (to.oper == NULL) to.oper = TF_GraphOperationByName(graph, "StatefulPartitionedCall");
  TF_Tensor *output = NULL;
  TF_SessionRun(session, NULL, &from, &input, 1, &to, &output, 1, NULL, 0, NULL, status);
  check(status);
  const float *values = TF_TensorData(output);
  for (int i = 0; i < 20; i++) printf("%.9g\n", values[i]);
  return 0;
}
"""


@pytest.fixture
def served(tmp_path):
    """A folder with an export of three members on one backbone, inputs and expected outputs."""
    source, in_backbone = with_backbone(nested=True)
    ens = ensemble_of(source, 3, shared=in_backbone)
    ens.export(tmp_path / "served")
    x = np.random.default_rng(3).normal(size=(5, 6, 6, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    x.tofile(tmp_path / "x.raw")
    return tmp_path, ens.predict(x, verbose=0)


@pytest.mark.slow
def test_in_tensorflow_without_keras_and_without_this_package(served):
    folder, expected = served
    command = [sys.executable, "-c", PLAIN_TENSORFLOW, str(folder)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    np.testing.assert_allclose(np.load(folder / "y.npy"), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_in_a_c_program(served):
    folder, expected = served
    library = pathlib.Path(tf.sysconfig.get_lib())
    (folder / "serve.c").write_text(C_PROGRAM)
    compile_it = ["gcc", "serve.c", "-o", "serve", f"-I{tf.sysconfig.get_include()}"]
    names = ["libtensorflow_cc.so.2", "libtensorflow_framework.so.2"]
    link = [f"-L{library}", *(f"-l:{name}" for name in names), f"-Wl,-rpath,{library}"]
    subprocess.run([*compile_it, *link], cwd=folder, check=True)
    command = ["./serve", "served", "x.raw"]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    actual = np.array(completed.stdout.split(), "float32").reshape(5, 4)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_in_openvino_which_reads_the_saved_model_itself(served):
    openvino = pytest.importorskip("openvino")
    folder, expected = served
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(folder / "served"), "CPU", precise)
    (actual,) = compiled({"image": np.load(folder / "x.npy")}).values()
    np.testing.assert_allclose(actual, expected, atol=1e-5)
