"""What the scikit-learn classifier and regressor share: training, cloning and pickling."""

import contextlib
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, Literal, Self

import keras
import numpy as np

try:
    from sklearn.base import BaseEstimator
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_array, check_consistent_length, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "`snapshot_ensemble.sklearn` needs scikit-learn 1.6 or newer. "
        "Run: pip install 'snapshot-ensemble[sklearn]'"
    ) from error

from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.inference.cloning import copy_of_model
from snapshot_ensemble.inference.model_checks import check_model
from snapshot_ensemble.keras_compat.random_seed import seeded
from snapshot_ensemble.schedules import CosineAnnealing
from snapshot_ensemble.storage.model_file import load_model
from snapshot_ensemble.storage.packing import files_in, write_files
from snapshot_ensemble.storage.snapshot import SnapshotError
from snapshot_ensemble.training.shrink_perturb import Shrink

_MODEL_FILE = "model.keras"


class SnapshotEstimator(BaseEstimator):
    """What the classifier and the regressor share."""

    def __init__(
        self,
        model: Callable[..., keras.Model] | keras.Model,
        *,
        model_kwargs: dict[str, Any] | None = None,
        cycles: int | Literal["auto"] = "auto",
        epochs: int | None = None,
        batch_size: int | None = None,
        lr_init: float | None = None,
        lr_min: float = 0.0,
        shrink: Shrink = "auto",
        schedule: CosineAnnealing | None = None,
        task: str | None = None,
        combine: str = "mean",
        validation_split: float = 0.0,
        random_state: Any = None,
        verbose: Any = 0,
    ) -> None:
        self.model = model
        self.model_kwargs = model_kwargs
        self.cycles = cycles
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr_init = lr_init
        self.lr_min = lr_min
        self.shrink = shrink
        self.schedule = schedule
        self.task = task
        self.combine = combine
        self.validation_split = validation_split
        self.random_state = random_state
        self.verbose = verbose

    # What a classifier and a regressor do in their own ways

    def _columns(self, y: np.ndarray) -> np.ndarray:
        """The targets as the model function gets them: in two dimensions."""
        raise NotImplementedError

    def _training_weights(
        self, weights: np.ndarray | None, y: np.ndarray, arguments: dict[str, Any]
    ) -> np.ndarray | None:
        """The weights of the rows that are trained on."""
        return weights

    def _strata(self, y: np.ndarray, share: float) -> np.ndarray | None:
        """What a random split keeps in proportion."""
        return None

    def _held_out_targets(self, y: Any) -> np.ndarray:
        """Checked validation targets, as `fit` has them internally."""
        raise NotImplementedError

    def _encoder(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> Callable[..., Any]:
        """Returns what turns targets into those of the compiled loss, or raises an error."""
        raise NotImplementedError

    # Training

    def _train(self, x: np.ndarray, y: np.ndarray, weights: Any, arguments: dict[str, Any]) -> None:
        """Trains on checked data."""
        # As with `keras.wrappers`, what is passed to `fit` comes before what the constructor got.
        split = arguments.pop("validation_split", self.validation_split)
        held_out = arguments.pop("validation_data", None)
        if held_out is not None:
            held_out = self._checked_held_out(*held_out)
        elif split:
            x, y, weights, held_out = self._split(x, y, weights, split)
        if self.combine == "weighted" and held_out is None:
            raise ValueError(
                "`combine='weighted'` learns the members' weights from validation data. Received: "
                "validation_split=0.0 and no `validation_data`. Pass one of them."
            )
        weights = self._training_weights(weights, y, arguments)
        model = self._new_model(x, y)
        ensemble = SnapshotEnsemble(
            model,
            cycles=self.cycles,
            schedule=self.schedule,
            lr_init=self.lr_init,
            lr_min=self.lr_min,
            shrink=self.shrink,
            task=self.task,
        )
        encoded = self._encoder(model, x, y)
        if held_out is not None:
            held_out = (held_out[0], encoded(held_out[1]), *held_out[2:])
        own = {name: getattr(self, name) for name in ("epochs", "batch_size", "verbose")}
        given = {**own, **arguments, "validation_data": held_out, "sample_weight": weights}
        history = ensemble.fit(x, encoded(y), **given)
        if self.combine == "weighted":
            names = ("x", "y", "sample_weight")
            ensemble.fit_weights(**dict(zip(names, held_out, strict=False)), verbose=0)
        self.ensemble_, self.history_ = ensemble, history.history

    def _generators(self) -> contextlib.AbstractContextManager[None]:
        """Seeds the generators while `fit` runs, if there is a `random_state`."""
        if self.random_state is None:
            return contextlib.nullcontext()
        generator = check_random_state(self.random_state)
        return seeded(int(generator.randint(np.iinfo("int32").max)))

    def _checked_held_out(self, x: Any, y: Any, sample_weight: Any = None) -> tuple[Any, ...]:
        x = validate_data(self, x, reset=False, allow_nd=True)
        y = self._held_out_targets(y)
        check_consistent_length(x, y)
        weights = checked_weights(sample_weight, x)
        return (x, y) if weights is None else (x, y, weights)

    def _split(self, x: np.ndarray, y: np.ndarray, weights: Any, share: float) -> tuple[Any, ...]:
        arrays = [x, y] if weights is None else [x, y, weights]
        parts = train_test_split(*arrays, test_size=share, stratify=self._strata(y, share))
        kept, held_out = parts[::2], parts[1::2]
        return kept[0], kept[1], None if weights is None else kept[2], tuple(held_out)

    def _new_model(self, x: np.ndarray, y: np.ndarray) -> keras.Model:
        if isinstance(self.model, keras.Model):
            check_model(self.model)
            return copy_of_model(self.model)
        if not callable(self.model):
            raise TypeError(
                "`model` must be a function that returns a compiled Keras model, or such a model. "
                f"Received: model={self.model!r}"
            )
        made = self.model(X=x, y=self._columns(y), **(self.model_kwargs or {}))
        if not isinstance(made, keras.Model):
            raise TypeError(
                "The model function must return a compiled Keras model. "
                f"Received: {made!r} from model={self.model!r}"
            )
        return made

    # Predicting

    def _raw_predictions(self, x: Any) -> np.ndarray:
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, allow_nd=True)
        return self.ensemble_.predict(
            x, combine=self.combine, batch_size=self.batch_size, verbose=self.verbose
        )

    # Cloning and pickling

    def __sklearn_clone__(self) -> Self:
        if not isinstance(self.model, keras.Model):
            return super().__sklearn_clone__()
        # `fit` leaves a given model as it is, so clones can share it.
        other = object.__new__(type(self))
        for name, value in {**vars(self), "model": None}.items():
            setattr(other, name, value)
        cloned = BaseEstimator.__sklearn_clone__(other)
        cloned.model = self.model
        return cloned

    def __getstate__(self) -> dict[str, Any]:
        """The state without Keras objects: instead of them, the files that they are saved in."""
        state = dict(super().__getstate__())
        with tempfile.TemporaryDirectory() as directory:
            if isinstance(self.model, keras.Model):
                self.model.save(f"{directory}/{_MODEL_FILE}")
                state["model"] = _Files(files_in(directory))
        if "ensemble_" in state:
            with tempfile.TemporaryDirectory() as directory:
                state["ensemble_"].save(directory)
                state["ensemble_"] = _Files(files_in(directory))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        for name, load in (("model", _loaded_model), ("ensemble_", _loaded_ensemble)):
            if isinstance(state.get(name), _Files):
                state[name] = _from_files(state[name], load)
        super().__setstate__(state)


