"""What a restart leaves of the weights: shrink and perturb."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.keras_compat.initializers import random_initializers_replaced
from snapshot_ensemble.keras_compat.layer_graph import direct_layers, own_trainable_variables
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.training.overfitting import has_overfitted

Shrink = float | Literal["auto"] | Mapping[str, float]

# What `"auto"` carries over once the run has overfitted.
AUTO_SHARE = 0.5


def check_shrink(shrink: Any) -> Any:
    """The value, or an error that says what it may be."""
    if isinstance(shrink, str):
        if shrink != "auto":
            raise ValueError(
                "`shrink` must be a number from 0 to 1, a dict of such by layer name, or 'auto'. "
                f"Received: shrink={shrink!r}"
            )
        return shrink
    if isinstance(shrink, Mapping):
        return {str(name): _share(value) for name, value in shrink.items()}
    return _share(shrink)


def _share(shrink: Any) -> float:
    share = real_number("shrink", shrink, positive=False)
    if share > 1:
        raise ValueError(f"`shrink` must be between 0 and 1. Received: shrink={shrink!r}")
    return share


class Part:
    """A layer that can be made anew by itself: its weights, and how they begin.

    Args:
        layer: A built layer.
        path: The names of the layers around it and its own.

    Raises:
        ValueError: If it cannot be made from its config.
    """

    def __init__(self, layer: Any, path: tuple[str, ...]) -> None:
        self.layer, self.path = layer, path
        self.weights = list(layer.weights)
        one, other = self.draw(), self.draw()
        same = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
        self.constants = {i: one[i] for i, equal in enumerate(same) if equal}

    def draw(self) -> list[np.ndarray]:
        """What its weights would be if it were made now, from Python's random numbers."""
        layer = self.layer
        with random_initializers_replaced(_drawn_anew):
            fresh = type(layer).from_config(layer.get_config())
            if not fresh.built:
                fresh.build_from_config(layer.get_build_config())
        found: list[np.ndarray] = fresh.get_weights()
        if [a.shape for a in found] != [tuple(v.shape) for v in self.weights]:
            raise ValueError("Its config does not say what it is.")
        return found

    def was_trained(self) -> bool | None:
        """Whether a weight that begins as a constant is something else; None without such."""
        if not self.constants:
            return None
        return any(
            not np.array_equal(keras.ops.convert_to_numpy(self.weights[i].value), constant)
            for i, constant in self.constants.items()
        )


def _drawn_anew(initializer: Any) -> Any:
    """The same kind with another seed: one of a layer's own would draw the same again."""
    config = initializer.get_config()
    return type(initializer).from_config({**config, "seed": random.randrange(1, 2**31)})


def parts_of(model: keras.Model) -> list[Part]:
    """The parts of a model, from its inputs to its outputs as far as that is known.

    Raises:
        ValueError: If weights belong to a layer that cannot be made anew.
    """
    return list(_parts(model, ()))


def _parts(layer: Any, around: tuple[str, ...]) -> Iterator[Part]:
    path = (*around, layer.name)
    if not layer.weights:
        return
    if not isinstance(layer, keras.Model):
        try:
            yield Part(layer, path)
            return
        except Exception:  # Of one that cannot be made, the layers inside may be.
            pass
    if own := own_trainable_variables(layer):
        raise ValueError(
            "`shrink` below 1 draws weights anew, and nothing is known of how these began: "
            f"{', '.join(v.path for v in own)}. Give the layer that makes them a `get_config` "
            "from which it can be made, or use `shrink=1`."
        )
    for inner in direct_layers(layer):
        yield from _parts(inner, path)


def trained_before(parts: Sequence[Part]) -> list[int]:
    """The places of parts that are not as they begin.

    A bias that is not zero tells, or a scale that is not one. Parts without such go with the
    next one that has them, as a convolution with the normalisation behind it, else with the last.
    """
    known = [part.was_trained() for part in parts]
    for order in (range(len(parts) - 2, -1, -1), range(1, len(parts))):
        for place in order:
            if known[place] is None:  # Of the next one, and then of the one before.
                known[place] = known[place + (1 if order.step < 0 else -1)]
    return [place for place, found in enumerate(known) if found]


