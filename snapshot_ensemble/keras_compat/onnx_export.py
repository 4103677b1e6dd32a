"""What Keras's export to ONNX changes in NumPy."""

import numpy as np


def prepare_for_tf2onnx() -> None:
    """Gives NumPy the name `np.object` back, which tf2onnx uses.

    Keras does the same in each export, but asks NumPy for the name first, which warns.
    """
    vars(np).setdefault("object", object)
