"""Distillation: trains one model of the original size on the ensemble's predictions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from snapshot_ensemble.checks import real_number
from snapshot_ensemble.inference.batch_size import are_arrays
from snapshot_ensemble.inference.cloning import Member, compile_like
from snapshot_ensemble.inference.combining import log_of, log_of_complement
from snapshot_ensemble.inference.losses import family_of, per_output
from snapshot_ensemble.inference.member_pool import MemberPool, PredictArguments
from snapshot_ensemble.inference.output_specs import names_of, read_outputs
from snapshot_ensemble.inference.task_words import Output
from snapshot_ensemble.keras_compat.added_losses import sum_of_added_losses
from snapshot_ensemble.keras_compat.compile_arguments import compile_arguments
from snapshot_ensemble.keras_compat.logits import logits_behind
from snapshot_ensemble.keras_compat.masks import mask_of, set_mask
from snapshot_ensemble.keras_compat.optimizer_rate import copy_of_optimizer
from snapshot_ensemble.keras_compat.own_methods import has_own_or_assigned
from snapshot_ensemble.losses import gaussian_nll, mean_and_log_variance
from snapshot_ensemble.schedules import Schedule, plan_of_fit
from snapshot_ensemble.storage.memory import MemoryStore
from snapshot_ensemble.training.fit_arguments import check_fit_arguments
from snapshot_ensemble.training.learning_rate import AnnealedRate
from snapshot_ensemble.training.session import FitSession
from snapshot_ensemble.training.shrink_perturb import Restarter
from snapshot_ensemble.training.state import build


class Taught(NamedTuple):
    """Inputs with the ensemble's outputs for them.

    Attributes:
        inputs: As the model takes them.
        outputs: As `predict` of the ensemble returns them.
    """

    inputs: Any
    outputs: Any


class Lesson(NamedTuple):
    """What a student learns, and from whom.

    Attributes:
        teach: Takes inputs; returns the ensemble's outputs as tensors. None if these come with
            the inputs.
        meanings: Takes the ensemble's outputs; returns the meaning of each.
        task: As for `SnapshotEnsemble`, for the student's outputs.
        alpha: The share of the compiled loss of the targets.
        temperature: What the logits of teacher and student are divided by.
    """

    teach: Callable[[Any], Any] | None
    meanings: Callable[[Any], list[Output]]
    task: Any
    alpha: float
    temperature: float


class Distiller(keras.Model):
    """Trains a student, whose weights it shares; the validation loss is the compiled one.

    Args:
        student: A compiled model.
        lesson: What it learns.
        has_targets: Whether there may be targets, for the compiled metrics.
    """

    def __init__(self, student: keras.Model, lesson: Lesson, has_targets: bool = True) -> None:
        super().__init__(name=student.name, dtype=student.dtype_policy, autocast=False)
        self.student = student
        self.built = True
        if getattr(student, "output_names", None):
            self.output_names = student.output_names
        self._lesson = lesson
        if has_targets:
            compile_like(self, student, optimizer_for(student))
        else:
            nothing = {"metrics": None, "weighted_metrics": None}
            own = compile_arguments(student) | {"optimizer": optimizer_for(student)}
            self.compile(**own | nothing)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        # Layers inside take `training` from the context of this call.
        return self.student(inputs.inputs if isinstance(inputs, Taught) else inputs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        share, own = 0.0, sum_of_added_losses(self)
        if y is not None:
            share = self._lesson.alpha
            own = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not training:
            return own
        lesson = self._lesson
        taught = x.outputs if isinstance(x, Taught) or lesson.teach is None else lesson.teach(x)
        learned = self._distillation_loss(taught, y_pred, sample_weight)
        # Penalties of the student's own count in full.
        return share * own + (1 - share) * (learned + sum_of_added_losses(self))

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        if y is None:
            return self.get_metrics_result()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _distillation_loss(self, taught: Any, predicted: Any, sample_weight: Any) -> Any:
        names = getattr(self, "output_names", None)
        compiled = compile_arguments(self)
        losses = per_output(compiled["loss"], predicted, names)
        shares = per_output(compiled["loss_weights"], predicted, names)
        weights = _by_output(sample_weight, names_of(self.student, predicted))
        meanings = read_outputs(self.student, self._lesson.task, predicted)
        teachers = self._lesson.meanings(taught)
        check_same_tasks(taught, teachers, predicted, meanings)
        total = ops.zeros((), keras.config.floatx())
        pairs = zip(keras.tree.flatten(taught), keras.tree.flatten(predicted), strict=True)
        for i, (target, output) in enumerate(pairs):
            if not losses[i] or meanings[i].is_passed:
                continue
            if meanings[i].is_classes:
                likely = _probabilities(target, teachers[i], self._lesson.temperature)
                loss = _cross_entropy(likely, output, meanings[i], weights[i], self._lesson)
            else:
                own = (
                    GaussianCrossEntropy()
                    if meanings[i].is_gaussian
                    else _loss_of_values(losses[i][0])
                )
                loss = own(target, output, weights[i])
            total += (float(sum(shares[i])) if shares[i] else 1.0) * loss
        return total


def _cross_entropy(target: Any, output: Any, meaning: Output, weight: Any, lesson: Lesson) -> Any:
    is_logits, temperature = meaning.logits, lesson.temperature
    if temperature != 1:
        mask = mask_of(output)
        output, is_logits = _logits(output, meaning) / temperature, True
        set_mask(output, mask)
    is_one_of_many = meaning.task == "multiclass"
    losses = keras.losses
    kind = losses.CategoricalCrossentropy if is_one_of_many else losses.BinaryCrossentropy
    # The gradients with respect to the logits shrink with the square of the temperature.
    return temperature**2 * kind(from_logits=is_logits)(target, output, weight)


def _probabilities(target: Any, meaning: Output, temperature: float) -> Any:
    """The ensemble's probabilities, with their logarithms divided by the temperature."""
    if temperature == 1 and not meaning.logits:
        return target
    logits = target if meaning.logits else _log_odds(target, meaning)
    activation = ops.softmax if meaning.task == "multiclass" else ops.sigmoid
    return activation(logits / temperature)


