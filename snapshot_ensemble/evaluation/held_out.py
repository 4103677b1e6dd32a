"""Held-out data: the members' predictions and the targets, collected in one pass."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.checks import counted
from snapshot_ensemble.evaluation.metrics import items_of, loss
from snapshot_ensemble.evaluation.targets import Truth, as_numbers, read_truth, shortened
from snapshot_ensemble.inference.batch_size import batch_size_for
from snapshot_ensemble.inference.cloning import compile_like
from snapshot_ensemble.inference.member_pool import Combiner, MemberPool, PredictArguments
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.output_specs import Output, per_output
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.masks import mask_of, set_mask


class Gatherer(MembersModel):
    """Predicts each member's outputs and returns them with the targets that the data yielded."""

    def predict_step(self, data: Any) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        gathered = {**self(x), "y": y, "sample_weight": sample_weight}
        return {name: value for name, value in gathered.items() if value is not None}


def stack_members(outputs: list[Any]) -> dict[str, Any]:
    """Stacks the members' outputs on a new second axis; the masks are the first member's."""
    stacked = {"outputs": keras.tree.map_structure(lambda *o: keras.ops.stack(o, axis=1), *outputs)}
    flat = keras.tree.flatten(outputs[0])
    masks = {str(i): mask_of(tensor) for i, tensor in enumerate(flat)}
    if masks := {name: mask for name, mask in masks.items() if mask is not None}:
        stacked["masks"] = masks
    return stacked


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The members' predictions for data that training has not seen, and the targets.

    Attributes:
        model: The wrapped model, whose compiled loss and metrics are used for scoring.
        outputs: One array for each flat output, the members on the first axis.
        structure: A structure like the model's outputs.
        meanings: What each flat output means.
        y: The targets, as they were passed.
        sample_weight: The sample weights, as they were passed, or None.
        masks: The Keras mask of each output that has one, by the output's index as a string.
        batch_size: As for `model.evaluate`, used by `scorer`.
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
        """A name for each flat output; for outputs in a dict, its key."""
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
        """The targets of each flat output; raises an error if they do not fit it."""
        targets = self._flat(self.y, "y")
        weights = [None] * len(targets)
        if self.sample_weight is not None:
            weights = self._flat(self.sample_weight, "sample_weight")
        truths = []
        for i, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            shape = self.outputs[i].shape[1:]
            truths.append(
                read_truth(target, weight, self.masks.get(str(i)), self.meanings[i], shape)
            )
        return truths

    @functools.cached_property
    def items(self) -> list[np.ndarray]:
        """The members' items of each flat output: `(members, items, ...)`."""
        return [
            np.stack([items_of(member, meaning) for member in output])
            for output, meaning in zip(self.outputs, self.meanings, strict=True)
        ]

    @functools.cached_property
    def loss_weights(self) -> list[float]:
        """The compiled loss weight of each flat output."""
        given = compile_arguments(self.model).get("loss_weights")
        if given is None:
            return [1.0] * len(self.outputs)
        flat = per_output(given, self.structure, self.names, len(self.outputs))
        return [1.0 if weight is None else float(weight) for weight in flat]

    def loss(self, combined: Any) -> float:
        """The loss of combined outputs: negative log-likelihoods and squared errors, summed."""
        total = 0.0
        flat = keras.tree.flatten(combined)
        for output, meaning, truth, weight in zip(
            flat, self.meanings, self.truths, self.loss_weights, strict=True
        ):
            total += weight * loss(items_of(output, meaning), truth)
        return total

    def scorer(self) -> Callable[[Any], dict[str, float]]:
        """A function that returns the compiled loss and metrics of combined outputs, by name."""
        evaluator = _Scorer(self.model)

        def scores(combined: Any) -> dict[str, float]:
            values = evaluator.evaluate(
                {"outputs": combined, "masks": self.masks},
                self.y,
                sample_weight=self.sample_weight,
                batch_size=self.batch_size,
                verbose=0,
                return_dict=True,
            )
            return {"loss": values.pop("loss"), **values}

        return scores

    def check_for_fitting(self) -> None:
        """Raises `ValueError` if there are fewer than two rows, or a class does not occur."""
        if self.rows < 2:
            raise ValueError(
                f"Too few rows to learn from. Received: {counted(self.rows, 'row')}. Pass at least "
                "two rows, or better some hundreds, that training has not seen."
            )
        for name, meaning, truth in zip(self.names, self.meanings, self.truths, strict=True):
            if not meaning.is_classes:
                continue
            missing = np.flatnonzero(truth.weights @ truth.targets == 0).tolist()
            if missing:
                raise ValueError(
                    "Each class must occur in the held-out data: nothing can be learned about a "
                    f"class without examples. Received: y without class {shortened(missing)} of "
                    f"output '{name}'. Use a stratified split."
                )

    def _flat(self, given: Any, what: str) -> list[Any]:
        """One array for each flat output, from any structure that Keras accepts."""
        count = len(self.outputs)
        if count == 1 and not isinstance(given, dict):
            leaves = keras.tree.flatten(given) if _is_structure(given) else [given]
            flat = leaves if len(leaves) == 1 else [np.asarray(given)]
        elif isinstance(given, dict):
            flat = [given.get(name) for name in self.names]
        elif what == "sample_weight" and not _is_structure(given):
            flat = [given] * count
        else:
            flat = keras.tree.flatten(given)
        if len(flat) != count or any(leaf is None for leaf in flat):
            raise ValueError(
                f"`{what}` must have one array for each of the model's {count} outputs "
                f"{self.names}. Received: {what} of {type(given).__name__} with {len(flat)}"
            )
        arrays = [as_numbers(leaf, what) for leaf in flat]
        for array in arrays:
            if not array.ndim or len(array) != self.rows:
                raise ValueError(
                    f"`{what}` must be as long as `x`. Received: {what} of shape {array.shape}, "
                    f"x with {self.rows} rows"
                )
        return arrays


