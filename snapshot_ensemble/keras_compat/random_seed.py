"""The global generator that Keras uses where no seed is given."""

import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import global_seed_generator


def global_seed() -> np.ndarray | None:
    """The state of Keras's global generator; None until something has drawn from it."""
    if global_state.get_global_attribute("global_seed_generator") is None:
        return None
    return np.asarray(global_seed_generator().state.numpy())


def set_global_seed(state: np.ndarray) -> None:
    """Sets the state of Keras's global generator."""
    global_seed_generator().state.assign(state)
