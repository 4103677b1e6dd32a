"""Files that are no files, or far larger when they are read: refused by name, and not read."""

import re
import shutil
import zipfile

import h5py
import numpy as np
import pytest
from benchmarks.faults import HOSTILE, in_bounds, sign
from models import classifier
from storage_cases import MANIFEST, load_and_use, manifest_of, weight_files

from snapshot_ensemble import SnapshotEnsemble, SnapshotError
from snapshot_ensemble.storage import manifest as manifests
from snapshot_ensemble.storage.array_files import array_headers
from snapshot_ensemble.storage.file_headers import check_weight_file, read_at_most
from snapshot_ensemble.storage.weight_delta import read_difference


def is_refused(path, read):
    """Whether reading raises an error that names the path, in little time and memory."""

    def check():
        with pytest.raises(SnapshotError, match=re.escape(str(path))):
            read()
        return True

    return in_bounds(check)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("which", ["manifest", "model", "snapshot"])
def test_what_is_no_file_of_its_kind_is_refused_by_name(made, which, kind):
    manifest = manifest_of(made.directory)
    files = {"manifest": MANIFEST, "model": manifest["model"]["name"]}
    path = made.directory / files.get(which, manifest["snapshots"][0]["file"]["name"])
    if (kind, which) != ("oversized data", "model"):
        path.unlink()
    HOSTILE[kind](path)
    if kind == "oversized data" and which != "manifest":
        sign(made.directory, path.name)
    assert is_refused(path, lambda: load_and_use(made.directory))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_weight_file_is_refused_by_from_weights(tmp_path, kind):
    path = tmp_path / "some.weights.h5"
    HOSTILE[kind](path)
    assert is_refused(path, lambda: SnapshotEnsemble.from_weights(classifier(), [path]))


def test_a_file_of_another_size_is_not_hashed(made):
    path = weight_files(made.directory)[0]
    path.write_bytes(path.read_bytes() + b"\0")
    size = path.stat().st_size
    with pytest.raises(SnapshotError, match=rf"Received: {size} bytes; expected {size - 1} bytes"):
        SnapshotEnsemble.load(made.directory, model=classifier())


def test_a_manifest_has_a_largest_size(made, monkeypatch):
    monkeypatch.setattr(manifests, "LARGEST", 1000)
    with pytest.raises(SnapshotError, match=r"ensemble\.json.* more than the 1000 that are read"):
        SnapshotEnsemble.load(made.directory)


def test_a_file_of_at_most_the_limit_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    assert read_at_most(tmp_path / "file", 4) == b"text"
    with pytest.raises(OSError, match="it has 4 bytes, more than the 3 that are read"):
        read_at_most(tmp_path / "file", 3)
    with pytest.raises(OSError, match="is not a regular file"):
        read_at_most(tmp_path, 3)


def linked(file):
    file["vars"] = h5py.ExternalLink("other.h5", "/vars")


def softly_linked(file):
    file["vars"] = h5py.SoftLink("/elsewhere")


def external(file):
    file.create_dataset("vars", (4,), "float32", external=[("/dev/zero", 0, 16)])


def virtual(file):
    layout = h5py.VirtualLayout((4,), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "vars", (4,))
    file.create_virtual_dataset("vars", layout)


def compressed(file):
    file.create_dataset("vars", data=np.zeros(2**12), compression="gzip")


def of_texts(file):
    file["vars"] = ["text"]


def with_large_chunks(file):
    file.create_dataset("vars", (4,), "float32", maxshape=(None,), chunks=(2**28,))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (linked, "'vars' is a link to another file or place"),
        (softly_linked, "'vars' is a link to another file or place"),
        (external, "the data of 'vars' are in another file"),
        (virtual, "the data of 'vars' are in another file"),
        (compressed, "'vars' is compressed or has values of no fixed size"),
        (of_texts, "'vars' is compressed or has values of no fixed size"),
        (with_large_chunks, "its data sets take 1073741824 bytes, more than the"),
    ],
)
def test_data_sets_that_are_not_plain_are_refused(tmp_path, write, message):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        write(file)
    with pytest.raises(ValueError, match=message):
        check_weight_file(tmp_path / "a.weights.h5")
    with pytest.raises(SnapshotError, match=r"a\.weights\.h5.*" + message):
        SnapshotEnsemble.from_weights(classifier(), [tmp_path / "a.weights.h5"])


def test_data_sets_may_take_what_a_model_needs(tmp_path):
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        file["vars"], file["optimizer/vars"] = np.zeros(10), np.zeros(100)
    check_weight_file(tmp_path / "a.weights.h5", 80)
    with pytest.raises(ValueError, match="take 80 bytes, more than the 79 that they may"):
        check_weight_file(tmp_path / "a.weights.h5", 79)


def test_compressed_entries_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", weight_0=np.zeros(10**5))
    with pytest.raises(ValueError, match=r"its entries have \d+ bytes, but the file has \d+"):
        array_headers(tmp_path / "a.npz")
    with pytest.raises(SnapshotError, match=r"a\.npz.*its entries have"):
        read_difference(tmp_path / "a.npz", [np.zeros(10**5)])


def test_a_header_that_claims_more_than_its_entry_is_refused(tmp_path):
    claim = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        with archive.open("weight_0.npy", "w") as entry:
            np.lib.format.write_array_header_1_0(entry, claim)
    with pytest.raises(ValueError, match=r"weight_0\.npy has shape \(1099511627776,\) and dtype"):
        array_headers(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("weight_0.npy", "")
        archive.writestr("weight_0.npy", "")
    with pytest.raises(ValueError, match="it has two entries of the same name"):
        array_headers(tmp_path / "a.npz")


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros(2, "float32"), np.asarray([None, None])])
def test_another_shape_or_dtype_than_the_base_is_refused(tmp_path, array):
    np.savez(tmp_path / "a.npz", weight_0=array)
    with pytest.raises(SnapshotError, match=r"a\.npz.*weight_0.* has shape"):
        read_difference(tmp_path / "a.npz", [np.zeros(2)])


def test_a_directory_is_the_same_through_a_link(made, tmp_path):
    """Only what is no file is refused: files may be links, as in a cache of downloads."""
    store = tmp_path / "store"
    store.mkdir()
    for path in list(made.directory.iterdir()):
        shutil.move(path, store / path.name)
        path.symlink_to(store / path.name)
    np.testing.assert_array_equal(load_and_use(made.directory), made.predictions)