def _logits(output: Any, meaning: Output) -> Any:
    if meaning.logits:
        return output
    behind = logits_behind(output)
    return _log_odds(output, meaning) if behind is None else behind


def _log_odds(probabilities: Any, meaning: Output) -> Any:
    if meaning.task == "multiclass":
        return log_of(probabilities)
    return log_of(probabilities) - log_of_complement(probabilities)


def _loss_of_values(compiled: Any) -> Any:
    """The compiled loss where it is one of Keras's own for values, else the squared error."""
    if family_of(compiled, None)[0] != "regression":
        return keras.losses.MeanSquaredError()
    if isinstance(compiled, type):
        compiled = compiled()
    loss = keras.losses.get(compiled)
    return loss if isinstance(loss, keras.losses.Loss) else _MeanOf(loss)


class GaussianCrossEntropy(keras.losses.Loss):
    """The expected `GaussianNLL` of values that are drawn from another normal distribution."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The loss of each row, from the means and log-variances of both."""
        (values, own), (mean, log_variance) = map(mean_and_log_variance, (y_true, y_pred))
        more = ops.exp(own - log_variance) / 2
        return ops.mean(gaussian_nll(values, mean, log_variance) + more, axis=-1)


class _MeanOf(keras.losses.Loss):
    """The mean over rows of a function such as `keras.losses.mean_squared_error`."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__(name="mean_of_rows")
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def _by_output(sample_weight: Any, names: Sequence[str]) -> list[Any]:
    """The sample weights of each flat output."""
    if isinstance(sample_weight, dict):
        return [sample_weight.get(name) for name in names]
    flat = keras.tree.flatten(sample_weight)
    return flat if len(flat) == len(names) else flat * len(names)


def distill(
    pool: MemberPool,
    x: Any,
    y: Any,
    student: Any,
    schedule: Schedule,
    epochs: int | None,
    alpha: float,
    temperature: float,
    fit_arguments: dict[str, Any],
) -> keras.Model:
    """Implements `SnapshotEnsemble.distill`, but for the state that it restores.

    Args:
        pool: The members.
        x: As for `model.fit`.
        y: As for `model.fit`.
        student: The model to train; None for the newest of the members.
        schedule: One cycle. Without a peak, it is the rate that the student was compiled with.
        epochs: The budget.
        alpha: The share of the compiled loss.
        temperature: What the logarithms of the probabilities are divided by.
        fit_arguments: The other arguments of `model.fit`.
    """
    combiner = pool.combiner("mean", None)
    teach, has_targets = None, y is not None or not are_arrays(x)
    temperature = real_number("temperature", temperature, positive=True)
    alpha = check_alpha(alpha)
    student = student_like(pool.member(combiner.members[-1])) if student is None else student
    check_student(student, pool.model, x)
    check_fit_arguments(student, fit_arguments)
    if are_arrays(x):
        x = Taught(x, pool.predict_combined(x, combiner, PredictArguments(verbose=0)))
    else:
        teach = pool.caller(combiner)
    lesson = Lesson(teach, pool.meanings, pool.task, alpha, temperature)
    distiller = Distiller(student, lesson, has_targets)
    rate = AnnealedRate(distiller)
    peak = rate.compiled if schedule.lr_init is None else schedule.lr_init
    first = fit_arguments.get("initial_epoch")
    session = FitSession(
        model=distiller,
        store=MemoryStore(),
        settings={},
        rate=rate,
        restarter=Restarter(1.0),
        plan=plan_of_fit(schedule, epochs, first, peak, keras.config.max_epochs()),
        directory=None,
    )
    student.history = session.run(x, y, fit_arguments)
    return student


def student_like(member: keras.Model) -> keras.Model:
    """The member itself, to be trained.

    Raises:
        ValueError: If it only runs the layers of the ensemble's model with other weights.
    """
    if isinstance(member, Member):
        raise ValueError(
            "The student cannot be made, since what is made from the model's config does not give "
            f"its outputs. Received: student=None, model={member.name!r}. Pass a new model as "
            "`student`."
        )
    return member


def check_alpha(alpha: Any) -> float:
    """`alpha` as a float from 0 to 1, or an error."""
    share = real_number("alpha", alpha, positive=False)
    if share > 1:
        raise ValueError(f"`alpha` must be between 0 and 1. Received: alpha={alpha!r}")
    return share


def check_student(student: Any, model: keras.Model, x: Any) -> None:
    """Raises an error unless `student` can be trained; compiles and builds it if need be."""
    if not isinstance(student, keras.Model):
        raise TypeError(f"`student` must be a `keras.Model`. Received: student={student!r}")
    if student is model:
        raise ValueError(
            "`student` must not be the ensemble's own model, which stays as it is. Received: "
            f"student={student.name!r}. Leave it out, or pass a new model."
        )
    if not student.compiled or student.optimizer is None:
        compile_like(student, model, optimizer_for(model))
    for name in ("train_step", "compute_loss", "compute_metrics"):
        if has_own_or_assigned(student, name):
            raise ValueError(
                f"The student's own `{name}` would not run: `distill` trains by a loss of its own. "
                f"Received: student={student.name!r} of class {type(student).__name__}. Pass a "
                "`student` without it."
            )
    build(student, x)


def check_same_tasks(
    taught: Any, teachers: list[Output], predicted: Any, students: list[Output]
) -> None:
    """Raises `ValueError` unless the student's outputs mean what the ensemble's do."""
    pairs = [
        [(tuple(t.shape[1:]), m.task) for t, m in zip(keras.tree.flatten(outputs), of, strict=True)]
        for outputs, of in ((taught, teachers), (predicted, students))
    ]
    if pairs[0] != pairs[1]:
        raise ValueError(
            "The student must have the outputs of the ensemble's model. Received: outputs of "
            f"shapes and tasks {pairs[1]}, where the ensemble has {pairs[0]}. Pass another "
            "`student`."
        )


def optimizer_for(model: keras.Model) -> Any:
    """A new optimizer with the settings of the compiled one."""
    return copy_of_optimizer(compile_arguments(model)["optimizer"])
