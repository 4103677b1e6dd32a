"""Restarts that shrink the weights and perturb them with a new draw (shrink and perturb)."""

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.keras_compat.initializers import random_initializers_replaced
from snapshot_ensemble.keras_compat.layer_graph import direct_layers, own_trainable_variables
from snapshot_ensemble.storage.record import Progress
from snapshot_ensemble.training.loss_ratios import scale_of
from snapshot_ensemble.training.overfitting import has_overfitted

Shrink = float | Literal["auto"] | Mapping[str, float]

# The share that `"auto"` carries over once the run has overfitted.
AUTO_SHARE = 0.5


def check_shrink(shrink: Any) -> Any:
    """The value, normalised; raises an error that says what is valid."""
    if isinstance(shrink, str):
        if shrink != "auto":
            raise ValueError(
                "`shrink` must be a number from 0 to 1, a dict of numbers by layer name, or "
                f"'auto'. Received: shrink={shrink!r}"
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
    """A layer that can be recreated from its config, to draw new initial weights.

    Args:
        layer: A built layer.

    Attributes:
        paths: The names of the enclosing layers, and its own; one for each place that it is in.

    Raises:
        ValueError: If it cannot be recreated from its config.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.paths = layer, list[tuple[str, ...]]()
        self.weights = list(layer.weights)
        one, other = self.draw(), self.draw()
        same = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
        self.constants = {i: one[i] for i, equal in enumerate(same) if equal}

    def draw(self) -> list[np.ndarray]:
        """New initial weights, with seeds drawn from Python's random generator."""
        layer = self.layer
        with random_initializers_replaced(_with_new_seed):
            fresh = type(layer).from_config(layer.get_config())
            if not fresh.built:
                fresh.build_from_config(layer.get_build_config())
        weights: list[np.ndarray] = fresh.get_weights()
        if [a.shape for a in weights] != [tuple(v.shape) for v in self.weights]:
            raise ValueError("The layer's config gives weights of other shapes.")
        return weights

    def was_trained(self) -> bool | None:
        """Whether a weight with a constant initial value has changed; None if there is none."""
        if not self.constants:
            return None
        return any(
            not np.array_equal(keras.ops.convert_to_numpy(self.weights[i].value), constant)
            for i, constant in self.constants.items()
        )


def _with_new_seed(initializer: Any) -> Any:
    """The same initializer with a new seed; with its own it would draw the same values again."""
    config = initializer.get_config()
    return type(initializer).from_config({**config, "seed": random.randrange(1, 2**31)})


def parts_of(model: keras.Model) -> list[Part]:
    """The parts of a model, in the order of its layers, each once.

    Raises:
        ValueError: If weights belong to a layer that cannot be recreated.
    """
    found: dict[int, Part] = {}
    _find_parts(model, (), found)
    return list(found.values())


def _find_parts(layer: Any, enclosing: tuple[str, ...], found: dict[int, Part]) -> None:
    path = (*enclosing, layer.name)
    if not layer.weights:
        return
    if not isinstance(layer, keras.Model):
        try:
            # Several models inside may share a layer.
            part = found.get(id(layer)) or Part(layer)
            part.paths.append(path)
            found[id(layer)] = part
            return
        except Exception:  # Then the layers inside may be recreated one by one.
            pass
    if own := own_trainable_variables(layer):
        raise ValueError(
            "`shrink` below 1 draws new weights, but it is not known how these are initialised. "
            f"Received: {', '.join(v.path for v in own)}. Give the layer that creates them a "
            "`get_config` from which it can be recreated, or use `shrink=1`."
        )
    for inner in direct_layers(layer):
        _find_parts(inner, path, found)


def trained_before(parts: Sequence[Part]) -> list[int]:
    """The indices of the parts that have been trained.

    A trained part is recognised by a bias that is not zero, or a scale that is not one. A part
    without such weights counts as trained if the next part that has them does (a convolution and
    the normalisation after it), or, if there is no next one, the previous part.
    """
    known = [part.was_trained() for part in parts]
    for order in (range(len(parts) - 2, -1, -1), range(1, len(parts))):
        for index in order:
            if known[index] is None:  # First from the next part, then from the previous one.
                known[index] = known[index + (1 if order.step < 0 else -1)]
    return [index for index, is_trained in enumerate(known) if is_trained]


class Restarter:
    """Mixes the weights with a new draw at the start of a cycle.

    Args:
        shrink: A value that `check_shrink` has returned.

    Attributes:
        share: The share of the weights that the last restart carried over.
    """

    def __init__(self, shrink: Shrink = 1.0) -> None:
        self.shrink = shrink
        self.share = 1.0

    @property
    def is_warm(self) -> bool:
        """Whether every restart is warm, as in the paper, and carries all weights over."""
        return self.shrink == 1

    def prepare(
        self, model: keras.Model, pretrained: list[int] | None, *, is_validated: bool = True
    ) -> list[int] | None:
        """Checks before a run that new weights can be drawn, and finds the pretrained parts.

        Args:
            model: The model to train.
            pretrained: The indices of the parts that were trained before the first run, if known.
            is_validated: Whether there are validation data, which `"auto"` needs to do anything.

        Returns:
            `pretrained`, determined if it was not known.

        Raises:
            ValueError: If `shrink` cannot be applied to this model.
        """
        if not model.built:
            return [] if pretrained is None else pretrained  # Nothing is trained yet.
        if self.is_warm or (self.shrink == "auto" and not is_validated):
            return pretrained
        generator = random.getstate()
        try:
            parts = self._parts(model)
        finally:
            random.setstate(generator)  # This check must not change later draws.
        if pretrained is None:
            pretrained = trained_before(parts)
        self._check_for(parts, pretrained)
        return pretrained

    def _check_for(self, parts: Sequence[Part], pretrained: Sequence[int]) -> None:
        if isinstance(self.shrink, Mapping):
            names = {name for part in parts for path in part.paths for name in path}
            if unknown := sorted(set(self.shrink) - names):
                raise ValueError(
                    f"`shrink` must name layers with weights. Received: {', '.join(unknown)}. "
                    f"The layers with weights are: {', '.join(sorted(names))}"
                )
            self._check_shared(parts)
        elif self.shrink != "auto" and len(pretrained) == len(parts):
            raise ValueError(
                "`shrink` does not change layers that were trained before, and all layers of this "
                f"model were. Received: shrink={self.shrink}. Name the layers to change, such as "
                f"shrink={{{parts[-1].paths[0][-1]!r}: {self.shrink}}}"
            )

    def restart(
        self, model: keras.Model, progress: Progress, unfinished: Collection[int | None] = ()
    ) -> float:
        """Changes the weights; returns the share carried over, the lowest if there are several.

        Args:
            model: The model.
            progress: Its training so far.
            unfinished: The cycles whose end is not that of their cosine.
        """
        self.share = 1.0
        if self.is_warm:
            return self.share
        if self.shrink == "auto":
            scale = scale_of(model)
            if not has_overfitted(progress.history, scale, unfinished):
                return self.share
        # What is still to be changed: layers may share a variable, which changes only once.
        left = {id(variable) for variable in model.trainable_variables}
        parts = self._parts(model)
        pretrained = set() if isinstance(self.shrink, Mapping) else set(progress.pretrained or ())
        left -= {id(variable) for index in pretrained for variable in parts[index].weights}
        for part in parts:
            share = self._share_of(part)
            own = {id(variable) for variable in part.weights} & left
            if share == 1 or not own:
                continue
            left -= own
            self.share = min(self.share, share)
            for variable, fresh in zip(part.weights, part.draw(), strict=True):
                if id(variable) in own:
                    own.discard(id(variable))  # A layer may list a variable twice.
                    value = keras.ops.convert_to_numpy(variable.value).astype("float64")
                    variable.assign((share * value + (1 - share) * fresh).astype(fresh.dtype))
        return self.share

    def _parts(self, model: keras.Model) -> list[Part]:
        try:
            return parts_of(model)
        except ValueError:
            if self.shrink != "auto":
                raise
            return []  # All restarts of such a model are warm.

    def _share_of(self, part: Part) -> float:
        if isinstance(self.shrink, Mapping):
            return next(iter(self._named_shares(part)), 1.0)
        return AUTO_SHARE if isinstance(self.shrink, str) else self.shrink

    def _named_shares(self, part: Part) -> list[float]:
        """The shares that a dict gives for each place of a part; innermost names count."""
        assert isinstance(self.shrink, Mapping)
        named = [[name for name in path if name in self.shrink] for path in part.paths]
        return [self.shrink[names[-1]] for names in named if names]

    def _check_shared(self, parts: Sequence[Part]) -> None:
        """Raises `ValueError` if a dict gives two shares for one variable."""
        shares: dict[int, float] = {}
        for part in parts:
            for share in self._named_shares(part):
                for variable in part.weights:
                    if shares.setdefault(id(variable), share) != share:
                        raise ValueError(
                            "`shrink` must give one share for weights that layers share. Received: "
                            f"shrink={self.shrink}, which gives {shares[id(variable)]} and {share} "
                            f"for {variable.path}. Name the innermost layer that has them."
                        )
