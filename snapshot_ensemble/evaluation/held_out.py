"""Held-out data: what each member predicts for them and what is true, from one pass over them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.targets import Truth, few, numbers, read_truth
from snapshot_ensemble.inference.batch_size import batch_size_for
from snapshot_ensemble.inference.cloning import compile_like, metrics_lent
from snapshot_ensemble.inference.member_pool import Combiner, MemberPool, PredictArguments
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.output_specs import Output, per_output
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.masks import mask_of, set_mask


class Gatherer(MembersModel):
    """Predicts each member's outputs, and gives beside them the targets that came with the data."""

    def predict_step(self, data: Any) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        found = {**self(x), "y": y, "sample_weight": sample_weight}
        return {name: value for name, value in found.items() if value is not None}


def lay_side_by_side(outputs: list[Any]) -> dict[str, Any]:
    """The members' outputs on a new second axis, with the masks of the first."""
    found = {"outputs": keras.tree.map_structure(lambda *o: keras.ops.stack(o, axis=1), *outputs)}
    flat = keras.tree.flatten(outputs[0])
    masks = {str(i): mask_of(tensor) for i, tensor in enumerate(flat)}
    if masks := {name: mask for name, mask in masks.items() if mask is not None}:
        found["masks"] = masks
    return found


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The members' predictions for data that they did not see, and the truth.

    Attributes:
        model: The wrapped model, whose loss and metrics score.
        outputs: One array for each flat output, the members on the first axis.
        structure: A structure like the model's outputs.
        meanings: What each flat output means.
        y: The targets as they were given.
        sample_weight: As it was given, or None.
        masks: Keras's mask of each output that has one, by its number as a string.
        batch_size: As for `model.evaluate`, for what is scored later.
    """

    model: keras.Model
    outputs: list[np.ndarray]
    structure: Any
    meanings: list[Output]
    y: Any
    sample_weight: Any
    masks: dict[str, np.ndarray]
    batch_size: int | None = None

    @property
    def rows(self) -> int:
        return self.outputs[0].shape[1]

    @property
    def names(self) -> list[str]:
        """A name for each flat output; its key, of outputs in a dict."""
        if isinstance(self.structure, dict) and len(self.structure) == len(self.outputs):
            return sorted(self.structure)
        names = getattr(self.model, "output_names", None)
        if names and len(names) == len(self.outputs):
            return list(names)
        return [f"output_{i}" for i in range(len(self.outputs))]

    def members(self) -> list[Any]:
        """Each member's outputs, in the model's structure."""
        count = len(self.outputs[0])
        return [
            keras.tree.pack_sequence_as(self.structure, [o[member] for o in self.outputs])
            for member in range(count)
        ]

    @functools.cached_property
    def truths(self) -> list[Truth]:
        """What is true of each flat output; raises an error where the targets cannot be."""
        targets = self._flat(self.y, "y")
        weights = [None] * len(targets)
        if self.sample_weight is not None:
            weights = self._flat(self.sample_weight, "sample_weight")
        found = []
        for i, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            shape = self.outputs[i].shape[1:]
            found.append(
                read_truth(target, weight, self.masks.get(str(i)), self.meanings[i], shape)
            )
        return found

    @functools.cached_property
    def items(self) -> list[np.ndarray]:
        """Of each flat output the members' items: `(members, items, ...)`."""
        return [
            np.stack([items_of(member, meaning) for member in output])
            for output, meaning in zip(self.outputs, self.meanings, strict=True)
        ]

    @functools.cached_property
    def loss_weights(self) -> list[float]:
        """How much each output counts, as compiled."""
        given = compile_arguments(self.model).get("loss_weights")
        if given is None:
            return [1.0] * len(self.outputs)
        flat = per_output(given, self.structure, self.names, len(self.outputs))
        return [1.0 if weight is None else float(weight) for weight in flat]

    def loss(self, combined: Any) -> float:
        """The summed loss of combined outputs: log-likelihoods and squared errors."""
        total = 0.0
        flat = keras.tree.flatten(combined)
        for output, meaning, truth, weight in zip(
            flat, self.meanings, self.truths, self.loss_weights, strict=True
        ):
            total += weight * loss(items_of(output, meaning), truth)
        return total

    def scorer(self) -> Callable[[Any], dict[str, float]]:
        """What gives the compiled loss and metrics of combined outputs, by name."""
        judge = _Judge(self.model)

        def scores(combined: Any) -> dict[str, float]:
            with metrics_lent(self.model):
                found = judge.evaluate(
                    {"outputs": combined, "masks": self.masks},
                    self.y,
                    sample_weight=self.sample_weight,
                    batch_size=self.batch_size,
                    verbose=0,
                    return_dict=True,
                )
            return {"loss": found.pop("loss"), **found}

        return scores

    def check_for_fitting(self) -> None:
        """Raises `ValueError` if the data are too few to learn from, or a class is not in them."""
        if self.rows < 2:
            raise ValueError(
                f"Nothing can be learned from so few data. Received: {self.rows} row. Give at "
                "least two, better some hundreds, that training has not seen."
            )
        for name, meaning, truth in zip(self.names, self.meanings, self.truths, strict=True):
            if not meaning.is_classes:
                continue
            missing = np.flatnonzero(truth.weights @ truth.targets == 0).tolist()
            if missing:
                raise ValueError(
                    "Each class must be in the data, or nothing would say how much probability "
                    f"it should have. Received: y without class {few(missing)} of output "
                    f"'{name}'. Hold out a stratified share."
                )

    def _flat(self, given: Any, what: str) -> list[Any]:
        """One array for each flat output, from whatever structure Keras would take."""
        count = len(self.outputs)
        if count == 1 and not isinstance(given, dict):
            only = keras.tree.flatten(given) if _is_pack(given) else [given]
            flat = only if len(only) == 1 else [np.asarray(given)]
        elif isinstance(given, dict):
            flat = [given.get(name) for name in self.names]
        elif what == "sample_weight" and not _is_pack(given):
            flat = [given] * count
        else:
            flat = keras.tree.flatten(given)
        if len(flat) != count or any(leaf is None for leaf in flat):
            raise ValueError(
                f"`{what}` must have one array for each of the model's {count} outputs "
                f"{self.names}. Received: {what} of {type(given).__name__} with {len(flat)}"
            )
        arrays = [numbers(leaf, what) for leaf in flat]
        for array in arrays:
            if not array.ndim or len(array) != self.rows:
                raise ValueError(
                    f"`{what}` must be as long as `x`. Received: {what} of shape {array.shape}, "
                    f"x with {self.rows} rows"
                )
        return arrays


