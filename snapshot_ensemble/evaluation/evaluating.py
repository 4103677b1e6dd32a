"""The compiled loss and metrics of combined outputs."""

from typing import Any

from snapshot_ensemble.evaluation.left_out import check_evaluates, warn_of_left_out, watched
from snapshot_ensemble.inference.batch_size import batch_size_for_scores
from snapshot_ensemble.inference.member_pool import MemberPool


def evaluate(
    pool: MemberPool, x: Any, y: Any, combine: str, members: Any, arguments: dict[str, Any]
) -> Any:
    """Implements `SnapshotEnsemble.evaluate`."""
    check_evaluates(pool.model)
    arguments = arguments | batch_size_for_scores(pool.model, x, **arguments)
    with pool.evaluator(pool.combiner(combine, members)) as model, watched(pool.model):
        scores = model.evaluate(x, y, **arguments)
    warn_of_left_out(pool.model)
    return scores
