"""What Keras and TensorFlow put into a SavedModel, for which they have no public names."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.twins import twin_of

_tracking = ContextPatch(
    keras.Optimizer, "_trackable_children", lambda _value, _original, _optimizer, *_args, **_kw: {}
)


@contextlib.contextmanager
def optimizers_left_out() -> Iterator[None]:
    """Exports inside the context hold nothing of optimizers.

    What is served needs none, TensorFlow refuses to save one whose variables were moved, and
    another thread may be training with it.
    """
    with _tracking.active(True):
        yield


def track_resources(target: Any, layer: Any) -> None:
    """Lets an export of `target` save the resources of a layer, too: lookup tables, not variables.

    It is a twin that is tracked, since TensorFlow takes away a model's compiled functions while it
    saves, and another thread may be training with them.
    """
    # Keras looks for variables in layers, but not in a module.
    module = tf.Module()
    module.layer = twin_of(layer)
    target.resources = module


def assets_of(path: pathlib.Path) -> list[str] | None:
    """The names of a SavedModel's assets, read from its `saved_model.pb`; None for other files."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415  Slow to load.
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel  # noqa: PLC0415

    content = SavedModel()
    try:
        content.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    graphs = content.meta_graphs
    return (
        [asset.filename for graph in graphs for asset in graph.asset_file_def] if graphs else None
    )
