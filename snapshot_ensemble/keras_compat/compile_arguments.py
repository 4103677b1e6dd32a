"""The arguments that a model was compiled with."""

from typing import Any

import keras


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments of the last `compile`, as passed by the user."""
    return dict(model._compile_config.config)


def compilation(model: keras.Model) -> Any:
    """An object that each `compile` replaces, to detect that a model was compiled again."""
    return model._compile_config
