"""`SnapshotEnsemble.merge`: one ensemble of several runs, what it refuses, and what it keeps."""

import os
import pathlib
import re
import shutil

import keras
import matplotlib as mpl
import numpy as np
import pytest
from keras import layers
from models import (
    SimulatedCrashError,
    assert_same,
    classifier,
    dense,
    ensemble_of,
    ensemble_with,
    member_weights,
    with_backbone,
)
from storage_cases import X, Y, contents, crash, ensemble, file_entries, fit, manifest_of

from snapshot_ensemble import SnapshotEnsemble, SnapshotError, plots

mpl.use("agg")


def trained(seed, directory=None, cycles=2, **arguments):
    keras.utils.set_random_seed(seed)
    ens = ensemble(directory, cycles=cycles, **arguments)
    fit(ens, epochs=cycles)
    return ens


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of three, two and two cycles; the first two are in directories."""
    home = tmp_path_factory.mktemp("runs")
    return [trained(1, home / "a", 3), trained(2, home / "b"), trained(3)]


def listed(runs):
    """Two directories and an ensemble, as `merge` takes them."""
    return [runs[0].directory, str(runs[1].directory), runs[2]]


@pytest.fixture
def merged(runs):
    return SnapshotEnsemble.merge(listed(runs))


def test_the_last_members_are_the_last_snapshots_of_each_chain(runs, merged):
    places = [(s.index, s.chain, s.cycle) for s in merged.snapshots]
    assert places == [
        (0, 0, 0),
        *[(1, 0, 1), (2, 1, 0), (3, 2, 0)],
        *[(4, 0, 2), (5, 1, 1), (6, 2, 1)],
    ]
    expected = [member_weights(runs[s.chain])[s.cycle] for s in merged.snapshots]
    assert_same(member_weights(merged), expected)
    for own in merged.snapshots:
        other = runs[own.chain].snapshots[own.cycle]
        assert (own.epoch, own.step, own.metrics) == (other.epoch, other.step, other.metrics)
    assert runs[0].snapshots[0].chain is None


def test_it_predicts_the_mean_of_all_members(runs, merged):
    everyone = np.concatenate([run.predict_members(X, verbose=0) for run in runs])
    np.testing.assert_allclose(merged.predict(X, verbose=0), everyone.mean(0), atol=1e-6)
    last = [run.predict_members(X, verbose=0)[-1] for run in runs]
    by_three = merged.predict(X, members=3, verbose=0)
    np.testing.assert_allclose(by_three, np.mean(last, axis=0), atol=1e-6)


def test_in_a_directory_and_loaded_again_it_predicts_the_same_to_the_bit(runs, merged, tmp_path):
    kept = SnapshotEnsemble.merge(listed(runs), tmp_path / "merged")
    again = SnapshotEnsemble.load(tmp_path / "merged")
    assert kept.directory == again.directory == tmp_path / "merged"
    for other in (kept, again):
        assert other.snapshots == merged.snapshots
        assert other.history == merged.history
        np.testing.assert_array_equal(other.predict(X, verbose=0), merged.predict(X, verbose=0))
    kept.calibrate(X, Y, verbose=0)
    assert SnapshotEnsemble.load(tmp_path / "merged").temperature == kept.temperature != 1


def test_merged_ensembles_can_be_merged(runs, merged, tmp_path):
    SnapshotEnsemble.merge([runs[1], runs[0]], tmp_path / "pair")
    every = SnapshotEnsemble.merge([runs[2], tmp_path / "pair"])
    chains = {s.chain: s.cycle for s in every.snapshots}
    assert chains == {0: 1, 1: 1, 2: 2}
    assert_same(member_weights(every)[-3:], [member_weights(runs[i])[-1] for i in (2, 1, 0)])


def test_what_was_learned_is_not_taken_over(runs):
    source = trained(4)
    source.weights, source.temperature, source.members = [0.5, 0.5], 2.0, 1
    merged = SnapshotEnsemble.merge([source, runs[2]])
    assert (merged.weights, merged.temperature, merged.members) == (None, 1.0, None)
    assert (source.temperature, source.members) == (2.0, 1)
    merged.fit_weights(X, Y, verbose=0)
    assert len(merged.weights) == 4


def test_the_history_has_the_epochs_of_all_chains(runs, merged):
    assert merged.history["cycle"] == [0, 1, 2, 0, 1, 0, 1]
    for name in ("loss", "accuracy", "learning_rate"):
        assert merged.history[name] == [value for run in runs for value in run.history[name]]
    assert "shrink" not in merged.history


def test_columns_that_not_all_chains_have(runs, tmp_path):
    drawn = trained(5, shrink=0.5)
    validated = trained(6, tmp_path / "validated")
    fit(validated, epochs=2, validation_data=(X, Y))
    merged = SnapshotEnsemble.merge([runs[2], drawn, validated], tmp_path / "merged")
    assert merged.history["shrink"] == [1.0, 1.0, *drawn.history["shrink"], 1.0, 1.0, 1.0, 1.0]
    assert merged.history["val_loss"] == [None] * 6 + validated.history["val_loss"][2:]
    assert SnapshotEnsemble.load(tmp_path / "merged").history == merged.history


def test_decisions_are_counted_over_all_epochs(runs):
    auto = SnapshotEnsemble(classifier(), cycles="auto", lr_init=0.5)
    fit(auto, epochs=10)
    merged = SnapshotEnsemble.merge([runs[0], auto])
    (own,), (kept,) = auto.decisions, merged.decisions
    assert kept.epoch == own.epoch + 3
    assert (kept.is_cut, kept.loss) == (own.is_cut, own.loss)


# Files


def inodes(directory):
    names = [entry["name"] for entry in file_entries(manifest_of(directory)["snapshots"])]
    return {(directory / name).stat().st_ino for name in names}


def test_weight_files_get_a_second_name_and_outlive_their_directories(runs, tmp_path):
    pairs = zip("ab", runs[:2], strict=True)
    sources = [shutil.copytree(run.directory, tmp_path / name) for name, run in pairs]
    before = [contents(source) for source in sources]
    merged = SnapshotEnsemble.merge(sources, tmp_path / "merged")
    shared = inodes(tmp_path / "merged") & set().union(*map(inodes, sources))
    # The first one was written anew, to learn how files give its weights back.
    assert len(shared) == len(merged) - 1
    assert [contents(source) for source in sources] == before
    expected = merged.predict(X, verbose=0)
    for source in sources:
        shutil.rmtree(source)
    again = SnapshotEnsemble.load(tmp_path / "merged")
    np.testing.assert_array_equal(again.predict(X, verbose=0), expected)


@pytest.mark.parametrize("reason", ["another file system", "another user's"])
def test_where_links_are_not_possible_or_not_safe_files_are_copied(
    runs, tmp_path, monkeypatch, reason
):
    def refuse(source, target):
        raise OSError(18, "Invalid cross-device link")

    if reason == "another file system":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    merged = SnapshotEnsemble.merge([run.directory for run in runs[:2]], tmp_path / "merged")
    assert not inodes(tmp_path / "merged") & (inodes(runs[0].directory) | inodes(runs[1].directory))
    assert_same(member_weights(merged)[-1], member_weights(runs[1])[-1])


def test_a_copy_that_is_damaged_on_its_way_is_noticed(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", crash_as_os_error)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: pathlib.Path(target).touch())
    with pytest.raises(SnapshotError, match="differs from the file that was saved"):
        SnapshotEnsemble.merge([run.directory for run in runs[:2]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def crash_as_os_error(*_):
    raise OSError(1, "Operation not permitted")


def test_what_all_chains_share_is_stored_once(tmp_path):
    rng = np.random.default_rng(0)
    model, is_shared = with_backbone(nested=False)
    kinds = list(zip(model.weights, model.get_weights(), strict=True))
    members = [
        [a if is_shared(v) else rng.normal(size=a.shape).astype("float32") for v, a in kinds]
        for _ in range(4)
    ]
    ensemble_with(model, *members[:2]).save(tmp_path / "0")
    ensemble_with(model, *members[2:]).save(tmp_path / "1")
    SnapshotEnsemble.merge([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    loaded = SnapshotEnsemble.load(tmp_path / "merged")
    assert_same(member_weights(loaded), [members[i] for i in (0, 2, 1, 3)])
    names = [entry["name"] for entry in file_entries(manifest_of(tmp_path / "merged")["snapshots"])]
    assert all(name.endswith(".npz") for name in names)


# What is refused


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([], ValueError, r"There is nothing to merge. Received: ensembles=\[\]"),
        ("run", TypeError, "`ensembles` must be a list of ensembles or directories.*'run'"),
        (3, TypeError, "must be a list of ensembles or directories. Received: ensembles=3"),
        ([3], TypeError, "`directory` must be a path. Received: directory=3"),
    ],
)
def test_what_is_no_list_of_ensembles_is_refused(sources, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble.merge(sources)


def test_an_ensemble_without_members_is_refused(runs):
    message = r"There are no members to merge in ensembles\[1\]. .* Train it first"
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble.merge([runs[0], ensemble()])


def test_a_directory_without_an_ensemble_is_refused(runs, tmp_path):
    with pytest.raises(SnapshotError, match=r"nowhere.*is not a readable manifest"):
        SnapshotEnsemble.merge([runs[0], tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (dense(), "its class is Functional, not Sequential"),
        (classifier(inside=[layers.Dense(4)]), "it has 4 weights, not 2"),
        (
            keras.Sequential([keras.Input((4,)), layers.Dense(5, "softmax", name="wide")]),
            r"its weight '.*wide/kernel' has shape \(4, 5\) and dtype float32, not shape \(4, 3\)",
        ),
        (classifier(inside=[layers.Activation("relu")]), "its layers have other settings"),
    ],
)
def test_another_architecture_is_refused(runs, other, how):
    if not other.compiled:
        other.compile("sgd", "sparse_categorical_crossentropy")
    message = "same architecture.*ensembles.1., whose model is another one than that of '.*a': "
    with pytest.raises(ValueError, match=message + how):
        SnapshotEnsemble.merge([runs[0].directory, ensemble_of(other, 1)])


def test_names_and_seeds_of_layers_make_no_other_architecture(runs):
    kernel = keras.initializers.GlorotUniform(seed=3)
    head = layers.Dense(3, "softmax", name="another", kernel_initializer=kernel)
    model = keras.Sequential([keras.Input((4,)), head])
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert len(SnapshotEnsemble.merge([runs[0], ensemble_of(model, 1)])) == 4


def head(activation, loss, **arguments):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation)])
    model.compile("sgd", loss)
    return ensemble_of(model, 1, **arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("mse", {}, "'output': 'regression'"),
        ("binary_crossentropy", {}, "'output': 'multilabel probabilities'"),
        ("categorical_crossentropy", {}, "'output': 'multiclass probabilities'"),
        ("categorical_crossentropy", {"task": "regression"}, "'output': 'regression'"),
    ],
)
def test_another_task_is_refused(loss, arguments, message):
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    first = head(None, logits)
    with pytest.raises(ValueError, match=f"same task.*{message}.*'multiclass logits'"):
        SnapshotEnsemble.merge([first, head(None, loss, **arguments)])


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.head = layers.Dense(3)

    def call(self, x):
        return self.head(x)


def test_so_it_is_for_models_whose_outputs_are_known_only_when_they_run():
    ensembles = []
    for loss in ("mse", "mae", keras.losses.CategoricalCrossentropy(from_logits=True)):
        model = Own()
        model.compile("sgd", loss)
        model(X)
        ensembles.append(ensemble_with(model, model.get_weights()))
    assert len(SnapshotEnsemble.merge(ensembles[:2])) == 2
    with pytest.raises(ValueError, match="same task.*'losses': .'categorical'.*'regression'"):
        SnapshotEnsemble.merge(ensembles[::2])


def test_the_same_chain_twice_is_refused(runs, tmp_path):
    copy = shutil.copytree(runs[1].directory, tmp_path / "copy")
    for other in (runs[1], runs[1].directory, copy):
        message = "must not be merged twice. Received: '.*b' and .*a member of the same weights"
        with pytest.raises(ValueError, match=message):
            SnapshotEnsemble.merge([runs[1].directory, runs[0], other])


def test_a_damaged_directory_is_named_and_nothing_is_written(runs, tmp_path):
    copy = shutil.copytree(runs[1].directory, tmp_path / "copy")
    file = next(copy.glob("snapshot-*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match=re.escape(str(file))):
        SnapshotEnsemble.merge([runs[0], copy], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class Drawn(layers.Layer):
    """Has a constant that is neither in its config nor a weight."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.drawn = np.random.default_rng().normal(size=4).astype("float32")

    def call(self, x):
        return x * self.drawn


