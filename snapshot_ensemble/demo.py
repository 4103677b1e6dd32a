"""The demo: training, scoring and exporting an ensemble on scikit-learn's digits."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.tables import text_table

PEAK = 0.1
BATCH = 16


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1797 images of handwritten digits, split in half with stratification.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: images as float32 of shape `(n, 8, 8, 1)` between
        0 and 1, labels as integers from 0 to 9. The test set is held out.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  An optional dependency.
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.5, stratify=labels, random_state=0
    )
    return (x_train, y_train), (x_test, y_test)


def digit_model(learning_rate: Any = PEAK) -> keras.Model:
    """A small dense network, compiled as in the paper: SGD with Nesterov momentum."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax", name="digit"),
        ],
        name="digits",
    )
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def ordinary_run(x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> keras.Model:
    """One network trained for the whole budget, with one cosine decay from the same peak."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x) // BATCH)
    model = digit_model(keras.optimizers.schedules.CosineDecay(PEAK, steps))
    model.fit(x, y, epochs=epochs, batch_size=BATCH, verbose=0)
    return model


_SERVING_SCRIPT = """
import sys
import numpy as np
import tensorflow as tf
served, inputs, outputs = sys.argv[1:]
signature = tf.saved_model.load(served).signatures["serving_default"]
np.save(outputs, signature(image=tf.constant(np.load(inputs)))["digit"].numpy())
"""


def predict_in_new_process(served: pathlib.Path, x: np.ndarray) -> np.ndarray:
    """The predictions of an export in a new process that imports only TensorFlow."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = f"{folder}/x.npy", f"{folder}/y.npy"
        np.save(inputs, x)
        command = [sys.executable, "-c", _SERVING_SCRIPT, str(served), inputs, outputs]
        subprocess.run(command, check=True, capture_output=True)
        return np.load(outputs)


def score(
    ens: SnapshotEnsemble, single: keras.Model, x: np.ndarray, y: np.ndarray
) -> dict[str, dict[str, float]]:
    """`error` and `nll` of the ordinary run, of each member and of each combination."""
    rows = {"one ordinary run": single.evaluate(x, y, verbose=0)}
    epochs = [snapshot.epoch for snapshot in ens.snapshots if snapshot.epoch is not None]
    for index, epoch in enumerate(epochs):
        last = ", the last" if index == len(ens) - 1 else ""
        name = f"member {index} (epoch {epoch + 1}{last})"
        rows[name] = ens.evaluate(x, y, members=[index], verbose=0)
    # The demo has no data left to learn the weights on, so later members simply get more.
    ens.weights = np.arange(1, len(ens) + 1) / np.arange(1, len(ens) + 1).sum()
    for combine in ("vote", "geometric", "weighted", "mean"):
        rows[f"ensemble, {combine}"] = ens.evaluate(x, y, combine=combine, verbose=0)
    return {name: {"error": 1 - accuracy, "nll": loss} for name, (loss, accuracy) in rows.items()}


def draw(ens: SnapshotEnsemble, x: np.ndarray, y: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
    """Draws the run and what came of it: each picture by itself, and all of them in one.

    Returns:
        The path of the one that has all, `summary.png` in the folder.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  Slow to import.

    from snapshot_ensemble import plots  # noqa: PLC0415

    report = ens.report(x, y, verbose=0)
    pictures: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "history": ("Training history", lambda ax: plots.plot_history(ens, ax=ax)),
        "members": ("Error by number of members", lambda ax: plots.plot_members(report, ax=ax)),
        "diversity": (
            "Disagreement between members",
            lambda ax: plots.plot_diversity(report, ax=ax),
        ),
        "reliability": (
            "Calibration",
            lambda ax: plots.plot_reliability(ens, x, y, ax=ax),
        ),
        "uncertainty": (
            "Error when the least certain are set aside",
            lambda ax: plots.plot_uncertainty(ens, x, y, ax=ax),
        ),
        "landscape": (
            "Loss between consecutive members",
            lambda ax: plots.plot_landscape(ens, x, y, ax=ax),
        ),
    }
    if len(ens) < 2:
        del pictures["landscape"]  # It needs at least two members.
    folder.mkdir(parents=True, exist_ok=True)
    together = Figure(figsize=(15, 8), layout="constrained")
    panels = together.subplots(2, 3).flat
    for panel, (name, (title, plot)) in zip(panels, pictures.items(), strict=False):
        alone = Figure(figsize=(6, 4), layout="constrained")
        for ax in (panel, alone.subplots()):
            plot(ax)
            ax.set_title(title)
        alone.savefig(folder / f"{name}.png")
    together.savefig(folder / "summary.png")
    return folder / "summary.png"


def run_demo(
    directory: str | os.PathLike[str],
    *,
    epochs: int = 50,
    cycles: int = 5,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Trains on digits, prints scores, and writes the ensemble, its export and plots.

    Args:
        directory: Where they are written, to `ensemble`, `served/1` and `pictures`.
        epochs: The budget of the ensemble, and of the ordinary run that it is compared with.
        cycles: How many cycles the ensemble splits it into.
        seed: Seed of both runs.
        overwrite: Whether the contents of the directory may be replaced.

    Returns:
        `error` (a fraction) and `nll` (in nats) on the held-out images, for each row of the table.

    Raises:
        ValueError: If there are such contents and `overwrite` is `False`.
    """
    (x_train, y_train), (x_test, y_test) = load_digits()
    start = time.perf_counter()
    home = pathlib.Path(directory).absolute() / "ensemble"
    served, pictures = home.parent / "served" / "1", home.parent / "pictures"
    existing = [path for path in (served, pictures) if path.exists()]
    if existing and not overwrite:
        raise ValueError(
            f"'{existing[0]}' already exists. Received: directory={str(directory)!r}. Choose "
            "another directory, or pass `overwrite=True`."
        )
    keras.utils.set_random_seed(seed)
    ens = SnapshotEnsemble(digit_model(), cycles=cycles, directory=home)
    print(f"{len(x_train)} training images, {len(x_test)} held-out images. The plan:\n")
    print(f"{ens.plan(epochs)}\n")
    ens.fit(x_train, y_train, epochs=epochs, batch_size=BATCH, verbose=2, overwrite=overwrite)

    print("\nTraining one ordinary run with the same budget ...", flush=True)
    scores = score(ens, ordinary_run(x_train, y_train, epochs, seed), x_test, y_test)
    rows = [("on the held-out images", "error %", "NLL")]
    for name, values in scores.items():
        rows.append((name, f"{100 * values['error']:.2f}", f"{values['nll']:.4f}"))
    print(f"\n{text_table(rows)}")

    ens.export(served, overwrite=overwrite)
    served_predictions = predict_in_new_process(served, x_test)
    difference = np.abs(served_predictions - ens.predict(x_test, verbose=0)).max()
    print("\nThe ensemble's mean as one SavedModel, run in a new process with only TensorFlow:")
    print(f"largest difference in a probability {difference:.1g}. Written to {served}")
    print(f"Plots: {draw(ens, x_test, y_test, pictures)}")
    print(f"\n{time.perf_counter() - start:.0f} s. Load the ensemble with")
    print(f"    SnapshotEnsemble.load({str(home)!r})")
    return scores
