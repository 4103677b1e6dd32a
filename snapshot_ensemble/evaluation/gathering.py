"""Predicts held-out data with several members, in one pass or one member after another."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.left_out import watched
from snapshot_ensemble.evaluation.targets import has_target, shortened
from snapshot_ensemble.inference.batch_size import batch_size_for
from snapshot_ensemble.inference.graphs import Combiner
from snapshot_ensemble.inference.losses import per_output
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.members_model import MembersModel
from snapshot_ensemble.inference.output_specs import names_of
from snapshot_ensemble.inference.passing import check_equal
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.logits import logits_behind
from snapshot_ensemble.keras_compat.masks import mask_of


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


def stack_with_logits(outputs: list[Any]) -> dict[str, Any]:
    """Like `stack_members`, with the logits that Keras keeps with probabilities."""
    stacked = stack_members(outputs)
    flat = [keras.tree.flatten(member) for member in outputs]
    logits = {}
    for i, of_members in enumerate(zip(*flat, strict=True)):
        behind = [logits_behind(tensor) for tensor in of_members]
        if not any(one is None for one in behind):
            logits[str(i)] = keras.ops.stack(behind, axis=1)
    return {**stacked, "logits": logits} if logits else stacked


def gather(
    pool: MemberPool,
    x: Any,
    y: Any,
    sample_weight: Any = None,
    arguments: PredictArguments = PredictArguments(verbose=0),  # noqa: B008  It is constant.
    *,
    indices: list[int] | None = None,
    with_logits: bool = False,
) -> HeldOut:
    """Predicts held-out data with several members.

    They run in one pass over the data or, on arrays if they are too large, one after another.

    Args:
        pool: The members.
        x: As for `model.evaluate`.
        y: As for `model.evaluate`.
        sample_weight: As for `model.evaluate`.
        arguments: As for `model.predict`.
        indices: The indices of the members. Defaults to `None`: all of them.
        with_logits: Whether the logits behind probabilities are wanted, too.

    Raises:
        ValueError: If there are no members or no targets, the targets do not fit the outputs, or a
            prediction or target is NaN.
        TypeError: If the targets are not numbers.
    """
    indices = pool.indices() if indices is None else indices
    stack, kind = (stack_members, "held out")
    if with_logits:
        stack, kind = (stack_with_logits, "held out with logits")
    combiner = Combiner(indices, (kind,), stack)
    if pool.runs_one_by_one(indices, x):
        predict = functools.partial(predict_one_by_one, pool, combiner)
    else:
        predict = pool.members_model(combiner, Gatherer).predict
    return gather_with(predict, pool.model, pool.meanings, x, y, sample_weight, arguments)


def predict_one_by_one(
    pool: MemberPool, combiner: Combiner, x: Any, **options: Any
) -> dict[str, Any]:
    """What a `Gatherer` of all members would predict for arrays, from one member after another.

    Args:
        pool: The members.
        combiner: Those that run, and `stack_members` or `stack_with_logits`.
        x: Arrays.
        **options: As for `model.predict`.
    """
    with pool.one_by_one(combiner, Gatherer) as run:
        parts = [
            run(index, lambda gatherer: gatherer.predict(x, **options))
            for index in combiner.members
        ]
    joined = dict(parts[0])  # The masks are the first member's.
    for name in joined.keys() & {"outputs", "logits"}:
        of_members = [part.pop(name) for part in parts]
        joined[name] = keras.tree.map_structure(
            lambda *arrays: np.concatenate(arrays, axis=1), *of_members
        )
    return joined


def gather_with(
    predict: Callable[..., dict[str, Any]],
    model: keras.Model,
    read: Callable[[Any], list[Output]],
    x: Any,
    y: Any,
    sample_weight: Any,
    arguments: PredictArguments,
) -> HeldOut:
    """Like `gather`, with what a `Gatherer` predicts that combines its members by `stack_members`.

    Args:
        predict: Called with `x` and with arguments of `model.predict`.
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
    with watched(model):
        predicted = predict(x, **options | batch_size_for(model, x, **options))
    if y is not None and "y" in predicted:
        raise ValueError(
            "`y` must not be passed if `x` already yields the targets. "
            f"Received: x={type(x).__name__}, y={type(y).__name__}"
        )
    y, sample_weight = predicted.get("y", y), predicted.get("sample_weight", sample_weight)
    if y is None:
        raise no_targets(x)
    held = held_out_of(model, read, predicted, y, sample_weight, arguments.batch_size)
    _ = held.truths  # Raises an error if the targets do not fit.
    return held


def no_targets(x: Any) -> ValueError:
    """The error for data without targets."""
    return ValueError(
        f"There are no targets to compare with. Received: x={type(x).__name__}, y=None. "
        "Give `y`, or data that yield `(inputs, targets)`."
    )


def held_out_of(
    model: keras.Model,
    read: Callable[[Any], list[Output]],
    predicted: dict[str, Any],
    y: Any,
    sample_weight: Any,
    batch_size: int | None = None,
) -> HeldOut:
    """The held-out data of what a `Gatherer` predicted.

    Raises:
        ValueError: If a prediction is NaN, no output has targets, or an output that is passed
            through differs between members.
    """
    structure = keras.tree.map_structure(lambda o: o[:, 0], predicted["outputs"])
    stacks = [np.moveaxis(array, 1, 0) for array in keras.tree.flatten(predicted["outputs"])]
    meanings, names = read(structure), names_of(model, structure)
    losses = per_output(model.loss, structure, getattr(model, "output_names", None))
    scored = []
    for i, (stack, meaning) in enumerate(zip(stacks, meanings, strict=True)):
        if meaning.is_passed:
            check_equal(stack, names[i])
        elif losses[i] or has_target(y, names, i):
            scored.append(i)
    if not scored:
        raise ValueError(
            "No output of the model can be compared with targets. Received: outputs "
            f"{names}, which are passed through or have neither a loss nor a target."
        )
    held = HeldOut(
        model,
        [stacks[i] for i in scored],
        structure,
        [meanings[i] for i in scored],
        y,
        sample_weight,
        predicted.get("masks", {}),
        batch_size,
        {i: np.moveaxis(of, 1, 0) for i, of in predicted.get("logits", {}).items()},
        {i: stack[0] for i, stack in enumerate(stacks) if i not in scored},
    )
    _check_predictions(held)
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
