"""Files of other programs in an ensemble's directory are never removed or replaced."""

import json
import shutil

import keras
import pytest
from benchmarks.faults import FOREIGN as NAMES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_cases import MANIFEST, ensemble, file_entries, fit, manifest_of, write_manifest

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage.contents import is_free


def add_foreign(directory, names=NAMES):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not yours: " + name.encode())


def assert_untouched(directory, names=NAMES):
    for name in names:
        assert (directory / name).read_bytes() == b"not yours: " + name.encode()


@pytest.mark.slow
def test_fitting_resuming_and_overwriting_leave_them(tmp_path):
    directory = tmp_path / "run"
    fit(ensemble(directory))
    add_foreign(directory)
    ens = SnapshotEnsemble.load(directory)
    fit(ens)
    ens.weights = [1] + [0] * 5
    assert_untouched(directory)
    fit(ensemble(directory, max_snapshots=1), overwrite=True)
    assert_untouched(directory)
    fit(ensemble(directory, max_snapshots=1), resume=True)
    assert_untouched(directory)
    SnapshotEnsemble.load(directory).save(directory.parent / "copy")
    add_foreign(directory.parent / "copy")
    SnapshotEnsemble.load(directory).save(directory.parent / "copy", overwrite=True)
    assert_untouched(directory.parent / "copy")
    assert len(SnapshotEnsemble.load(directory.parent / "copy")) == 1


@pytest.mark.sampled(3, 2)
@pytest.mark.parametrize("name", NAMES)
def test_a_directory_with_one_is_not_free(tmp_path, name):
    add_foreign(tmp_path / "run", [name])
    with pytest.raises(ValueError, match="is not empty"):
        fit(ensemble(tmp_path / "run"))
    assert_untouched(tmp_path / "run", [name])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name.split("/")[0]]
    fit(ensemble(tmp_path / "run"), overwrite=True)
    assert_untouched(tmp_path / "run", [name])


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.from_regex(
        r"\A(writing|state|model|snapshot|history|ensemble)[-.]?[0-9a-f]{0,8}[-.]?"
        r"(npz|keras|weights\.h5|json|tmp|lock2)\Z"
    )
)
def test_no_other_name_counts_as_left_over(tmp_path, name):
    if name == MANIFEST:
        return
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    add_foreign(directory, [name])
    assert not is_free(directory)


@pytest.mark.slow
def test_checkpoints_of_keras_in_the_same_directory(tmp_path):
    directory = tmp_path / "run"
    kept = {}

    class Remember(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            for path in directory.glob("model-????.keras"):
                kept.setdefault(path.name, path.read_bytes())

    save = keras.callbacks.ModelCheckpoint(str(directory / "model-{epoch:04d}.keras"))
    for _ in range(2):
        fit(ensemble(directory), epochs=6, overwrite=True, callbacks=[save, Remember()])
        assert len(SnapshotEnsemble.load(directory)) == 3
    assert len(list(directory.glob("model-????.keras"))) == 6
    assert len(kept) == 6


@pytest.mark.parametrize("content", [b"{}", b"[1, 2]", b'{"format": "another"}', b'"text"'])
def test_another_programs_manifest_is_not_replaced(tmp_path, content):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / MANIFEST).write_bytes(content)
    ens = ensemble(directory)
    with pytest.raises(ValueError, match="written by another program, and is not replaced"):
        fit(ens, overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {MANIFEST: content}


@pytest.mark.sampled(2, 2)
@pytest.mark.parametrize("name", ["notes.txt", "writing-notes.txt", "weights.h5", "a.keras"])
def test_a_manifest_cannot_claim_other_files(tmp_path, name):
    directory = tmp_path / "run"
    fit(ensemble(directory))
    add_foreign(directory, [name])
    manifest = manifest_of(directory)
    file_entries(manifest["snapshots"])[0]["name"] = name
    write_manifest(directory, json.loads(json.dumps(manifest)))
    with pytest.raises(SnapshotError, match="must be a file of this directory"):
        SnapshotEnsemble.load(directory)
    fit(ensemble(directory), overwrite=True)
    assert_untouched(directory, [name])
