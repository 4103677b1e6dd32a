"""The tasks of `accuracy.py`: real data from packages, and a model for each.

Data that are not in scikit-learn are in Debian packages, which need not be installed:
`apt-get download`, then `dpkg -x FILE.deb FOLDER`, then pass `--root FOLDER`.

- `digits`, `digits_conv`, `digits_conv_augmented`: in scikit-learn
- `digits_transfer`: the digits 5 to 9, by a network that was trained on 0 to 4
- `fashion`, `fashion_augmented`: `dataset-fashion-mnist`
- `letter_sgd`, `letter_adam`, `satellite`, `dna`: `r-cran-mlbench`, read with `pip install rdata`
- `boston`, the value of houses, a regression: `r-cran-mlbench`, too
- `words`, `words_attention`, classifying the language of a word: `wamerican`, `wngerman`,
  `wfrench`, `witalian`, `wspanish` and `wdutch`
"""

import dataclasses
import functools
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
    """A data set with its model and the settings to train it.

    Attributes:
        load: Takes the folder of the packages; returns the inputs and labels of all rows.
        classes: The number of classes.
        split: The numbers of training, validation and test rows.
        net: Takes the number of classes; returns the model.
        optimizer: Takes the peak learning rate; returns the optimizer.
        peak: The peak learning rate.
        batch: The batch size.
        epochs: The budget.
        loss: The compiled loss.
    """

    load: Callable[[pathlib.Path], tuple[np.ndarray, np.ndarray]]
    classes: int
    split: tuple[int, int, int]
    net: Callable[[int], keras.Model]
    optimizer: Callable[[float], Any]
    peak: float
    batch: int
    epochs: int
    loss: str = "sparse_categorical_crossentropy"

    def parts(self, root):
        """The inputs and labels of the training, validation and test data."""
        x, y = self.load(pathlib.Path(root))
        ends = np.cumsum((0, *self.split))
        return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]

    def model(self):
        model = self.net(self.classes)
        model.compile(self.optimizer(self.peak), self.loss)
        return model


def digits(root):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return (x[order] / 16).astype("float32"), y[order]


def fashion(root):
    """The first 12,000 training images (10,000 train, 2,000 validate), and the test images."""
    folder = root / "usr/share/datasets/fashion-mnist"

    def read(name):
        data = gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes())
        shape = np.frombuffer(data, ">i4", data[3], offset=4)
        return np.frombuffer(data, "uint8", offset=4 + 4 * data[3]).reshape(shape)

    x = np.concatenate([read("train-images-idx3")[:12_000], read("t10k-images-idx3")])
    y = np.concatenate([read("train-labels-idx1")[:12_000], read("t10k-labels-idx1")])
    return x[..., None].astype("float32") / 255, y.astype("int64")


def five_digits(root):
    x, y = digits(root)
    return x[y >= 5], y[y >= 5] - 5


@functools.cache
def pretrained_weights():
    """The weights of `convolutional()`, trained on the digits 0 to 4, without the last layer."""
    x, y = digits(None)
    model = convolutional()(5)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 20 * 56)
    model.compile(sgd(rate), "sparse_categorical_crossentropy")
    model.fit(x[y < 5], y[y < 5], epochs=20, batch_size=16, verbose=0)
    return [layer.get_weights() for layer in model.layers[:-1]]


def pretrained(classes):
    """`convolutional()` with pretrained weights and a new last layer."""
    model = convolutional()(classes)
    for layer, weights in zip(model.layers, pretrained_weights(), strict=False):
        layer.set_weights(weights)
    return model


def boston(root):
    """The logarithm of the median value of houses in 506 parts of a town, from 13 features."""
    import rdata

    path = root / "usr/lib/R/site-library/mlbench/data/BostonHousing.rda"
    table = rdata.read_rda(path)["BostonHousing"]
    y = np.log(table["medv"].to_numpy("float64"))
    x = table.drop(columns="medv").astype("float64").to_numpy("float32")
    order = np.random.default_rng(0).permutation(len(y))
    x, y = x[order], y[order]
    x, y = (x - x[:350].mean(0)) / x[:350].std(0), (y - y[:350].mean()) / y[:350].std()
    return x, y.astype("float32")


def table_of_r(name, labels, rows):
    """A table of features, shuffled with a fixed seed and scaled by its first rows."""

    def read(root):
        import rdata

        table = rdata.read_rda(root / f"usr/lib/R/site-library/mlbench/data/{name}.rda")[name]
        y = np.unique(table[labels].astype(str), return_inverse=True)[1]
        x = table.drop(columns=labels).to_numpy().astype("float32")
        order = np.random.default_rng(0).permutation(len(y))
        x, y = x[order], y[order]
        return (x - x[:rows].mean(0)) / x[:rows].std(0), y

    return read


