"""Ratios of times, measured in turn; what the benchmarks of this folder share."""

import math
import statistics
import time


def seconds(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratios(candidates, rounds):
    """Times of all candidates in turn, `rounds` times, after one that does not count.

    Args:
        candidates: Functions by name.
        rounds: How often.

    Returns:
        The median time of each, and a function that gives the median ratio of one to another.
    """
    times = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    for _ in range(rounds):
        for name, function in candidates.items():
            times[name].append(seconds(function))

    def ratio(one, other):
        pairs = zip(times[one], times[other], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return {name: statistics.median(found) for name, found in times.items()}, ratio


def show(rows):
    """Prints rows of (what, against what, ratio, at most; NaN where there is no limit)."""
    print(f"{'what':46}{'against':30}{'ratio':>8}{'at most':>9}")
    for what, against, found, most in rows:
        limit = "" if math.isnan(most) else f"{most:.3g}"
        print(f"{what:46}{against:30}{found:8.3f}{limit:>9}")
    return rows