class _Files(dict[str, bytes]):
    """The files of a directory."""


def _from_files(files: _Files, load: Callable[[str], Any]) -> Any:
    directory = tempfile.TemporaryDirectory()
    try:
        write_files(files, directory.name)
        loaded = load(directory.name)
    except SnapshotError as error:
        directory.cleanup()
        error.add_note(
            "To unpickle an estimator, first register classes and functions of your own with "
            "`keras.saving.register_keras_serializable`. If the processes of `n_jobs` lack them, "
            "pass a function that makes the model instead of the model: it brings them along."
        )
        raise
    # An ensemble reads its members from its directory.
    weakref.finalize(loaded, directory.cleanup)
    return loaded


def _loaded_model(directory: str) -> keras.Model:
    return load_model(f"{directory}/{_MODEL_FILE}")


def _loaded_ensemble(directory: str) -> SnapshotEnsemble:
    return SnapshotEnsemble.load(directory)


def checked_weights(sample_weight: Any, x: np.ndarray) -> np.ndarray | None:
    """Checks that there is one weight for each row, if there are weights.

    Args:
        sample_weight: As for `fit` of an estimator.
        x: The rows.

    Raises:
        ValueError: If there is another number of weights, or all of them are zero.
    """
    if sample_weight is None:
        return None
    weights = check_array(
        sample_weight, ensure_2d=False, dtype="float32", input_name="sample_weight"
    )
    if weights.shape != (len(x),):
        raise ValueError(
            "`sample_weight` must have one number for each row. Received: "
            f"sample_weight of shape {weights.shape} for {len(x)} rows"
        )
    if not weights.any():
        raise ValueError(
            "Sample weights must contain at least one non-zero number. Received: "
            f"`sample_weight` with {len(weights)} zeros"
        )
    return weights
