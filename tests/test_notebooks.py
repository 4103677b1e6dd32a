"""The notebooks: their saved outputs, and that they run from the first cell to the last."""

import base64
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.request

import keras
import nbclient
import nbformat
import numpy as np
import pytest

from snapshot_ensemble import SnapshotEnsemble

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = [
    "calibration_and_weights",
    "image_classification",
    "keep_going",
    "many_machines",
    "quickstart",
    "regression_uncertainty",
    "serving",
    "transfer_learning",
    "tuners_and_trackers",
]
# What the longest ones are run with, unless `--all-cases` asks for them as they are: text of a
# cell, and what replaces it.
SHORTER = {
    "calibration_and_weights": ("EPOCHS, BATCH, PEAK = 20,", "EPOCHS, BATCH, PEAK = 5,"),
    "image_classification": ("epochs=75,", "epochs=10,"),
    "quickstart": ("epochs=40,", "epochs=10,"),
    "regression_uncertainty": ("for seed in (1, 2, 3)]", "for seed in (1,)]"),
    "transfer_learning": ("epochs=150,", "epochs=20,"),
    "tuners_and_trackers": ("EPOCHS, BATCH = 20,", "EPOCHS, BATCH = 6,"),
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]


def kinds(notebook):
    """The types of output of each cell; text may come in several pieces."""
    return [{output.output_type for output in cell.outputs} for cell in code_cells(notebook)]


def test_the_list_of_notebooks_is_complete():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_starts_with_the_question_that_it_answers(name):
    first = read(name).cells[0]
    assert first.cell_type == "markdown"
    title, _, rest = first.source.partition("\n")
    assert title.startswith("# ")
    assert rest.strip().split("\n\n")[0].rstrip("*_").endswith("?")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_answers_it_at_once_with_one_of_its_own_pictures(name):
    notebook = read(name)
    answer = notebook.cells[1]
    assert answer.cell_type == "markdown"
    assert answer.source.startswith("**Answer:** ")
    (picture,) = re.findall(r"!\[[^\]]{20,}\]\((.*?)\)", answer.source)
    assert picture == f"{name}.png"
    # A notebook that was run again has new pictures: save the one for its answer again, too.
    own = [base64.b64decode(picture) for picture in pictures(notebook)]
    assert (FOLDER / picture).read_bytes() in own


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_saved_with_its_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        assert not re.search(r"(?<![\w./])/(?:tmp|home|root|Users|work)\b", text), text
    assert pictures(notebook)
    for picture in pictures(notebook):
        assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, pytestconfig):
    kept, running = read(name), read(name)
    if name in SHORTER and not pytestconfig.getoption("all_cases"):
        long, short = SHORTER[name]
        assert any(long in cell.source for cell in code_cells(running))
        for cell in code_cells(running):
            cell.source = cell.source.replace(long, short)
    where = {"metadata": {"path": str(tmp_path)}}
    # TensorFlow logs directly to file descriptors, which none of its settings can suppress.
    quiet = ["--IPKernelApp.capture_fd_output=False"]
    client = nbclient.NotebookClient(running, timeout=600, resources=where, extra_arguments=quiet)
    ran = client.execute()
    assert kinds(ran) == kinds(kept)
    assert len(pictures(ran)) == len(pictures(kept))


@pytest.mark.slow
def test_the_server_of_the_serving_notebook_answers_with_the_ensembles_predictions(tmp_path):
    pytest.importorskip("litserve")
    texts = "\n".join(c.source for c in read("serving").cells if c.cell_type == "markdown")
    (script,) = re.findall(r"```python\n(# server.py\n.*?)```", texts, re.S)
    (tmp_path / "server.py").write_text(script)
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8, 1), "float32"), rng.integers(0, 10, 64)
    digit = keras.layers.Dense(10, "softmax", name="digit")
    model = keras.Sequential([keras.Input((8, 8, 1), name="image"), keras.layers.Flatten(), digit])
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = SnapshotEnsemble(model, cycles=2)
    ens.fit(x, y, epochs=2, verbose=0)
    ens.export(tmp_path / "served" / "1", verbose=False)
    with (tmp_path / "server.log").open("w") as log:
        # In a new session, so that its workers are killed with it.
        server = subprocess.Popen(
            [sys.executable, "server.py"],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        answer = ask("http://127.0.0.1:8000", {"image": x[:3].tolist()}, server)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)
    np.testing.assert_allclose(answer["digit"], ens.predict(x[:3], verbose=0), atol=1e-5)


def ask(address, request, server):
    """Posts a request as soon as the server is ready."""
    for _ in range(120):
        assert server.poll() is None
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health") as reply:
            if reply.read() == b"ok":
                break
        time.sleep(1)
    posted = urllib.request.Request(
        f"{address}/predict",
        data=json.dumps(request).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(posted) as reply:
        return json.load(reply)
