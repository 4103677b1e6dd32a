"""Real data from packages, and a net for each: what `accuracy.py` trains.

`digits` come with scikit-learn. The others come with Debian's packages, which need not be
installed: `apt-get download` and `dpkg -x FILE.deb FOLDER`, then `--root FOLDER`.

- `fashion`, `fashion_augmented`: `dataset-fashion-mnist`
- `letter_sgd`, `letter_adam`: `r-cran-mlbench`, read by `pip install rdata`
- `words`, the language of a word by its letters: `wamerican`, `wngerman`, `wfrench`, `witalian`,
  `wspanish` and `wdutch`
"""

import dataclasses
import gzip
import itertools
import pathlib
import unicodedata
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, by which net, and how.

    Attributes:
        load: Takes the folder where packages are; gives inputs and labels of all rows.
        split: How many rows to train, to validate and to test on.
        net: Takes the number of classes.
        optimizer: Takes the peak rate.
        peak: The peak rate.
        batch: Rows in a batch.
        epochs: The budget.
    """

    load: Callable[[pathlib.Path], tuple[np.ndarray, np.ndarray]]
    split: tuple[int, int, int]
    net: Callable[[int], keras.Model]
    optimizer: Callable[[float], Any]
    peak: float
    batch: int
    epochs: int

    def parts(self, root):
        """Inputs and labels to train, to validate and to test on."""
        x, y = self.load(pathlib.Path(root))
        ends = np.cumsum((0, *self.split))
        return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]

    def model(self):
        model = self.net(self.classes)
        model.compile(self.optimizer(self.peak), "sparse_categorical_crossentropy")
        return model

    @property
    def classes(self):
        return {digits: 10, fashion: 10, letter: 26, words: 6}[self.load]


def digits(root):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return (x[order] / 16).astype("float32"), y[order]


def fashion(root):
    """The first 10,000 images to train on, the next 2,000 to validate, and the test images."""
    folder = root / "usr/share/datasets/fashion-mnist"

    def read(name):
        data = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
        shape = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, "uint8", offset=4 + 4 * data[3]).reshape(shape)

    x = np.concatenate([read("train-images-idx3")[:12_000], read("t10k-images-idx3")])
    y = np.concatenate([read("train-labels-idx1")[:12_000], read("t10k-labels-idx1")])
    return x[..., None].astype("float32") / 255, y.astype("int64")


def letter(root):
    """Sixteen measures of printed capital letters."""
    import rdata

    file = root / "usr/lib/R/site-library/mlbench/data/LetterRecognition.rda"
    table = rdata.read_rda(file)["LetterRecognition"]
    y = np.asarray([ord(kind) - ord("A") for kind in table["lettr"].astype(str)])
    x = table.drop(columns="lettr").to_numpy().astype("float32")
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    return (x - x[:8000].mean(0)) / x[:8000].std(0), y


def words(root):
    """9,000 words of each of six languages, without accents, as numbers of letters."""
    rng, rows, labels = np.random.default_rng(0), [], []
    names = ("american-english", "ngerman", "french", "italian", "spanish", "dutch")
    for label, name in enumerate(names):
        found = set()
        for line in (root / "usr/share/dict" / name).read_text("utf-8").split("\n"):
            word = unicodedata.normalize("NFKD", line.split("'")[0].lower())
            word = "".join(c for c in word if not unicodedata.combining(c)).replace("ß", "ss")
            if 3 <= len(word) <= 16 and word.isascii() and word.isalpha():
                found.add(word)
        listed = sorted(found)
        for index in rng.choice(len(listed), 9_000, replace=False):
            letters = [ord(c) - 96 for c in listed[index]]
            rows.append(letters + [0] * (16 - len(letters)))
        labels += [label] * 9_000
    order = rng.permutation(len(labels))
    return np.asarray(rows, "int32")[order], np.asarray(labels)[order]


def dense(width):
    def net(classes):
        hidden = [layers.Dense(128, "relu") for _ in range(2)]
        return keras.Sequential([keras.Input((width,)), *hidden, layers.Dense(classes, "softmax")])

    return net


def residual(*augmenting):
    """Eight layers with batch normalisation, and what changes images while it trains."""

    def normed(x, filters, size, stride):
        x = layers.Conv2D(filters, size, stride, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def net(classes):
        x = inputs = keras.Input((28, 28, 1))
        for make in augmenting:
            x = make()(x)
        x = layers.ReLU()(normed(x, 16, 3, 1))
        for filters, stride in ((16, 2), (32, 2), (64, 2)):
            y = layers.ReLU()(normed(x, filters, 3, stride))
            past = normed(x, filters, 1, stride)
            x = layers.ReLU()(layers.Add()([normed(y, filters, 3, 1), past]))
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(classes, "softmax")(x))

    return net


def recurrent(classes):
    inside = [
        layers.Embedding(27, 16),
        layers.Conv1D(64, 3, activation="relu", padding="same"),
        layers.GRU(64),
    ]
    return keras.Sequential(
        [keras.Input((16,), dtype="int32"), *inside, layers.Dense(classes, "softmax")]
    )


def sgd(rate):
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


AUGMENTING = (
    lambda: layers.RandomFlip("horizontal"),
    lambda: layers.RandomTranslation(0.1, 0.1, "constant"),
)
ADAM = keras.optimizers.Adam
IMAGES, LETTERS, WORDS = (10_000, 2_000, 10_000), (8_000, 2_000, 10_000), (20_000, 4_000, 20_000)

TASKS = {
    "digits": Task(digits, (700, 198, 899), dense(64), sgd, 0.1, 16, 50),
    "fashion": Task(fashion, IMAGES, residual(), sgd, 0.1, 64, 30),
    "fashion_augmented": Task(fashion, IMAGES, residual(*AUGMENTING), sgd, 0.1, 64, 30),
    "letter_sgd": Task(letter, LETTERS, dense(16), sgd, 0.1, 64, 40),
    "letter_adam": Task(letter, LETTERS, dense(16), ADAM, 1e-3, 64, 40),
    "words": Task(words, WORDS, recurrent, sgd, 0.1, 64, 20),
    "words_adam": Task(words, WORDS, recurrent, ADAM, 2e-3, 64, 20),
}
