"""The commands of the command line, except `demo`."""

import json
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from models import three_classes

from snapshot_ensemble import CosineAnnealing, SnapshotEnsemble
from snapshot_ensemble.__main__ import main, parser

X, Y = three_classes()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("cli") / "ensemble"
    model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    SnapshotEnsemble(model, cycles=2, lr_init=0.5, directory=path).fit(X, Y, epochs=4, verbose=0)
    return path


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "held_out.npz", x=X, y=Y)
    return str(tmp_path / "held_out.npz")


def out_of(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_plan_prints_the_table_and_writes_the_plot(capsys, tmp_path):
    plot = tmp_path / "plan.png"
    arguments = ("plan", "--epochs", 7, "--cycle-length", 2, "--cycle-length-multiplier", 2)
    actual = out_of(capsys, *arguments, "--warmup", 1, "--lr-min", 0.01, "--plot", plot)
    expected = CosineAnnealing(2, 2.0, lr_init=0.1, lr_min=0.01, warmup=1).plan(7)
    assert actual == f"{expected}\n"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_plan_as_json(capsys):
    actual = json.loads(out_of(capsys, "plan", "--epochs", 5, "--cycles", 2, "--json"))
    assert [(c["first_epoch"], c["last_epoch"], c["lr_max"]) for c in actual] == [
        (0, 1, 0.1),
        (2, 4, 0.1),
    ]


def test_plan_with_automatic_cycles(capsys):
    actual = json.loads(out_of(capsys, "plan", "--epochs", 10, "--cycles", "auto", "--json"))
    assert [(c["first_epoch"], c["last_epoch"], c["is_decided"]) for c in actual] == [
        (0, 9, False),
    ]


def test_inspect_lists_each_file(capsys, directory):
    text = out_of(capsys, "inspect", directory)
    actual = json.loads(out_of(capsys, "inspect", directory, "--json"))
    assert actual["temperature"] == 1
    assert [entry["cycle"] for entry in actual["files"]] == [None, 0, 1, None]
    for entry in actual["files"]:
        assert entry["bytes"] == (directory / entry["name"]).stat().st_size
        assert entry["intact"]
        assert re.search(rf"^{re.escape(entry['name'])} +{entry['bytes']}( |$)", text, re.M)
    ens = SnapshotEnsemble.load(directory)
    assert actual["files"][2]["metrics"] == ens.snapshots[1].metrics


def test_inspect_reports_damaged_files(capsys, directory, tmp_path):
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    path = next(damaged.glob("snapshot-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(damaged)]) == 2
    captured = capsys.readouterr()
    assert f"{path.name}" in captured.err
    assert re.search(rf"^{re.escape(path.name)} .*DAMAGED$", captured.out, re.M)


def test_report_matches_the_ensembles_report(capsys, directory, data):
    expected = SnapshotEnsemble.load(directory).report(X, Y, verbose=0)
    assert out_of(capsys, "report", directory, "--data", data) == f"{expected}\n"
    actual = json.loads(out_of(capsys, "report", directory, "--data", data, "--json"))
    assert actual == json.loads(json.dumps(expected.to_dict()))


def test_export_predicts_like_the_ensemble(capsys, directory, tmp_path):
    out = tmp_path / "served"
    out_of(capsys, "export", directory, out, "--combine", "vote", "--members", 1)
    served = tf.saved_model.load(str(out)).signatures["serving_default"]
    expected = SnapshotEnsemble.load(directory).predict(X, combine="vote", members=1, verbose=0)
    (actual,) = served(x=tf.constant(X)).values()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--epochs", "2", "--cycles", "5"], "at least one epoch for each cycle"),
        (["inspect", "nowhere"], "nowhere"),
        (["report", "nowhere", "--data", "nothing.npz"], "nothing.npz"),
        (["export", "{directory}", "out", "--combine", "most"], "`combine` must be one of"),
        (["report", "{directory}", "--data", "{data}", "--x", "z"], "The file has no array 'z'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(arguments, message, capsys, directory, data):
    arguments = [argument.format(directory=directory, data=data) for argument in arguments]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_each_command_has_help(capsys):
    for command in ("demo", "plan", "inspect", "export", "report"):
        with pytest.raises(SystemExit) as ended:
            parser().parse_args([command, "--help"])
        assert ended.value.code == 0
        assert f"snapshot-ensemble {command}" in capsys.readouterr().out


def test_an_argument_that_cannot_be_parsed_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--epochs", "many"])
    assert ended.value.code == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
