"""The global generator that Keras uses where no seed is given."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.random.seed_generator import global_seed_generator

from snapshot_ensemble.keras_compat.context_patch import ContextPatch


def global_seed() -> np.ndarray | None:
    """The state of Keras's global generator; None until something has drawn from it."""
    if global_state.get_global_attribute("global_seed_generator") is None:
        return None
    return np.asarray(global_seed_generator().state.numpy())


def set_global_seed(state: np.ndarray) -> None:
    """Sets the state of Keras's global generator."""
    global_seed_generator().state.assign(state)


def _draw(generator: random.Random, original: Any) -> int:
    return generator.randint(1, int(1e9))


# Two modules look the function up by its name.
_drawing = [
    ContextPatch(module, "make_default_seed", _draw)
    for module in (seed_generator, keras.src.backend.random)
]


@contextlib.contextmanager
def seeds_drawn_apart() -> Iterator[None]:
    """Layers that are made inside the context do not advance Python's generator for their seeds.

    Training in another thread, or around a callback, draws from it. The seeds are those that the
    generator would give next.
    """
    apart = random.Random()
    apart.setstate(random.getstate())
    with contextlib.ExitStack() as stack:
        for patch in _drawing:
            stack.enter_context(patch.active(apart))
        yield
