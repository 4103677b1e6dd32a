"""Checks that several ensembles can become one: the same model, the same meaning, other members."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from snapshot_ensemble.inference.architecture import difference
from snapshot_ensemble.inference.losses import family_of
from snapshot_ensemble.inference.member_pool import MemberPool
from snapshot_ensemble.inference.output_specs import known_outputs, names_of
from snapshot_ensemble.inference.rebuilt import compute_the_same
from snapshot_ensemble.storage.directory import DirectoryStore
from snapshot_ensemble.storage.file_names import directory_path
from snapshot_ensemble.storage.model_file import OTHER_OUTPUTS
from snapshot_ensemble.storage.snapshot import Weights
from snapshot_ensemble.storage.view import View


def check_sources(sources: Any, directory: Any) -> list[Any]:
    """The ensembles or directories to merge, as a list.

    Raises:
        TypeError: If they are no list.
        ValueError: If there are none, or one is the directory that is written to.
    """
    if isinstance(sources, (str, bytes, os.PathLike, dict)) or not hasattr(sources, "__iter__"):
        raise TypeError(
            "`ensembles` must be a list of ensembles or directories. "
            f"Received: ensembles={sources!r}"
        )
    listed = list(sources)
    if not listed:
        raise ValueError(
            "There is nothing to merge. Received: ensembles=[]. Pass a list of ensembles or of the "
            "directories that they are in."
        )
    if directory is not None:
        target = directory_path(directory).resolve()
        for source in listed:
            own = getattr(source, "directory", source)
            if own is not None and directory_path(own).resolve() == target:
                raise ValueError(
                    "`directory` must not be one of those that are merged. "
                    f"Received: directory='{directory}'. Choose another one."
                )
    return listed


class Merger:
    """Takes ensembles one by one, and holds what is needed to merge them: no models but the first.

    Attributes:
        views: The snapshots of each.
    """

    def __init__(self) -> None:
        self.views: list[View] = []
        self._first: tuple[str, MemberPool] | None = None
        self._seen: dict[str, str] = {}  # Which ensemble has members of these weights.

    def add(self, name: str, pool: MemberPool, *, is_loaded: bool = False) -> None:
        """Checks that an ensemble fits the first one, and adds it.

        Args:
            name: What messages call it.
            pool: Its members, as they are now.
            is_loaded: Whether it was loaded from its directory only to be merged.

        Raises:
            ValueError: If it does not fit, or has members that others have, too.
            SnapshotError: If one of its files is damaged.
        """
        if not len(pool):
            raise ValueError(
                f"There are no members to merge in {name}. Received: an ensemble without members. "
                "Train it first, or leave it out."
            )
        if self._first is None:
            self._first = (name, pool)
        _, first = self._first
        if is_loaded and isinstance(pool.store, DirectoryStore):
            self._check_file(name, pool.store)
            pool.store.computes_the_same = None  # It would keep the model in memory.
        if pool.model is not first.model:
            self._check_architecture(name, pool)
            self._check_meaning(name, pool)
        view, own = pool.view, set()
        for snapshot in view.snapshots:
            weights = view.weights(first.model, snapshot.index)
            if pool.model is not first.model and snapshot.index == len(view.snapshots) - 1:
                self._check_outputs(name, pool, weights)
            own.add(_digest(weights))
        for digest in own:
            if digest in self._seen:
                raise ValueError(
                    f"A chain must not be merged twice. Received: {self._seen[digest]} and {name}, "
                    "which have a member of the same weights. Leave one of them out."
                )
        self._seen |= dict.fromkeys(own, name)
        self.views.append(view)

    def _check_file(self, name: str, store: DirectoryStore) -> None:
        if self.views and store.needs_model == OTHER_OUTPUTS:
            raise ValueError(
                f"It cannot be checked that one model fits all runs. Received: {name}, whose own "
                f"is not in its directory: {store.needs_model} Merge ensembles that are loaded "
                "each with its own `model=`."
            )

    def _check_architecture(self, name: str, pool: MemberPool) -> None:
        assert self._first is not None
        base, first = self._first
        if how := difference(first.model, pool.model):
            raise ValueError(
                f"Only runs of the same architecture can be merged. Received: {name}, whose model "
                f"is another one than that of {base}: {how}."
            )

    def _check_meaning(self, name: str, pool: MemberPool) -> None:
        assert self._first is not None
        base, first = self._first
        own, other = _meanings(first), _meanings(pool)
        if own != other:
            raise ValueError(
                "Only runs of the same task can be merged: the outputs of their models must mean "
                f"the same. Received: {other} in {name}, {own} in {base}."
            )

    def _check_outputs(self, name: str, pool: MemberPool, weights: Weights) -> None:
        assert self._first is not None
        base, first = self._first
        sample = first.sample if pool.sample is None else pool.sample
        if compute_the_same(pool.model, weights, first.model, weights, sample) is False:
            raise ValueError(
                f"Only runs of the same model can be merged. Received: {name}, whose model gives "
                f"other outputs than that of {base} with the same weights. Something of it is "
                "neither in its config nor in its weights, such as a constant that a layer draws "
                "when it is made, or a vocabulary. Make it equal in all runs."
            )


def _meanings(pool: MemberPool) -> dict[str, Any]:
    """What each output means, by its name; what is known of it if the model must run first."""
    outputs = known_outputs(pool.model)
    if outputs is None:
        families = [family_of(loss, None)[0] for loss in keras.tree.flatten(pool.model.loss)]
        return {"task": pool.task, "losses": families}
    words = []
    for meaning in pool.meanings(outputs):
        form = ("logits" if meaning.logits else "probabilities") if meaning.is_classes else ""
        words.append(" ".join(filter(None, (meaning.task, form))))
    if len(words) == 1:  # Its name may have been made up.
        return {"output": words[0]}
    return dict(zip(names_of(pool.model, outputs), words, strict=True))


def _digest(weights: Sequence[np.ndarray]) -> str:
    """A hash of weights, by their bytes."""
    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