class Restarter:
    """Shrinks the weights towards a fresh draw where a cycle begins.

    Args:
        shrink: A value that `check_shrink` has passed.

    Attributes:
        share: What the last restart carried over.
    """

    def __init__(self, shrink: Shrink = 1.0) -> None:
        self.shrink = shrink
        self.share = 1.0

    @property
    def is_warm(self) -> bool:
        """Whether every restart is the paper's, which carries all weights over."""
        return self.shrink == 1

    def prepare(
        self, model: keras.Model, pretrained: list[int] | None, *, is_validated: bool = True
    ) -> list[int] | None:
        """Checks before a run that the weights can shrink, and looks what was trained before.

        Args:
            model: What will be trained.
            pretrained: The places of parts that were trained before the first run, if known.
            is_validated: Whether there are validation data, which `"auto"` needs to do anything.

        Returns:
            `pretrained`, found out if it can be.

        Raises:
            ValueError: If the model is not one whose weights can shrink as they are to.
        """
        if not model.built:
            return [] if pretrained is None else pretrained  # Nothing in it is trained.
        if self.is_warm or (self.shrink == "auto" and not is_validated):
            return pretrained
        generator = random.getstate()
        try:
            parts = self._parts(model)
        finally:
            random.setstate(generator)  # To have looked changes nothing.
        if pretrained is None:
            pretrained = trained_before(parts)
        self._check_for(parts, pretrained)
        return pretrained

    def _check_for(self, parts: Sequence[Part], pretrained: Sequence[int]) -> None:
        if isinstance(self.shrink, Mapping):
            names = {name for part in parts for name in part.path}
            if unknown := sorted(set(self.shrink) - names):
                raise ValueError(
                    f"`shrink` must name layers with weights. Received: {', '.join(unknown)}. "
                    f"There are: {', '.join(sorted(names))}"
                )
        elif self.shrink != "auto" and len(pretrained) == len(parts):
            raise ValueError(
                "`shrink` leaves layers alone that were trained before, and these are all that "
                f"there are. Received: shrink={self.shrink}. Name those that it is meant for: "
                f"shrink={{{parts[-1].path[-1]!r}: {self.shrink}}}"
            )

    def restart(self, model: keras.Model, progress: Progress) -> float:
        """Changes the weights; returns the share carried over, the least if there are several."""
        self.share = 1.0
        if self.is_warm or (self.shrink == "auto" and not has_overfitted(progress.history)):
            return self.share
        trained = {id(variable) for variable in model.trainable_variables}
        for place, part in enumerate(self._parts(model)):
            share = self._share_of(part, place in (progress.pretrained or ()))
            if share == 1 or not trained & {id(variable) for variable in part.weights}:
                continue
            self.share = min(self.share, share)
            for variable, fresh in zip(part.weights, part.draw(), strict=True):
                if id(variable) in trained:
                    value = keras.ops.convert_to_numpy(variable.value).astype("float64")
                    variable.assign((share * value + (1 - share) * fresh).astype(fresh.dtype))
        return self.share

    def _parts(self, model: keras.Model) -> list[Part]:
        try:
            return parts_of(model)
        except ValueError:
            if self.shrink != "auto":
                raise
            return []  # Then all restarts are warm.

    def _share_of(self, part: Part, is_pretrained: bool) -> float:
        if isinstance(self.shrink, Mapping):
            named = [self.shrink[name] for name in part.path if name in self.shrink]
            return named[-1] if named else 1.0  # The innermost name counts.
        if is_pretrained:
            return 1.0
        return AUTO_SHARE if isinstance(self.shrink, str) else self.shrink
