"""The report: scores of each member and each combination on held-out data."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation import conformal_coverage, metrics, refusing
from snapshot_ensemble.evaluation.calibration import learn_temperature, tempered_loss
from snapshot_ensemble.evaluation.chains import (
    chains_told_apart,
    of_chains,
    within_and_between,
)
from snapshot_ensemble.evaluation.held_out import HeldOut
from snapshot_ensemble.evaluation.member_counts import curves_by_members, good_counts
from snapshot_ensemble.evaluation.report_notes import (
    notes_on_compiled,
    notes_on_members,
    notes_on_one_cosine,
)
from snapshot_ensemble.evaluation.targets import of_rows
from snapshot_ensemble.inference.early_exit import COUNTS, Stages, outputs_of
from snapshot_ensemble.storage.record import Learned
from snapshot_ensemble.storage.snapshot import Snapshot
from snapshot_ensemble.tables import text_table


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """Scores on held-out data; shown as a table, both in a terminal and in a notebook.

    Attributes:
        rows: Scores by name, for `"member 0"` …, `"last snapshot"`, `"best member"` (chosen on
            these data), in a merged ensemble the mean of `"chain 0"` …, and each combination. The
            compiled loss and metrics have the values that `evaluate` returns. For classes: `nll`,
            the mean negative log-likelihood in nats without a temperature; `nll_calibrated`, the
            same with a temperature that was fitted on one half of the rows and scored on the
            other; `brier`, the Brier score; `ece`, the expected calibration error of the most
            probable class. For regression: `squared_error`, and for the task `"gaussian"` also
            `nll` and `nll_calibrated`. For members also `disagreement`, the mean over all other
            members. With several outputs, the name of the output comes first. After
            `fit_early_exit`,
            `"early exit"` with its own temperatures in all columns, and `members_run`, the mean
            number of members that run for a row.
        examples: Number of rows of data.
        bins: Number of bins of equal mass in `ece`; 0 without classes.
        temperature: The temperature of the combinations.
        disagreement: For each output by name, the share of items for which each pair of members
            differs in the predicted class; for values the root mean squared difference.
        added_from_last: For each output by name, the error of the mean of the last 1, 2, …
            members: the error rate, or the mean squared error; and the `loss` of these means.
        added_from_first: The same for the first 1, 2, … members.
        worth: The smallest number of last members whose mean is within one standard error (of
            the paired difference) of the best such mean.
        notes: Remarks on the scores, in sentences.
        coverage: After `conformalize`, by the confidence level (and the name of the output, if
            there are several): the share of the targets that lie in their set or interval,
            `coverage`, with its binomial 95 % interval from `low` to `high`, and the mean `size`,
            which is the number of classes of a set, or the width of an interval. Each row counts
            once, however many items it has, and sample weights only where they are 0.
        refusing: For each score of how unsure the mean is (`max_probability`: one minus the largest
            probability; `total`, `epistemic` or `std` as in `predict_uncertainty`; with several
            outputs, after the output's name): `aurc`, the area under the risk-coverage curve, which
            is the mean error rate (for values, the mean squared error) of what is answered, over
            all shares of the items, the surest first; `coverage`, the largest share that can be
            answered at the stated `risk`; `auroc`, the probability that a row from elsewhere has a
            higher score than a known one, and `fpr95`, the share of the known rows that are
            refused by the threshold at which 95 % of those from elsewhere are.
        risk_coverage: For each of these scores the curve, `(2, points)`: coverage and risk.
        chains: The chain of each member of a merged ensemble; empty for any other.
    """

    rows: dict[str, dict[str, Any]]
    examples: int
    bins: int
    temperature: float
    disagreement: dict[str, np.ndarray]
    added_from_last: dict[str, list[float]]
    added_from_first: dict[str, list[float]]
    worth: int
    notes: list[str]
    coverage: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    refusing: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    risk_coverage: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    chains: list[int] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as values that JSON can represent."""
        content = dataclasses.asdict(self)
        pairs = self.disagreement.items()
        content["disagreement"] = {name: matrix.tolist() for name, matrix in pairs}
        means = {name: metrics.mean_of_pairs(matrix) for name, matrix in pairs}
        content["mean_disagreement"] = means
        for name, matrix in pairs if self.chains else ():
            of_pairs = within_and_between(matrix, self.chains)
            content.setdefault("mean_disagreement_of_chains", {})[name] = of_pairs
        return keras.tree.map_structure(_for_json, content)

    def to_frame(self) -> Any:
        """The printed table as a pandas `DataFrame`.

        Example:

        >>> frame = ens.report(x_val, y_val, verbose=0).to_frame()
        >>> frame.loc[["member 0", "mean"], ["nll", "ece"]].shape
        (2, 2)

        Returns:
            A `DataFrame` with the names of the rows as its index, and NaN where the table is empty.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas  # noqa: PLC0415  An optional dependency.
        except ImportError as error:
            raise ImportError(
                "`to_frame` needs pandas. Run: pip install pandas. "
                "`to_dict()` gives the same numbers without it."
            ) from error
        return pandas.DataFrame(list(self.rows.values()), index=list(self.rows))

    def _cells(self) -> list[tuple[str, ...]]:
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        table = [("", *columns)]
        for name, row in self.rows.items():
            table.append((name, *(_shown(row.get(column)) for column in columns)))
        return table

    def _remarks(self) -> list[str]:
        pairs = (
            f"{metrics.mean_of_pairs(matrix):.4f}"
            + chains_told_apart(matrix, self.chains)
            + (f" ({name})" if len(self.disagreement) > 1 else "")
            for name, matrix in self.disagreement.items()
        )
        bins = f"; calibration error over {self.bins} bins of equal mass" if self.bins else ""
        remarks = [
            f"{self.examples} rows{bins}.",
            f"Mean pairwise disagreement: {', '.join(pairs)}.",
        ]
        for name, errors in self.added_from_last.items():
            first = self.added_from_first[name]
            remarks.append(f"{name}, members added from the last: {_listed(errors)}")
            remarks.append(f"{name}, members added from the first: {_listed(first)}")
        if self.temperature != 1:
            remarks.append(
                f"The combinations have the temperature {self.temperature:.4g}, the members none."
            )
        remarks += conformal_coverage.sentences(self.coverage)
        return remarks + refusing.sentences(self.refusing) + self.notes

    def __str__(self) -> str:
        return "\n".join([text_table(self._cells()), "", *self._remarks()])

    __repr__ = __str__

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        def line(row: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        cells = self._cells()
        body = "".join(line(row, "td") for row in cells[1:])
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        head = f"<thead>{line(cells[0], 'th')}</thead>"
        return f"<table>{head}<tbody>{body}</tbody></table>{remarks}"


def _for_json(value: Any) -> Any:
    if isinstance(value, (float, np.ndarray)):
        values = np.asarray(value, "float64").tolist()
        # JSON has no NaN.
        return keras.tree.map_structure(lambda one: None if math.isnan(one) else one, values)
    return value


def _shown(value: Any) -> str:
    """A score as text; for a metric with several values, such as one for each class, all."""
    if value is None:
        return ""
    return " ".join("" if math.isnan(one) else f"{one:.4f}" for one in np.ravel(value).tolist())


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def make_report(
    held: HeldOut,
    learned: Learned,
    stages: Stages | None,
    refused: refusing.Refusals,
    snapshots: Sequence[Snapshot] = (),
) -> Report:
    """Scores the members and their combinations.

    Args:
        held: The members' predictions and the targets.
        learned: The member weights, the temperature of all combinations, and the members that
            predict by default.
        stages: The stages of early exit, or None.
        refused: What was measured of refusing rows.
        snapshots: The members as they are kept.
    """
    matrices, losses = _alone(held)
    compiled = held.scorer()
    rows = _rows_of_members(held, compiled, matrices)
    rows["last snapshot"] = rows[f"member {len(rows) - 1}"]
    rows["best member"] = rows[f"member {int(np.argmin(losses))}"]
    numbers = [own.chain for own in snapshots if own.chain is not None]
    for name, chain in of_chains(held, numbers):
        rows[name] = _combined(chain, compiled, "mean", None, learned.temperature)
    rows |= _rows_of_combinations(held, compiled, learned)
    if stages is not None:
        rows["early exit"] = _row_of_early_exit(held, compiled, stages)
    from_last, from_first = curves_by_members(held, -1, 1)
    worth = min(good_counts(from_last.losses))
    return Report(
        rows=rows,
        examples=held.rows,
        bins=_bins(held),
        temperature=learned.temperature,
        disagreement=dict(zip(held.names, matrices, strict=True)),
        added_from_last=from_last.scores,
        added_from_first=from_first.scores,
        worth=worth,
        notes=[
            *notes_on_members(losses, from_last.scores["loss"], worth, learned),
            *notes_on_one_cosine(snapshots, learned),
            *notes_on_compiled(held.model),
        ],
        coverage=conformal_coverage.coverage(held, learned),
        refusing=refused.scores,
        risk_coverage=refused.curves,
        chains=numbers,
    )


def _rows_of_members(
    held: HeldOut, compiled: Any, matrices: list[np.ndarray]
) -> dict[str, dict[str, Any]]:
    rows = {}
    members = held.members()
    for number, outputs in enumerate(members):
        logits = held.logits_of_member(number)
        row = rows[f"member {number}"] = _row(held, compiled, outputs, outputs, logits)
        for name, matrix in zip(_columns(held, "disagreement"), matrices, strict=True):
            row[name] = float(matrix[number].sum() / max(1, len(members) - 1))
    return rows


def _alone(held: HeldOut) -> tuple[list[np.ndarray], list[float]]:
    """How much each pair of members disagrees in each output, and the loss of each member."""
    count = len(held.outputs[0])
    matrices, losses = [np.zeros((count, count)) for _ in held.outputs], np.zeros(count)
    for block in held.blocks():
        for i, (items, truth) in enumerate(zip(block.items, block.truths, strict=True)):
            matrices[i] += metrics.disagreement(items, truth)
            losses += held.loss_weights[i] * metrics.losses(items, truth) @ truth.weights
    pairs = zip(matrices, held.meanings, strict=True)
    matrices = [matrix if meaning.is_classes else np.sqrt(matrix) for matrix, meaning in pairs]
    return matrices, losses.tolist()


def _rows_of_combinations(held: HeldOut, compiled: Any, learned: Learned) -> dict[str, Any]:
    """The scores of each combination that is defined for all outputs."""
    weights = None if learned.weights is None else np.asarray(learned.weights)
    rows = {}
    for combine in _combinations(held, weights):
        own = weights if combine == "weighted" else None
        rows[combine] = _combined(held, compiled, combine, own, learned.temperature)
    return rows


def _bins(held: HeldOut) -> int:
    """The number of bins of the calibration error; 0 if no output has classes."""
    pairs = zip(held.truths, held.meanings, strict=True)
    items = [len(truth.weights) for truth, meaning in pairs if meaning.is_classes]
    return min([metrics.BINS, *items]) if items else 0


def _combinations(held: HeldOut, weights: np.ndarray | None) -> list[str]:
    """The names of the combinations that are defined for all outputs."""
    names = ["mean"]
    if all(meaning.is_classes for meaning in held.meanings):
        names += ["vote", "geometric"]
    if not any(meaning.has_temperature for meaning in held.meanings):
        names += ["median"]
    return names + ([] if weights is None else ["weighted"])


def _columns(held: HeldOut, name: str) -> list[str]:
    """The column name of a score for each output."""
    return [name] if len(held.names) == 1 else [f"{output}_{name}" for output in held.names]


def _row(
    held: HeldOut, compiled: Any, plain: Any, shown: Any, logits: dict[str, np.ndarray]
) -> dict[str, Any]:
    """The scores of one prediction.

    Args:
        held: The members' predictions and the targets.
        compiled: Returns the compiled loss and metrics.
        plain: The prediction without a temperature.
        shown: The prediction.
        logits: The logits behind `shown`.
    """
    row = dict(compiled(keras.tree.map_structure(np.asarray, shown), logits))
    untempered = _items(held, plain)
    calibrated = _calibrated(held, untempered)
    shown_items = untempered if shown is plain else _items(held, shown)
    for i, (meaning, truth, items) in enumerate(
        zip(held.meanings, held.truths, shown_items, strict=True)
    ):
        scores = {"squared_error": metrics.error(items, truth)}
        if meaning.is_gaussian:
            nll = {"nll": metrics.loss(untempered[i], truth), "nll_calibrated": calibrated[i]}
            scores = nll | scores
        if meaning.is_classes:
            scores = {
                "nll": metrics.loss(untempered[i], truth),
                "nll_calibrated": calibrated[i],
                "brier": metrics.brier_score(items, truth, meaning),
                "ece": metrics.calibration_error(items, truth),
            }
        named = {_columns(held, name)[i]: value for name, value in scores.items()}
        # If a compiled metric has the same name, its value is kept.
        row |= {name: value for name, value in named.items() if name not in row}
    return row


def _combined(
    held: HeldOut, compiled: Any, combine: str, weights: np.ndarray | None, temperature: float
) -> dict[str, Any]:
    """The scores of a combination."""
    plain = shown = held.combined(combine, weights)
    if temperature != 1:
        shown = held.combined(combine, weights, temperature)
    logits = held.combined_logits(combine, weights, temperature)
    return _row(held, compiled, plain, shown, logits)


def _row_of_early_exit(held: HeldOut, compiled: Any, stages: Stages) -> dict[str, Any]:
    members = held.members()
    result = stages.choose([members[index] for index in stages.early_exit.order])
    outputs = keras.tree.map_structure(np.asarray, outputs_of(result, stages))
    row = _row(held, compiled, outputs, outputs, {})
    return {**row, "members_run": float(np.mean(result[COUNTS]))}


def _items(held: HeldOut, outputs: Any) -> list[np.ndarray]:
    flat = zip(held.unpacked(outputs), held.meanings, strict=True)
    return [metrics.items_of(output, meaning) for output, meaning in flat]


def _calibrated(held: HeldOut, items: list[np.ndarray]) -> list[float]:
    """Each output's negative log-likelihood; each half with the other half's temperature."""
    chosen = [i for i, meaning in enumerate(held.meanings) if meaning.has_temperature]
    shares = [held.loss_weights[i] for i in chosen]
    halves = [slice(0, None, 2), slice(1, None, 2)]
    logs = [[of_rows(items[i], half, held.rows) for i in chosen] for half in halves]
    truths = [[held.truths[i].of_rows(half, held.rows) for i in chosen] for half in halves]
    totals = [0.0 if i in chosen else math.nan for i in range(len(items))]
    if not chosen or not all(truth.weights.any() for half in truths for truth in half):
        return [math.nan] * len(items)
    for fitted, scored in ((0, 1), (1, 0)):
        temperature = learn_temperature(logs[fitted], truths[fitted], shares)
        for i, half, truth in zip(chosen, logs[scored], truths[scored], strict=True):
            totals[i] += tempered_loss(half, truth, temperature)
    return totals
