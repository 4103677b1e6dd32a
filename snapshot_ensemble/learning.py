"""What an ensemble learns on held-out data that the user names."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.evaluation import held_out as heldout
from snapshot_ensemble.evaluation.member_weights import check_method, learn_weights, temperature_of
from snapshot_ensemble.evaluation.report import Report, make_report, most_members
from snapshot_ensemble.evaluation.weight_averaging import average
from snapshot_ensemble.inference.combining import check_combine, combine_outputs
from snapshot_ensemble.prediction import Predictor


class Learner(Predictor):
    """A predictor that learns weights and a temperature, and is scored."""

    def fit_weights(
        self,
        x: Any,
        y: Any = None,
        *,
        method: str = "likelihood",
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> np.ndarray:
        """Learns the weights of `combine="weighted"` on held-out data.

        Data that training has seen favour the members that overfitted, so there is no default.
        `"likelihood"` finds, to within a billionth of its size, the least held-out loss of the
        weighted mean over all weights that are at least 0 and sum to 1 (it is convex): the
        negative log-likelihood for classes, the squared error for regression, their sum over
        several outputs with the compiled `loss_weights`. `"greedy"` selects members with
        replacement for 25 rounds, each the one that helps most, and stops where the loss was
        lowest (Caruana et al., 2004). On the data given, neither is worse than the best member
        or the mean. Members of weight 0 are neither run nor exported.

        Example:

        >>> weights = ens.fit_weights(x_val, y_val, verbose=0)
        >>> bool(weights.min() >= 0), round(float(weights.sum()), 6)
        (True, 1.0)
        >>> weighted = ens.predict(x, combine="weighted", verbose=0)

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            method: `"likelihood"` or `"greedy"`. Defaults to `"likelihood"`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            The weights, float64 of shape `(members,)`; also in `weights` from then on.

        Raises:
            ValueError: If the data do not fit the model, are fewer than two rows, lack a class,
                or hold a NaN. The weights are as before.

        References:
            - [Caruana et al., 2004](https://doi.org/10.1145/1015330.1015432)
        """
        check_method(method)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, callbacks=callbacks, **run)
        self.weights = learn_weights(held, method)
        return self.weights

    def choose_members(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> int:
        """Chooses on held-out data how many of the last members predictions combine.

        Early members that had not converged make a mean worse. Of the means of the last 1, 2, …
        members this takes the one of most members whose loss (negative log-likelihood in nats,
        or squared error) is within one standard error, of the paired difference, of the least.
        `fit` calls it with its validation data.

        Example:

        >>> count = ens.choose_members(x_val, y_val, verbose=0)
        >>> ens.members in (None, count)
        True

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            How many; also in `members` from then on, where `None` means all.

        Raises:
            ValueError: If the data do not fit the model, or hold a NaN. `members` is as before.
        """
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, callbacks=callbacks, **run)
        count = most_members(held)
        self.members = None if count == len(self) else count
        return count

    def calibrate(
        self,
        x: Any,
        y: Any = None,
        *,
        combine: str = "mean",
        members: int | Sequence[int] | None = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> float:
        """Learns one temperature for the combined probabilities on held-out data.

        The logarithms of the combined probabilities (for binary and multilabel their log-odds)
        are divided by it, `p_c^(1/T) / sum_k p_k^(1/T)`: above 1 it makes them less sure, below 1
        surer. It is the one of least negative log-likelihood between 0.05 and 20, and from then
        on part of `predict`, `evaluate`, `to_keras`, `export` and `save`, whatever the
        combination. The likeliest class never changes. `predict_members` and
        `predict_uncertainty` show the members as they are. Of several outputs those of classes
        share it. Learning anew starts from the uncalibrated probabilities.

        Example:

        >>> temperature = ens.calibrate(x_val, y_val, verbose=0)
        >>> ens.temperature == temperature
        True

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            combine: The combination to calibrate. Defaults to `"mean"`.
            members: The members to combine, as for `predict`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            The temperature; also in `temperature` from then on.

        Raises:
            ValueError: If all outputs are regressions, or the data do not fit the model, are
                fewer than two rows, lack a class, or hold a NaN. The temperature is as before.

        References:
            - [Guo et al., 2017](https://arxiv.org/abs/1706.04599)
        """
        check_combine(combine)
        chosen, weights = self._choice(combine, members)
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, chosen, callbacks=callbacks, **run)
        combined = combine_outputs(held.members(), combine, held.meanings, weights)
        self.temperature = temperature_of(held, combined)
        return self.temperature

    def report(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int | None = None,
        verbose: Any = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Report:
        """Scores each member and each combination, from one pass over the data.

        Example:

        >>> report = ens.report(x_val, y_val, verbose=0)
        >>> list(report.rows)
        ['member 0', 'member 1', 'last snapshot', 'best member', 'mean', 'vote', 'geometric']
        >>> list(report.rows["mean"])
        ['loss', 'nll', 'nll_calibrated', 'brier', 'ece']

        Args:
            x: As for `model.evaluate`; data that training has not seen.
            y: As for `model.evaluate`.
            sample_weight: As for `model.evaluate`.
            batch_size: As for `model.predict`.
            verbose: As for `model.predict`.
            steps: As for `model.predict`.
            callbacks: As for `model.predict`.

        Returns:
            A `Report`. It prints as a table; `to_dict()` gives its numbers.

        Raises:
            ValueError: If there are no members, or the data do not fit the model or hold a NaN.
        """
        run = {"batch_size": batch_size, "verbose": verbose, "steps": steps}
        held = self._gather(x, y, sample_weight, callbacks=callbacks, **run)
        found = make_report(held, self.weights, self.temperature)
        if self.members is not None:
            which = f"the last {self.members}" if isinstance(self.members, int) else self.members
            found.notes.append(f"Where nobody says, predictions combine of the members {which}.")
        return found

    def average_weights(
        self,
        members: int | Sequence[int] | str | None = None,
        x: Any = None,
        y: Any = None,
        *,
        batch_size: int | None = None,
    ) -> keras.Model:
        """One model of the original size, whose weights are the mean of the members' weights.

        It costs no more to serve than one member, and is good only where the members lie in one
        basin of the loss; restarts at a high rate leave it, and then the mean of their weights
        is worse than any of them. So give data to check it on, or let `members="greedy"` take
        only what helps.

        The mean is taken in float64. The statistics of batch normalisation are those of `x`
        under the new weights: in one pass over it, in which these layers normalise by the
        statistics of the batch (and nothing is dropped), the mean and variance of all rows,
        whatever the layers' momentum. Frozen layers keep theirs.

        Example:

        >>> small = ens.average_weights("greedy", x=x_val, y=y_val)
        >>> small.count_params() == ens.model.count_params()
        True

        Args:
            members: As for `predict`, or `"greedy"`: beginning with the best member on `x` and
                `y`, in the order of their loss, a member is added if the averaged model's loss
                falls (the greedy soup of Wortsman et al., 2022). Defaults to `None`, all.
            x: Data as for `model.evaluate`, to estimate the statistics on.
            y: Targets of `x`, to check on. A warning says if the averaged model is worse there
                than the worst member.
            batch_size: As for `model.predict`.

        Returns:
            A compiled `keras.Model`.

        Raises:
            ValueError: If there are no members, `members` makes no sense, or `"greedy"` has no
                data.

        References:
            - [Izmailov et al., 2018](https://arxiv.org/abs/1803.05407)
            - [Wortsman et al., 2022](https://arxiv.org/abs/2203.05482)
        """
        greedy = isinstance(members, str) and members == "greedy"
        chosen = self._chosen(None if greedy else members)
        weights = [self._store.weights(self.model, i) for i in chosen]
        return average(
            self.model, weights, self._read, greedy=greedy, x=x, y=y, batch_size=batch_size
        )

    def _gather(
        self, x: Any, y: Any, sample_weight: Any, chosen: list[int] | None = None, **run: Any
    ) -> heldout.HeldOut:
        """What the members predict for held-out data, and what is true."""
        chosen = self._chosen(None) if chosen is None else chosen
        gatherer = self._model_of(chosen, ("gather",), heldout.lay_side_by_side, heldout.Gatherer)
        return heldout.gather(gatherer, self.model, self._read, x, y, sample_weight, **run)
