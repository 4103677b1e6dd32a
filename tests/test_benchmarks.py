"""Smoke tests of the benchmarks: each runs, and results that do not depend on time are right."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from benchmarks import (
    accuracy,
    calibration,
    chains,
    distill,
    early_exit,
    faults,
    memory_cost,
    prediction_cost,
    regression,
    report_cost,
    shared_backbone,
    threads,
    training_cost,
)
from scipy import stats

KILLS = [sys.executable, str(pathlib.Path(__file__).parent / "benchmarks" / "kills.py"), "--json"]


@pytest.mark.slow
def test_shared_backbone(capsys):
    size = ["--members", "2", "--rows", "8", "--size", "8", "--pairs", "1"]
    parameters, ratios = shared_backbone.main(size)
    head = (128 * 64 + 64) + (64 * 10 + 10)
    backbone = parameters["one model"] - head
    assert parameters["combined model"] == backbone + 2 * head
    assert set(ratios) == {"ens.predict", "combined model", "SavedModel", "loop over members"}
    assert "time / one model" in capsys.readouterr().out


@pytest.mark.slow
def test_distill(tmp_path, capsys):
    size = ["--tasks", "digits", "--seeds", "2", "--epochs", "5", "--directory", str(tmp_path)]
    row = distill.main(size)["digits"]
    assert row["scores"].shape == (2, 3, 2)
    assert row["passes"] == (5, 2)
    # Saved runs are not run again.
    np.testing.assert_array_equal(distill.main(size)["digits"]["scores"], row["scores"])
    assert "| digits | 2 | " in capsys.readouterr().out


@pytest.mark.slow
def test_chains(tmp_path, capsys):
    size = ["--tasks", "digits", "--seeds", "1", "--epochs", "2", "--cycles", "2", "--chains", "2"]
    size += ["--directory", str(tmp_path)]
    result = chains.main([*size, "--plan", "1000"])
    rows = {method: row for method, [row] in result["digits"].items()}
    assert set(rows) == {"chains", "kept", "one chain", "full runs"}
    assert all(0 <= error <= 100 and nll > 0 for error, nll, _ in rows.values())
    assert dict(result["digits", "plan"])["members in all"] == "2000"
    # Saved runs are not run again.
    assert chains.main(size)["digits"] == result["digits"]
    assert "| digits | " in capsys.readouterr().out


@pytest.mark.slow
def test_calibration(tmp_path, capsys):
    size = ["--tasks", "digits", "--seeds", "2", "--epochs", "2", "--directory", str(tmp_path)]
    rows = calibration.main(size)["digits"]
    assert rows.keys() == calibration.METHODS.keys()
    assert all(values.shape == (2, 3) for values in rows.values())
    for same in ("temperature", "likelihood"):  # No temperature changes the most probable class.
        np.testing.assert_array_equal(rows[same][:, 0], rows["none"][:, 0])
    np.testing.assert_array_equal(calibration.main(size)["digits"]["none"], rows["none"])
    assert "| digits | vector, 10 | " in capsys.readouterr().out


def test_the_share_that_a_student_keeps():
    values = np.asarray(
        [[[4.0, 0.4], [3.0, 0.1], [2.0, 0.4]], [[6.0, 0.4], [5.0, 0.3], [4.0, 0.4]]]
    )
    assert distill.kept(values) == [0.5, None]


@pytest.mark.slow
def test_regression(tmp_path, capsys):
    size = ["--sets", "diabetes", "--splits", "1", "--epochs", "5", "--directory", str(tmp_path)]
    rows = regression.main(size)["diabetes"]
    names = {"one network", "warm snapshots", "the default", "the default, conformal"}
    assert rows.keys() == names | {"deep ensemble", "MC dropout"}
    # Saved runs are not run again.
    again = regression.main(size)["diabetes"]
    for name, values in rows.items():
        assert values.shape == (1, 4)
        np.testing.assert_array_equal(again[name], values)
    assert "| deep ensemble | " in capsys.readouterr().out


def test_scores_of_a_regression():
    y, found = np.array([0.0, 1.0]), np.array([[0.5, 1.0], [4.0, 1.0], [-1.0, 1.5], [1.0, 2.0]])
    rmse, nll, covered, width = regression.scores(found, y, 0.0, 10.0)
    normal = stats.norm([5, 10], [20, 10]).logpdf([0, 10])
    assert (covered, width) == (0.5, pytest.approx(12.5))
    assert rmse == pytest.approx(np.sqrt(12.5))
    assert nll == pytest.approx(-normal.mean())


def test_a_mixture_of_samples():
    members = np.array([[[0.0, 0.0]], [[2.0, np.log(3)]]])
    mean, variance, low, high = regression.mixed(members)[:, 0]
    assert (mean, variance) == (1.0, pytest.approx(3.0))
    assert (high - low) / 2 == pytest.approx(1.6449 * np.sqrt(3), rel=1e-4)


@pytest.mark.slow
def test_faults(capsys):
    size = ["--flips", "10", "--mutations", "20", "--states", "10", "--every", "5"]
    counts = faults.main(size)
    assert all(tried == survived > 0 for tried, survived in counts.values())
    kinds = {"a bit flipped", "cut", "removed", "swapped", "manifest altered", "manifest forged"}
    kinds |= {"foreign file"}
    kinds |= {"state altered", "state forged", "hostile: a pipe", "hostile: oversized data"}
    assert kinds < set(counts)
    assert f"{sum(tried for tried, _ in counts.values())}" in capsys.readouterr().out


@pytest.mark.slow
def test_early_exit(capsys):
    results = early_exit.main(["--tasks", "digits_conv", "--epochs", "5", "--rounds", "1"])
    (one, early, every), time = results["digits_conv"]
    assert 1 <= early[-1] <= every[-1] == 5
    assert one[-1] == 1
    assert all(ratio > 0 for ratio in time.values())
    assert "members   run" in capsys.readouterr().out


@pytest.mark.slow
def test_threads(capsys):
    counts = threads.main(["--rounds", "2"])
    assert (counts["rounds"], counts["disturbed"], counts["kept"]) == (2, 0, 2)
    assert counts["looks"] >= 12
    assert counts["plain models"] > 10
    assert "disturbed" in capsys.readouterr().out


@pytest.mark.slow
def test_training_cost(capsys):
    size = ["--rows", "64", "--width", "8", "--small", "4", "--epochs", "4", "--rounds", "1"]
    rows = training_cost.main([*size, "--pairs", "1"])
    assert len(rows) == 5
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "MB of weights" in capsys.readouterr().out


@pytest.mark.slow
def test_prediction_cost(capsys):
    size = ["--dense-rows", "64", "--conv-rows", "8", "--largest", "2", "--rounds", "1"]
    rows = prediction_cost.main([*size, "--members", "2"])
    assert len(rows) == 11
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "import snapshot_ensemble" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_cost(capsys):
    rows = memory_cost.main(["--members", "3", "--width", "400", "--limit", "1"])
    actual = {what: ratio for what, _, ratio, _ in rows}
    # Numbers of bytes do not depend on the machine.
    assert actual["a snapshot on disk"] < 1.02
    assert actual["6 heads on a frozen backbone, directory"] < 1.05
    assert actual["the same in memory"] == 1
    assert "peaks" in capsys.readouterr().out


@pytest.mark.slow
def test_report_cost(capsys):
    [line] = report_cost.main(["--sizes", "40x2"])
    assert line[:2] == [40, 2]
    assert len(line) == len(report_cost.HEAD)
    assert all(value > 0 for value in line)
    assert "peak MB" in capsys.readouterr().out


def test_the_hand_written_scores_are_those_of_the_report():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, report_cost.FEATURES)), rng.integers(0, report_cost.CLASSES, 40)
    ens = report_cost.random_ensemble(report_cost.dense_net(), 2, scale=0.5)
    rows = ens.report(x, y, verbose=0).rows
    expected = [
        (rows[name]["nll"], rows[name]["brier"]) for name in ("member 0", "member 1", "mean")
    ]
    np.testing.assert_allclose(report_cost.by_hand(list(ens), x, y), expected, rtol=1e-4)


def test_torchensemble_cost(capsys):
    pytest.importorskip("torchensemble", reason="TorchEnsemble is not installed for tests.")
    from benchmarks import torchensemble_cost

    rows = torchensemble_cost.main(["--rows", "64", "--width", "8", "--rounds", "1"])
    assert all(ratio > 0 for _, _, ratio, _ in rows)
    assert "TorchEnsemble" in capsys.readouterr().out


def killed(*arguments):
    done = subprocess.run([*KILLS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kills():
    # In a new process: it forks, which is safe only before TensorFlow has run anything.
    rows = killed("--kills", "2", "--others", "0")
    assert [row["kind"] for row in rows] == ["arrays", "tf.data", "auto"]
    for row in rows:
        assert row["kills"] == 2
        assert row["runs"] == row["equal"] > 0
    # Where a kill falls is chance, but not all of six miss the writes.
    assert sum(row["in a write"] for row in rows) > 0


@pytest.mark.slow
def test_other_endings():
    rows = killed("--kills", "0", "--kinds", "tf.data", "--others", "1")
    assert [row["ending"] for row in rows] == ["full disk", "two processes"]
    assert all(row["runs"] == row["equal"] > 0 for row in rows)


def members_by_hand():
    """Two members, four rows and two classes, small enough to compute by hand."""
    one = np.asarray([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
    other = np.asarray([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [0.9, 0.1]])
    return [one, other], np.asarray([0, 1, 0, 1])


def test_the_arithmetic_of_accuracy():
    members, y = members_by_hand()
    actual = accuracy.scores(members, y)
    mean = [0.8, 0.7, 0.4, 0.3]  # Probabilities of the true classes.
    assert actual["error"] == 50
    assert actual["nll"] == pytest.approx(-np.mean(np.log(mean)))
    assert actual["last error"] == 50
    assert actual["last nll"] == pytest.approx(-np.mean(np.log([0.7, 0.6, 0.2, 0.1])))
    assert (
        actual["disagreement"] == 25
    )  # Only the third row: on ties, as in the fourth, class 0 is first.
    # One row per bin: 0.8 and 0.7 are right, 0.6 and 0.7 wrong.
    assert actual["ece"] == pytest.approx(np.mean([0.2, 0.3, 0.6, 0.7]))


def test_the_arithmetic_of_regression():
    y = np.asarray([0.0, 2.0, 4.0, 6.0])
    one, other = np.asarray([[1, 2, 5, 5], [0, 3, 4, 7]], float)[..., None]
    actual = accuracy.scores([one, other], y)
    error = np.asarray([0.5, 0.5, 0.5, 0.0])  # Of the mean.
    assert actual["error"] == pytest.approx(100 * np.sqrt(np.mean(error**2)) / y.std())
    assert actual["last error"] == pytest.approx(100 * np.sqrt(0.5) / y.std())
    assert actual["disagreement"] == pytest.approx(100 * np.std([1, -1, 1, -2]) / y.std())
    # The last member is off by 0 and 1 in either half: a mean square of 1/2.
    expected = np.mean([0, 1, 0, 1]) + 0.5 * np.log(2 * np.pi / 2)
    assert actual["last nll"] == pytest.approx(expected)


def test_the_temperature_is_fitted_on_the_other_half():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    logs = rng.normal(size=(200, 3)) + 2 * np.eye(3)[y]
    logs = accuracy.tempered(logs, 0.3)
    grid = np.exp(np.linspace(-3, 3, 20_001))
    expected = []
    for fitted, scored in ((slice(100), slice(100, None)), (slice(100, None), slice(100))):
        # With temperature t, probabilities are softmax(logs / t).
        powers = logs[fitted, None] / grid[:, None]
        right = np.take_along_axis(powers, y[fitted, None, None], axis=-1)[..., 0]
        best = grid[np.argmax(np.mean(right - np.log(np.exp(powers).sum(-1)), axis=0))]
        p = np.exp(logs[scored] / best)
        p /= p.sum(-1, keepdims=True)
        expected.append(-np.mean(np.log(p[np.arange(100), y[scored]])))
    assert accuracy.calibrated(logs, y) == pytest.approx(np.mean(expected), rel=1e-5)


def test_deep_equivalent_interpolates_between_sizes():
    deep = {1: {"calibrated": 0.4}, 2: {"calibrated": 0.3}, 3: {"calibrated": 0.28}}
    assert accuracy.equivalent(0.5, deep) == 1
    assert accuracy.equivalent(0.35, deep) == pytest.approx(1.5)
    assert accuracy.equivalent(0.285, deep) == pytest.approx(2.75)
    assert accuracy.equivalent(0.1, deep) == 3


def test_deep_ensembles_average_over_cyclic_choices():
    members, y = members_by_hand()
    runs = [*members, members[0]]
    deep = accuracy.deep_ensembles(runs, y)
    alone = [accuracy.scores([run], y)["nll"] for run in runs]
    assert deep[1]["nll"] == pytest.approx(np.mean(alone))
    pairs = [accuracy.scores([runs[i], runs[j]], y)["nll"] for i, j in ((0, 1), (1, 2), (2, 0))]
    assert deep[2]["nll"] == pytest.approx(np.mean(pairs))
    assert deep[3] == pytest.approx(accuracy.scores(runs, y))


def test_differences_are_computed_within_seeds():
    def rows(*errors):
        return [{"error": e, "nll": e / 10, "calibrated": e / 20} for e in errors]

    text = accuracy.compared({"warm": rows(3, 5, 4), "chosen": rows(2, 3, 3)})
    # Differences of -1, -2 and -1: standard deviation sqrt(1/3), standard error 1/3.
    assert text.splitlines()[2:] == [
        "| warm | -1.33 ± 0.33 | -0.1333 ± 0.0333 | -0.0667 ± 0.0167 |"
    ]


# One of the models is trained on other data first.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "digits_transfer" else [])
        for name in accuracy.TASKS
    ],
)
def test_each_model_returns_probabilities_of_its_classes_or_a_value(name):
    task = accuracy.TASKS[name]
    model = task.model()
    (shape,) = {tuple(tensor.shape[1:]) for tensor in model.inputs}
    actual = model(np.ones((2, *shape), model.inputs[0].dtype)).numpy()
    assert actual.shape == (2, task.classes)
    if task.loss == "mse":
        return
    np.testing.assert_allclose(actual.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("name", "changes"), [("digits_conv", 0), ("digits_conv_augmented", 1)])
def test_augmentation_changes_images_only_in_training(name, changes):
    layers = accuracy.TASKS[name].net(10).layers
    first = [layer for layer in layers if layer.name.startswith("random")]
    assert len(first) == changes
    for layer in first:
        images = np.random.default_rng(0).random((3, 8, 8, 1), "float32")
        np.testing.assert_array_equal(layer(images, training=False), images)
        assert not np.allclose(layer(images, training=True), images)


@pytest.mark.slow
def test_accuracy(capsys, tmp_path):
    # All but further values of `shrink`.
    methods = [name for name in accuracy.DEFAULT if name not in ("0.8", "0.2", "0")]
    arguments = ["--epochs", "2", "--cycles", "2", "--seeds", "2", "--directory", str(tmp_path)]
    arguments += ["--methods", *methods]
    result = accuracy.main(arguments)
    assert list(result["methods"]) == methods
    first = capsys.readouterr().out
    assert first.count(".npz: ") == 2 * (len(methods) - 1)  # `auto` and `chosen` share a run.
    y = accuracy.TASKS["digits"].parts("/")[2][1]
    for name, rows in result["methods"].items():
        for seed, row in enumerate(rows):
            cycles = 1 if name in ("one", "step") else 2
            kind = "auto" if name == "chosen" else name
            with np.load(tmp_path / f"digits-2-{cycles}-{kind}-{seed}.npz") as actual:
                members, chosen = actual["members"], int(actual["chosen"])
            assert len(members) == cycles
            members = members[-chosen:] if name == "chosen" else members
            mean = members.mean(0)
            assert row["error"] == pytest.approx(100 * np.mean(mean.argmax(-1) != y))
            nll = -np.mean(np.log(mean[np.arange(len(y)), y]))
            assert row["nll"] == pytest.approx(nll, rel=1e-4)
    # Saved runs are read, not run again; missing ones are run.
    (tmp_path / "digits-2-2-warm-1.npz").unlink()
    assert accuracy.main(arguments)["methods"] == result["methods"]
    assert capsys.readouterr().out.count(".npz: ") == 1
    table = (tmp_path / "digits-2.md").read_text()
    assert "accuracy.py --task digits --cycles 2 --seeds 2" in table
    errors = [row["error"] for row in result["methods"]["warm"]]
    assert f"| warm | {np.mean(errors):.2f} ± {abs(errors[0] - errors[1]) / 2:.2f} |" in table
    assert json.loads((tmp_path / "digits-2.json").read_text())["methods"] == result["methods"]


@pytest.mark.slow
def test_variants_that_are_not_in_the_library(tmp_path):
    arguments = ["--epochs", "5", "--cycles", "2", "--seeds", "1", "--directory", str(tmp_path)]
    accuracy.main([*arguments, "--methods", *accuracy.VARIANTS])
    assert "--methods averaged late growing floor early" in (tmp_path / "digits-2.md").read_text()
    members = {}
    for name in accuracy.VARIANTS:
        with np.load(tmp_path / f"digits-5-2-{name}-0.npz") as actual:
            members[name] = actual["members"]
        np.testing.assert_allclose(members[name].sum(-1), 1, rtol=1e-5)
    assert 1 <= len(members.pop("tail")) <= 3  # After 3, 4 and 5 epochs.
    assert {name: len(array) for name, array in members.items()} == {
        "averaged": 2,
        "late": 4,
        "growing": 2,
        "floor": 2,
        "early": 3,
        "statistics": 2,
        "slots": 2,
        "star": 2,
        "taught": 2,
        "taught_by_all": 2,
    }
    # Every second late snapshot is the member itself, and its average is similar.
    averages, own = members["averaged"], members["late"][1::2]
    assert not np.allclose(averages, own, atol=1e-3)
    assert np.mean(averages.argmax(-1) == own.argmax(-1)) > 0.9
