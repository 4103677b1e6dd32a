"""Kinds of models made of Keras's own layers."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kinds.kind import RATE, RNG, ROWS, X4, Y3, Kind, classes, floats

SPARSE = "sparse_categorical_crossentropy"
MEAN = {"loss": SPARSE}


def compiled(model, loss=SPARSE, metrics=("accuracy",), optimizer=None, **arguments):
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9) if optimizer is None else optimizer
    # XLA takes long to compile; one kind has it.
    arguments.setdefault("jit_compile", False)
    model.compile(optimizer, loss, metrics=list(metrics) or None, **arguments)
    return model


def chain(*inside, head=None, shape=(4,), dtype=None, **arguments):
    """A Sequential model with these layers before its head."""
    head = layers.Dense(3, "softmax") if head is None else head
    return compiled(keras.Sequential([keras.Input(shape, dtype=dtype), *inside, head]), **arguments)


def sequential():
    return chain(layers.Dense(5, "tanh"))


def built_by_a_call():
    model = compiled(keras.Sequential([layers.Dense(5, "tanh"), layers.Dense(3, "softmax")]))
    model(np.zeros((3, 4), "float32"))
    return model


def functional():
    inputs = keras.Input((4,), name="features")
    hidden = layers.Dense(4, "relu")(inputs)
    outputs = layers.Dense(3, "softmax", name="answer")(layers.add([inputs, hidden]))
    return compiled(keras.Model(inputs, outputs))


def two_lists():
    inputs = [keras.Input((4,), name="left"), keras.Input((3,), name="right")]
    joined = layers.Concatenate()(inputs)
    outputs = [
        layers.Dense(3, "softmax", name="kind")(joined),
        layers.Dense(1, name="size")(joined),
    ]
    return compiled(keras.Model(inputs, outputs), [SPARSE, "mse"], [])


def two_dicts():
    inputs = {"left": keras.Input((4,), name="left"), "right": keras.Input((3,), name="right")}
    joined = layers.Concatenate()([inputs["left"], inputs["right"]])
    outputs = {
        "kind": layers.Dense(3, "softmax", name="kind")(joined),
        "size": layers.Dense(1, name="size")(joined),
    }
    return compiled(keras.Model(inputs, outputs), {"kind": SPARSE, "size": "mse"}, [])


def nested():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, "tanh"), layers.Dropout(0.2)])
    inputs = keras.Input((4,))
    middle = keras.Model(inputs, inner(inputs))
    outer = keras.Input((4,))
    return compiled(keras.Model(outer, layers.Dense(3, "softmax")(middle(outer))))


def shared():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    tower = layers.Dense(5, "tanh")
    joined = layers.Subtract()([tower(left), tower(right)])
    return compiled(keras.Model([left, right], layers.Dense(3, "softmax")(joined)))


def normalised():
    return chain(layers.Dense(6, "relu"), layers.BatchNormalization(), layers.Dropout(0.3))


def logits():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return chain(layers.Dense(5, "tanh"), head=layers.Dense(3), loss=loss)


def binary():
    return chain(head=layers.Dense(1, "sigmoid"), loss="binary_crossentropy")


def log_odds():
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    return chain(head=layers.Dense(1), loss=loss, metrics=())


def multilabel():
    return chain(head=layers.Dense(3, "sigmoid"), loss="binary_crossentropy", metrics=("AUC",))


def regression():
    return chain(layers.Dense(5, "tanh"), head=layers.Dense(2), loss="mse", metrics=("mae",))


def masked_sequence():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.Embedding(9, 4, mask_zero=True)(inputs)
    hidden = layers.Bidirectional(layers.LSTM(3))(hidden)
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


def masked_tokens():
    inputs = keras.Input((6,), dtype="int32")
    hidden = layers.GRU(4, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(inputs))
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


def stateful():
    inputs = keras.Input(batch_shape=(8, 5, 2))
    hidden = layers.GRU(4, stateful=True)(inputs)
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


def always_dropping():
    inputs = keras.Input((4,))
    hidden = layers.Dropout(0.5)(layers.Dense(16, "relu")(inputs), training=True)
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden)), "mse", [])


def augmented():
    first = [layers.RandomFlip(), layers.RandomTranslation(0.2, 0.2), layers.GaussianNoise(0.1)]
    return chain(*first, layers.Conv2D(3, 3, strides=2), layers.Flatten(), shape=(6, 6, 2))


def augmented_by_training_true():
    inputs = keras.Input((6, 6, 2))
    hidden = layers.Flatten()(layers.RandomFlip(seed=3)(inputs, training=True))
    return compiled(keras.Model(inputs, layers.Dense(2)(hidden)), "mse", [])


def with_lora():
    first = layers.Dense(5, "tanh")
    model = chain(first)
    first.enable_lora(2)
    return compiled(model)


def frozen():
    first = layers.Dense(5, "tanh", trainable=False)
    return chain(first, layers.Dense(4, "relu"))


def in_half_precision():
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        return chain(layers.Dense(5, "tanh"), head=layers.Dense(3, "softmax", dtype="float32"))
    finally:
        keras.mixed_precision.set_dtype_policy(policy)


def with_ema():
    return chain(
        layers.Dense(5, "tanh"),
        optimizer=keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=0.9),
    )


def with_adam():
    return chain(
        layers.Dense(5, "tanh"),
        layers.BatchNormalization(),
        optimizer=keras.optimizers.AdamW(RATE, clipnorm=1.0, gradient_accumulation_steps=2),
    )


def with_penalties():
    first = layers.Dense(5, "tanh", kernel_regularizer="l2", activity_regularizer="l1")
    return chain(first, head=layers.Dense(2), loss="mse", metrics=())


def depending_rows():
    return chain(layers.Dense(4), layers.UnitNormalization(axis=0), layers.Softmax(axis=0))


def strided():
    inputs = keras.Input((None, 2))
    hidden = layers.Conv1D(3, 9, strides=4)(inputs)
    hidden = layers.Conv1D(3, 5, strides=2)(hidden)
    return compiled(
        keras.Model(inputs, layers.Dense(3, "softmax")(layers.GlobalMaxPooling1D()(hidden)))
    )


def integer_ids():
    """An id of each row goes through beside the prediction."""
    inputs = {"id": keras.Input((), dtype="int64", name="id"), "x": keras.Input((4,), name="x")}
    outputs = {
        "id": layers.Lambda(lambda ids: ids, name="same_id")(inputs["id"]),
        "p": layers.Dense(3, "softmax", name="p")(inputs["x"]),
    }
    return compiled(keras.Model(inputs, outputs), {"id": None, "p": SPARSE}, [])


def text():
    words = layers.TextVectorization(10, output_sequence_length=4)
    words.adapt(TEXTS)
    inputs = keras.Input((), dtype="string", name="a-b.c")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(12, 4)(words(inputs)))
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


def looked_up():
    lookup = layers.StringLookup(vocabulary=["a", "b", "c"], num_oov_indices=0)
    inputs = keras.Input((1,), dtype="string", name="word")
    hidden = layers.Flatten()(layers.Embedding(3, 4)(lookup(inputs)))
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(hidden)))


def several_steps_at_once():
    return chain(layers.Dense(5, "tanh"), steps_per_execution=2)


def compiled_by_xla():
    return chain(layers.Dense(5, "tanh"), jit_compile=True)


def overlapping():
    return chain(head=layers.Dense(3, "sigmoid"), loss=keras.losses.Dice(), metrics=())


def vector_metrics():
    return chain(
        layers.Dense(5), loss="categorical_crossentropy", metrics=[keras.metrics.F1Score()]
    )


def constant_arguments():
    """Two constants of many elements that differ only in the middle."""
    first = np.ones((1, 4000), "float32")
    second = first.copy()
    second[0, 1800:2200] = -1
    inputs = keras.Input((4000,))
    parts = [
        layers.Dense(2)(layers.Multiply()([inputs, keras.ops.convert_to_tensor(each)]))
        for each in (first, second)
    ]
    return compiled(keras.Model(inputs, layers.Dense(3, "softmax")(layers.Concatenate()(parts))))


def named_cycle():
    metric = keras.metrics.SparseCategoricalAccuracy(name="cycle")
    return chain(layers.Dense(5, "tanh"), metrics=[metric])


def double_precision():
    return chain(
        layers.Dense(5, "tanh", dtype="float64"), head=layers.Dense(3, "softmax", dtype="float64")
    )


TEXTS = tf.constant(["a b c", "b d", "c c a e"] * (ROWS // 3))
TOKENS = RNG.integers(1, 9, (ROWS, 6)) * (np.arange(6) < RNG.integers(2, 7, (ROWS, 1)))
IDS = 2**24 + np.arange(ROWS, dtype="int64")
PAIR = [floats(4), floats(3)]
MIXED = {"kind": Y3, "size": floats(1)}
MIXED_MEANING = {"kind": "probabilities", "size": "values"}

STOCK = [
    Kind("Sequential", sequential, **MEAN),
    Kind("Sequential, built by a call", built_by_a_call, **MEAN),
    Kind("Functional", functional, **MEAN),
    Kind(
        "two inputs and outputs, lists",
        two_lists,
        PAIR,
        list(MIXED.values()),
        meaning=list(MIXED_MEANING.values()),
    ),
    Kind(
        "two inputs and outputs, dicts",
        two_dicts,
        dict(zip(("left", "right"), PAIR, strict=True)),
        MIXED,
        meaning=MIXED_MEANING,
    ),
    Kind("nested", nested, **MEAN),
    Kind("a shared layer", shared, [X4, floats(4)], **MEAN),
    Kind("BatchNormalization", normalised, is_averaged=False, **MEAN),
    Kind(
        "logits",
        logits,
        meaning="log-probabilities",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
    Kind("sigmoid", binary, X4, classes(2, 1), loss="binary_crossentropy"),
    Kind(
        "log-odds",
        log_odds,
        X4,
        classes(2, 1),
        meaning="log-odds",
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
    ),
    Kind("multilabel", multilabel, X4, classes(2, 3), loss="binary_crossentropy"),
    Kind("regression", regression, X4, floats(2), meaning="values", loss="mse"),
    Kind("masked LSTM", masked_sequence, TOKENS, **MEAN),
    Kind("masked tokens", masked_tokens, TOKENS, classes(3, 6)),
    Kind("stateful GRU", stateful, floats(5, 2), is_stateful=True, **MEAN),
    Kind(
        "Dropout(training=True)",
        always_dropping,
        X4,
        floats(2),
        meaning="values",
        is_random=True,
    ),
    Kind("random preprocessing", augmented, floats(6, 6, 2), **MEAN),
    Kind(
        "RandomFlip(training=True)",
        augmented_by_training_true,
        floats(6, 6, 2),
        floats(2),
        meaning="values",
        is_random=True,
    ),
    Kind("LoRA", with_lora, is_averaged=False, **MEAN),
    Kind("frozen layer", frozen, **MEAN),
    Kind("mixed precision", in_half_precision, tolerance=5e-3, **MEAN),
    Kind("EMA", with_ema, **MEAN),
    Kind("AdamW, accumulated", with_adam, is_averaged=False, tolerance=1e-4, **MEAN),
    Kind("penalties", with_penalties, X4, floats(2), meaning="values"),
    Kind("rows that depend on each other", depending_rows),
    Kind("strided Conv1D, open length", strided, floats(40, 2), **MEAN),
    Kind(
        "integer ids beside",
        integer_ids,
        {"id": IDS, "x": X4},
        {"id": IDS, "p": Y3},
        meaning={"id": "same", "p": "probabilities"},
    ),
    Kind("TextVectorization", text, TEXTS, **MEAN),
    Kind("StringLookup without OOV", looked_up, tf.constant([["a"], ["b"], ["c"]] * 8), **MEAN),
    Kind("steps_per_execution", several_steps_at_once, **MEAN),
    Kind("jit_compile", compiled_by_xla, **MEAN),
    Kind("Dice", overlapping, X4, classes(2, 3).astype("float32")),
    Kind("F1Score", vector_metrics, X4, np.eye(3, dtype="float32")[Y3]),
    Kind("constants as arguments", constant_arguments, floats(4000), **MEAN),
    Kind("a metric named cycle", named_cycle, **MEAN),
    Kind("float64", double_precision, **MEAN),
]
