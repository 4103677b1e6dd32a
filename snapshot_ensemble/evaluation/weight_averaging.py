"""Weight averaging: one model of the original size from the mean of the members' weights."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from snapshot_ensemble.evaluation.gathering import Gatherer, gather_with, stack_members
from snapshot_ensemble.inference.cloning import Member, build_member
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.keras_compat.batch_statistics import (
    STATISTICS,
    normalizing_layers,
    recorded_by_batch,
)
from snapshot_ensemble.keras_compat.stateless_call import with_weights
from snapshot_ensemble.storage.snapshot import Weights


def mean_weights(members: Sequence[Weights]) -> Weights:
    """The mean of each array, in float64; arrays that are not floats are the last member's."""
    means = []
    for arrays in zip(*members, strict=True):
        dtype = arrays[0].dtype
        if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(dtype)):
            means.append(arrays[-1])
            continue
        total = np.zeros(arrays[0].shape)
        for array in arrays:
            total += array.astype("float64")
        means.append((total / len(members)).astype(dtype))
    return means


def _equal(arrays: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(array, arrays[0]) for array in arrays)


class Statistics(keras.Model):
    """Predicts the mean and variance that each batch-normalisation layer sees in each batch.

    Args:
        model: The model.
        member: Holds the weights that the model runs with.
    """

    def __init__(self, model: keras.Model, member: Member) -> None:
        super().__init__(autocast=False)
        self.built = True
        layers = normalizing_layers(model)
        index = {id(variable): i for i, variable in enumerate(model.weights)}
        # The indices of each layer's moving mean and variance in `model.weights`.
        self.indices = [(index[id(la.moving_mean)], index[id(la.moving_variance)]) for la in layers]

        # A closure, so that Keras does not track the model's variables.
        def run(inputs: Any) -> dict[str, Any]:
            with with_weights(model, member.in_model_order), recorded_by_batch(layers) as calls:
                model.predict_step((inputs,))
            # A row for each call: Keras concatenates them over the batches.
            return {
                str(i): {name: ops.stack([call[name] for call in of_layer]) for name in of_layer[0]}
                for i, of_layer in enumerate(calls)
                if of_layer
            }

        self._run = run

    def predict_step(self, data: Any) -> Any:
        return self._run(keras.utils.unpack_x_y_sample_weight(data)[0])

    def recomputed(self, weights: Weights, x: Any, arguments: PredictArguments) -> Weights:
        """The weights with the moving statistics of all rows of `x`, from one pass over it."""
        if not self.indices:
            return weights
        statistics = self.predict(x, **arguments._asdict())
        weights = list(weights)
        for layer, calls in statistics.items():
            counts, means, variances = (calls[name].astype("float64") for name in STATISTICS)
            share = counts / counts.sum()
            mean = np.tensordot(share, means, 1)
            # The law of total variance: within batches, and between them.
            variance = np.tensordot(share, variances + np.square(means - mean), 1)
            for i, value in zip(self.indices[int(layer)], (mean, variance), strict=True):
                weights[i] = value.astype(weights[i].dtype)
        return weights


