"""Held-out data: the members' predictions and the targets."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.evaluation.left_out import why_not_compiled
from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.scoring import Scorer
from snapshot_ensemble.evaluation.targets import (
    Truth,
    as_numbers,
    by_output,
    read_truth,
)
from snapshot_ensemble.inference.blocks import in_blocks, row_blocks
from snapshot_ensemble.inference.combining import (
    check_meanings,
    combine_logits,
    combine_stack,
)
from snapshot_ensemble.inference.losses import per_output
from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments


class Block(NamedTuple):
    """Some of the rows.

    Attributes:
        rows: Which rows.
        items: The members' items of each flat output: `(members, items, ...)`.
        truths: The targets of each flat output. The weights of all blocks sum to 1.
    """

    rows: slice
    items: list[np.ndarray]
    truths: list[Truth]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The members' predictions for data that training has not seen, and the targets.

    Attributes:
        model: The wrapped model, whose compiled loss and metrics are used for scoring.
        outputs: One array for each output that has targets, the members on the first axis.
        structure: A structure like the model's outputs.
        meanings: What each of these outputs means.
        y: The targets, as they were passed.
        sample_weight: The sample weights, as they were passed, or None.
        masks: The Keras mask of each output that has one, by the output's index as a string.
        batch_size: As for `model.evaluate`, used by `scorer`.
        logits: The members' logits behind the outputs that have some, like `masks`.
        rest: The outputs that have no targets, one member's, by their number among all.
        is_part: Whether these are some of the rows, which may all have the weight 0.
    """

    model: keras.Model
    outputs: list[np.ndarray]
    structure: Any
    meanings: list[Output]
    y: Any
    sample_weight: Any
    masks: dict[str, np.ndarray]
    batch_size: int | None = None
    logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rest: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    is_part: bool = False

    @property
    def rows(self) -> int:
        return self.outputs[0].shape[1]

    @functools.cached_property
    def numbers(self) -> list[int]:
        """The number of each output that has targets among all flat outputs."""
        count = len(self.outputs) + len(self.rest)
        return [i for i in range(count) if i not in self.rest]

    @functools.cached_property
    def all_names(self) -> list[str]:
        """A name for each flat output, also for those without targets."""
        return names_of(self.model, keras.tree.pack_sequence_as(self.structure, self._filled([])))

    @property
    def names(self) -> list[str]:
        """A name for each output that has targets; for outputs in a dict, its key."""
        return [self.all_names[i] for i in self.numbers]

    def _filled(self, flat: Sequence[Any]) -> list[Any]:
        """A value for each flat output, from one for each output that has targets."""
        given = dict(itertools.zip_longest(self.numbers, flat))
        return [self.rest.get(i, given.get(i)) for i in range(len(given) + len(self.rest))]

    def packed(self, flat: Sequence[Any]) -> Any:
        """The model's structure, from one array for each output that has targets."""
        return keras.tree.pack_sequence_as(self.structure, self._filled(flat))

    def unpacked(self, structure: Any) -> list[Any]:
        """The arrays of the outputs that have targets."""
        flat = keras.tree.flatten(structure)
        return [flat[i] for i in self.numbers]

    def members(self) -> list[Any]:
        """Each member's outputs, in the model's structure."""
        return [
            self.packed([output[member] for output in self.outputs])
            for member in range(len(self.outputs[0]))
        ]

    def logits_of_member(self, member: int) -> dict[str, np.ndarray]:
        """One member's logits, by the output's index as a string."""
        return {i: stack[member] for i, stack in self.logits.items()}

    @functools.cached_property
    def truths(self) -> list[Truth]:
        """The targets of each flat output; raises an error if they do not fit it."""
        targets, weights = self._targets
        truths = []
        for i, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            shape = self.outputs[i].shape[1:]
            mask = self.masks.get(str(self.numbers[i]))
            meaning = self.meanings[i]
            truths.append(read_truth(target, weight, mask, meaning, shape, self.is_part))
        return truths

    @functools.cached_property
    def _targets(self) -> tuple[list[Any], list[Any]]:
        """The targets and the sample weights, or None, of each flat output."""
        targets = self._flat(self.y, "y")
        if self.sample_weight is None:
            return targets, [None] * len(targets)
        return targets, self._flat(self.sample_weight, "sample_weight")

    def blocks(self) -> Iterator[Block]:
        """All rows, block by block: the items of all at once would take a lot of memory."""
        for rows in row_blocks(self.rows, sum(output.size for output in self.outputs)):
            items = []
            for output, meaning in zip(self.outputs, self.meanings, strict=True):
                flat = items_of(output[:, rows], meaning)
                items.append(flat.reshape(len(output), -1, *flat.shape[1:]))
            truths = [truth.of_rows(rows, self.rows) for truth in self.truths]
            yield Block(rows, items, truths)

    def combined(self, combine: str, weights: Any = None, temperature: float = 1.0) -> Any:
        """The members' outputs, combined as by `combine_outputs`."""
        check_meanings(combine, self.meanings)

        def combined(output: np.ndarray, meaning: Output) -> Any:
            def of_block(rows: np.ndarray) -> Any:
                stack = np.moveaxis(rows, 1, 0)
                return combine_stack(stack, combine, meaning, weights, temperature)

            return in_blocks(of_block, np.moveaxis(output, 0, 1))

        return self.packed([*map(combined, self.outputs, self.meanings)])

    def combined_logits(
        self, combine: str, weights: Any = None, temperature: float = 1.0
    ) -> dict[str, np.ndarray]:
        """The logits behind `combined`, by the output's index as a string."""
        combined = {}
        for number, meaning in zip(self.numbers, self.meanings, strict=True):
            stack = self.logits.get(str(number))
            if stack is None:
                continue
            logits = combine_logits(stack, combine, meaning, weights, temperature)
            if logits is not None:
                combined[str(number)] = np.asarray(logits)
        return combined

    @functools.cached_property
    def loss_weights(self) -> list[float]:
        """The compiled loss weight of each flat output."""
        given = compile_arguments(self.model).get("loss_weights")
        if given is None:
            return [1.0] * len(self.outputs)
        structure = self.packed(self.outputs)
        weights = per_output(given, structure, self.all_names)
        # An output with several losses has several weights.
        return [float(sum(weights[i])) if weights[i] else 1.0 for i in self.numbers]

    def loss(self, combined: Any) -> float:
        """The loss of combined outputs: negative log-likelihoods and squared errors, summed."""
        total = 0.0
        flat = self.unpacked(combined)
        for output, meaning, truth, weight in zip(
            flat, self.meanings, self.truths, self.loss_weights, strict=True
        ):
            total += weight * loss(items_of(output, meaning), truth)
        return total

    def scorer(self) -> Callable[..., dict[str, float]]:
        """A function of combined outputs and, if they are known, of the logits behind them.

        It returns the compiled loss and metrics by name; none if they are not those of
        predictions.
        """
        if why_not_compiled(self.model) is not None:
            return lambda outputs, logits=None: {}
        targets, weights = self._targets
        nothing = {i: np.zeros(self.rows, "float32") for i in self.rest}
        same = dataclasses.replace(self, rest=nothing)
        y, sample_weight = same.packed(targets), None
        if self.sample_weight is not None:
            sample_weight = same.packed(weights)
        return Scorer(self.model, y, sample_weight, self.masks, self.batch_size).scores

    def check_for_fitting(self) -> None:
        """Raises `ValueError` if there are fewer than two rows."""
        if self.rows < 2:
            raise ValueError(
                f"Too few rows to learn from. Received: {counted(self.rows, 'row')}. Pass at least "
                "two rows, or better some hundreds, that training has not seen."
            )

    def _flat(self, given: Any, what: str) -> list[Any]:
        """One array for each output that has targets, from any structure that Keras accepts."""
        arrays = []
        for leaf in by_output(given, what, self.all_names, self.numbers):
            array = as_numbers(leaf, what)
            if not array.ndim or len(array) != self.rows:
                raise ValueError(
                    f"`{what}` must be as long as `x`. Received: {what} of shape {array.shape}, "
                    f"x with {self.rows} rows"
                )
            arrays.append(array)
        return arrays
