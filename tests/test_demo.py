"""The demo, run from the command line as a user would."""

import re
import subprocess
import sys

import numpy as np
import pytest

from snapshot_ensemble import SnapshotEnsemble, demo
from snapshot_ensemble.__main__ import main

NAMES = ["diversity", "history", "landscape", "members", "reliability", "summary", "uncertainty"]


def row(out, name):
    """The two cells of a row of the table."""
    return re.search(rf"^{re.escape(demo.SCORES[name])} +(\S+) +(\S+)$", out, re.M).groups()


@pytest.mark.slow
def test_demo_prints_the_plan_and_scores_and_writes_the_ensemble(tmp_path, capsys):
    directory = tmp_path / "digits"
    arguments = ["--epochs", "4", "--cycles", "2", "--runs", "1", "--directory", str(directory)]
    assert main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert "cycle  epochs  length" in out
    # The table, recomputed from the saved ensemble.
    _, _, (x, y) = demo.load_digits()
    probabilities = SnapshotEnsemble.load(directory / "ensemble").predict(x, verbose=0)
    wrong = probabilities.argmax(-1) != y
    assert float(row(out, "errors")[1]) == wrong.sum()
    assert float(row(out, "sure")[1]) == wrong[probabilities.max(-1) > 0.9].sum()
    nll = -np.log(probabilities[np.arange(len(y)), y]).mean()
    assert float(row(out, "nll")[1]) == pytest.approx(nll, abs=6e-4)
    assert re.search(r"^seed 0, one run: \d+ wrong answers, NLL [\d.]+ \(\d+ s\)$", out, re.M)
    assert float(re.search(r"difference in a probability ([\d.e-]+)\.", out).group(1)) < 1e-5
    assert (directory / "served" / "1" / "saved_model.pb").exists()
    assert str(directory) in out
    pictures = sorted((directory / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{name}.png" for name in NAMES]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert out.splitlines()[-1].startswith("The ensemble against one run of the same budget, 1 se")


@pytest.mark.slow
def test_dense_runs_are_compared_over_seeds(tmp_path, capsys):
    directory = tmp_path / "digits"
    arguments = {"epochs": 2, "cycles": 1, "seed": 4, "runs": 2, "dense": True}
    scores = demo.run_demo(directory, **arguments)
    out = capsys.readouterr().out
    assert "a dense network is trained" in out
    ensemble = SnapshotEnsemble.load(directory / "ensemble")
    assert [type(layer).__name__ for layer in ensemble.model.layers] == ["Flatten"] + 3 * ["Dense"]
    assert [len(of_seeds) for of_seeds in scores.values()] == [2, 2]
    lines = re.findall(r"^seed (\d+), (one run|ensemble): (\d+) wrong", out, re.M)
    assert {(int(seed), name): int(count) for seed, name, count in lines} == {
        (4 + index, name): of_seed["errors"]
        for name, of_seeds in scores.items()
        for index, of_seed in enumerate(of_seeds)
    }
    assert out.splitlines()[-1] == demo.verdict(scores)
    # Of one member there is no line from each member to the next.
    assert not (directory / "pictures" / "landscape.png").exists()


def test_who_is_asked_about_what():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.45, 0.55]])
    y = np.array([1, 0, 0, 1])  # The first and the third are wrong; the least sure is the last.
    assert [demo.to_check(probabilities, y, left) for left in (0, 1, 2)] == [4, 3, 0]


def test_scores_of_probabilities_that_rule_out_the_true_class_are_finite():
    scores = demo.score(np.array([[1.0, 0.0], [0.2, 0.8]]), np.array([1, 1]))
    assert (scores["errors"], scores["sure"], scores["none"]) == (1, 1, 2)
    assert np.isfinite(scores["nll"])


@pytest.mark.parametrize(
    ("errors", "nll", "said"),
    [
        ([8, 7], [0.1, 0.2], "a gain in errors (-1.5 ± 0.5), a gain in NLL (-0.150 ± 0.050)."),
        ([9, 9], [0.5, 0.4], "no clear change in errors (+0.0 ± 0.0), a loss in NLL (+0.150"),
        ([5, 12], [0.3, 0.3], "no clear change in errors (-0.5 ± 3.5), no clear change in NLL ("),
        ([10, 11], [0.2, 0.2], "a loss in errors (+1.5 ± 0.5), a gain in NLL (-0.100 ± 0.000)."),
        ([8], [0.2], "1 seed: a gain in errors (-1.0), a gain in NLL (-0.100)."),
    ],
)
def test_the_last_line_says_whether_the_ensemble_gained(errors, nll, said):
    count = len(errors)
    one = [{"errors": 9, "nll": 0.3}, {"errors": 9, "nll": 0.3}][:count]
    ensemble = [{"errors": a, "nll": b} for a, b in zip(errors, nll, strict=True)]
    assert said in demo.verdict({"one run": one, "ensemble": ensemble})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3", "--cycles", "5"], "There must be at least one epoch for each cycle."),
        (["--cycles", "0"], "`cycles` must be at least 1. Received: cycles=0"),
        (["--runs", "0"], "`runs` must be at least 1. Received: runs=0"),
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
    assert "snapshot-ensemble demo --epochs 40" in done.stdout
