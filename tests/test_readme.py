"""The code blocks of the README, run unchanged."""

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

import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The names defined by the blocks, which run one after another in a new folder."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    folder = tmp_path_factory.mktemp("readme")
    names = {"__name__": "readme"}
    with contextlib.chdir(folder):
        for number, block in enumerate(blocks):
            if block.startswith("# server.py"):
                (folder / "server.py").write_text(block)
            else:
                exec(compile(block, f"README.md, block {number}", "exec"), names)
            if number == 0:
                names["exported_members"] = names["ens"].members
    return names, folder


def test_every_block_does_what_it_says(readme):
    names, _ = readme
    ens, again, x_test = names["ens"], names["again"], names["x_test"]
    assert len(again) == len(ens) == 5
    np.testing.assert_array_equal(again.predict(x_test, verbose=0), ens.predict(x_test, verbose=0))
    assert ens.predict_members(x_test, verbose=0).shape == (5, 450, 10)
    assert ens.evaluate(x_test, names["y_test"], verbose=0)[1] > 0.9


def test_what_is_learned_on_held_out_data(readme):
    names, folder = readme
    ens = names["ens"]
    assert ens.weights.sum() == pytest.approx(1)
    assert ens.temperature != 1
    assert set(names["unsure"]) == {"mean", "total", "aleatoric", "epistemic"}
    assert names["small"].count_params() == ens.model.count_params()
    with contextlib.chdir(folder):
        before = (folder / "run" / "ensemble.json").read_bytes()
        assert len(names["train"]()) == 3
        assert (
            folder / "run" / "ensemble.json"
        ).read_bytes() == before  # There was nothing left to do.


@pytest.mark.slow
def test_the_server_answers_with_the_ensembles_predictions(readme):
    pytest.importorskip("litserve")
    names, folder = readme
    x = names["x_test"][:3]
    with (folder / "server.log").open("w") as log:
        # In a new session, so that its workers are killed with it.
        server = subprocess.Popen(
            [sys.executable, "server.py"],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        answer = ask("http://127.0.0.1:8000", {"pixels": x.tolist()}, server)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(30)
    ens = names["ens"]  # It was exported before anything was learned on held-out data.
    ens.temperature, ens.members = 1.0, names["exported_members"]
    expected = ens.predict(x, verbose=0)
    np.testing.assert_allclose(answer["digit"], expected, atol=1e-5)


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