def test_models_that_compute_something_else_are_refused():
    ensembles = [ensemble_of(classifier(inside=[Drawn()]), 1) for _ in range(2)]
    message = "Only runs of the same model.*with the same weights. Something of it is neither in"
    with pytest.raises(ValueError, match=message):
        SnapshotEnsemble.merge(ensembles)


def test_so_they_are_in_directories(tmp_path):
    model = classifier(inside=[Drawn()])
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        ens = ensemble(tmp_path / f"{seed}", classifier(inside=[Drawn()]))
        with pytest.warns(UserWarning, match="saved copy of the model cannot be used"):
            fit(ens)
    with pytest.raises(SnapshotError, match="pass it as `model=`"):
        SnapshotEnsemble.merge([tmp_path / "0", tmp_path / "1"])
    with pytest.raises(ValueError, match="cannot be checked that one model fits all runs.*1'"):
        SnapshotEnsemble.merge([tmp_path / "0", tmp_path / "1"], model=model)


def test_a_directory_that_holds_something_is_refused_or_replaced(runs, tmp_path):
    target = tmp_path / "merged"
    first = SnapshotEnsemble.merge(runs[:2], target)
    before = contents(target)
    with pytest.raises(ValueError, match="The directory is not empty"):
        SnapshotEnsemble.merge(runs[1:], target)
    assert contents(target) == before
    with pytest.raises(ValueError, match="must not be one of those that are merged"):
        SnapshotEnsemble.merge([runs[2], target], target, overwrite=True)
    assert contents(target) == before
    assert len(first) == 5
    SnapshotEnsemble.merge(runs[1:], target, overwrite=True)
    assert len(SnapshotEnsemble.load(target)) == 4


