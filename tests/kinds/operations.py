"""The operations of the matrix: what each must give, and what it gives."""

import functools

import keras
import numpy as np

from kinds.exports import exported, exported_by_keras, served_rows
from kinds.kind import BATCH, CYCLES, combined, first_rows, probabilities
from kinds.verdicts import Operation, Skip, assert_alike, assert_bitwise

PREDICT = {"verbose": 0, "batch_size": BATCH}


def assert_same_statistics(case, actual, expected):
    """Two samples of random outputs have the same mean and spread, and differ draw by draw."""
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    for one, other in pairs:
        one, other = np.asarray(one, "float64"), np.asarray(other, "float64")  # noqa: PLW2901
        assert one.shape[1:] == other.shape[1:], f"shape {one.shape}, not {other.shape}"
        count = min(len(one), len(other))
        error = np.sqrt((one.var(0) + other.var(0)) / count) + 1e-6
        distance = np.max(np.abs(one.mean(0) - other.mean(0)) / error)
        assert distance < 6, f"the means are {distance:.1f} standard errors apart"
        # Keras draws nothing in layers that were recorded with `training=True`, but rounds.
        spread = (one.std(0).mean() + 1e-6) / (other.std(0).mean() + 1e-6)
        assert 0.75 < spread < 1.33, f"the spread is {spread:.2f} times that of Keras"


def drawn(case, predict, draws=40):
    """Many predictions for the first row, one after another."""
    row = keras.tree.map_structure(lambda array: np.repeat(array[:1], BATCH, 0), case.kind.x)
    outputs = [predict(row) for _ in range(draws)]
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *outputs)


def drawn_by_keras(case):
    models = [case.copy(number) for number in range(CYCLES)]
    for number, model in enumerate(models):
        for _ in range(number):  # Copies have the same seed: each begins at another draw.
            model.predict(case.kind.x, **PREDICT)
    return drawn(
        case,
        lambda x: combined(case.kind.meaning, [model.predict(x, **PREDICT) for model in models]),
    )


def expected_mean(case):
    return drawn_by_keras(case) if case.kind.is_random else case.mean


def expected_of_served(case):
    return drawn_by_keras(case) if case.kind.is_random else case.served


def compare_outputs(case, actual, expected):
    compare = assert_same_statistics if case.kind.is_random else assert_alike
    compare(case, actual, expected)


def predictions(get):
    """The predictions of what `get` returns for a case: an ensemble, or a model."""

    def predict(case):
        model = get(case)
        if case.kind.is_random:
            return drawn(case, lambda x: model.predict(x, **PREDICT))
        return model.predict(case.kind.x, **PREDICT)

    return predict


def unless_random(function):
    @functools.wraps(function)
    def run(case):
        if case.kind.is_random:
            raise Skip("its outputs are drawn at random")
        return function(case)

    return run


def expected_uncertainty(case):
    """The uncertainty of a single output, by its definition."""
    meaning = case.kind.meaning
    if not isinstance(meaning, str) or meaning == "same":
        raise Skip("several outputs, or none to average")
    stacked = np.stack([np.asarray(each, "float64") for each in case.outputs])
    mean = combined(meaning, case.outputs)
    if meaning == "values":
        return {"mean": mean, "std": stacked.std(0)}
    p = probabilities(meaning, stacked)
    is_binary = meaning == "log-odds" or p.shape[-1] == 1 or not np.allclose(p.sum(-1), 1)
    total, aleatoric = entropy(p.mean(0), is_binary), entropy(p, is_binary).mean(0)
    parts = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
    return {"mean": mean, **parts}


def entropy(p, is_binary):
    p = np.clip(p, 1e-300, 1)
    if is_binary:
        q = np.clip(1 - p, 1e-300, 1)
        return -(p * np.log(p) + q * np.log(q))
    return -(p * np.log(p)).sum(-1)


def plain_scores(case, number=-1):
    model = case.copy(number)
    return model.evaluate(case.kind.trained_on, case.kind.y, return_dict=True, **PREDICT)


def evaluated(case, ens, **arguments):
    data = (case.kind.trained_on, case.kind.y)
    return ens.evaluate(*data, return_dict=True, **PREDICT, **arguments)


def loss_of_the_mean(case):
    if case.kind.loss is None:
        raise Skip("its loss is not one of the mean of its rows")
    loss = keras.losses.get(case.kind.loss)
    rows = loss(case.kind.y, keras.ops.convert_to_tensor(case.mean.astype("float32")))
    return float(np.mean(rows))


def assert_scores_alike(case, actual, expected):
    assert actual.keys() == expected.keys(), f"{sorted(actual)}, not {sorted(expected)}"
    names = sorted(actual)
    wide = [np.asarray(scores[name], "float64") for scores in (actual, expected) for name in names]
    for name, one, other in zip(names, wide[: len(names)], wide[len(names) :], strict=True):
        limit = {"rtol": 10 * case.kind.tolerance, "atol": 10 * case.kind.tolerance}
        np.testing.assert_allclose(one, other, **limit, err_msg=name)


