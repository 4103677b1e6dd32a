"""The demonstration: the main job from end to end on the digits that scikit-learn ships."""

import os
import pathlib
import time
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.ensemble import SnapshotEnsemble

PEAK = 0.1
BATCH = 16


def load_digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """1797 images of handwritten digits, half of them (in each class) held out.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: images float32 of shape `(n, 8, 8, 1)` from 0 to
        1, labels integers from 0 to 9.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  The extra `demo`.
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
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(128, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def ordinary_run(x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> keras.Model:
    """One network trained for the whole budget, from the same peak along one cosine."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x) // BATCH)
    model = digit_model(keras.optimizers.schedules.CosineDecay(PEAK, steps))
    model.fit(x, y, epochs=epochs, batch_size=BATCH, verbose=0)
    return model


def run_demo(
    directory: str | os.PathLike[str],
    *,
    epochs: int = 50,
    cycles: int = 5,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Trains on digits, prints what comes of it, and leaves the ensemble in a directory.

    Args:
        directory: Where the ensemble is written.
        epochs: The budget, of the ensemble and of the ordinary run beside it.
        cycles: Into how many cycles the ensemble splits it.
        seed: Seed of both runs.
        overwrite: Whether an ensemble in the directory may be replaced.

    Returns:
        `error` (a share) and `nll` (nats) on the held-out images, for each row of the table.
    """
    (x_train, y_train), (x_test, y_test) = load_digits()
    start = time.perf_counter()
    keras.utils.set_random_seed(seed)
    ens = SnapshotEnsemble(digit_model(), cycles=cycles, directory=directory)
    print(f"{len(x_train)} images to train on, {len(x_test)} held out. The plan:\n")
    print(f"{ens.plan(epochs)}\n")
    ens.fit(x_train, y_train, epochs=epochs, batch_size=BATCH, verbose=2, overwrite=overwrite)

    print("\nOne ordinary run of the same budget ...", flush=True)
    single = ordinary_run(x_train, y_train, epochs, seed)

    rows = {"one ordinary run": single.evaluate(x_test, y_test, verbose=0)}
    for snapshot in ens.snapshots:
        last = ", the last" if snapshot.index == len(ens) - 1 else ""
        rows[f"member {snapshot.index} (epoch {snapshot.epoch + 1}{last})"] = ens.evaluate(
            x_test, y_test, members=[snapshot.index], verbose=0
        )
    # On weights: no data is left here to learn them on, so the later members get more by hand.
    ens.weights = np.arange(1, len(ens) + 1) / np.arange(1, len(ens) + 1).sum()
    for combine in ("vote", "weighted", "mean"):
        rows[f"ensemble, {combine}"] = ens.evaluate(x_test, y_test, combine=combine, verbose=0)

    scores = {name: {"error": 1 - accuracy, "nll": loss} for name, (loss, accuracy) in rows.items()}
    print(f"\n{'on the held-out images':34}{'error %':>10}{'NLL':>10}")
    for name, score in scores.items():
        print(f"{name:34}{100 * score['error']:10.2f}{score['nll']:10.4f}")
    path = pathlib.Path(directory).resolve()
    print(f"\n{time.perf_counter() - start:.0f} s. The ensemble lies in {path}; it comes back with")
    print(f"    SnapshotEnsemble.load({str(path)!r})")
    return scores