def test_after_a_crash_nothing_is_there(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("snapshot_ensemble.storage.directory.link_or_copy", crash)
    with pytest.raises(SimulatedCrashError):
        SnapshotEnsemble.merge([run.directory for run in runs[:2]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# What a merged ensemble does


def test_it_does_not_train_further(runs, merged, tmp_path):
    message = "A merged ensemble does not train further.*with 3 chains. Train a chain by itself"
    with pytest.raises(ValueError, match=message):
        fit(merged)
    assert len(merged) == 7
    SnapshotEnsemble.merge([run.directory for run in runs[:2]], tmp_path / "merged")
    loaded = SnapshotEnsemble.load(tmp_path / "merged")
    with pytest.raises(ValueError, match="does not train further"):
        fit(loaded)
    fit(loaded, overwrite=True)
    assert [(s.chain, s.cycle) for s in loaded.snapshots] == [(None, 0), (None, 1), (None, 2)]


def test_the_report_tells_chains_apart(runs, merged):
    report = merged.report(X, Y, verbose=0)
    assert report.chains == [0, 0, 1, 2, 0, 1, 2]
    labels = merged.predict_members(X, verbose=0).argmax(-1)
    pairs = {"within": [], "between": []}
    for i, j in zip(*np.triu_indices(7, 1), strict=True):
        which = "within" if report.chains[i] == report.chains[j] else "between"
        pairs[which].append(np.mean(labels[i] != labels[j]))
    within, between = np.mean(pairs["within"]), np.mean(pairs["between"])
    expected = {"within": pytest.approx(within), "between": pytest.approx(between)}
    assert list(report.to_dict()["mean_disagreement_of_chains"].values()) == [expected]
    assert f"(within chains {within:.4f}, between chains {between:.4f})" in str(report)
    for number, run in enumerate(runs):
        row = report.rows[f"chain {number}"]
        loss, accuracy = run.evaluate(X, Y, members=list(range(len(run))), verbose=0)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["accuracy"] == pytest.approx(accuracy)
    assert runs[0].report(X, Y, verbose=0).chains == []


@pytest.mark.slow
def test_plots_and_exports_work(merged, tmp_path):
    report = merged.report(X, Y, verbose=0)
    ax = plots.plot_diversity(report)
    assert [text.get_text() for text in ax.get_xticklabels()] == list("0142536")
    order = [0, 1, 4, 2, 5, 3, 6]
    shown = np.asarray(ax.images[0].get_array())
    matrix = next(iter(report.disagreement.values()))
    np.testing.assert_array_equal(shown, matrix[np.ix_(order, order)])
    ax = plots.plot_trajectory(merged)
    assert [len(line.get_xdata()) for line in ax.lines] == [3, 2, 2]
    plots.plot_members(report)
    plots.plot_history(merged)
    plots.plot_landscape(merged, X, Y, points=2)
    single = merged.to_keras()
    np.testing.assert_allclose(
        single.predict(X, verbose=0), merged.predict(X, verbose=0), atol=1e-6
    )
    merged.save(tmp_path / "saved")
    saved = SnapshotEnsemble.load(tmp_path / "saved")
    assert saved.snapshots == merged.snapshots
