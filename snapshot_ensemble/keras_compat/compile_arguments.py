"""What a model was compiled with."""

from typing import Any

import keras


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments of the last `compile`, as they were given."""
    return dict(model._compile_config.config)


def compilation(model: keras.Model) -> Any:
    """An object that is another one after each `compile`."""
    return model._compile_config
