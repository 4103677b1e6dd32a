"""The code blocks of the README, run unchanged."""

import contextlib
import pathlib
import re

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
            exec(compile(block, f"README.md, block {number}", "exec"), names)
    return names, folder


@pytest.mark.slow
def test_every_block_does_what_it_says(readme):
    names, _ = readme
    ens, again, x_test = names["ens"], names["again"], names["x_test"]
    assert len(again) == len(ens) == 5
    np.testing.assert_array_equal(again.predict(x_test, verbose=0), ens.predict(x_test, verbose=0))
    assert ens.predict_members(x_test, verbose=0).shape == (5, 450, 10)
    assert ens.evaluate(x_test, names["y_test"], verbose=0)[1] > 0.9


@pytest.mark.slow
def test_the_export_has_what_was_learned_until_then(readme):
    names, _ = readme
    x = names["tf"].constant(names["x_test"], "float32")
    served = names["serve"](pixels=x)["digit"].numpy()
    expected = names["ens"].predict(names["x_test"], verbose=0)
    np.testing.assert_allclose(served, expected, atol=1e-5)


@pytest.mark.slow
def test_runs_from_elsewhere_make_an_ensemble(readme):
    names, _ = readme
    x = names["x_test"]
    parts = [names["ens"], names["run"]]
    members = np.concatenate(
        [part.predict_members(x, members=len(part), verbose=0) for part in parts]
    )
    both = names["both"].predict(x, verbose=0)
    np.testing.assert_allclose(both, members.mean(axis=0), atol=1e-6)
    assert {snapshot.chain for snapshot in names["chains"].snapshots} == {0, 1, 2}


def test_links_lead_somewhere():
    text = README.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (README.parent / target).exists(), target


def test_the_readme_is_short():
    assert README.read_text("utf-8").count("\n") <= 220


@pytest.mark.slow
def test_what_is_learned_on_held_out_data(readme):
    names, _ = readme
    ens = names["ens"]
    assert ens.weights.sum() == pytest.approx(1)
    assert ens.temperature != 1
    assert set(names["unsure"]) == {"mean", "total", "aleatoric", "epistemic"}
    assert len(set(names["ask"])) == 10
    assert names["small"].count_params() == ens.model.count_params()


@pytest.mark.slow
def test_a_run_that_has_ended_is_not_run_again_by_the_same_script(readme):
    names, folder = readme
    manifest = folder / "run" / "ensemble.json"
    assert len(names["run"]) == 3
    before = manifest.read_bytes()
    with contextlib.chdir(folder):
        run = names["SnapshotEnsemble"](names["model"], cycles=3, directory="run")
        run.fit(names["x"], names["y"], epochs=6, resume=True, verbose=0)
    assert len(run) == 3
    assert manifest.read_bytes() == before
