"""What an ensemble does with its members: predict, be scored, learn weights, become one model."""

import dataclasses
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from snapshot_ensemble import heldout
from snapshot_ensemble.averaging import average
from snapshot_ensemble.checks import real_number, whole_number
from snapshot_ensemble.combining import (
    check_combine,
    check_meanings,
    check_members,
    check_weights,
    combine_outputs,
    weights_of,
)
from snapshot_ensemble.exporting import (
    check_format,
    export_model,
    serving_function,
    serving_graph,
)
from snapshot_ensemble.members import (
    MembersModel,
    blank_member,
    build_member,
    compile_like,
    graph_of,
    metrics_lent,
)
from snapshot_ensemble.merging import merge
from snapshot_ensemble.report import Report, make_report
from snapshot_ensemble.scoring import uncertainty
from snapshot_ensemble.sharing import bytes_of
from snapshot_ensemble.snapshots import Snapshot, SnapshotStore, Weights
from snapshot_ensemble.tasks import Output, check_task, read_outputs
from snapshot_ensemble.weighting import check_method, learn_weights, temperature_of

# In bytes: how much memory the members' weights may take at once.
MEMORY_LIMIT = 2**28


@dataclasses.dataclass(frozen=True)
class Learned:
    """What was learned on held-out data about the members that there are."""

    weights: np.ndarray | None = None
    temperature: float = 1.0


