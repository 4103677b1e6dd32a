"""The compiled loss and metrics of combined outputs."""

from collections.abc import Callable
from typing import Any

import keras

from snapshot_ensemble.evaluation.gathering import predict_one_by_one, stack_with_logits
from snapshot_ensemble.evaluation.left_out import check_evaluates, warn_of_left_out, watched
from snapshot_ensemble.evaluation.targets import of_slice
from snapshot_ensemble.inference.batch_size import batch_size_for_scores
from snapshot_ensemble.inference.cloning import compile_like
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.keras_compat.logits import attach
from snapshot_ensemble.keras_compat.train_step import only_with


def evaluate(
    pool: MemberPool, x: Any, y: Any, combine: str, members: Any, arguments: dict[str, Any]
) -> Any:
    """Implements `SnapshotEnsemble.evaluate`."""
    check_evaluates(pool.model)
    arguments = arguments | batch_size_for_scores(pool.model, x, **arguments)
    combiner = pool.combiner(combine, members)
    with watched(pool.model):
        if pool.runs_one_by_one(combiner.members, x):
            scores = _evaluate_one_by_one(pool, combiner, x, y, arguments)
        else:
            with pool.evaluator(combiner) as model:
                scores = model.evaluate(x, y, **arguments)
    warn_of_left_out(pool.model)
    return scores


class Combination(keras.Model):
    """Combines what members have predicted, as a `MembersModel` combines what they predict.

    So that Keras's own `evaluate` can score it, with its callbacks and everything else.

    Args:
        model: The wrapped model.
        combine: Takes the list of the members' outputs.
        count: Number of members.
    """

    def __init__(self, model: keras.Model, combine: Callable[[list[Any]], Any], count: int) -> None:
        super().__init__(name=model.name, dtype=model.dtype_policy, autocast=False)
        self.built = True
        if getattr(model, "output_names", None):
            self.output_names = model.output_names
        compile_like(self, model)
        self._combine, self._count = combine, count

    def call(self, inputs: Any) -> Any:
        return self._combine([self._member(number, inputs) for number in range(self._count)])

    def _member(self, number: int, inputs: Any) -> Any:
        """One member's outputs, with the logits and masks that Keras attaches to them."""
        logits, masks = inputs.get("logits", {}), inputs.get("masks", {})
        outputs = []
        for i, stack in enumerate(keras.tree.flatten(inputs["outputs"])):
            behind = logits[str(i)][:, number] if str(i) in logits else None
            outputs.append(attach(stack[:, number], (behind, masks.get(str(i)))))
        return keras.tree.pack_sequence_as(inputs["outputs"], outputs)

    def test_step(self, data: Any) -> Any:
        with only_with(data):
            return super().test_step(data)


def _evaluate_one_by_one(
    pool: MemberPool, combiner: Combiner, x: Any, y: Any, arguments: dict[str, Any]
) -> Any:
    """Runs one member after another, and then Keras's `evaluate` on what they have predicted."""
    shared = {"batch_size", "steps", "verbose"}
    options = {name: value for name, value in arguments.items() if name in shared}
    gathering = Combiner(combiner.members, ("held out with logits",), stack_with_logits)
    predicted = predict_one_by_one(pool, gathering, x, **options)
    predicted = keras.tree.map_structure(_as_tensor_if_strings, predicted)
    if arguments.get("steps") is not None:  # Some rows may be left.
        rows = slice(len(keras.tree.flatten(predicted["outputs"])[0]))
        weights = of_slice(arguments.get("sample_weight"), rows)
        y, arguments = of_slice(y, rows), {**arguments, "sample_weight": weights}
    with pool.model.distribute_strategy.scope():
        model = Combination(pool.model, combiner.combine, len(combiner.members))
    with pool.refusals():
        return model.evaluate(predicted, y, **arguments)


def _as_tensor_if_strings(array: Any) -> Any:
    """Keras does not take arrays of the objects that strings are predicted as."""
    return keras.ops.convert_to_tensor(array) if array.dtype.kind == "O" else array
