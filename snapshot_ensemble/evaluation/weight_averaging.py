"""One model of the original size: the mean of the members' weights."""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from snapshot_ensemble.evaluation.held_out import Gatherer, gather_with, lay_side_by_side
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
    """The mean of each array, taken in float64; of what are no real numbers the last one."""
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
    """Predicts, for each batch, its mean and variance in each layer that normalises by them.

    Args:
        model: The model.
        member: Its weights are those that it runs with.
    """

    def __init__(self, model: keras.Model, member: Member) -> None:
        super().__init__(autocast=False)
        self.built = True
        layers = normalizing_layers(model)
        place = {id(variable): i for i, variable in enumerate(model.weights)}
        self.places = [(place[id(la.moving_mean)], place[id(la.moving_variance)]) for la in layers]

        # In a closure, so that Keras tracks nothing of it.
        def run(inputs: Any) -> dict[str, Any]:
            with with_weights(model, member.in_model_order), recorded_by_batch(layers) as calls:
                model.predict_step((inputs,))
            # A row for each call: Keras joins them over the batches.
            return {
                str(i): {name: ops.stack([call[name] for call in seen]) for name in seen[0]}
                for i, seen in enumerate(calls)
                if seen
            }

        self._run = run

    def predict_step(self, data: Any) -> Any:
        return self._run(keras.utils.unpack_x_y_sample_weight(data)[0])

    def renewed(self, weights: Weights, x: Any, batch_size: int | None) -> Weights:
        """The weights with the statistics of all rows of `x`, by one pass over it."""
        if not self.places:
            return weights
        found = self.predict(x, batch_size=batch_size, verbose=0)
        weights = list(weights)
        for number, calls in found.items():
            counts, means, variances = (calls[name].astype("float64") for name in STATISTICS)
            share = counts / counts.sum()
            mean = np.tensordot(share, means, 1)
            # Of all items together: within batches, and between them.
            variance = np.tensordot(share, variances + np.square(means - mean), 1)
            for place, value in zip(self.places[int(number)], (mean, variance), strict=True):
                weights[place] = value.astype(weights[place].dtype)
        return weights


class Averager:
    """Averages weights, and judges what comes of it on data.

    Args:
        pool: The members whose weights they are.
        x: Data to estimate statistics on, or None.
        y: Targets to judge by, or None.
        batch_size: As for `model.predict`.
    """

    def __init__(
        self,
        pool: MemberPool,
        x: Any,
        y: Any,
        batch_size: int | None,
    ) -> None:
        model = pool.model
        self._pool, self._batch_size = pool, batch_size
        self._x, self._y = x, y
        with model.distribute_strategy.scope():
            self._member = Member(model)
            self._statistics = Statistics(model, self._member)
            self._judge = Gatherer(model, [self._member.in_model_order], lay_side_by_side)
            for own in (self._statistics, self._judge):
                own.compile()  # Which tells Keras that there is nothing to warn of.

    def average(self, members: Sequence[Weights]) -> Weights:
        """The mean, with statistics of its own where there are data."""
        weights = mean_weights(members)
        if self._x is None:
            layers = normalizing_layers(self._pool.model)
            if layers and len(members) > 1:
                warnings.warn(
                    f"The model has {len(layers)} layers of batch normalisation, whose statistics "
                    "are not the mean of the members'. Received: x=None. Pass training data as "
                    "`x`, to estimate them.",
                    stacklevel=4,
                )
            return weights
        self._member.set_weights(weights)
        renewed = self._statistics.renewed(weights, self._x, self._batch_size)
        for pair in self._statistics.places:
            # What is equal in all members was never trained: the layer always works in inference.
            if len(members) > 1 and all(_equal([m[place] for m in members]) for place in pair):
                for place in pair:
                    renewed[place] = weights[place]
        return renewed

    def loss(self, weights: Weights) -> float:
        """The loss on the data."""
        self._member.set_weights(weights)
        run = PredictArguments(self._batch_size, verbose=0)
        pool = self._pool
        held = gather_with(self._judge, pool.model, pool.meanings, self._x, self._y, None, run)
        return held.loss(held.members()[0])

    def soup(self, members: Sequence[Weights]) -> Weights:
        """Beginning with the best, takes in whoever lowers the loss of the mean."""
        alone = [self.loss(member) for member in members]
        order = np.argsort(alone, kind="stable")
        taken, best, best_loss = [order[0]], members[order[0]], alone[order[0]]
        for number in order[1:]:
            mixed = self.average([members[i] for i in (*taken, number)])
            if (mixed_loss := self.loss(mixed)) < best_loss:
                taken, best, best_loss = [*taken, number], mixed, mixed_loss
        return best


def average_weights(
    pool: MemberPool, members: Any, x: Any, y: Any, batch_size: int | None
) -> keras.Model:
    """The model that `SnapshotEnsemble.average_weights` returns; see there."""
    is_greedy = isinstance(members, str) and members == "greedy"
    is_judged = y is not None or brings_targets(x)
    weights = pool.weights(pool.indices(None if is_greedy else members))
    _check_data(x, y, is_greedy and not is_judged)
    averager = Averager(pool, x, y, batch_size)
    if is_greedy:
        return build_member(pool.model, averager.soup(weights))
    averaged = averager.average(weights)
    if is_judged:
        worst = max(averager.loss(member) for member in weights)
        loss = averager.loss(averaged)
        if not loss <= worst:
            warnings.warn(
                f"The mean of the weights is worse than the worst member: its loss on `x` is "
                f"{loss:.4g}, the worst member's {worst:.4g}. The members lie in different "
                "basins of the loss. Use `members='greedy'`, fewer members, or the ensemble.",
                stacklevel=3,
            )
    return build_member(pool.model, averaged)


def _check_data(x: Any, y: Any, lacks_targets: bool) -> None:
    if y is not None and x is None:
        raise ValueError("`y` needs the data that it belongs to. Received: x=None. Pass `x`.")
    if lacks_targets:
        raise ValueError(
            "`members='greedy'` chooses by the loss on held-out data. Received: "
            f"x={type(x).__name__}, y={type(y).__name__}. Pass `x` and `y`."
        )
    if hasattr(x, "__next__"):
        raise ValueError(
            "`x` is read more than once. Received: x="
            f"{type(x).__name__}, an iterator. Pass arrays, a `tf.data.Dataset` or a `PyDataset`."
        )


def brings_targets(x: Any) -> bool:
    """Whether the data yield inputs and targets."""
    if isinstance(x, tf.data.Dataset):
        return isinstance(x.element_spec, tuple) and len(x.element_spec) > 1
    if isinstance(x, keras.utils.PyDataset):
        return isinstance(x[0], (tuple, list)) and len(x[0]) > 1
    return False
