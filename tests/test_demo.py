"""The demo, run from the command line as a user would."""

import re
import subprocess
import sys

import numpy as np
import pytest

from snapshot_ensemble import SnapshotEnsemble, demo
from snapshot_ensemble.__main__ import main


@pytest.mark.slow
def test_demo_prints_the_plan_and_scores_and_writes_the_ensemble(tmp_path, capsys):
    directory = tmp_path / "digits"
    assert main(["demo", "--epochs", "4", "--cycles", "2", "--directory", str(directory)]) == 0
    out = capsys.readouterr().out
    assert "cycle  epochs  length" in out
    assert len(re.findall(r"^Snapshot of cycle", out, re.M)) == 2
    # The table, recomputed from the saved ensemble.
    _, (x, y) = demo.load_digits()
    ens = SnapshotEnsemble.load(directory / "ensemble")
    members = ens.predict_members(x, verbose=0)
    rows = {"member 0": members[0], "member 1": members[1], "ensemble, mean": members.mean(0)}
    for name, probabilities in rows.items():
        error, nll = re.search(rf"^{name}.*?([\d.]+) +([\d.]+)$", out, re.M).groups()
        assert float(error) == pytest.approx(100 * (probabilities.argmax(-1) != y).mean(), abs=0.01)
        picked = probabilities[np.arange(len(y)), y]
        assert float(nll) == pytest.approx(-np.log(picked).mean(), abs=2e-4)
    assert re.search(r"^one ordinary run +[\d.]+ +[\d.]+$", out, re.M)
    assert float(re.search(r"difference in a probability ([\d.e-]+)\.", out).group(1)) < 1e-5
    assert (directory / "served" / "1" / "saved_model.pb").exists()
    assert str(directory) in out
    names = ["diversity", "history", "landscape", "members", "reliability", "summary"]
    pictures = sorted((directory / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{n}.png" for n in [*names, "uncertainty"]]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3"], "There must be at least one epoch for each cycle."),
        (["--cycles", "0"], "`cycles` must be at least 1. Received: cycles=0"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert main(["demo", "--directory", str(tmp_path / "new"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble" / "thesis.tex").write_text("irreplaceable")
    assert main(["demo", "--directory", str(tmp_path)]) == 2
    assert "The directory is not empty." in capsys.readouterr().err
    assert (tmp_path / "ensemble" / "thesis.tex").read_text() == "irreplaceable"


@pytest.mark.parametrize("name", ["pictures", "served/1"])
def test_what_the_demo_would_write_to_must_not_exist(name, tmp_path, capsys):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "history.png").write_text("irreplaceable")
    assert main(["demo", "--directory", str(tmp_path)]) == 2
    message = f"'{tmp_path / name}' already exists. Received: directory='{tmp_path}'. Choose anot"
    assert capsys.readouterr().err.startswith(message)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["history.png"]


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo", "--directory", str(tmp_path / "new")]) == 2
    assert "pip install 'snapshot-ensemble[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_help_shows_examples():
    command = [sys.executable, "-m", "snapshot_ensemble", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "snapshot-ensemble demo --epochs 30" in done.stdout
