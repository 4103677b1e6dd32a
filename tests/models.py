"""Models and members that several test files use."""

import keras
import numpy as np

from snapshot_ensemble import Snapshot, SnapshotEnsemble

layers = keras.layers

# Arguments of `dense` for each task, and the combinations that make sense for it.
TASKS = {
    "softmax": ("sparse_categorical_crossentropy", 3, "softmax"),
    "logits": (keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None),
    "sigmoid": ("binary_crossentropy", 1, "sigmoid"),
    "log-odds": (keras.losses.BinaryCrossentropy(from_logits=True), 1, None),
    "multilabel": ("binary_crossentropy", 3, "sigmoid"),
    "regression": ("mse", 2, None),
}
COMBINATIONS = [
    (task, combine)
    for task in TASKS
    for combine in ("mean", "vote", "weighted", "geometric", "median")
    if combine not in (("vote", "geometric") if task == "regression" else ("median",))
]


def ensemble_of(model, count=3, *, shared=lambda variable: False, **arguments):
    """An ensemble of members with random weights, except for `shared` ones."""
    rng = np.random.default_rng(0)
    ens = SnapshotEnsemble(model, **arguments)
    own = model.get_weights()
    for index in range(count):
        weights = [
            # Positive where it is a variance, and small enough to keep outputs apart.
            array
            if shared(v)
            else np.abs(rng.normal(0, 0.5, array.shape)).astype(array.dtype)
            if "variance" in v.name
            else rng.normal(0, 0.5, array.shape).astype(array.dtype)
            for v, array in zip(model.weights, own, strict=True)
        ]
        ens._store.add_weights(weights, Snapshot(index))
    return ens


def dense(loss="sparse_categorical_crossentropy", units=3, activation="softmax"):
    """A dense Functional model, compiled."""
    inputs = keras.Input((4,), name="features")
    hidden = layers.Dense(6, "tanh")(inputs)
    model = keras.Model(inputs, layers.Dense(units, activation, name="answer")(hidden))
    model.compile("sgd", loss)
    return model


def with_backbone(nested, trainable=False):
    """A convolutional backbone with a skip past its border, and a head of 5 x 4 weights.

    Returns the model, and whether a variable is the backbone's.
    """
    inputs = keras.Input((6, 6, 3), name="image")
    body = keras.Input((6, 6, 3)) if nested else inputs
    early = layers.Conv2D(4, 3, padding="same", activation="relu", name="back_conv")(body)
    late = layers.Conv2D(4, 3, padding="same", name="back_late")(early)
    late = layers.BatchNormalization(name="back_norm")(late)
    late = layers.Add()([early, late])
    if nested:
        backbone = keras.Model(body, [early, late], name="backbone")
        early, late = backbone(inputs, training=False)
    mixed = layers.Add()([early, keras.ops.relu(late)])
    pooled = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(mixed))
    model = keras.Model(inputs, layers.Dense(4, "softmax", name="head")(pooled))
    for layer in model._flatten_layers():
        if "back" in layer.name:
            layer.trainable = trainable
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, lambda variable: "back_" in variable.path
