"""How many of the last members predict by default, from one pass over held-out data.

Only sums over the rows are kept: of the losses of the means of the last 1, 2, … members, and of
their products, from which the standard error of each paired difference follows.
"""

import dataclasses
import math
import threading
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation import metrics
from snapshot_ensemble.evaluation.gathering import (
    gather,
    held_out_of,
    no_targets,
    predict_one_by_one,
    stack_members,
)
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.member_counts import (
    chosen_count,
    combined_first,
    most_members,
)
from snapshot_ensemble.evaluation.targets import as_numbers, is_structure, of_slice
from snapshot_ensemble.inference.batch_size import KERAS, are_arrays, batch_size_for
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.output_specs import known_outputs
from snapshot_ensemble.keras_compat.graphs import zeros_after

# In bytes: about how much the outputs of all members may take for a batch of arrays.
MEMORY = 2**26


class LossMoments:
    """Sums over all rows, of the losses of the means of the last 1, 2, … members.

    Losses are taken relative to those of the mean of all members, so that their differences, which
    are compared, are not lost in rounding.

    Args:
        pool: The members.
    """

    def __init__(self, pool: MemberPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()  # With several replicas, batches come from several threads.
        self._rows = 0
        self._sums: Any = 0.0
        self._products: Any = 0.0
        self._of_all: Any = 0.0
        self._totals: Any = 0.0
        self._shares: list[float] = []
        self.error: Exception | None = None

    def take(self, predicted: dict[str, Any]) -> None:
        """Adds a batch. An error is kept: raised inside a graph, it would be another one."""
        if self.error is not None:
            return
        try:
            y, weight = predicted["y"], predicted.get("sample_weight")
            held = held_out_of(self._pool.model, self._pool.meanings, predicted, y, weight)
            held = dataclasses.replace(held, is_part=True)
            losses = losses_of_rows(held)
        except Exception as error:  # Whatever it is, `most` raises it.
            self.error = error
            return
        relative = (losses - losses[:, -1:]).reshape(-1, held.rows)
        with self._lock:
            self._rows += held.rows
            self._sums = self._sums + relative.sum(axis=1)
            self._products = self._products + relative @ relative.T
            self._of_all = self._of_all + losses[:, -1].sum(axis=1)
            self._totals = self._totals + np.asarray([truth.total for truth in held.truths])
            self._shares = held.loss_weights

    def most(self) -> int:
        """The number of last members that predict; see `chosen_count`."""
        if self.error is not None:
            raise self.error
        if not np.all(self._totals):
            raise ValueError(
                "`sample_weight` must be at least 0 and not 0 everywhere. Received: "
                f"{self._rows} rows, all of weight 0"
            )
        shares = np.asarray(self._shares) / self._totals
        outputs, rows = len(shares), self._rows
        sums = shares @ self._sums.reshape(outputs, -1)
        products = self._products.reshape(outputs, len(sums), outputs, len(sums))
        products = np.einsum("i,ikjl,j->kl", shares, products, shares)
        own = np.diag(products)
        squares = own[:, None] - 2 * products + own
        squares -= np.square(sums[:, None] - sums) / rows
        errors = np.sqrt(np.maximum(squares, 0) * rows / max(rows - 1, 1))
        rounding = 1e-12 * abs(float(shares @ self._of_all))
        return chosen_count(sums, errors + rounding, self._pool.view.snapshots)


def losses_of_rows(held: HeldOut) -> np.ndarray:
    """`(outputs, members, rows)`: each row's loss of the mean of the last 1, 2, … members.

    Weighted by its sample weight and not normalised.
    """
    losses = np.zeros((len(held.outputs), len(held.outputs[0]), held.rows))
    for block in held.blocks():
        for i, (items, truth) in enumerate(zip(block.items, block.truths, strict=True)):
            means = combined_first(items[::-1], held.meanings[i])
            of_items = truth.weights * metrics.losses(means, truth)
            of_rows = losses[i, :, block.rows]
            of_rows += truth.total * of_items.reshape(*of_rows.shape, -1).sum(axis=-1)
    return losses


class Judge(MembersModel):
    """Runs the members on each batch and takes their losses, instead of returning outputs."""

    moments: LossMoments

    def predict_step(self, data: Any) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if isinstance(x, dict) and set(x) <= _PACKED:
            x, y, sample_weight = (x.get(name) for name in (_X, _Y, _WEIGHT))
        if y is None:
            raise no_targets(data)
        gathered = {**self(x), "y": y}
        if sample_weight is not None:
            gathered["sample_weight"] = sample_weight

        def take(*arrays: np.ndarray) -> None:
            self.moments.take(keras.tree.pack_sequence_as(gathered, arrays))

        return zeros_after(take, keras.tree.flatten(gathered))


# Arrays of inputs and targets, which Keras batches together as inputs.
_X, _Y, _WEIGHT = "inputs of judged rows", "targets of judged rows", "weights of judged rows"
_PACKED = {_X, _Y, _WEIGHT}


def _packed(x: Any, y: Any, sample_weight: Any) -> dict[str, Any]:
    packed = {_X: x, _Y: y, _WEIGHT: sample_weight}
    for name, what in ((_Y, "y"), (_WEIGHT, "sample_weight")):
        given = packed[name]
        if given is None:
            del packed[name]
        elif not is_structure(given):
            packed[name] = as_numbers(given, what)
    return packed


def _most_rows(model: keras.Model, members: int, memory: int) -> int | None:
    """How many rows of outputs fit into so many bytes; None if their size is not known."""
    outputs = known_outputs(model)
    if outputs is None:
        return None
    shapes = [tensor.shape[1:] for tensor in keras.tree.flatten(outputs)]
    if any(None in shape for shape in shapes):
        return None
    return max(1, memory // (4 * members * sum(map(math.prod, shapes))))


def count_of_members(
    pool: MemberPool, x: Any, y: Any, sample_weight: Any, arguments: PredictArguments
) -> int:
    """Implements `SnapshotEnsemble.choose_members`."""
    if y is not None and not are_arrays(x):
        # The targets cannot be read together with the inputs.
        return most_members(gather(pool, x, y, sample_weight, arguments), pool.view.snapshots)
    options = arguments._asdict()
    options |= batch_size_for(pool.model, x, **options)
    if are_arrays(x):
        if y is None:
            raise no_targets(x)
        x = _packed(x, y, sample_weight)
        rows = _most_rows(pool.model, len(pool), MEMORY)
        if rows is not None:
            options["batch_size"] = min(rows, options["batch_size"] or KERAS)
    if pool.runs_one_by_one(pool.indices(), x):
        return _count_one_by_one(pool, x, options)
    combiner, moments = Combiner(pool.indices(), ("judge",), stack_members), LossMoments(pool)
    with pool.evaluator(combiner, Judge) as judge:
        judge.jit_compile = False  # A compiled graph cannot call NumPy.
        judge.moments = moments
        judge.predict(x, **options)
    return moments.most()


def _count_one_by_one(pool: MemberPool, packed: dict[str, Any], options: dict[str, Any]) -> int:
    """Like `count_of_members`, with one member after another on as many rows as memory allows.

    Args:
        pool: The members.
        packed: What `_packed` returned.
        options: As for `model.predict`.
    """
    combiner, moments = Combiner(pool.indices(), ("held out",), stack_members), LossMoments(pool)
    size, steps = options["batch_size"] or KERAS, options.pop("steps")
    if steps is not None:
        packed = of_slice(packed, slice(steps * size))
    total = len(keras.tree.flatten(packed[_X])[0])
    # The weights are read again for each part, so that a part has whole batches, and many.
    most = _most_rows(pool.model, len(pool), max(MEMORY, pool.memory_limit)) or total
    most = max(most // size, 1) * size
    for start in range(0, total, most):
        # The last part has whatever is left, so that targets that are too many are noticed.
        part = of_slice(packed, slice(start, start + most if start + most < total else None))
        predicted = predict_one_by_one(pool, combiner, part[_X], **options)
        names = {"y": _Y, "sample_weight": _WEIGHT}
        given = {name: part[key] for name, key in names.items() if key in part}
        moments.take({**predicted, **given})
    return moments.most()
