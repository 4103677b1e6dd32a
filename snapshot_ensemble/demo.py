"""The demo: an ensemble and ordinary runs of the same budget on scikit-learn's digits."""

import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import keras
import numpy as np

from snapshot_ensemble.checks import counted, whole_number
from snapshot_ensemble.drawing import BLUE, ORANGE
from snapshot_ensemble.ensemble import SnapshotEnsemble
from snapshot_ensemble.tables import text_table

PEAK = 0.1
BATCH = 16
SURE = 0.9
FEW = 5
SCORES = {
    "errors": "wrong answers",
    "sure": "wrong answers of which it was more than 90 % sure",
    "few": f"images to check by hand, least sure first, until {FEW} errors are left",
    "none": "images to check by hand until no error is left",
    "nll": "NLL: mean of -log(probability of the true digit), 0 is best",
}

INTRODUCTION = """\
1797 images of handwritten digits: 700 to train on, 198 for validation, 899 to test on.
For each seed, a {net} network is trained twice for {epochs} epochs: as an ensemble,
with the default settings, and as one run, whose learning rate falls to 0 only once.
The plan of the ensemble:
"""

Part = tuple[np.ndarray, np.ndarray]
Scores = dict[str, list[dict[str, float]]]


def load_digits() -> tuple[Part, Part, Part]:
    """1797 images of handwritten digits, shuffled and split.

    Returns:
        `(x, y)` of the 700 training, 198 validation and 899 test images: float32 of shape
        `(n, 8, 8, 1)` between 0 and 1, and the digits as integers.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  An optional dependency.

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x, y = (images[order] / 16).astype("float32").reshape(-1, 8, 8, 1), labels[order]
    return (x[:700], y[:700]), (x[700:898], y[700:898]), (x[898:], y[898:])


def digit_model(learning_rate: Any = PEAK, *, dense: bool = False) -> keras.Model:
    """A small network, compiled as in the paper: SGD with Nesterov momentum.

    Args:
        learning_rate: A number or a schedule.
        dense: Two dense layers instead of two convolutions with batch normalisation.
    """
    layers = keras.layers
    inside: list[Any] = []
    if dense:
        inside = [layers.Flatten(), *(layers.Dense(128, activation="relu") for _ in range(2))]
    else:
        for filters, stride in ((16, 1), (32, 2)):
            inside.append(layers.Conv2D(filters, 3, stride, "same", use_bias=False))
            inside += [layers.BatchNormalization(), layers.ReLU()]
        inside.append(layers.Flatten())
    digit = layers.Dense(10, activation="softmax", name="digit")
    model = keras.Sequential([keras.Input((8, 8, 1), name="image"), *inside, digit], name="digits")
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    # An epoch has 44 small steps: four in one call take less time and give the same.
    model.compile(
        optimizer,
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=4,
    )
    return model


def ordinary_run(x: np.ndarray, y: np.ndarray, epochs: int, seed: int, dense: bool) -> keras.Model:
    """One network trained for the whole budget, with one cosine decay from the same peak."""
    keras.utils.set_random_seed(seed)
    steps = epochs * -(-len(x) // BATCH)
    model = digit_model(keras.optimizers.schedules.CosineDecay(PEAK, steps), dense=dense)
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


def to_check(probabilities: np.ndarray, y: np.ndarray, left: int) -> int:
    """How many images a person must check so that at most `left` of the rest are wrong.

    The person gets the images about which the model is least sure. With `left=0`, these are all
    images down to the surest wrong answer.

    Example:

    >>> probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    >>> to_check(probabilities, np.array([0, 1, 0]), left=1)
    1

    Args:
        probabilities: Of each class, for each image.
        y: The true classes.
        left: The number of errors that may be left.
    """
    order = np.argsort(probabilities.max(-1), kind="stable")
    wrong = (probabilities.argmax(-1) != y)[order]
    remaining = wrong.sum() - np.concatenate([[0], np.cumsum(wrong)])
    return int(np.argmax(remaining <= left))


def score(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The numbers of the demo's table, by the names in `SCORES`."""
    wrong = probabilities.argmax(-1) != y
    likelihood = np.clip(probabilities[np.arange(len(y)), y], 1e-7, 1)
    return {
        "errors": float(wrong.sum()),
        "sure": float((wrong & (probabilities.max(-1) > SURE)).sum()),
        "few": float(to_check(probabilities, y, FEW)),
        "none": float(to_check(probabilities, y, 0)),
        "nll": float(-np.log(likelihood).mean()),
    }