class _Scorer(keras.Model):
    """Evaluates a model's compiled loss and metrics on outputs that are already combined."""

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
    """Predicts held-out data with several members, in one pass over the data.

    Args:
        pool: The members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        sample_weight: As for `model.evaluate`.
        arguments: As for `model.predict`.
        indices: The indices of the members. Defaults to `None`: all of them.

    Raises:
        ValueError: If there are no members or no targets, the targets do not fit the outputs, or a
            prediction or target is NaN.
        TypeError: If the targets are not numbers.
    """
    indices = pool.indices() if indices is None else indices
    combiner = Combiner(indices, ("held out",), stack_members)
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
    """Like `gather`, with a `Gatherer` that combines its members by `stack_members`.

    Args:
        gatherer: Runs the members.
        model: The wrapped model.
        read: Returns the meaning of each flat output of a structure.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        sample_weight: As for `model.evaluate`.
        arguments: As for `model.predict`.

    Raises:
        ValueError: If there are no targets, they do not fit the outputs, or a prediction or target
            is NaN.
        TypeError: If the targets are not numbers.
    """
    options = arguments._asdict()
    predicted = gatherer.predict(x, **options | batch_size_for(model, x, **options))
    if y is not None and "y" in predicted:
        raise ValueError(
            "`y` must not be passed if `x` already yields the targets. "
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
    _check_predictions(held)
    _ = held.truths  # Raises an error if the targets do not fit.
    return held


def _check_predictions(held: HeldOut) -> None:
    """Raises `ValueError` if members predict NaN or infinity."""
    for output, meaning in zip(held.outputs, held.meanings, strict=True):
        invalid = [i for i, member in enumerate(output) if _is_invalid(member, meaning)]
        if len(invalid) == len(output):
            raise ValueError(
                "Predictions must not be NaN or infinite. Received: NaN or infinity from every "
                "member. Check `x`."
            )
        if invalid:
            raise ValueError(
                "Predictions must not be NaN or infinite. Received: NaN or infinity from member "
                f"{shortened(invalid)}. Make an ensemble without it."
            )


def _is_invalid(member: np.ndarray, meaning: Output) -> bool:
    """Whether a prediction is NaN, or infinite without standing for a probability of 0 or 1."""
    if not meaning.is_classes:
        return not np.isfinite(member).all()
    if meaning.task == "multiclass" and meaning.logits:
        return not np.isfinite(member.max(axis=-1)).all()
    return bool(np.isnan(member).any())


def _is_structure(given: Any) -> bool:
    """Whether it is a structure of arrays; a list of numbers is one array."""
    if isinstance(given, dict):
        return True
    return isinstance(given, (list, tuple)) and all(hasattr(leaf, "shape") for leaf in given)