class Averager:
    """Averages weights and evaluates the result on data.

    Args:
        pool: The members whose weights are averaged.
        x: Data to compute batch-normalisation statistics and losses on, or None.
        y: Targets for the loss, or None.
        arguments: As for `model.predict`.
    """

    def __init__(self, pool: MemberPool, x: Any, y: Any, arguments: PredictArguments) -> None:
        model = pool.model
        self._pool, self._arguments = pool, arguments
        self._x, self._y = x, y
        with model.distribute_strategy.scope():
            self._member = Member(model)
            self._statistics = Statistics(model, self._member)
            self._gatherer = Gatherer(model, [self._member.in_model_order], stack_members)
            for own in (self._statistics, self._gatherer):
                own.compile()  # Otherwise Keras warns that the model is not compiled.

    def average(self, members: Sequence[Weights]) -> Weights:
        """The mean of the weights; with data, its batch-normalisation statistics are recomputed."""
        weights = mean_weights(members)
        if self._x is None:
            layers = normalizing_layers(self._pool.model)
            if layers and len(members) > 1:
                warnings.warn(
                    f"The model has {len(layers)} batch-normalisation layers, and the mean of the "
                    "members' moving statistics does not fit the averaged weights. Received: "
                    "x=None. Pass training data as `x` to recompute the statistics.",
                    stacklevel=4,
                )
            return weights
        self._member.set_weights(weights)
        recomputed = self._statistics.recomputed(weights, self._x, self._arguments)
        for pair in self._statistics.indices:
            # Statistics that are equal in all members belong to a layer in inference mode.
            if len(members) > 1 and all(_equal([m[i] for m in members]) for i in pair):
                for i in pair:
                    recomputed[i] = weights[i]
        return recomputed

    def loss(self, weights: Weights) -> float:
        """The loss on the data."""
        self._member.set_weights(weights)
        model, meanings = self._pool.model, self._pool.meanings
        predict, arguments = self._gatherer.predict, self._arguments
        held = gather_with(predict, model, meanings, self._x, self._y, None, arguments)
        return held.loss(held.members()[0])

    def soup(self, members: Sequence[Weights]) -> Weights:
        """Greedy soup: starts with the best member and adds those that lower the mean's loss."""
        alone = [self.loss(member) for member in members]
        order = np.argsort(alone, kind="stable")
        chosen, best, best_loss = [order[0]], members[order[0]], alone[order[0]]
        for number in order[1:]:
            mixed = self.average([members[i] for i in (*chosen, number)])
            if (mixed_loss := self.loss(mixed)) < best_loss:
                chosen, best, best_loss = [*chosen, number], mixed, mixed_loss
        return best


def average_weights(
    pool: MemberPool, members: Any, x: Any, y: Any, arguments: PredictArguments
) -> keras.Model:
    """Implements `SnapshotEnsemble.average_weights`."""
    is_greedy = isinstance(members, str) and members == "greedy"
    has_targets = y is not None or yields_targets(x)
    weights = pool.weights(pool.indices(None if is_greedy else members))
    _check_data(x, y, is_greedy and not has_targets)
    averager = Averager(pool, x, y, arguments)
    if is_greedy:
        return build_member(pool.model, averager.soup(weights), sample=pool.sample)
    averaged = averager.average(weights)
    if has_targets:
        worst = max(averager.loss(member) for member in weights)
        loss = averager.loss(averaged)
        if not loss <= worst:
            warnings.warn(
                f"The averaged model is worse than the worst member: its loss on `x` is "
                f"{loss:.4g}, the worst member's {worst:.4g}. The members lie in different "
                "basins of the loss. Use `members='greedy'`, fewer members, or the ensemble.",
                stacklevel=3,
            )
    return build_member(pool.model, averaged, sample=pool.sample)


def _check_data(x: Any, y: Any, lacks_targets: bool) -> None:
    if y is not None and x is None:
        raise ValueError("`y` cannot be used without `x`. Received: x=None. Pass `x`.")
    if lacks_targets:
        raise ValueError(
            "`members='greedy'` selects members by their loss on held-out data. Received: "
            f"x={type(x).__name__}, y={type(y).__name__}. Pass `x` and `y`."
        )
    if hasattr(x, "__next__"):
        raise ValueError(
            "`x` is read more than once. Received: x="
            f"{type(x).__name__}, an iterator. Pass arrays, a `tf.data.Dataset` or a `PyDataset`."
        )


def yields_targets(x: Any) -> bool:
    """Whether the data yield inputs and targets."""
    if isinstance(x, tf.data.Dataset):
        return isinstance(x.element_spec, tuple) and len(x.element_spec) > 1
    if isinstance(x, keras.utils.PyDataset):
        return isinstance(x[0], (tuple, list)) and len(x[0]) > 1
    return False