def table(runs: Scores) -> str:
    """The mean of each score over the seeds, with the standard deviation if there are several."""
    rows = [("", *runs)]
    for name, words in SCORES.items():
        digits = 3 if name == "nll" else 1
        cells = []
        for scores in runs.values():
            values = np.array([of_seed[name] for of_seed in scores])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        rows.append((words, *cells))
    return text_table(rows)


def verdict(scores: Scores) -> str:
    """One line that says whether the ensemble gained, in errors and in NLL.

    A mean difference within one standard error, over the seeds, is called no clear difference.
    """
    said = []
    for name, digits in (("errors", 1), ("nll", 3)):
        one, ensemble = ([of_seed[name] for of_seed in runs] for runs in scores.values())
        saved = np.subtract(one, ensemble)
        error = saved.std(ddof=1) / len(saved) ** 0.5 if len(saved) > 1 else 0.0
        spread = f" ± {error:.{digits}f}" if len(saved) > 1 else ""
        if abs(saved.mean()) <= error:
            change = "no clear change"
        else:
            change = "a gain" if saved.mean() > 0 else "a loss"
        unit = "errors" if name == "errors" else "NLL"
        said.append(f"{change} in {unit} ({0.0 - saved.mean():+.{digits}f}{spread})")
    seeds = counted(len(saved), "seed")
    return f"The ensemble against one run of the same budget, {seeds}: {said[0]}, {said[1]}."


def draw(ens: SnapshotEnsemble, x: np.ndarray, y: np.ndarray, folder: pathlib.Path) -> None:
    """Draws what the package can plot of one ensemble, each picture into a file by itself."""
    from matplotlib.figure import Figure  # noqa: PLC0415  Slow to import.

    from snapshot_ensemble import plots  # noqa: PLC0415

    report = ens.report(x, y, batch_size=len(y), verbose=0)
    pictures: dict[str, Callable[[Any], Any]] = {
        "history": lambda ax: plots.plot_history(ens, ax=ax),
        "members": lambda ax: plots.plot_members(report, ax=ax),
        "diversity": lambda ax: plots.plot_diversity(report, ax=ax),
        "reliability": lambda ax: plots.plot_reliability(ens, x, y, ax=ax),
        "uncertainty": lambda ax: plots.plot_uncertainty(ens, x, y, ax=ax),
        "landscape": lambda ax: plots.plot_landscape(ens, x, y, points=5, batch_size=len(y), ax=ax),
    }
    if len(ens) < 2:
        del pictures["landscape"]  # It needs at least two members.
    for name, plot in pictures.items():
        figure = Figure(figsize=(6, 4), layout="constrained")
        plot(figure.subplots())
        figure.savefig(folder / f"{name}.png")


def _bars(ax: Any, values: Sequence[Sequence[float]], title: str, digits: int) -> None:
    """A bar for the mean of one run and of the ensemble, with a dot for each seed."""
    means = [float(np.mean(of_seeds)) for of_seeds in values]
    ax.bar(("one run", "ensemble"), means, width=0.6, color=(ORANGE, BLUE))
    for place, of_seeds in enumerate(values):
        ax.scatter([place] * len(of_seeds), of_seeds, color="black", s=18, zorder=3)
        color = "white" if place else "black"
        number = f"{means[place]:.{digits}f}"
        ax.text(place, means[place] / 2, number, ha="center", fontsize=13, color=color)
    ax.set_title(title)


