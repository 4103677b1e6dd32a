"""Contract tests for the description of a SavedModel."""

import keras
import pytest
import tensorflow as tf

from snapshot_ensemble.keras_compat.saved_model import assets_of, optimizers_left_out


class WithAsset(tf.Module):
    def __init__(self, path):
        super().__init__()
        self.words = tf.saved_model.Asset(str(path))


def test_assets_of(tmp_path):
    (tmp_path / "words.txt").write_text("red green")
    tf.saved_model.save(WithAsset(tmp_path / "words.txt"), str(tmp_path / "with"))
    assert assets_of(tmp_path / "with" / "saved_model.pb") == ["words.txt"]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.export(tmp_path / "without", verbose=False)
    assert assets_of(tmp_path / "without" / "saved_model.pb") == []


def test_other_files_are_no_descriptions(tmp_path):
    (tmp_path / "words.txt").write_text("red green")
    (tmp_path / "empty.pb").touch()
    assert assets_of(tmp_path / "words.txt") is None
    assert assets_of(tmp_path / "empty.pb") is None


def test_optimizers_are_left_out(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    variables = model.optimizer._variables
    variables.insert(1, variables.pop())
    with pytest.raises(ValueError, match="Unable to save the object ListWrapper"):
        model.export(tmp_path / "with", verbose=False)
    with optimizers_left_out():
        model.export(tmp_path / "without", verbose=False)
    with pytest.raises(ValueError, match="Unable to save the object ListWrapper"):
        model.export(tmp_path / "with", verbose=False)
