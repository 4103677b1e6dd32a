"""Data, weights and calls for tests of `SnapshotEnsemble` itself."""

import numpy as np
from models import three_classes

X, Y = three_classes()


def fit(ens, **arguments):
    return ens.fit(**{"x": X, "y": Y, "verbose": 0, **arguments})


def shown(value):
    """A short test id made of the arguments."""
    if not isinstance(value, dict):
        return ""
    plain = (bool, int, float, str, type(None))
    return ", ".join(f"{k}={v}" if isinstance(v, plain) else k for k, v in value.items())


# The weights of three members, which the fixture `paths` also writes to files.
WEIGHTS = [
    [factor * np.linspace(1, 2, 12, dtype="float32").reshape(4, 3), np.full(3, factor, "float32")]
    for factor in (1, 2, 3)
]
