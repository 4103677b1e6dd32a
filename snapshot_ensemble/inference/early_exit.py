"""A cascade of members: rows that are settled by the first ones do not reach the others."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.composites import rows_of
from snapshot_ensemble.losses import mean_and_log_variance
from snapshot_ensemble.storage.record import EarlyExit

# The key of how many members ran for each row, beside the outputs.
COUNTS = "how many members ran"


def check_early_exit(
    early_exit: bool, combine: str, members: Any, return_counts: bool = False
) -> None:
    """Raises `ValueError` for arguments that contradict each other."""
    if early_exit and (combine != "mean" or members is not None):
        raise ValueError(
            "`early_exit=True` combines the mean of the members that `fit_early_exit` has put in "
            f"order. Received: early_exit=True, combine={combine!r}, members={members!r}. Leave "
            "`combine` and `members` out, or set `ens.members` and call `fit_early_exit` again."
        )
    if return_counts and not early_exit:
        raise ValueError(
            "All members run for each row unless `early_exit=True`. "
            "Received: return_counts=True, early_exit=False"
        )


def doubts(combined: Any, stack: Any, meaning: Output) -> Any:
    """How unsure the members are of each row.

    For classes, one minus the probability of the most probable class; for regression, the
    standard deviation over the members, or the one that they predict. The mean over all units,
    pixels or steps of a row.

    Args:
        combined: The combined output of the members so far, with rows on the first axis.
        stack: Their own outputs, on a new first axis.
        meaning: What the output means.

    Returns:
        One number for each row.
    """
    if meaning.is_gaussian:
        each = ops.exp(mean_and_log_variance(combined)[1] / 2)
    elif not meaning.is_classes:
        each = ops.std(stack, axis=0)
    elif meaning.task == "multiclass":
        each = 1 - ops.max(ops.softmax(combined) if meaning.logits else combined, axis=-1)
    else:
        yes = ops.sigmoid(combined) if meaning.logits else combined
        each = ops.minimum(yes, 1 - yes)
    return ops.mean(ops.reshape(each, (ops.shape(each)[0], -1)), axis=1)


class Stages(NamedTuple):
    """The stages of a cascade, in a graph.

    Attributes:
        early_exit: When a row is settled.
        combine: Combines the outputs of the members so far; called with the number of the stage.
        meanings: Returns the meaning of each flat output of a structure.
    """

    early_exit: EarlyExit
    combine: Callable[[int, list[Any]], Any]
    meanings: Callable[[Any], list[Output]]

    def run(self, member: Callable[[int, Any], Any], inputs: Any) -> dict[str, Any]:
        """The outputs for a batch, and how many members ran for each row.

        Args:
            member: The outputs of the member with this number in the order, for some rows.
            inputs: The batch.
        """
        outputs, counts = self._from(0, member, inputs, [])
        return {"outputs": outputs, COUNTS: counts}

    def choose(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """Like `run`, from all members' outputs for all rows, in the order of the cascade."""
        rows = ops.arange(ops.shape(keras.tree.flatten(outputs[0])[0])[0])
        return self.run(lambda number, chosen: rows_of(outputs[number], chosen), rows)

    def _from(
        self, stage: int, member: Callable[[int, Any], Any], inputs: Any, before: list[Any]
    ) -> tuple[Any, Any]:
        """The outputs and counts of rows that reach a stage, for which some members have run."""
        members = [*before, member(stage, inputs)]
        combined = self.combine(stage, members)
        flat = keras.tree.flatten(combined)
        counts = ops.full((ops.shape(flat[0])[0],), stage + 1, "int32")
        if stage == len(self.early_exit.thresholds):
            return combined, counts
        unsure = self._doubt(flat, members) > self.early_exit.thresholds[stage]
        (rows,) = ops.nonzero(unsure)

        def go_on() -> list[Any]:
            rest, more = self._from(stage + 1, member, *rows_of((inputs, members), rows))
            return [*keras.tree.flatten(rest), more]

        def stop() -> list[Any]:
            return rows_of([*flat, counts], rows)

        rest = ops.cond(ops.any(unsure), go_on, stop)
        places = ops.expand_dims(rows, -1)
        *flat, counts = [
            ops.scatter_update(old, places, new)
            for old, new in zip([*flat, counts], rest, strict=True)
        ]
        return keras.tree.pack_sequence_as(combined, flat), counts

    def _doubt(self, flat: Sequence[Any], members: Sequence[Any]) -> Any:
        """The largest scaled doubt of the outputs that have one."""
        stacks = [ops.stack(of) for of in zip(*map(keras.tree.flatten, members), strict=True)]
        meanings = self.meanings(members[0])
        scaled = [
            doubts(output, stack, meaning) / scale
            for output, stack, meaning, scale in zip(
                flat, stacks, meanings, self.early_exit.scales, strict=True
            )
            if scale
        ]
        return ops.max(ops.stack(scaled), axis=0)


def outputs_of(result: Any, stages: Stages | None) -> Any:
    """The outputs alone, of what a model of members returns with these stages or none."""
    return result if stages is None else result["outputs"]
