"""The file that describes a SavedModel, for which TensorFlow has no public name."""

import pathlib


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
