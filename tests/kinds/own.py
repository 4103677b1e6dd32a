"""Kinds of models with layers, steps or methods of the user's own."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from kinds.kind import RATE, X4, Y3, Kind, floats
from kinds.stock import MEAN, SPARSE, chain, compiled


class Subclassed(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.hidden = layers.Dense(5, "tanh")
        self.head = layers.Dense(3, "softmax")

    def call(self, inputs, training=False):
        return self.head(self.hidden(inputs))


class OwnTrainStep(Subclassed):
    def train_step(self, data):
        x, y = data
        loss = None

        def total():
            nonlocal loss
            loss = self.compute_loss(x, y, self(x, training=True))
            return loss

        with tf.GradientTape() as tape:
            total()
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


class OwnTestStep(Subclassed):
    def test_step(self, data):
        x, y = data
        loss = 3 * ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x)))
        return {"loss": loss, "own": loss + 1}


class OwnPredict(Subclassed):
    def predict(self, x, **arguments):
        return super().predict(np.asarray(x) * 3, **arguments)


class OwnPredictStep(Subclassed):
    """Ends in logits, and applies the softmax when it predicts."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.head = layers.Dense(3)

    def predict_step(self, data):
        return ops.softmax(super().predict_step(data))


class LabelsPredicted(Subclassed):
    def predict_step(self, data):
        return ops.argmax(super().predict_step(data), axis=-1)


class OwnEvaluate(Subclassed):
    def evaluate(self, x=None, y=None, **arguments):
        return super().evaluate(np.asarray(x) * 3, y, **arguments)


class OwnFit(Subclassed):
    def fit(self, x=None, y=None, **arguments):
        return super().fit(np.asarray(x) * 3, y, **arguments)


class OwnLoss(Subclassed):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return 2 * ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred))


class OwnMetrics(Subclassed):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "largest": ops.max(y_pred)}


class AddedLoss(Subclassed):
    def call(self, inputs, training=False):
        outputs = super().call(inputs)
        self.add_loss(ops.mean(ops.square(outputs)))
        return outputs


class UnreadableConfig(Subclassed):
    def get_config(self):
        raise RuntimeError("this model has no config")


class OwnWeightsFile(Subclassed):
    def save_weights(self, where):
        super().save_weights(where)


class Sampling(layers.Layer):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seed = keras.random.SeedGenerator(5)

    def call(self, inputs):
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seed)


class AutoEncoder(keras.Model):
    """A variational autoencoder: it samples, and adds its own loss."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance = layers.Dense(2), layers.Dense(2)
        self.sampling, self.decoder = Sampling(), layers.Dense(4)

    def call(self, inputs):
        mean, variance = self.mean(inputs), self.variance(inputs)
        self.add_loss(0.1 * ops.mean(ops.square(mean) + ops.exp(variance) - variance - 1))
        return self.decoder(self.sampling(mean))


class StepsOnly(AutoEncoder):
    """The same with its own steps, and a tracker of its loss."""

    def __init__(self):
        super().__init__()
        self.tracker = keras.metrics.Mean(name="own_loss")

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(data - self(data)))
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.tracker.update_state(loss)
        return {"own_loss": self.tracker.result()}


class TwoOptimizers(keras.Model):
    """A generative adversarial pair."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = layers.Dense(4), layers.Dense(1)
        self.one, self.other = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.01)

    def call(self, inputs):
        return self.critic(self.generator(inputs))

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape(persistent=True) as tape:
            fake = self.critic(self.generator(x))
            real = self.critic(x)
            generated, criticised = -ops.mean(fake), ops.mean(fake) - ops.mean(real)
        for optimizer, loss, part in (
            (self.one, generated, self.generator),
            (self.other, criticised, self.critic),
        ):
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply_gradients(zip(gradients, part.trainable_variables, strict=True))
        return {"loss": criticised}


class OwnTrainFunction(Subclassed):
    """Trains with an optimizer of its own, in a loop of its own."""

    def make_train_function(self, force=False):
        own = keras.optimizers.SGD(RATE)

        def train(iterator):
            x, y = next(iterator)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            own.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

        self.train_function = train


