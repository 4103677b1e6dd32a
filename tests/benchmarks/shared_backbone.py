"""Prediction time of an ensemble with a frozen backbone, compared with one of its models.

    python tests/benchmarks/shared_backbone.py

Four ways to run six members: `ens.predict`, the combined model and the SavedModel, which all store
and compute the backbone once, and a loop over the members. Each is timed alternately with one
model; the ratio is the median over the pairs. One model spends most of its time in the backbone's
convolutions, so six heads instead of one make little difference.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

try:
    from benchmarks.builders import random_ensemble
except ImportError:
    from builders import random_ensemble

layers = keras.layers


def transfer_model(size):
    """A frozen convolutional backbone and a trainable head of two dense layers."""
    tensor = backbone_inputs = keras.Input((size, size, 3))
    for filters in (32, 64, 128):
        for _ in range(2):
            tensor = layers.Conv2D(filters, 3, padding="same", use_bias=False)(tensor)
            tensor = layers.ReLU()(layers.BatchNormalization()(tensor))
        tensor = layers.MaxPooling2D()(tensor)
    backbone = keras.Model(
        backbone_inputs, layers.GlobalAveragePooling2D()(tensor), name="backbone"
    )
    backbone.trainable = False
    inputs = keras.Input((size, size, 3), name="image")
    hidden = layers.Dense(64, "relu")(backbone(inputs, training=False))
    model = keras.Model(inputs, layers.Dense(10, "softmax", name="answer")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model, backbone.count_params()


BATCH = 64


def served(ens):
    """A function that predicts in batches with the SavedModel alone."""
    with tempfile.TemporaryDirectory() as folder:
        ens.export(f"{folder}/served", verbose=False)
        model = tf.saved_model.load(f"{folder}/served")

    def predict(x):
        signature = model.signatures["serving_default"]
        parts = [x[i : i + BATCH] for i in range(0, len(x), BATCH)]
        return np.concatenate([signature(image=tf.constant(p))["answer"] for p in parts])

    return predict


def measure(candidates, x, pairs):
    """For each candidate, the median ratio of its prediction time to that of the first."""
    for predict in candidates.values():
        predict(x)  # Traces and warms up.
    first, *others = candidates
    ratios = {name: [] for name in others}
    times = []
    for _ in range(pairs):
        for name in others:
            pair = []
            for one in (first, name):
                start = time.perf_counter()
                candidates[one](x)
                pair.append(time.perf_counter() - start)
            times.append(pair[0])
            ratios[name].append(pair[1] / pair[0])
    return statistics.median(times), {n: statistics.median(r) for n, r in ratios.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--size", type=int, default=32, help="image side in pixels")
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs")
    args = parser.parse_args(argv)
    keras.utils.set_random_seed(0)
    model, in_backbone = transfer_model(args.size)
    ens = random_ensemble(model, args.members)
    x = np.random.default_rng(1).normal(size=(args.rows, args.size, args.size, 3))
    x = x.astype("float32")
    merged, members = ens.to_keras(), list(ens)
    run = {"batch_size": BATCH, "verbose": 0}
    candidates = {
        "one model": lambda x: model.predict(x, **run),
        "ens.predict": lambda x: ens.predict(x, **run),
        "combined model": lambda x: merged.predict(x, **run),
        "SavedModel": served(ens),
        "loop over members": lambda x: np.mean([m.predict(x, **run) for m in members], axis=0),
    }
    for name in candidates.keys() - {"one model"}:
        np.testing.assert_allclose(candidates[name](x[:8]), ens.predict(x[:8], **run), atol=1e-5)
    seconds, ratios = measure(candidates, x, args.pairs)
    head = model.count_params() - in_backbone
    parameters = {
        "one model": model.count_params(),
        "ens.predict": in_backbone + args.members * head,
        "combined model": merged.count_params(),
        "SavedModel": merged.count_params(),
        "loop over members": args.members * model.count_params(),
    }
    print(f"{args.members} members, backbone {in_backbone:,} and head {head:,} parameters, ")
    print(f"{args.rows} rows, medians of {args.pairs} pairs\n")
    print(f"{'':24}{'time / one model':>18}{'parameters':>14}")
    for name, count in parameters.items():
        print(f"{name:24}{ratios.get(name, 1.0):18.2f}{count:14,}")
    print(f"\none model: {seconds:.3f} s")
    return parameters, ratios


if __name__ == "__main__":
    main()
