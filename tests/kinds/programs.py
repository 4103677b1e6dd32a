"""Small programs of the kinds that Keras's own examples show, each written anew."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from kinds.kind import RNG, ROWS, X4, Y3, Kind, classes, floats
from kinds.stock import MEAN, TOKENS, compiled


class Patches(layers.Layer):
    """Cuts images into patches; its config lacks the argument."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, images):
        patches = ops.image.extract_patches(images, size=self.size)
        return ops.reshape(patches, (-1, 4, patches.shape[-1]))


class PatchEncoder(layers.Layer):
    """Projects patches and adds an embedding of their positions."""

    def __init__(self, count, width):
        super().__init__()
        self.count = count
        self.projection = layers.Dense(width)
        self.positions = layers.Embedding(count, width)

    def call(self, patches):
        return self.projection(patches) + self.positions(ops.arange(self.count))


def vision_transformer():
    inputs = keras.Input((6, 6, 2))
    hidden = layers.RandomFlip("horizontal")(inputs)
    hidden = PatchEncoder(4, 6)(Patches(3)(hidden))
    normed = layers.LayerNormalization()(hidden)
    hidden = layers.Add()([layers.MultiHeadAttention(2, 3, dropout=0.1)(normed, normed), hidden])
    outputs = layers.Dense(3, "softmax")(layers.Flatten()(hidden))
    return compiled(keras.Model(inputs, outputs))


class Trees(keras.Model):
    """A decision tree of soft splits, each of features that are drawn in the constructor."""

    def __init__(self, depth=2, features=4, used=2):
        super().__init__()
        self.depth, leaves = depth, 2**depth
        chosen = np.random.choice(features, used, replace=False)  # noqa: NPY002
        self.mask = np.eye(features, dtype="float32")[chosen]
        self.classes = self.add_weight(shape=(leaves, 3), initializer="random_normal")
        self.splits = layers.Dense(leaves, "sigmoid")

    def call(self, features):
        chosen = ops.matmul(features, ops.transpose(self.mask))
        splits = ops.expand_dims(self.splits(chosen), 2)
        splits = ops.concatenate([splits, 1 - splits], 2)
        reached = ops.ones_like(splits[:, :1, 0:1])
        for level in range(self.depth):
            now = splits[:, 2**level : 2 ** (level + 1)]
            reached = ops.reshape(ops.tile(reached, (1, 1, 2)) * now, (-1, 2 ** (level + 1), 1))
        return ops.matmul(reached[..., 0], ops.softmax(self.classes))


def neural_decision_tree():
    inputs = {name: keras.Input((), name=name) for name in ("a", "b", "c", "d")}
    features = ops.stack(list(inputs.values()), axis=1)
    return compiled(keras.Model(inputs, Trees()(layers.BatchNormalization()(features))))


def wide_and_deep():
    inputs = {
        "age": keras.Input((1,), name="age"),
        "job": keras.Input((1,), dtype="string", name="job"),
        "level": keras.Input((1,), dtype="int64", name="level"),
    }
    job = layers.StringLookup(vocabulary=["x", "y", "z"], num_oov_indices=0)(inputs["job"])
    level = layers.IntegerLookup(vocabulary=[10, 20], num_oov_indices=0)(inputs["level"])
    wide = [
        layers.CategoryEncoding(3, "one_hot")(job),
        layers.CategoryEncoding(2, "one_hot")(level),
    ]
    deep = layers.Concatenate()([layers.Flatten()(layers.Embedding(3, 2)(job)), inputs["age"]])
    deep = layers.Dropout(0.2)(layers.Dense(5, "relu")(layers.BatchNormalization()(deep)))
    outputs = layers.Dense(1, "sigmoid")(layers.Concatenate()([*wide, deep]))
    return compiled(keras.Model(inputs, outputs), "binary_crossentropy")


def feature_space():
    kinds = keras.utils.FeatureSpace
    space = kinds(
        features={"age": kinds.float_normalized(), "job": kinds.string_categorical()},
        output_mode="concat",
    )
    table = {"age": FEATURES["age"][:, 0], "job": FEATURES["job"][:, 0]}
    space.adapt(tf.data.Dataset.from_tensor_slices(table))
    outputs = layers.Dense(1, "sigmoid")(space.get_encoded_features())
    return compiled(keras.Model(space.get_inputs(), outputs), "binary_crossentropy")