def expected_rows(case):
    """The compiled metrics of each member, as Keras evaluates them."""
    rows = {}
    for number in range(CYCLES):
        scores = plain_scores(case, number)
        rows[f"member {number}"] = {k: v for k, v in scores.items() if not k.endswith("loss")}
    return rows


def assert_in_report(case, report, expected):
    """Each compiled metric of a member is in its row, or the report says that it is left out."""
    said = str(report)
    says_so = "[k].evaluate" in said or "no columns for the compiled" in said
    for name, scores in expected.items():
        row = report.rows[name]
        kept = {key: value for key, value in scores.items() if key in row or not says_so}
        assert_scores_alike(case, {key: row.get(key, np.nan) for key in kept}, kept)


def member_outputs(case):
    return keras.tree.map_structure(lambda *arrays: np.stack(arrays), *case.outputs)


def members_weights(case):
    return [member.get_weights() for member in case.ens]


def assert_served(case, actual, expected):
    """What is served is what `predict` returns or, as in Keras, what `model(x)` does."""
    try:
        assert_alike(case, actual, expected)
    except AssertionError:
        if case.kind.called is None:
            raise
        assert_alike(case, actual, case.mean_of_calls())


def expected_of_saved(case):
    if not case.saved_by_keras():
        raise Skip("a layer of this kind saves something else than its variables")
    return case.served


def assert_called(case, actual, expected):
    """A call is one of the model or, if it has its own, one of `predict_step`."""
    if case.kind.called is not None:
        expected = first_rows(case.mean, BATCH)
    assert_alike(case, actual, expected)


def compare_merged(case, actual, expected):
    compare = assert_same_statistics if case.kind.is_random else assert_served
    compare(case, actual, expected)


def if_annealed(function):
    """What Keras gives, if it is Keras's optimizer that trains."""

    def run(case):
        if case.kind.has_own_rate:
            raise ValueError("An annealed rate would have no effect.")
        return function(case)

    return run


def annealed(case):
    ens = case.ensemble(lr_min=0.0)
    ens.fit(case.kind.trained_on, case.kind.y, epochs=4, batch_size=BATCH, verbose=0)
    return [member.get_weights() for member in ens]


def each_member(case):
    return [member.predict(case.kind.x, **PREDICT) for member in case.ens]


OPERATIONS = [
    Operation("fit", if_annealed(lambda c: c.weights), lambda c: c.fitted[1], assert_bitwise),
    Operation("anneal", if_annealed(lambda c: c.annealed_weights), annealed, assert_alike),
    Operation("predict", expected_mean, predictions(lambda c: c.ens), compare_outputs),
    Operation(
        "call",
        unless_random(lambda c: c.mean_of_calls(BATCH)),
        lambda c: c.one_call(),
        assert_called,
    ),
    Operation("weights", lambda c: c.weights, members_weights, assert_bitwise),
    Operation("members", unless_random(lambda c: c.outputs), each_member, assert_alike),
    Operation(
        "predict_members",
        unless_random(member_outputs),
        lambda c: c.ens.predict_members(c.kind.x, **PREDICT),
        assert_alike,
    ),
    Operation(
        "memory_limit",
        unless_random(lambda c: c.mean),
        lambda c: c.under_memory_limit(),
        assert_alike,
    ),
    Operation(
        "uncertainty",
        unless_random(expected_uncertainty),
        lambda c: c.ens.predict_uncertainty(c.kind.x, **PREDICT),
        assert_alike,
    ),
    Operation(
        "evaluate",
        unless_random(loss_of_the_mean),
        lambda c: evaluated(c, c.ens)["loss"],
        assert_alike,
        may_warn="evaluate",
    ),
    Operation(
        "evaluate one",
        unless_random(plain_scores),
        lambda c: evaluated(c, c.ens, members=[-1]),
        assert_scores_alike,
        may_warn="evaluate",
    ),
    Operation(
        "member.evaluate",
        unless_random(plain_scores),
        lambda c: evaluated(c, c.ens[-1]),
        assert_scores_alike,
    ),
    Operation(
        "report",
        unless_random(expected_rows),
        lambda c: c.ens.report(c.kind.trained_on, c.kind.y, verbose=0, batch_size=BATCH),
        assert_in_report,
        may_warn="evaluate",
    ),
    Operation("save, load", unless_random(lambda c: c.mean), lambda c: c.reloaded(), assert_alike),
    Operation("resume", if_annealed(lambda c: c.weights), lambda c: c.resumed(), assert_alike),
    Operation(
        "to_keras", expected_of_served, predictions(lambda c: c.ens.to_keras()), compare_merged
    ),
    Operation(
        "to_keras, saved",
        unless_random(expected_of_saved),
        lambda c: c.saved_keras_model(),
        assert_served,
    ),
    Operation(
        "average_weights",
        unless_random(lambda c: c.averaged()),
        lambda c: c.ens.average_weights().predict(c.kind.x, **PREDICT),
        assert_alike,
    ),
    *(
        Operation(
            name,
            unless_random(served_rows),
            lambda c, name=name: exported(c, name),
            assert_served,
            in_keras=lambda c, name=name: exported_by_keras(c, name),
        )
        for name in ("tf_saved_model", "onnx", "litert", "openvino")
    ),
]
