"""The notebooks: their saved outputs, and that they run from the first cell to the last."""

import base64
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NAMES = [
    "calibration_and_weights",
    "image_classification",
    "keep_going",
    "quickstart",
    "regression_uncertainty",
    "serving",
    "transfer_learning",
]


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
def test_a_notebook_runs(name, tmp_path):
    kept = read(name)
    where = {"metadata": {"path": str(tmp_path)}}
    # TensorFlow logs directly to file descriptors, which none of its settings can suppress.
    quiet = ["--IPKernelApp.capture_fd_output=False"]
    client = nbclient.NotebookClient(
        read(name), timeout=600, resources=where, extra_arguments=quiet
    )
    ran = client.execute()
    assert kinds(ran) == kinds(kept)
    assert len(pictures(ran)) == len(pictures(kept))
