"""The words for what an output means, as users pass them in `task`."""

import dataclasses
from typing import Any

import keras

CLASSES = ("multiclass", "binary", "multilabel")
# The task that each word stands for, and whether the output is logits; None: to be inferred.
WORDS: dict[str, tuple[str, bool | None]] = {
    **{task: (task, None) for task in CLASSES},
    "regression": ("regression", False),
    "gaussian": ("gaussian", False),
    "passthrough": ("passthrough", False),
    **{f"{task}_logits": (task, True) for task in CLASSES},
    **{f"{task}_probabilities": (task, False) for task in CLASSES},
}


@dataclasses.dataclass(frozen=True)
class Output:
    """The meaning of one output.

    Attributes:
        task: `"multiclass"` (mutually exclusive classes on the last axis), `"binary"`,
            `"multilabel"`, `"regression"`, `"gaussian"` (means and log-variances, the two halves
            of the last axis), or `"passthrough"` (an id, a label, a string: equal in all members,
            and not combined).
        logits: Whether a classifier outputs logits (log-odds for binary and multilabel) rather
            than probabilities.
        ignored: The label that the compiled loss ignores (`ignore_class`), or None.
    """

    task: str
    logits: bool = False
    ignored: int | None = None

    @property
    def is_classes(self) -> bool:
        return self.task in CLASSES

    @property
    def is_gaussian(self) -> bool:
        return self.task == "gaussian"

    @property
    def has_temperature(self) -> bool:
        """Whether the output is a distribution, which a temperature makes wider or narrower."""
        return self.is_classes or self.is_gaussian

    @property
    def is_passed(self) -> bool:
        """Whether the output is passed through instead of combined."""
        return self.task == "passthrough"


def check_words(task: Any) -> None:
    """Raises `ValueError` unless `task` is a structure of words, or of `None`."""
    for leaf in keras.tree.flatten(task):
        if leaf is not None and leaf not in WORDS:
            raise ValueError(f"`task` must be one of {tuple(WORDS)}. Received: task={task!r}")


def is_number_with_digits(tensor: Any) -> bool:
    """Whether an output holds floats; integers, bools and strings cannot be averaged."""
    dtype = tensor.dtype
    name = str(getattr(dtype, "name", dtype))
    return "float" in name or "complex" in name
