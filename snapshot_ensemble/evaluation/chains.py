"""The chains of a merged ensemble: the mean of each, and how much they disagree."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from snapshot_ensemble.evaluation.held_out import HeldOut


def of_chains(held: HeldOut, chains: Sequence[int]) -> Iterator[tuple[str, HeldOut]]:
    """The name of each chain, and the predictions of its members alone.

    Args:
        held: The predictions of all members.
        chains: The chain of each member; empty if they are of one run.
    """
    for number in sorted(set(chains)):
        own = [index for index, chain in enumerate(chains) if chain == number]
        yield (
            f"chain {number}",
            dataclasses.replace(
                held,
                outputs=[output[own] for output in held.outputs],
                logits={name: stack[own] for name, stack in held.logits.items()},
            ),
        )


def within_and_between(matrix: np.ndarray, chains: Sequence[int]) -> dict[str, float]:
    """The mean over the pairs of members of one chain, and over all other pairs, if there are any.

    Args:
        matrix: The disagreement of each pair of members.
        chains: The chain of each member.
    """
    same = np.equal.outer(chains, chains)
    pairs = {"within": same & ~np.eye(len(matrix), dtype=bool), "between": ~same}
    return {which: float(matrix[own].mean()) for which, own in pairs.items() if own.any()}


def chains_told_apart(matrix: np.ndarray, chains: Sequence[int]) -> str:
    """The two means as text; empty if there are no chains."""
    if not chains:
        return ""
    means = within_and_between(matrix, chains).items()
    return f" ({', '.join(f'{which} chains {mean:.4f}' for which, mean in means)})"
