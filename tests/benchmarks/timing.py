"""Ratios of times that are measured alternately; shared by the benchmarks in this folder."""

import math
import statistics
import time


def seconds(function):
    """The duration of one call, in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratios(candidates, rounds):
    """Times all candidates alternately in `rounds` rounds, after a warmup round.

    Every other round goes through them backwards, so that none always follows another.

    Args:
        candidates: Functions by name.
        rounds: Number of timed rounds.

    Returns:
        The median time of each, and a function that gives the median ratio of one to another.
    """
    times = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    for number in range(rounds):
        for name, function in list(candidates.items())[:: -1 if number % 2 else 1]:
            times[name].append(seconds(function))

    def ratio(one, other):
        pairs = zip(times[one], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {name: statistics.median(values) for name, values in times.items()}, ratio


def show(rows):
    """Prints rows of (what, compared with, ratio, limit), where the limit may be NaN for none."""
    print(f"{'what':46}{'compared with':30}{'ratio':>8}{'limit':>9}")
    for what, baseline, ratio, most in rows:
        limit = "" if math.isnan(most) else f"{most:.3g}"
        print(f"{what:46}{baseline:30}{ratio:8.3f}{limit:>9}")
    return rows
