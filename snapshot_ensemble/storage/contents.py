"""What a process knows of a directory of snapshots."""

import dataclasses

from snapshot_ensemble.storage.manifest import Manifest
from snapshot_ensemble.storage.record import Record


@dataclasses.dataclass
class Contents:
    """What this process knows of a directory: everything that a transaction rolls back.

    Attributes:
        record: What is kept besides the snapshots; updated during training.
        kept: The manifest that the directory will have when all writes have finished.
        saved: The manifest in the directory.
        version: A number that changes whenever the snapshots change.
        saved_version: The version of `saved`.
        pending: The manifest with additions that are not yet committed.
        known: The manifest's text when it was last read or written; None if there was none.
        claimed: Whether the contents of the directory belong to this store.
        restarting: Whether the next added file replaces all existing ones.
        trusted: Whether the manifest, if any, could be read. Only then are files that it does not
            name known to be left over from a killed writer.
    """

    record: Record = dataclasses.field(default_factory=Record)
    kept: Manifest = dataclasses.field(default_factory=Manifest)
    saved: Manifest = dataclasses.field(default_factory=Manifest)
    version: int = 0
    saved_version: int = 0
    pending: Manifest | None = None
    known: bytes | None = None
    claimed: bool = False
    restarting: bool = False
    trusted: bool = True

    def copy(self) -> "Contents":
        """A copy to roll back to."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record))
