"""How many batches the data have, and how many steps Keras takes in each epoch."""

import dataclasses
from typing import Any

import keras


def dataset_batches(x: Any) -> int:
    """The number of batches of a dataset; negative if it is unknown or infinite.

    A distributed dataset has a number as its `cardinality`, a `tf.data.Dataset` a method.
    """
    count = x.cardinality
    return int(count() if callable(count) else count)


@dataclasses.dataclass
class EpochSteps:
    """How many steps Keras takes in each epoch of a run.

    With `steps_per_epoch`, an epoch continues in the data where the one before has ended, and ends
    where they end: with 8 batches, epochs of 5 steps have 5, 3, 5, 3 ... steps. And Keras always
    runs whole executions of `steps_per_execution` steps, as long as there are data: 16 steps at 7
    per execution become 21.

    Attributes:
        nominal: Steps per epoch as Keras reports them; None if they are not known.
        per_execution: The model's `steps_per_execution`.
        held: The number of batches that a pass over the data has; None if they never end or their
            number is not known.
        resumed_at: The first epoch of a resumed run, where its data begin anew.
    """

    nominal: int | None
    per_execution: int = 1
    held: int | None = None
    resumed_at: int = 0

    def of(self, first: int, last: int) -> list[int] | None:
        """The steps of epochs `first` to `last`, counted from 0; None if they are not known."""
        if self.nominal is None:
            return None
        if self.held is None:
            whole = -(-self.nominal // self.per_execution) * self.per_execution
            return [whole] * (last + 1 - first)
        # From the beginning of the data, up to the interruption and from there on.
        before = self._from_start(min(self.resumed_at, last + 1), self.held)
        after = self._from_start(max(last + 1 - self.resumed_at, 0), self.held)
        return [*before, *after][first:]

    def _from_start(self, epochs: int, held: int) -> list[int]:
        """The steps of so many epochs from the beginning of the data, as Keras counts them."""
        steps, seen = [], 0
        for _ in range(epochs):
            taken = 0
            for _ in range(0, self.nominal or 0, self.per_execution):
                if seen >= held:
                    break
                taken += min(self.per_execution, held - seen)
                seen += self.per_execution
            seen = 0 if seen >= held else seen
            steps.append(taken)
        return steps


def epoch_steps(
    model: keras.Model, x: Any, arguments: dict[str, Any], nominal: int | None
) -> EpochSteps:
    """The steps of the epochs of `fit`, from what Keras reports as steps per epoch.

    Args:
        model: A compiled model.
        x: As for `model.fit`.
        arguments: The other arguments of `model.fit`.
        nominal: What Keras reports; None if it does not know.
    """
    # Keras's limit for debugging is one more way to pass `steps_per_epoch`.
    if arguments.get("steps_per_epoch") is None and not keras.config.max_steps_per_epoch():
        return EpochSteps(nominal)
    split = arguments.get("validation_split") if arguments.get("validation_data") is None else 0
    held = _batches(x, arguments.get("batch_size"), split or 0)
    return EpochSteps(nominal, int(model.steps_per_execution), held)


def _batches(x: Any, batch_size: int | None, split: float) -> int | None:
    """Number of batches in one pass over `x`; None if unknown or infinite."""
    if hasattr(x, "cardinality"):
        count = dataset_batches(x)
        return count if count >= 0 else None
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches
    arrays = keras.tree.flatten(x)
    if arrays and hasattr(arrays[0], "shape"):
        return -(-int(arrays[0].shape[0] * (1 - split)) // (batch_size or 32))
    return None
