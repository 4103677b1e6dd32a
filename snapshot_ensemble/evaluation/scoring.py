"""The compiled loss and metrics of outputs that are already predicted."""

from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.batch_size import KERAS, MOST, scores_add_up
from snapshot_ensemble.inference.cloning import compile_like
from snapshot_ensemble.keras_compat.graphs import in_graph, loop
from snapshot_ensemble.keras_compat.logits import with_logits
from snapshot_ensemble.keras_compat.masks import set_mask


class Scorer(keras.Model):
    """Evaluates the compiled loss and metrics of a model, without running the model again.

    Keras's own `test_step` takes one batch after another, as in `evaluate`, but in a loop within
    the graph, which costs a tenth of `evaluate` and is traced once for all predictions.

    Args:
        model: The compiled model.
        y: The targets, one array for each output, in the outputs' structure.
        sample_weight: The sample weights in the same structure, or None.
        masks: The Keras mask of each output that has one, by the output's index as a string.
        batch_size: As for `model.evaluate`.
    """

    def __init__(
        self,
        model: keras.Model,
        y: Any,
        sample_weight: Any,
        masks: dict[str, Any],
        batch_size: int | None,
    ) -> None:
        super().__init__(name=model.name, autocast=False)
        self.built = True
        if getattr(model, "output_names", None):
            self.output_names = model.output_names
        compile_like(self, model)
        add_up = not masks and not keras.tree.is_nested(y) and scores_add_up(model)
        self._size = batch_size or (MOST if add_up else KERAS)
        # Closures, so that Keras does not track the model and the data.
        given = (y,) if sample_weight is None else (y, sample_weight)
        targets = keras.tree.map_structure(_as_keras_does, given)
        self._with_targets: Any = lambda inputs: ({**inputs, "masks": masks}, *targets)
        self._run = self._all_steps
        if not self.run_eagerly:
            self._run = in_graph(self._all_steps)
        self._has_metrics = False

    def call(self, inputs: Any) -> Any:
        outputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs["outputs"])
        for name, mask in inputs["masks"].items():
            set_mask(keras.tree.flatten(outputs)[int(name)], mask)
        for name, logits in inputs["logits"].items():
            with_logits(keras.tree.flatten(outputs)[int(name)], logits)
        return outputs

    def _all_steps(self, data: Any) -> Any:
        rows = keras.ops.shape(keras.tree.flatten(data)[0])[0]

        def step(start: Any) -> Any:
            self.test_step(keras.tree.map_structure(lambda t: t[start : start + self._size], data))
            return start + self._size

        loop(lambda start: start < rows, step, 0)
        return self.get_metrics_result()

    def scores(self, outputs: Any, logits: dict[str, np.ndarray] | None = None) -> dict[str, float]:
        """The loss and metrics by name, as `evaluate` returns them.

        Args:
            outputs: Predictions of all rows, in the model's structure.
            logits: The logits behind probabilities, by the output's index as a string. Without
                them, the loss is that of the rounded probabilities.
        """
        inputs = {"outputs": outputs, "logits": logits or {}}
        data = self._with_targets(keras.tree.map_structure(_as_keras_does, inputs))
        data = keras.tree.map_structure(keras.ops.convert_to_tensor, data)
        if not self._has_metrics:  # The first step creates their variables.
            self.test_step(keras.tree.map_structure(lambda t: t[: self._size], data))
            self._has_metrics = True
        self.reset_metrics()
        values = self._run(data)
        return {"loss": float(values.pop("loss")), **_by_name(values)}


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """The results of metrics as numbers; a metric whose result is a dict has several names."""
    named: dict[str, Any] = {}
    for name, value in sorted(values.items()):
        if isinstance(value, dict):
            named |= _by_name(value)
        else:
            named[name] = np.asarray(value) if np.ndim(value) else float(value)
    return named


def _as_keras_does(array: Any) -> Any:
    """The array with floats in Keras's default dtype, as `evaluate` takes arrays."""
    if getattr(array.dtype, "kind", None) == "O":  # Strings, which have no loss.
        return keras.ops.convert_to_tensor(array)
    dtype = keras.backend.standardize_dtype(array.dtype)
    is_float = keras.backend.is_float_dtype(dtype)
    return keras.ops.convert_to_tensor(array, keras.config.floatx() if is_float else dtype)
