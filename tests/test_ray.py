"""Chains and batch prediction on Ray: two workers on this machine, stopped at the end."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from chains_cases import ARGUMENTS, X, Y, assert_same_outcome, callback_that, maker
from models import assert_same, ensemble_of, member_weights

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.ray import BatchPredictor, fit_chains

ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
# What Ray says to its own developers, and of tables that are smaller than its default blocks.
RAYS_OWN = [
    "ignore:Tip. In future versions of Ray:FutureWarning",
    "ignore::DeprecationWarning:ray.data.context",
    "ignore:The minimum number of concurrent actors:UserWarning",
]
pytestmark = [pytest.mark.slow, *map(pytest.mark.filterwarnings, RAYS_OWN)]


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs, and only for these tests."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory):
    """The chains of one process; the number of its threads can be set only in a new one."""
    directory = tmp_path_factory.mktemp("local") / "run"
    script = f"import chains_cases; chains_cases.train_here({str(directory)!r})"
    tests = pathlib.Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    return SnapshotEnsemble.load(directory / "merged")


def chains(**arguments):
    return fit_chains(maker(), X, Y, **{"verbose": 0, **ARGUMENTS, **arguments})


def once(act, epoch, marker):
    """Arguments with a callback that acts in the first chain that comes to an epoch."""
    return {"callbacks": [callback_that(act, epoch, str(marker))]}


@pytest.mark.usefixtures("cluster")
def test_two_workers_give_what_one_process_gives_also_if_one_is_killed(
    one_after_another, tmp_path, capsys
):
    directory = tmp_path / "run"
    made = chains(directory=directory, verbose=2, **once("die", 2, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert_same_outcome(made, one_after_another)
    np.testing.assert_array_equal(
        made.predict(X, verbose=0), one_after_another.predict(X, verbose=0)
    )
    shown = capsys.readouterr().out
    assert all(f"Chain {number} has ended after " in shown for number in range(3))
    assert ray.is_initialized()  # `fit_chains` has not started it.


@pytest.mark.usefixtures("cluster")
def test_chains_that_fail_for_good_are_named_and_the_others_merged_in_memory(
    one_after_another, tmp_path
):
    callbacks = [
        *once("fail", 1, tmp_path / "failed")["callbacks"],
        *once("die", 3, tmp_path / "killed")["callbacks"],
    ]
    with pytest.warns(UserWarning, match="2 of 3 chains failed") as warned:
        made = chains(callbacks=callbacks, retries=0)
    assert [(s.chain, s.cycle) for s in made.snapshots] == [(0, 0), (0, 1)]
    (message,) = (str(one.message) for one in warned if "chains failed" in str(one.message))
    failed = re.search(r"chain (\d) \(RuntimeError: no luck\)", message)[1]
    killed = re.search(r"chain (\d) \(WorkerCrashedError: ", message)[1]
    (left,) = {0, 1, 2} - {int(failed), int(killed)}
    expected = zip(one_after_another.snapshots, member_weights(one_after_another), strict=True)
    assert_same(
        member_weights(made), [weights for snapshot, weights in expected if snapshot.chain == left]
    )


@pytest.mark.usefixtures("cluster")
def test_ctrl_c_stops_all_chains_and_the_same_call_goes_on(one_after_another, tmp_path):
    def press():
        while not (tmp_path / "waiting").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    arguments = {"directory": tmp_path / "run", **once("wait", 2, tmp_path / "waiting")}
    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        chains(**arguments)
    kept = []
    for path in (tmp_path / "run").glob("chain-*"):
        with contextlib.suppress(SnapshotError):  # Another chain may have just begun.
            kept.append(SnapshotEnsemble.load(path))
    assert len(kept) >= 1
    assert not (tmp_path / "run" / "merged").exists()
    assert_same_outcome(chains(**arguments), one_after_another)


@pytest.mark.usefixtures("cluster")
def test_ten_blocks_on_two_actors_are_predicted_as_in_one_process(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 4)).astype("float32")
    inputs = keras.Input((4,), name="pixels")
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax", name="digit")(inputs))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model, 3)
    ens.save(tmp_path / "ens")
    table = pyarrow.table(
        {"id": range(100), "pixels": list(x), "word": [f"row {i}" for i in range(100)]}
    )
    (tmp_path / "in").mkdir()
    for block in range(10):
        parquet.write_table(table.slice(10 * block, 10), tmp_path / "in" / f"{block}.parquet")
    rows = ray.data.read_parquet(str(tmp_path / "in")).repartition(10)
    predicted = rows.map_batches(
        BatchPredictor,
        fn_constructor_args=[str(tmp_path / "ens")],
        fn_constructor_kwargs={"combine": "geometric"},
        batch_size=10,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,
    )
    predicted.write_parquet(str(tmp_path / "out"))
    # Any reader of Parquet finds lists of numbers.
    back = parquet.read_table(tmp_path / "out").sort_by("id")
    assert back["id"].to_pylist() == list(range(100))
    assert back["word"].to_pylist() == table["word"].to_pylist()
    np.testing.assert_array_equal(np.asarray(back["pixels"].to_pylist(), "float32"), x)
    # Batches of another size are rounded differently, in the last digit.
    expected = ens.predict(x, combine="geometric", batch_size=10, verbose=0)
    digits = np.asarray(back["digit"].to_pylist(), "float32")
    np.testing.assert_array_equal(digits, expected)