def _wrong_answers(ax: Any, outputs: dict[str, list[np.ndarray]], y: np.ndarray) -> None:
    """How many wrong answers were given with which confidence, by one run and the ensemble."""
    edges = np.array([0, 50, 60, 70, 80, 90, 100])
    places = np.arange(len(edges) - 1)
    looks = ((ORANGE, -0.2), (BLUE, 0.2))
    for (color, offset), (name, of_seeds) in zip(looks, outputs.items(), strict=True):
        counts = [
            np.histogram(100 * p.max(-1)[p.argmax(-1) != y], edges)[0] / len(of_seeds)
            for p in of_seeds
        ]
        ax.bar(places + offset, np.sum(counts, 0), 0.4, color=color, label=name)
    names = ["under 50", *(f"{a} to {b}" for a, b in itertools.pairwise(edges[1:]))]
    ax.set_xticks(places, names, rotation=40, ha="right")
    ax.set_xlabel("how sure the model was, in %")
    ax.set_ylabel("wrong answers of a run, on average")
    ax.set_title("How sure wrong answers were")
    ax.legend(frameon=False)


def draw_summary(
    outputs: dict[str, list[np.ndarray]], x: np.ndarray, y: np.ndarray, path: pathlib.Path
) -> None:
    """Draws what the demo has found into one picture.

    Args:
        outputs: The probabilities of `"one run"` and of the `"ensemble"`, an array for each seed.
        x: The test images.
        y: Their digits.
        path: The file to write.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  Slow to import.

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    parts: Any = figure.subfigures(1, 3, width_ratios=(4.2, 4, 4.8))
    left, middle, right = parts
    scores = [[score(p, y) for p in of_seeds] for of_seeds in outputs.values()]
    titles = (("errors", f"Errors of {len(y)}", 1), ("nll", "NLL (0 is best)", 3))
    for ax, (name, title, digits) in zip(left.subplots(1, 2), titles, strict=True):
        _bars(ax, [[of_seed[name] for of_seed in row] for row in scores], title, digits)
    left.supxlabel("a dot for each seed", fontsize=10)
    _wrong_answers(middle.subplots(), outputs, y)

    probabilities = outputs["ensemble"][0]
    least_sure = np.argsort(probabilities.max(-1), kind="stable")[:8]
    right.suptitle("What the ensemble would hand to a person:\nthe digits that it is least sure of")
    for ax, index in zip(right.subplots(2, 4).flat, least_sure, strict=True):
        guess, sure = probabilities[index].argmax(), probabilities[index].max()
        ax.imshow(x[index, ..., 0], cmap="gray_r")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlabel(f"{guess}? {100 * sure:.0f} % sure\nit is {y[index]}")
    for part in parts:
        for ax in part.axes:
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _write(ens: SnapshotEnsemble, home: pathlib.Path, x: Any, y: Any, overwrite: bool) -> None:
    """Exports the ensemble, compares the export with it, and draws its plots."""
    served, pictures = home / "served" / "1", home / "pictures"
    ens.export(served, overwrite=overwrite, verbose=False)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # The new process takes seconds to import TensorFlow: pictures are drawn meanwhile.
        predictions = pool.submit(predict_in_new_process, served, x)
        pictures.mkdir(parents=True, exist_ok=True)
        draw(ens, x, y, pictures)
    difference = np.abs(predictions.result() - ens.predict(x, batch_size=len(x), verbose=0)).max()
    print("\nThe first ensemble as one SavedModel, run in a new process with only TensorFlow:")
    print(f"largest difference in a probability {difference:.1g}. Written to {served}")
    print(f"The ensemble itself: SnapshotEnsemble.load({str(home / 'ensemble')!r})")


def _check_new(home: pathlib.Path, overwrite: bool) -> None:
    existing = [path for path in (home / "served" / "1", home / "pictures") if path.exists()]
    if existing and not overwrite:
        raise ValueError(
            f"'{existing[0]}' already exists. Received: directory='{home}'. Choose another "
            "directory, or pass `overwrite=True`."
        )


def _start(
    seed: int, cycles: int | Literal["auto"], dense: bool, home: pathlib.Path | None
) -> SnapshotEnsemble:
    """The ensemble of a seed before it is trained."""
    keras.utils.set_random_seed(seed)
    directory = None if home is None else home / "ensemble"
    return SnapshotEnsemble(digit_model(dense=dense), cycles=cycles, directory=directory)


def _say(what: str, seed: int, probabilities: np.ndarray, y: np.ndarray, start: float) -> None:
    """Prints one line of progress."""
    scores = score(probabilities, y)
    numbers = f"{scores['errors']:.0f} wrong answers, NLL {scores['nll']:.3f}"
    print(f"seed {seed}, {what}: {numbers} ({time.perf_counter() - start:.0f} s)", flush=True)


def run_demo(
    directory: str | os.PathLike[str],
    *,
    epochs: int = 30,
    cycles: int | Literal["auto"] = "auto",
    seed: int = 0,
    runs: int = 3,
    dense: bool = False,
    overwrite: bool = False,
) -> Scores:
    """Compares ensembles with ordinary runs on digits, and writes one ensemble with its export.

    Args:
        directory: Where the ensemble of the first seed is written, to `ensemble`, with its export
            `served/1` and plots in `pictures`. `pictures/summary.png` shows the comparison.
        epochs: The budget of each ensemble and of each ordinary run.
        cycles: How many cycles an ensemble splits it into, or `"auto"`.
        seed: The first seed.
        runs: How many seeds. With each of them, an ensemble and an ordinary run are trained.
        dense: Whether to train a dense network instead of a convolutional one.
        overwrite: Whether the contents of the directory may be replaced.

    Returns:
        The scores in the table for each seed, of `"one run"` and of the `"ensemble"`.

    Raises:
        ValueError: If there are such contents and `overwrite` is `False`, or if there is no run.
    """
    train, validation, (x, y) = load_digits()
    home, start = pathlib.Path(directory).absolute(), time.perf_counter()
    seeds = range(seed, seed + whole_number("runs", runs, 1))
    _check_new(home, overwrite)
    first = _start(seed, cycles, dense, home)
    print(INTRODUCTION.format(net="dense" if dense else "small convolutional", epochs=epochs))
    print(f"{first.plan(epochs)}\n")
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "verbose": 0}
    settings["validation_batch_size"] = len(validation[1])
    outputs: dict[str, list[np.ndarray]] = {"one run": [], "ensemble": []}
    for number in seeds:
        ens = first if number == seed else _start(number, cycles, dense, None)
        ens.fit(*train, validation_data=validation, overwrite=overwrite, **settings)
        outputs["ensemble"].append(ens.predict(x, batch_size=len(x), verbose=0))
        _say("ensemble", number, outputs["ensemble"][-1], y, start)
        single = ordinary_run(*train, epochs, number, dense)
        outputs["one run"].append(single.predict(x, batch_size=len(x), verbose=0))
        _say("one run", number, outputs["one run"][-1], y, start)
    _write(first, home, x, y, overwrite)
    draw_summary(outputs, x, y, home / "pictures" / "summary.png")
    print(f"Pictures: {home / 'pictures'}, first of all summary.png")
    scores = {name: [score(p, y) for p in of_seeds] for name, of_seeds in outputs.items()}
    spread = " ± standard deviation" if runs > 1 else ""
    print(f"\nOn {len(y)} test images, mean{spread} over {counted(runs, 'seed')}:\n")
    print(f"{table(scores)}\n\n{verdict(scores)}")
    return scores
