"""A smoke run of each benchmark: that it runs, and the figures that do not depend on time."""

import json
import pathlib
import subprocess
import sys

import pytest
from benchmarks import faults, memory_cost, prediction_cost, shared_backbone, training_cost

KILLS = [sys.executable, str(pathlib.Path(__file__).parent / "benchmarks" / "kills.py"), "--json"]


def test_shared_backbone(capsys):
    parameters, ratios = shared_backbone.main(["--rows", "8", "--size", "8", "--pairs", "1"])
    head = (128 * 64 + 64) + (64 * 10 + 10)
    backbone = parameters["one model"] - head
    assert parameters["combined model"] == backbone + 6 * head
    assert set(ratios) == {"ens.predict", "combined model", "SavedModel", "loop over members"}
    assert "time / one model" in capsys.readouterr().out


def test_faults(capsys):
    counts = faults.main(["--flips", "20", "--mutations", "60"])
    assert all(tried == survived > 0 for tried, survived in counts.values())
    kinds = {"a bit flipped", "cut", "removed", "swapped", "manifest altered", "manifest forged"}
    assert kinds < set(counts)
    assert f"{sum(tried for tried, _ in counts.values())}" in capsys.readouterr().out


def test_training_cost(capsys):
    size = ["--rows", "64", "--width", "8", "--small", "4", "--epochs", "4", "--rounds", "1"]
    rows = training_cost.main(size)
    assert len(rows) == 4
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "MB of weights" in capsys.readouterr().out


@pytest.mark.slow
def test_prediction_cost(capsys):
    size = ["--dense-rows", "64", "--conv-rows", "8", "--largest", "2", "--rounds", "1"]
    rows = prediction_cost.main(size)
    assert len(rows) == 8
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "import snapshot_ensemble" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_cost(capsys):
    rows = memory_cost.main(["--members", "3", "--width", "400", "--limit", "1"])
    found = {what: ratio for what, _, ratio, _ in rows}
    # Of bytes the figures do not depend on the machine.
    assert found["a snapshot on disk"] < 1.02
    assert found["6 heads on a frozen backbone, directory"] < 1.05
    assert found["the same in memory"] == 1
    assert "peaks" in capsys.readouterr().out


def test_torchensemble_cost(capsys):
    pytest.importorskip("torchensemble", reason="Another framework's, not installed for tests.")
    from benchmarks import torchensemble_cost

    rows = torchensemble_cost.main(["--rows", "64", "--width", "8", "--rounds", "1"])
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "TorchEnsemble" in capsys.readouterr().out


def killed(*arguments):
    done = subprocess.run([*KILLS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_kills_in_short():
    # In a process of its own: it forks, which is safe only before TensorFlow ran something.
    (row,) = killed("--kills", "1", "--kinds", "tf.data")
    assert row["kills"] == 1
    assert row["runs"] == row["equal"] > 0


@pytest.mark.slow
def test_kills_at_length():
    for row in killed("--kills", "50"):
        assert row["kills"] == 50
        assert row["in a write"] > 10
        assert row["runs"] == row["equal"] > 0