class Predictor:
    """Members of one model, kept in a store, as one predictor.

    Args:
        model: The compiled model whose weights the members are.
        task: As for `SnapshotEnsemble`.
        store: Where the members are.
        memory_limit: As for `SnapshotEnsemble`.
    """

    def __init__(
        self,
        model: keras.Model,
        task: Any,
        store: SnapshotStore,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        check_model(model)
        check_task(model, task)
        self.memory_limit = whole_number("memory_limit", memory_limit, 0)
        self.model = model
        self.task = task
        self._store = store
        self._learned = Learned()
        self._learned_of: Any = None  # The state of the store that it belongs to.
        self._tensors: dict[int, list[Any]] = {}
        self._first: dict[int, tuple[weakref.ref[np.ndarray], Any]] = {}  # By place in a model.
        self._models: dict[Any, MembersModel] = {}
        self._built_of: Any = None  # The state of the store that they were made of.

    # Predictions

    def predict(
        self,
        x: Any,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """The members' predictions, combined.

        The data is gone through once, however many members there are. Combination runs in
        float32, or float64 if the model does.

        Args:
            x: As for `model.predict`.
            combine: `"mean"` of the members' probabilities or values; `"vote"`, the share of
                members that vote for each class (classes only; of equal shares at the top, the
                one with the higher mean is raised by a millionth of itself, so that `argmax`
                is the winner); `"weighted"`, the mean by `weights`; `"geometric"`, the
                normalised geometric mean (classes only); `"median"` (regression only).
                Defaults to `"mean"`.
            members: Which members: `None` for all, an int for the last that many, or a list of
                indices. Defaults to `None`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            NumPy arrays in the structure and shapes of `model.predict`.

        Raises:
            ValueError: If there are no members, or `combine` or `members` make no sense.
        """
        check_combine(combine)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        return self._predict(x, *self._way(combine, members), **run, callbacks=callbacks)

    def __call__(
        self,
        inputs: Any,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
    ) -> Any:
        """The members' outputs for one batch, combined: as `model(inputs, training=False)`.

        For single rows, gradients with respect to the inputs, and use inside a `tf.function`.
        All members run in one compiled graph, traced at the first call.

        Example:

        >>> ens(x[:1]).shape
        TensorShape([1, 3])

        Args:
            inputs: One batch: arrays or tensors, in the structure of the model's inputs.
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`. Defaults to `None`, all.

        Returns:
            Tensors in the structure and shapes of the model's outputs.

        Raises:
            ValueError: If there are no members, or `combine` or `members` make no sense.
        """
        check_combine(combine)
        return self._combined(combine, members).run(inputs)

    def predict_members(
        self,
        x: Any,
        *,
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Each member's own output.

        Args:
            x: As for `model.predict`.
            members: Which members, as for `predict`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            As `model.predict`, with the members on a new first axis of each array.

        Raises:
            ValueError: If there are no members, or `members` makes no sense.
        """
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        stacked = self._predict(x, *self._way(None, members), **run, callbacks=callbacks)
        # Keras joins batches along the first axis, so that the members come second till here.
        return keras.tree.map_structure(lambda array: np.moveaxis(array, 1, 0), stacked)

    def predict_uncertainty(
        self,
        x: Any,
        *,
        members: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """How unsure the ensemble is, and how much of it is that its members do not agree.

        With the members' probabilities `p_m` and the entropy `H(p) = -sum_c p_c log p_c`, in
        nats: `total = H(mean p_m)`, `aleatoric = mean H(p_m)`, which no further member would
        take away, and `epistemic = total - aleatoric`. A temperature has no part in it.

        Example:

        >>> found = ens.predict_uncertainty(x, verbose=0)
        >>> most_unsure = np.argsort(-found["epistemic"])[:10]

        Args:
            x: As for `model.predict`.
            members: Which members, as for `predict`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            A dict of arrays, of several outputs one for each, in their structure. `"mean"`: as
            `predict` gives it without a temperature. For classes `"total"`, `"aleatoric"` and
            `"epistemic"`, float32, of the output's shape without the classes' axis (one number
            a row or pixel), for binary and multilabel of the output's shape. For regression
            `"std"`, the standard deviation over the members, in the output's shape and unit.

        Raises:
            ValueError: If there are no members, or `members` makes no sense.

        References:
            - [Depeweg et al., 2018](https://arxiv.org/abs/1710.07283)
        """

        def put_together(outputs: list[Any]) -> Any:
            meanings = self._read(outputs[0])
            mean = combine_outputs(outputs, "mean", meanings)
            return {"mean": mean, "spread": uncertainty(outputs, meanings)}

        way = (self._chosen(members), ("uncertainty",), put_together)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        found = self._predict(x, *way, **run, callbacks=callbacks)
        return keras.tree.map_structure_up_to(
            found["mean"], lambda mean, spread: {"mean": mean, **spread}, *found.values()
        )

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        return_dict: bool = False,
        **evaluate_arguments: Any,
    ) -> Any:
        """The compiled loss and metrics, on the combined output.

        The loss is that of the predictions alone: penalties on weights (regularizers) belong to
        single members and are not in it.

        Args:
            x: As for `model.evaluate`.
            y: As for `model.evaluate`.
            combine: As for `predict`.
            members: As for `predict`.
            return_dict: Whether to return a dict by name rather than a list.
                Defaults to `False`.
            **evaluate_arguments: `batch_size`, `verbose`, `sample_weight`, `steps` and
                `callbacks`, as for `model.evaluate`.

        Returns:
            The loss and metrics as `model.evaluate` returns them.

        Raises:
            ValueError: If there are no members, or `combine` or `members` make no sense.
        """
        check_combine(combine)
        model = self._combined(combine, members)
        with metrics_lent(self.model):
            return model.evaluate(x, y, return_dict=return_dict, **evaluate_arguments)

    def _combined(self, combine: str | None, members: Any) -> MembersModel:
        """The model that runs the members. None: not combined."""
        return self._model_of(*self._way(combine, members))

    def _way(
        self, combine: str | None, members: Any
    ) -> tuple[list[int], Any, Callable[[list[Any]], Any]]:
        """The members to run, a name for what is made of their outputs, and what makes it."""
        chosen, weights = self._choice(combine, members)
        how = (combine, None if weights is None else tuple(weights), self.temperature)
        return chosen, how, self._put_together(combine, weights)

    def _predict(
        self,
        x: Any,
        chosen: list[int],
        how: Any,
        put_together: Callable[[list[Any]], Any],
        **run: Any,
    ) -> Any:
        """Predicts with all members at once or, where they are too large, one after another."""
        if not self._is_too_large(chosen) or not _are_arrays(x):
            return self._model_of(chosen, how, put_together).predict(x, **run)
        self._tensors, self._models, self._first, self._built_of = {}, {}, {}, None
        outputs = []
        with self.model.distribute_strategy.scope():
            member = blank_member(self.model)
        for i in chosen:
            self._store.put(member, self.model, i)
            outputs.append(member.predict(x, **run))
        found = put_together(outputs)
        return keras.tree.map_structure(ops.convert_to_numpy, found)

    def _is_too_large(self, chosen: list[int]) -> bool:
        """Whether these members' weights take more memory than they may; shared ones count once."""
        trained, frozen = bytes_of(self.model)
        return len(chosen) * trained + frozen > self.memory_limit

    def _model_of(
        self,
        chosen: list[int],
        how: Any,
        put_together: Callable[[list[Any]], Any],
        kind: type[MembersModel] = MembersModel,
    ) -> Any:
        """A model that runs members; built once for each choice of them and name of a way."""
        # A new `compile` brings other metrics, and maybe another loss.
        state = (*self._members_now(), self.model._compile_config)
        if self._built_of != state:
            self._tensors, self._models, self._first, self._built_of = {}, {}, {}, state
        key = (how, tuple(chosen))
        if key not in self._models:
            for i in sorted(set(chosen) - set(self._tensors)):
                self._tensors[i] = self._as_tensors(self._store.weights(self.model, i))
            with self.model.distribute_strategy.scope():
                model = kind(self.model, [self._tensors[i] for i in chosen], put_together)
                compile_like(model, self.model)
            # A model for another temperature or other weights has had its day.
            for old in [k for k in self._models if k[1] == key[1] and k[0][0] == key[0][0]]:
                del self._models[old]
            self._models[key] = model
        return self._models[key]

    def _as_tensors(self, arrays: Weights) -> list[Any]:
        """Arrays as tensors; one that members share becomes one tensor, by which that is seen."""
        tensors = []
        for place, array in enumerate(arrays):
            known, tensor = self._first.get(place, (None, None))
            if known is None or known() is not array:
                tensor = ops.convert_to_tensor(array)
                if isinstance(array, np.ndarray):  # And no number.
                    self._first.setdefault(place, (weakref.ref(array), tensor))
            tensors.append(tensor)
        return tensors

    def _parts(
        self, combine: str, members: Any
    ) -> tuple[list[Weights], Callable[[list[Any]], Any]]:
        """What one model is made of: the members' weights, and what combines their outputs."""
        chosen, weights = self._choice(combine, members)
        arrays = [self._store.weights(self.model, i) for i in chosen]
        return arrays, self._put_together(combine, weights)

    def _choice(self, combine: str | None, members: Any) -> tuple[list[int], np.ndarray | None]:
        """The members to run and, for a weighted combination, their weights; all checked."""
        if combine is not None:
            check_combine(combine)
        chosen, weights = self._chosen(members), None
        graph = graph_of(self.model)
        if combine is not None and graph is not None:
            # Of a subclass, the outputs are known only when it runs.
            check_meanings(combine, self._read(graph._outputs_struct))
        if combine == "weighted":
            weights = weights_of(self.weights, chosen)
            # Who has no say need not be run.
            chosen = [member for member, weight in zip(chosen, weights, strict=True) if weight]
            weights = weights[weights > 0]
        return chosen, weights

    def _put_together(
        self, combine: str | None, weights: np.ndarray | None
    ) -> Callable[[list[Any]], Any]:
        """What makes one output of the members' outputs; of arrays, tensors or symbols."""
        temperature = self.temperature

        def put_together(outputs: list[Any]) -> Any:
            if combine is None:
                return keras.tree.map_structure(lambda *o: ops.stack(o, axis=1), *outputs)
            meanings = self._read(outputs[0])
            return combine_outputs(outputs, combine, meanings, weights, temperature)

        return put_together

    def _chosen(self, members: Any) -> list[int]:
        if not len(self):
            raise ValueError(
                "The ensemble has no members yet. Call `fit`, or make it with `load` or "
                "`from_weights`."
            )
        return check_members(members, len(self))

    # One model to serve

    def to_keras(
        self, combine: str = "mean", members: int | Sequence[int] | None = None
    ) -> keras.Model:
        """One Keras model that computes the combination.

        It is made of stock Keras layers and operations (and the layers of your own model), so
        that it is saved and loaded without this package. Layers whose weights are equal in all
        members and that depend only on such layers, a frozen backbone or preprocessing, are in
        it once, and computed once. Its output carries no Keras mask: to score padded sequences
        with it, mark the padding by `sample_weight`.

        Example:

        >>> model = ens.to_keras()
        >>> model.save("ensemble.keras")
        >>> again = keras.models.load_model("ensemble.keras")  # also without this package

        Args:
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`. Defaults to `None`, all.

        Returns:
            A Functional `keras.Model` with the inputs' structure and names and the outputs'
            structure and names of the wrapped model, compiled with its loss and metrics (and
            plain SGD, which adds no slots to its file).

        Raises:
            ValueError: If there are no members, `combine` or `members` make no sense, or the
                model is a subclass, which is no graph of layers.
        """
        return merge(self.model, *self._parts(combine, members))

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        overwrite: bool = False,
        **export_arguments: Any,
    ) -> None:
        """Exports one artefact that computes the combination, to be served without Keras.

        Its signature has the model's own input and output names and takes any batch size. The
        file is opened by its own runtime, where that is installed, and compared with `predict`
        on random inputs before it is moved into place.

        Args:
            filepath: Path of the folder or file. Files end with `.onnx`, `.tflite` (LiteRT) or
                `.xml` (OpenVINO, with a `.bin` beside it).
            format: `"tf_saved_model"`, `"onnx"`, `"litert"` or `"openvino"`. Defaults to
                `"tf_saved_model"`.
            combine: As for `predict`. Defaults to `"mean"`.
            members: As for `predict`. Defaults to `None`, all.
            overwrite: Whether what lies at the path may be replaced. Defaults to `False`.
            **export_arguments: As for `keras.Model.export`.

        Raises:
            ValueError: If there are no members, `combine`, `members` or `format` make no sense,
                something lies at the path, or the file does not give the ensemble's numbers.
            ImportError: If the format needs a package that is not installed.
        """
        path = check_format(filepath, format)
        reference = self._combined(combine, members)
        if graph_of(self.model) is not None:
            served = serving_graph(self.to_keras(combine, members), reference)
        else:
            served = serving_function(self.model, *self._parts(combine, members), reference)
        export_model(served, path, format, overwrite=overwrite, **export_arguments)

    # Learned on held-out data

    def fit_weights(
        self,
        x: Any,
        y: Any = None,
        *,
        method: str = "likelihood",
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> np.ndarray:
        """Learns the weights of `combine="weighted"` on held-out data.

        Data that training has seen favour the members that overfitted, so there is no default.
        `"likelihood"` finds, to within a billionth of its size, the least held-out loss of the
        weighted mean over all weights that are at least 0 and sum to 1 (it is convex): the
        negative log-likelihood for classes, the squared error for regression, their sum over
        several outputs with the compiled `loss_weights`. `"greedy"` selects members with
        replacement for 25 rounds, each the one that helps most, and stops where the loss was
        lowest (Caruana et al., 2004). On the data given, neither is worse than the best member
        or the mean. Members of weight 0 are neither run nor exported.

        Example:

        >>> weights = ens.fit_weights(x_val, y_val, verbose=0)
        >>> bool(weights.min() >= 0), round(float(weights.sum()), 6)
        (True, 1.0)
        >>> weighted = ens.predict(x, combine="weighted", verbose=0)

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            method: `"likelihood"` or `"greedy"`. Defaults to `"likelihood"`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            The weights, float64 of shape `(members,)`; also in `weights` from then on.

        Raises:
            ValueError: If the data do not fit the model, are fewer than two rows, lack a class,
                or hold a NaN. The weights are as before.

        References:
            - [Caruana et al., 2004](https://doi.org/10.1145/1015330.1015432)
        """
        check_method(method)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, callbacks=callbacks, **run)
        self.weights = learn_weights(held, method)
        return self.weights

    @property
    def weights(self) -> np.ndarray | None:
        """The weights of `combine="weighted"`.

        One a member, float64, at least 0 and summing to 1; `None` until they are set. They go
        when the members change.
        """
        weights = self._what_is_learned().weights
        return None if weights is None else weights.copy()

    @weights.setter
    def weights(self, weights: Any) -> None:
        self._learn(weights=None if weights is None else check_weights(weights, len(self)))

    def calibrate(
        self,
        x: Any,
        y: Any = None,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> float:
        """Learns one temperature for the combined probabilities on held-out data.

        The logarithms of the combined probabilities (for binary and multilabel their log-odds)
        are divided by it, `p_c^(1/T) / sum_k p_k^(1/T)`: above 1 it makes them less sure, below 1
        surer. It is the one of least negative log-likelihood between 0.05 and 20, and from then
        on part of `predict`, `evaluate`, `to_keras`, `export` and `save`, whatever the
        combination. The likeliest class never changes. `predict_members` and
        `predict_uncertainty` show the members as they are. Of several outputs those of classes
        share it. Learning anew starts from the uncalibrated probabilities.

        Example:

        >>> temperature = ens.calibrate(x_val, y_val, verbose=0)
        >>> ens.temperature == temperature
        True

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            combine: The combination to calibrate. Defaults to `"mean"`.
            members: The members to combine, as for `predict`. Defaults to `None`, all.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            The temperature; also in `temperature` from then on.

        Raises:
            ValueError: If all outputs are regressions, or the data do not fit the model, are
                fewer than two rows, lack a class, or hold a NaN. The temperature is as before.

        References:
            - [Guo et al., 2017](https://arxiv.org/abs/1706.04599)
        """
        check_combine(combine)
        chosen, weights = self._choice(combine, members)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, chosen, callbacks=callbacks, **run)
        combined = combine_outputs(held.members(), combine, held.meanings, weights)
        self.temperature = temperature_of(held, combined)
        return self.temperature

    @property
    def temperature(self) -> float:
        """What `calibrate` learned; 1.0 changes nothing. It goes when the members change."""
        return self._what_is_learned().temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._learn(temperature=real_number("temperature", temperature, positive=True))

    def _what_is_learned(self) -> Learned:
        return self._learned if self._learned_of == self._members_now() else Learned()

    def _learn(self, **what: Any) -> None:
        before = self._learned, self._learned_of
        self._learned = dataclasses.replace(self._what_is_learned(), **what)
        self._learned_of = self._members_now()
        try:
            self._keep_learned()
        except BaseException:
            self._learned, self._learned_of = before
            raise

    def _keep_learned(self) -> None:
        """Where it is to be kept beyond memory, that happens here."""

    def report(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Report:
        """Scores each member and each combination, from one pass over the data.

        Example:

        >>> report = ens.report(x_val, y_val, verbose=0)
        >>> list(report.rows)
        ['member 0', 'member 1', 'last snapshot', 'best member', 'mean', 'vote', 'geometric']
        >>> list(report.rows["mean"])
        ['loss', 'nll', 'nll_calibrated', 'brier', 'ece']

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            A `Report`. It prints as a table; `to_dict()` gives its numbers.

        Raises:
            ValueError: If there are no members, or the data do not fit the model or hold a NaN.
        """
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, callbacks=callbacks, **run)
        return make_report(held, self.weights, self.temperature)

    def average_weights(
        self,
        members: int | Sequence[int] | str | None = None,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
    ) -> keras.Model:
        """One model of the original size, whose weights are the mean of the members' weights.

        It costs no more to serve than one member, and is good only where the members lie in one
        basin of the loss; restarts at a high rate leave it, and then the mean of their weights
        is worse than any of them. So give data to check it on, or let `members="greedy"` take
        only what helps.

        The mean is taken in float64. The statistics of batch normalisation are those of `x`
        under the new weights: in one pass over it, in which these layers normalise by the
        statistics of the batch (and nothing is dropped), the mean and variance of all rows,
        whatever the layers' momentum. Frozen layers keep theirs.

        Example:

        >>> small = ens.average_weights("greedy", x=x_val, y=y_val)
        >>> small.count_params() == ens.model.count_params()
        True

        Args:
            members: As for `predict`, or `"greedy"`: beginning with the best member on `x` and
                `y`, in the order of their loss, a member is added if the averaged model's loss
                falls (the greedy soup of Wortsman et al., 2022). Defaults to `None`, all.
            x: Data as for `model.evaluate`, to estimate the statistics on.
            y: Targets of `x`, to check on. A warning says if the averaged model is worse there
                than the worst member.
            batch_size: As for `model.predict`.

        Returns:
            A compiled `keras.Model`.

        Raises:
            ValueError: If there are no members, `members` makes no sense, or `"greedy"` has no
                data.

        References:
            - [Izmailov et al., 2018](https://arxiv.org/abs/1803.05407)
            - [Wortsman et al., 2022](https://arxiv.org/abs/2203.05482)
        """
        greedy = isinstance(members, str) and members == "greedy"
        chosen = self._chosen(None if greedy else members)
        weights = [self._store.weights(self.model, i) for i in chosen]
        return average(
            self.model, weights, self._read, greedy=greedy, x=x, y=y, batch_size=batch_size
        )

    def _gather(
        self, x: Any, y: Any, sample_weight: Any, chosen: list[int] | None = None, **run: Any
    ) -> heldout.HeldOut:
        """What the members predict for held-out data, and what is true."""
        chosen = self._chosen(None) if chosen is None else chosen
        gatherer = self._model_of(chosen, ("gather",), heldout.lay_side_by_side, heldout.Gatherer)
        return heldout.gather(gatherer, self.model, self._read, x, y, sample_weight, **run)

    def _read(self, outputs: Any) -> list[Output]:
        return read_outputs(self.model, self.task, outputs)

    # The members

    @property
    def snapshots(self) -> list[Snapshot]:
        """A `Snapshot` for each member, oldest first."""
        return list(self._store.snapshots)

    def __len__(self) -> int:
        return len(self._store.snapshots)

    def __getitem__(self, index: int) -> keras.Model:
        weights = self._store.weights(self.model, range(len(self))[operator.index(index)])
        return build_member(self.model, weights)

    def __iter__(self) -> Iterator[keras.Model]:
        return (self[i] for i in range(len(self)))

    def _members_now(self) -> Any:
        """Another value whenever the members are others."""
        return self._store, self._store.version


def _are_arrays(x: Any) -> bool:
    """Whether data can be gone through again and again, in the same order."""
    return all(isinstance(leaf, (np.ndarray, tf.Tensor)) for leaf in keras.tree.flatten(x))


def check_model(model: Any) -> None:
    """Raises an error unless it is a compiled Keras model."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r}")
    if not model.compiled or model.optimizer is None:
        raise ValueError(
            "`model` must be compiled, so that it can be trained. "
            f"Received: model={model.name!r}, not compiled. Call `model.compile(...)` first."
        )


def check_built(model: keras.Model) -> None:
    """Raises an error unless the model has weights."""
    if not model.built or not model.weights:
        raise ValueError(
            "`model` must be built, so that it has weights to load. "
            f"Received: model={model.name!r}, not built. Call it on a batch first."
        )