class Masked(layers.Layer):
    """Draws a constant in its constructor, as the neural decision tree does."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        # Of the seeded generator, so that a model that is built again has the same.
        self.mask = np.random.normal(size=4).astype("float32")  # noqa: NPY002

    def call(self, inputs):
        return inputs * self.mask


class Patches(layers.Layer):
    """Takes an argument that its config lacks."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, inputs):
        return ops.reshape(inputs, (-1, 4 // self.size, self.size))


class Endpoint(layers.Layer):
    """Adds the loss of the targets, which are an input, as in Keras's OCR example."""

    def call(self, targets, outputs):
        self.add_loss(ops.mean(keras.losses.sparse_categorical_crossentropy(targets, outputs)))
        return outputs


class Rounded(layers.Dense):
    """Saves its weights rounded."""

    def save_own_variables(self, store):
        for index, variable in enumerate(self.variables):
            store[str(index)] = np.round(variable.numpy(), 2)


def of(model, loss=SPARSE, **arguments):
    """A function that makes and compiles a model of a class."""
    return lambda: compiled(model(), loss, **arguments)


def with_a_constant():
    return chain(Masked(), layers.Dense(5, "tanh"))


def without_config():
    return chain(Patches(2), layers.Flatten(), layers.Dense(5, "tanh"))


def with_an_endpoint():
    inputs, targets = keras.Input((4,), name="x"), keras.Input((), dtype="int32", name="y")
    outputs = layers.Dense(3, "softmax")(inputs)
    model = keras.Model({"x": inputs, "y": targets}, Endpoint(name="endpoint")(targets, outputs))
    model.compile(keras.optimizers.SGD(RATE))
    return model


def saved_rounded():
    return chain(Rounded(5, "tanh"))


def with_a_closure():
    factor = 3.0
    return chain(layers.Lambda(lambda x: x * factor), layers.Dense(5, "tanh"))


def with_an_activation():
    return chain(layers.Dense(5, lambda x: ops.tanh(2 * x)))


def with_standardization():
    def lower(texts):
        return tf.strings.lower(texts)

    words = layers.TextVectorization(10, standardize=lower, output_sequence_length=4)
    words.adapt(np.array(["A b c", "b d"]))
    inputs = keras.Input((), dtype="string", name="texts")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(12, 4)(words(inputs)))
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


class FunctionalSubclass(keras.Model):
    """Functional, with a constructor that its config does not fit."""

    def __init__(self, width):
        inputs = keras.Input((4,))
        hidden = layers.Dense(width, "tanh")(inputs)
        super().__init__(inputs, layers.Dense(3, "softmax")(hidden))


def own_loss_function():
    def loss(y, outputs):
        return keras.losses.sparse_categorical_crossentropy(y, outputs)

    return chain(layers.Dense(5), loss=loss)


class Embedder(keras.Model):
    """Metric learning: the loss is on similarities, the output are unit vectors."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return ops.normalize(self.dense(inputs))

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            vectors = self(x)
            similarities = ops.matmul(vectors, ops.transpose(vectors))
            loss = self.compute_loss(y=ops.arange(8), y_pred=similarities)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


PROBABILITIES = {"task": "multiclass_probabilities"}
FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
REGRESSION = {"y": floats(4), "meaning": "values"}

OWN = [
    Kind("subclass", of(Subclassed), **MEAN),
    Kind("own train_step", of(OwnTrainStep, metrics=()), arguments=PROBABILITIES, **MEAN),
    Kind("own test_step", of(OwnTestStep, metrics=())),
    Kind("own predict", of(OwnPredict), called="probabilities"),
    Kind(
        "own predict_step",
        of(OwnPredictStep, FROM_LOGITS),
        called="log-probabilities",
        arguments=PROBABILITIES,
    ),
    Kind("labels predicted", of(LabelsPredicted), meaning="same", called="probabilities"),
    Kind("own evaluate", of(OwnEvaluate)),
    Kind("own fit", of(OwnFit)),
    Kind("own compute_loss", of(OwnLoss), arguments=PROBABILITIES),
    Kind("own compute_metrics", of(OwnMetrics), **MEAN),
    Kind("add_loss", of(AddedLoss)),
    Kind("get_config raises", of(UnreadableConfig), **MEAN),
    Kind("own save_weights", of(OwnWeightsFile), **MEAN),
    Kind(
        "autoencoder that samples", of(AutoEncoder, "mse", metrics=()), is_random=True, **REGRESSION
    ),
    Kind(
        "autoencoder, own steps",
        of(StepsOnly, None, metrics=()),
        y=None,
        meaning="values",
        is_random=True,
        arguments={"task": "regression"},
    ),
    Kind(
        "two optimizers",
        of(TwoOptimizers, "mse", metrics=()),
        arguments={"task": "regression"},
        y=floats(1),
        meaning="values",
        has_own_rate=True,
    ),
    Kind("own make_train_function", of(OwnTrainFunction, metrics=()), has_own_rate=True, **MEAN),
    Kind(
        "a constant drawn in the constructor",
        with_a_constant,
        custom_objects={"Masked": Masked},
        **MEAN,
    ),
    Kind("a layer without config", without_config, custom_objects={"Patches": Patches}, **MEAN),
    Kind(
        "endpoint layer",
        with_an_endpoint,
        {"x": X4, "y": Y3},
        None,
        arguments=PROBABILITIES,
        custom_objects={"Endpoint": Endpoint},
    ),
    Kind("own save_own_variables", saved_rounded, custom_objects={"Rounded": Rounded}, **MEAN),
    Kind("Lambda with a closure", with_a_closure, **MEAN),
    Kind("a lambda as activation", with_an_activation, **MEAN),
    Kind(
        "TextVectorization(standardize=f)",
        with_standardization,
        tf.constant(["a B", "b C d", "c"] * 8),
        **MEAN,
    ),
    Kind(
        "Functional subclass",
        of(lambda: FunctionalSubclass(5)),
        custom_objects={"FunctionalSubclass": FunctionalSubclass},
        **MEAN,
    ),
    Kind("own loss function", own_loss_function, **MEAN),
    Kind("metric learning", of(Embedder, FROM_LOGITS, metrics=()), meaning="values"),
]
