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
from tensorflow.python.eager import context as tensorflow_context

from snapshot_ensemble.keras_compat.context_patch import ContextPatch
from snapshot_ensemble.keras_compat.layer_graph import all_layers


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


def seed_states(layer: Any) -> list[keras.Variable]:
    """The states of the random generators of a layer and all layers inside it, each once."""
    generators = {id(g): g for inner in all_layers(layer) for g in inner._seed_generators}
    return [generator.state for generator in generators.values()]


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Gives Python's, NumPy's and Keras's global generators their states back."""
    name = "global_seed_generator"
    own = global_state.get_global_attribute(name)
    python, numpy, seed = random.getstate(), np.random.get_state(), global_seed()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if seed is None:
            global_state.set_global_attribute(name, own)
        else:
            set_global_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds all generators as `keras.utils.set_random_seed`, and gives them their states back.

    Those are Python's, NumPy's, Keras's and TensorFlow's.
    """
    names = ("global_seed_generator", "global_random_seed")
    own = {name: global_state.get_global_attribute(name) for name in names}
    eager = tensorflow_context.context()
    generator = getattr(eager, "_rng", None)  # None until a seed has been set.
    tensorflow_seed, state = eager._seed, None if generator is None else generator.getstate()
    with generators_restored():
        try:
            # Older versions of Keras go on with a global generator that exists.
            global_state.set_global_attribute("global_seed_generator", None)
            keras.utils.set_random_seed(seed)
            yield
        finally:
            for name, value in own.items():
                global_state.set_global_attribute(name, value)
            tensorflow_context.set_global_seed(tensorflow_seed)
            if state is not None:
                eager._rng.setstate(state)