class _Judge(keras.Model):
    """The compiled loss and metrics of a model, for predictions that are there already."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name=model.name, autocast=False)
        self.built = True
        if getattr(model, "output_names", None):
            self.output_names = model.output_names
        compile_like(self, model)

    def call(self, inputs: Any) -> Any:
        outputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs["outputs"])
        for name, mask in inputs["masks"].items():
            set_mask(keras.tree.flatten(outputs)[int(name)], mask)
        return outputs


def gather(
    pool: MemberPool,
    x: Any,
    y: Any,
    sample_weight: Any = None,
    arguments: PredictArguments = PredictArguments(verbose=0),  # noqa: B008  It is constant.
    *,
    indices: list[int] | None = None,
) -> HeldOut:
    """Predicts held-out data with members, in one pass over them.

    Args:
        pool: The members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        sample_weight: As for `model.evaluate`.
        arguments: As for `model.predict`.
        indices: Which members. Defaults to `None`, all.

    Raises:
        ValueError: If there are no members or no targets, they do not fit the outputs, or a number
            is NaN.
        TypeError: If targets are no numbers.
    """
    indices = pool.indices() if indices is None else indices
    combiner = Combiner(indices, ("held out",), lay_side_by_side)
    gatherer = pool.members_model(combiner, Gatherer)
    return gather_with(gatherer, pool.model, pool.meanings, x, y, sample_weight, arguments)


def gather_with(
    gatherer: Gatherer,
    model: keras.Model,
    read: Callable[[Any], list[Output]],
    x: Any,
    y: Any,
    sample_weight: Any,
    arguments: PredictArguments,
) -> HeldOut:
    """The same, with members that a `Gatherer` made with `lay_side_by_side` runs.

    Args:
        gatherer: Runs the members.
        model: The wrapped model.
        read: What gives the meanings of outputs.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        sample_weight: As for `model.evaluate`.
        arguments: As for `model.predict`.

    Raises:
        ValueError: If there are no targets, they do not fit the outputs, or a number is NaN.
        TypeError: If targets are no numbers.
    """
    run = arguments._asdict()
    predicted = gatherer.predict(x, **run | batch_size_for(model, x, **run))
    if y is not None and "y" in predicted:
        raise ValueError(
            "`y` must not be given where `x` brings the targets itself. "
            f"Received: x={type(x).__name__}, y={type(y).__name__}"
        )
    y, sample_weight = predicted.get("y", y), predicted.get("sample_weight", sample_weight)
    if y is None:
        raise ValueError(
            f"There are no targets to compare with. Received: x={type(x).__name__}, y=None. "
            "Give `y`, or data that yield `(inputs, targets)`."
        )
    structure = keras.tree.map_structure(lambda o: o[:, 0], predicted["outputs"])
    outputs = [np.moveaxis(array, 1, 0) for array in keras.tree.flatten(predicted["outputs"])]
    masks = predicted.get("masks", {})
    size = arguments.batch_size
    held = HeldOut(model, outputs, structure, read(structure), y, sample_weight, masks, size)
    for output, meaning in zip(outputs, held.meanings, strict=True):
        wrong = [i for i, member in enumerate(output) if _makes_no_sense(member, meaning)]
        if len(wrong) == len(output):
            raise ValueError("A prediction is NaN. Received: NaN from each member. Look at `x`.")
        if wrong:
            raise ValueError(
                f"A prediction is NaN. Received: NaN from member {few(wrong)}. Make an ensemble "
                "without it."
            )
    _ = held.truths  # Checked.
    return held


def _makes_no_sense(member: np.ndarray, meaning: Output) -> bool:
    """Whether a NaN is in it, or an infinity that is neither sure nor ruled out."""
    if not meaning.is_classes:
        return not np.isfinite(member).all()
    if meaning.task == "multiclass" and meaning.logits:
        return not np.isfinite(member.max(axis=-1)).all()
    return bool(np.isnan(member).any())


def _is_pack(given: Any) -> bool:
    """Whether it is a structure of arrays and not an array, a list of numbers in particular."""
    if isinstance(given, dict):
        return True
    return isinstance(given, (list, tuple)) and all(hasattr(leaf, "shape") for leaf in given)