class OpticalLoss(layers.Layer):
    """The connectionist loss of labels that are an input of the model."""

    def call(self, labels, outputs):
        count = ops.shape(labels)[0]
        lengths = [ops.full((count,), each.shape[1], "int32") for each in (labels, outputs)]
        logs = ops.log(outputs + 1e-7)
        self.add_loss(ops.mean(ops.ctc_loss(labels, logs, *lengths)))
        return outputs


def text_recognition():
    images, labels = (
        keras.Input((8, 4), name="image"),
        keras.Input((3,), dtype="int32", name="label"),
    )
    hidden = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(images)
    outputs = OpticalLoss(name="ctc")(labels, layers.Dense(5, "softmax")(hidden))
    model = keras.Model({"image": images, "label": labels}, outputs)
    model.compile(keras.optimizers.SGD(0.05), jit_compile=False)
    return model


class TokenLoss(keras.losses.Loss):
    """The loss of the tokens that are not padding."""

    def call(self, y, outputs):
        losses = keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)
        kept = ops.cast(y > 0, losses.dtype)
        return ops.sum(losses * kept) / ops.maximum(ops.sum(kept), 1.0)


class TokenEmbedding(layers.Layer):
    """Tokens and their positions, embedded and added."""

    def __init__(self, length, size, width, **arguments):
        super().__init__(**arguments)
        self.tokens, self.positions = layers.Embedding(size, width), layers.Embedding(length, width)

    def call(self, tokens):
        return self.tokens(tokens) + self.positions(ops.arange(tokens.shape[-1]))


class EntityRecognition(keras.Model):
    """Tags each token; ends in logits."""

    def __init__(self):
        super().__init__()
        self.embedding = TokenEmbedding(6, 9, 4)
        self.attention, self.head = layers.MultiHeadAttention(2, 2), layers.Dense(4)

    def call(self, tokens, training=False):
        hidden = self.embedding(tokens)
        return self.head(self.attention(hidden, hidden, training=training))


def entity_recognition():
    return compiled(EntityRecognition(), TokenLoss(), [])


class Recommender(keras.Model):
    """Scores a user and a film by the product of their embeddings."""

    def __init__(self):
        super().__init__()
        self.users, self.films = layers.Embedding(9, 3), layers.Embedding(9, 3)
        self.bias = layers.Embedding(9, 1)

    def call(self, pairs):
        users, films = self.users(pairs[:, 0]), self.films(pairs[:, 1])
        product = ops.sum(users * films, axis=1, keepdims=True)
        return ops.sigmoid(product + self.bias(pairs[:, 1]))


def recommender():
    return compiled(Recommender(), "binary_crossentropy", [])


def siamese():
    tower = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), layers.Dense(3)])
    inputs = [keras.Input((4,), name="one"), keras.Input((4,), name="other")]

    def distance(vectors):
        one, other = vectors
        total = ops.sum(ops.square(one - other), axis=1, keepdims=True)
        return ops.sqrt(ops.maximum(total, 1e-7))

    merged = layers.Lambda(distance, output_shape=(1,))([tower(each) for each in inputs])
    outputs = layers.Dense(1, "sigmoid")(layers.BatchNormalization()(merged))
    return compiled(keras.Model(inputs, outputs), "binary_crossentropy")


def series_transformer():
    inputs = keras.Input((10, 1))
    hidden = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    residual = layers.LayerNormalization(epsilon=1e-6)(hidden) + inputs
    hidden = layers.Conv1D(1, 1)(layers.Conv1D(4, 1, activation="relu")(residual))
    hidden = layers.GlobalAveragePooling1D(data_format="channels_first")(hidden + residual)
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


class Distiller(keras.Model):
    """Trains a student to predict as its teacher does."""

    def __init__(self):
        super().__init__()
        self.teacher = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        self.teacher.trainable = False
        self.student = keras.Sequential([keras.Input((4,)), layers.Dense(3)])

    def call(self, inputs):
        return self.student(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        own = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        soft = [ops.softmax(each / 3) for each in (self.teacher(x), y_pred)]
        return ops.mean(own) + ops.mean(keras.losses.kl_divergence(*soft))


def distiller():
    return compiled(Distiller(), None, [])


class Contrastive(keras.Model):
    """An encoder that brings two noisy views of a row together."""

    def __init__(self):
        super().__init__()
        self.noise, self.encoder = layers.GaussianNoise(0.3), layers.Dense(3)

    def call(self, inputs):
        return self.encoder(inputs)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            views = [ops.normalize(self.encoder(self.noise(data, training=True))) for _ in range(2)]
            logits = ops.matmul(views[0], ops.transpose(views[1])) / 0.1
            labels = ops.arange(ops.shape(logits)[0])
            loss = ops.mean(
                keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            )
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def contrastive():
    return compiled(Contrastive(), None, [])


def masked_language_model():
    inputs = keras.Input((6,), dtype="int64")
    hidden = TokenEmbedding(6, 9, 4)(inputs)
    hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(2, 2)(hidden, hidden))
    outputs = layers.Dense(9, "softmax", name="words")(hidden)
    return compiled(keras.Model(inputs, outputs), metrics=())


