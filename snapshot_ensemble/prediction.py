"""What an ensemble predicts, and the one model that it becomes."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation.metrics import uncertainty
from snapshot_ensemble.export.formats import (
    check_format,
    export_model,
    serving_function,
    serving_graph,
)
from snapshot_ensemble.export.merged_model import merge
from snapshot_ensemble.inference.cloning import metrics_lent
from snapshot_ensemble.inference.combining import check_combine, combine_outputs
from snapshot_ensemble.inference.member_pool import Runner
from snapshot_ensemble.inference.members_model import graph_of


class Predictor(Runner):
    """Members as one predictor."""

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
            members: Which members: an int for the last that many, or a list of indices. Defaults
                to `None`: those of the attribute `members`, which are all unless validation data
                say otherwise; for `"weighted"` all.
            batch_size: As for `model.predict`. Defaults to `None`: 32, or up to 1024 rows of arrays
                where small layers of Keras's own make that faster and it changes nothing.
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
            members: As for `predict`.

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
            members: An int for the last that many, or a list of indices. Defaults to `None`, all.
            batch_size: As for `predict`.
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
            batch_size: As for `predict`.
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

        chosen = self._chosen(self._or_default(members))
        way = (chosen, ("uncertainty",), put_together)
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
            members: As for `predict`.

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
            members: As for `predict`.
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
