"""What counts as an export, and is replaced; everything else is refused and left as it is."""

import shutil

import keras
import pytest
from export_cases import FILES, contents, earlier, replace
from models import dense, ensemble_of

from snapshot_ensemble.export.recognition import foreign_part


def test_exports_are_recognised(exports, file_format):
    paths = [exports / name for name in FILES[file_format]]
    assert foreign_part(file_format, paths) is None
    assert foreign_part(file_format, []) is None


PHOTO = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def keras_model(path):
    dense().save(path.with_suffix(".keras"))
    path.with_suffix(".keras").rename(path)


def photos(path):
    path.mkdir()
    (path / "beach.png").write_bytes(PHOTO)


OF_THE_USER = {
    "text": lambda path: path.write_text("somebody's"),
    "nothing": lambda path: path.write_text(""),
    "xml": lambda path: path.write_text("<net version='11'><nodes/></net>"),
    "photo": lambda path: path.write_bytes(PHOTO),
    "model": keras_model,
    "photos": photos,
}


@pytest.mark.parametrize("kind", OF_THE_USER)
def test_what_is_no_export_is_not_replaced(exports, file_format, kind, tmp_path):
    path = tmp_path / FILES[file_format][0]
    OF_THE_USER[kind](path)
    before = contents(tmp_path)
    message = (
        rf"replaces only an earlier export of format '{file_format}', and '{path}.*' is not part "
        rf"of one\. Received: filepath='{path}'\. Move that file away, or choose another path\."
    )
    with pytest.raises(ValueError, match=message):
        replace(exports, file_format, path)
    assert contents(tmp_path) == before


def test_an_export_in_another_format_is_not_replaced(exports, file_format, tmp_path):
    for other, (name, *_) in FILES.items():
        path = tmp_path / other / FILES[file_format][0]
        path.parent.mkdir()
        (shutil.copytree if (exports / name).is_dir() else shutil.copy)(exports / name, path)
        if other != file_format:
            with pytest.raises(ValueError, match="replaces only an earlier export of format"):
                replace(exports, file_format, path)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "assets/words.txt",
        "variables/checkpoint",
        "variables/variables.data-of-mine",
        "saved_model.pb.bak",
        "photos/beach.png",
        ".hidden",
    ],
)
def test_a_file_in_the_folder_of_a_saved_model_is_not_removed(exports, name, tmp_path):
    path = earlier(exports, "tf_saved_model", tmp_path / "models")
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("somebody's")
    before = contents(tmp_path)
    first = path / "photos" if "photos" in name else path / name
    with pytest.raises(ValueError, match=rf"and '{first}' is not part of one"):
        replace(exports, "tf_saved_model", path)
    assert contents(tmp_path) == before


def test_a_link_in_the_folder_of_a_saved_model_is_not_removed(exports, tmp_path):
    path = earlier(exports, "tf_saved_model", tmp_path / "models")
    (path / "saved_model.pb").rename(tmp_path / "elsewhere.pb")
    (path / "saved_model.pb").symlink_to(tmp_path / "elsewhere.pb")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"saved_model.pb' is not part of one"):
        replace(exports, "tf_saved_model", path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("description", [b"somebody's", PHOTO, b"", None])
def test_a_folder_of_variables_alone_is_no_saved_model(exports, description, tmp_path):
    path = earlier(exports, "tf_saved_model", tmp_path / "models")
    (path / "saved_model.pb").unlink()
    if description is not None:
        (path / "saved_model.pb").write_bytes(description)
    with pytest.raises(ValueError, match="is not part of one"):
        replace(exports, "tf_saved_model", path)


@pytest.mark.slow
def test_a_vocabulary_is_part_of_a_saved_model(tmp_path):
    table = keras.layers.StringLookup()
    table.adapt([["red", "green"]])
    inputs = keras.Input((1,), dtype="string", name="words")
    embedded = keras.layers.Flatten()(keras.layers.Embedding(4, 3)(table(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(3, "softmax")(embedded))
    model.compile("sgd", "sparse_categorical_crossentropy")
    ens = ensemble_of(model)
    for _ in range(2):
        ens.export(tmp_path / "served", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_an_empty_folder_is_replaced(exports, tmp_path):
    (tmp_path / "served").mkdir()
    replace(exports, "tf_saved_model", tmp_path / "served")
    assert (tmp_path / "served" / "saved_model.pb").exists()


@pytest.mark.parametrize("missing", [".xml", ".bin"])
def test_one_of_two_files(exports, missing, tmp_path):
    path = earlier(exports, "openvino", tmp_path / "models")
    path.with_suffix(missing).unlink()
    before = contents(tmp_path)
    if missing == ".xml":  # Any file may have the ending `.bin`.
        with pytest.raises(ValueError, match=r"served.bin' is not part of one"):
            replace(exports, "openvino", path)
        assert contents(tmp_path) == before
    else:
        replace(exports, "openvino", path)
        assert path.with_suffix(".bin").exists()


def test_a_file_beside_a_graph_of_openvino_is_not_taken_for_its_constants(exports, tmp_path):
    path = earlier(exports, "openvino", tmp_path / "models")
    path.with_suffix(".bin").write_bytes(PHOTO)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"served.bin' is not part of one"):
        replace(exports, "openvino", path)
    assert contents(tmp_path) == before