class ConditionalGenerator(keras.Model):
    """An adversarial pair whose generator is told the class; each part has an optimizer."""

    def __init__(self):
        super().__init__()
        self.generator, self.critic = layers.Dense(4), layers.Dense(1)

    def compile(self, generator_optimizer, critic_optimizer):
        super().compile()
        self.optimizers = (generator_optimizer, critic_optimizer)

    def call(self, inputs):
        return self.generator(inputs)

    def train_step(self, data):
        x, y = data
        told = ops.one_hot(y, 3)
        with tf.GradientTape(persistent=True) as tape:
            fake = self.critic(ops.concatenate([self.generator(x), told], 1))
            real = self.critic(ops.concatenate([x, told], 1))
            losses = (-ops.mean(fake), ops.mean(fake) - ops.mean(real))
        for optimizer, loss, part in zip(
            self.optimizers, losses, (self.generator, self.critic), strict=True
        ):
            gradients = tape.gradient(loss, part.trainable_variables)
            optimizer.apply(gradients, part.trainable_variables)
        return {"g_loss": losses[0], "c_loss": losses[1]}


def conditional_generator():
    model = ConditionalGenerator()
    model.critic.build((None, 7))  # A call runs the generator alone.
    model.compile(keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02))
    return model


FEATURES = {
    "age": floats(1),
    "job": tf.constant([["x"], ["y"], ["z"]] * (ROWS // 3)),
    "level": np.array([[10], [20]] * (ROWS // 2)),
}
OF_TREES = {name: X4[:, index] for index, name in enumerate("abcd")}
OCR = {"image": floats(8, 4), "label": RNG.integers(1, 5, (ROWS, 3))}
BINARY = classes(2, 1)

PROGRAMS = [
    Kind("program: vision transformer", vision_transformer, floats(6, 6, 2), Y3, **MEAN),
    Kind(
        "program: neural decision tree",
        neural_decision_tree,
        OF_TREES,
        is_averaged=False,
        custom_objects={"Trees": Trees},
        **MEAN,
    ),
    Kind(
        "program: wide and deep",
        wide_and_deep,
        FEATURES,
        BINARY,
        is_averaged=False,
        loss="binary_crossentropy",
    ),
    Kind(
        "program: FeatureSpace",
        feature_space,
        {name: FEATURES[name] for name in ("age", "job")},
        BINARY,
        loss="binary_crossentropy",
    ),
    Kind(
        "program: text recognition",
        text_recognition,
        OCR,
        None,
        arguments={"task": "multiclass_probabilities"},
        custom_objects={"OpticalLoss": OpticalLoss},
    ),
    Kind(
        "program: entity recognition",
        entity_recognition,
        TOKENS,
        classes(4, 6),
        meaning="log-probabilities",
        arguments={"task": "multiclass_logits"},
    ),
    Kind(
        "program: recommender",
        recommender,
        RNG.integers(0, 9, (ROWS, 2)),
        BINARY,
        loss="binary_crossentropy",
    ),
    Kind(
        "program: siamese",
        siamese,
        [X4, floats(4)],
        BINARY,
        is_averaged=False,
        loss="binary_crossentropy",
    ),
    Kind("program: series transformer", series_transformer, floats(10, 1), **MEAN),
    Kind(
        "program: distiller",
        distiller,
        meaning="log-probabilities",
        arguments={"task": "multiclass_logits"},
    ),
    Kind(
        "program: contrastive",
        contrastive,
        y=None,
        meaning="values",
        arguments={"task": "regression"},
    ),
    Kind(
        "program: masked language model",
        masked_language_model,
        TOKENS,
        TOKENS,
        custom_objects={"TokenEmbedding": TokenEmbedding},
    ),
    Kind(
        "program: conditional generator",
        conditional_generator,
        meaning="values",
        has_own_rate=True,
        arguments={"task": "regression"},
    ),
]