def words(root):
    """9,000 words from each of six languages, without accents, as letter indices."""
    rng, rows, labels = np.random.default_rng(0), [], []
    names = ("american-english", "ngerman", "french", "italian", "spanish", "dutch")
    for label, name in enumerate(names):
        unique = set()
        for line in (root / "usr/share/dict" / name).read_text("utf-8").split("\n"):
            word = unicodedata.normalize("NFKD", line.split("'")[0].lower())
            word = "".join(c for c in word if not unicodedata.combining(c)).replace("ß", "ss")
            if 3 <= len(word) <= 16 and word.isascii() and word.isalpha():
                unique.add(word)
        listed = sorted(unique)
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
    """Three residual blocks with batch normalisation, after the augmentation layers."""

    def normed(x, filters, size, stride):
        x = layers.Conv2D(filters, size, stride, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def net(classes):
        x = inputs = keras.Input((28, 28, 1))
        for make in augmenting:
            x = make()(x)
        x = layers.ReLU()(normed(x, 16, 3, 1))
        for filters, stride in ((16, 1), (32, 2), (64, 2)):
            y = layers.ReLU()(normed(x, filters, 3, stride))
            past = x if x.shape[1:] == y.shape[1:] else normed(x, filters, 1, stride)
            x = layers.ReLU()(layers.Add()([normed(y, filters, 3, 1), past]))
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(classes, "softmax")(x))

    return net


def convolutional(*augmenting):
    """Two convolutions with batch normalisation, after the augmentation layers."""

    def net(classes):
        inside = [layers.Reshape((8, 8, 1)), *(make() for make in augmenting)]
        for filters, stride in ((16, 1), (32, 2)):
            inside.append(layers.Conv2D(filters, 3, stride, "same", use_bias=False))
            inside += [layers.BatchNormalization(), layers.ReLU()]
        inside += [layers.Flatten(), layers.Dense(classes, "softmax")]
        return keras.Sequential([keras.Input((64,)), *inside])

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


def attention(classes):
    """One block of self-attention over letters, as in a transformer."""
    inputs = keras.Input((16,), dtype="int32")
    place = layers.Embedding(16, 32)(keras.ops.arange(16))
    x = layers.Embedding(27, 32)(inputs) + place
    y = layers.MultiHeadAttention(4, 8, dropout=0.1)(x, x)
    x = layers.LayerNormalization()(x + y)
    y = layers.Dense(32)(layers.Dense(64, "gelu")(x))
    x = layers.LayerNormalization()(x + layers.Dropout(0.1)(y))
    outputs = layers.Dense(classes, "softmax")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs)


def value(_):
    hidden = [layers.Dense(50, "relu") for _ in range(2)]
    return keras.Sequential([keras.Input((13,)), *hidden, layers.Dense(1)])


def sgd(rate):
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=1e-4)


def mirrored():
    return layers.RandomFlip("horizontal")


def shifted():
    return layers.RandomTranslation(0.125, 0.125, "constant")


ADAM = keras.optimizers.Adam
DIGITS, IMAGES = (700, 198, 899), (10_000, 2_000, 10_000)
LETTERS, WORDS = (8_000, 2_000, 10_000), (20_000, 4_000, 20_000)
letter = table_of_r("LetterRecognition", "lettr", 8_000)  # 16 features of printed capital letters.
satellite = table_of_r("Satellite", "classes", 3_000)  # 9 pixels in 4 bands: land use.
dna = table_of_r("DNA", "Class", 1_500)  # 60 bases: splice junctions.

TASKS = {
    "digits": Task(digits, 10, DIGITS, dense(64), sgd, 0.1, 16, 50),
    "digits_conv": Task(digits, 10, DIGITS, convolutional(), sgd, 0.1, 16, 50),
    "digits_conv_augmented": Task(digits, 10, DIGITS, convolutional(shifted), sgd, 0.1, 16, 50),
    "fashion": Task(fashion, 10, IMAGES, residual(), sgd, 0.1, 64, 30),
    "fashion_augmented": Task(fashion, 10, IMAGES, residual(mirrored, shifted), sgd, 0.1, 64, 30),
    "letter_sgd": Task(letter, 26, LETTERS, dense(16), sgd, 0.1, 64, 40),
    "letter_adam": Task(letter, 26, LETTERS, dense(16), ADAM, 1e-3, 64, 40),
    "satellite": Task(satellite, 6, (3_000, 1_000, 2_435), dense(36), sgd, 0.1, 32, 50),
    "dna": Task(dna, 3, (1_500, 400, 1_286), dense(180), sgd, 0.05, 32, 50),
    "words": Task(words, 6, WORDS, recurrent, sgd, 0.1, 64, 20),
    "words_attention": Task(words, 6, (8_000, 2_000, 20_000), attention, ADAM, 2e-3, 64, 20),
    "digits_transfer": Task(five_digits, 5, (200, 100, 590), pretrained, sgd, 0.02, 16, 30),
    "boston": Task(boston, 1, (350, 50, 106), value, ADAM, 5e-3, 16, 50, "mse"),
    "words_adam": Task(words, 6, WORDS, recurrent, ADAM, 2e-3, 64, 20),
}
