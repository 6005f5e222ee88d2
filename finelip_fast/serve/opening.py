"""Short, picklable description of what a server opens, passed to each of its processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finelip_fast.errors import InputError, StoreError

if TYPE_CHECKING:
    from finelip_fast.engines import EngineName
    from finelip_fast.runtimes.manifest import Precision
    from finelip_fast.serve.collection import Collection


@dataclass(frozen=True)
class Opening:
    """An index folder or shards, and the model that made them; can be pickled, and each process opens its own.

    Attributes:
        index: Folder of an index; None if there are shards.
        shards: Folders of indexes that are searched together.
        ray: Address of the Ray cluster that holds the shards; None: that of ``RAY_ADDRESS``, or this machine.
        checkpoint: Checkpoint that made the index; None: the one that the index names, if this user has opened it before.
        engine, precision, device, alpha: The same as for :class:`finelip_fast.Retriever`.
        uploads: Folder for added pictures; None: nothing is added or deleted.

    Raises:
        InputError: Both or neither of index and shards, or shards with an uploads folder.
    """

    index: str | None = None
    shards: tuple[str, ...] = ()
    ray: str | None = None
    checkpoint: str | None = None
    engine: EngineName = "auto"
    precision: Precision | None = None
    device: str | None = None
    alpha: float | None = None
    uploads: str | None = None

    def __post_init__(self) -> None:
        if (self.index is None) == (not self.shards):
            raise InputError(
                "expected either the folder of an index or shards, got " + ("neither" if self.index is None else "both")
            )
        if self.shards and self.uploads is not None:
            raise InputError(
                "expected an index to add pictures to, got shards; add them to the folder of a shard instead"
            )

    def check(self) -> None:
        """Check what can be checked before a model is loaded.

        Raises:
            StoreError: There is no index in a folder, or it names a checkpoint that this user has not opened.
        """
        from finelip_fast.known_checkpoints import checkpoint_of

        for folder in self.shards or (str(self.index),):
            _require_index(folder)
            if self.checkpoint is None:
                checkpoint_of(folder)

    def open(self) -> Collection:
        """Load the model and open the collection, which the caller must close; takes seconds.

        Raises:
            InputError, EngineError, CheckpointError, StoreError: The same as for :class:`finelip_fast.Retriever` and
                :class:`finelip_fast.distributed.Shards`.
        """
        from finelip_fast.known_checkpoints import checkpoint_of
        from finelip_fast.serve.index_collection import IndexCollection

        if self.index is not None:
            # A retriever would create one, and a folder that is away for a moment would seem to be empty.
            _require_index(self.index)
        checkpoint = self.checkpoint or checkpoint_of(self.index or self.shards[0])
        if self.index is not None:
            from finelip_fast.retriever import Retriever

            retriever = Retriever(
                checkpoint,
                engine=self.engine,
                precision=self.precision,
                device=self.device,
                index=self.index,
                alpha=self.alpha,
            )
            try:
                return IndexCollection(retriever, None if self.uploads is None else Path(self.uploads))
            except BaseException:
                retriever.close()
                raise
        from finelip_fast.distributed import Shards
        from finelip_fast.engines import open_engine
        from finelip_fast.serve.shard_collection import ShardCollection

        if self.ray is not None:
            os.environ["RAY_ADDRESS"] = self.ray
        engine = open_engine(self.engine, checkpoint, self.device, precision=self.precision)
        shards = Shards(self.shards, partial="mark")
        try:
            return ShardCollection(engine, shards, self.alpha)
        except BaseException:
            shards.close()
            raise


def _require_index(folder: str) -> None:
    from finelip_fast.index import remedies, stored_source

    if stored_source(folder) is None:
        raise StoreError(f"there is no index at {folder}: {remedies.make(folder)}")
