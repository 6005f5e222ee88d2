"""Training batches, determined by the seed whatever the number of workers (except for shards), also after a restart.

A pair that cannot be read does not stop a run: another example replaces it, so that every batch keeps its size on every
process, and the batch carries the reason, which is then reported and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from finelip_fast._terminal import printable
from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.base import FileExamples
from finelip_fast.datasets.survey import hash_of
from finelip_fast.errors import ConfigError, FineLIPError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.batch import Batch
from finelip_fast.training.features import Features
from finelip_fast.training.pairs import Encoded, GroupedSampler, collate_or_error
from finelip_fast.training.shard_batches import MOST_SAMPLES, ShardBatches
from finelip_fast.training.shards import shard_names, shard_size


def identity_of(source: PairDataset | str, *, remote: bool = False) -> dict[str, Any]:
    """Identify data well enough to detect other data of the same name, as far as that is cheap.

    Args:
        source: Map-style dataset, or pattern of webdataset shards.
        remote: Whether shards may come from the network.

    Returns:
        For pairs of files, their number and a hash of paths and captions. For shards, their number, the total bytes of those
        that are files, and a hash of names and file sizes. Empty for other data.

    Raises:
        TrainingError: A shard file cannot be found.
    """
    if isinstance(source, str):
        sizes = {name: shard_size(name) for name in shard_names(source, remote=remote)}
        size = sum(filter(None, sizes.values()))
        return {"shards": len(sizes), "bytes": size, "sha256": hash_of(f"{name}:{sizes[name]}" for name in sizes)}
    if isinstance(source, FileExamples):
        texts = (text for path, caption in source.pairs for text in (str(path), caption))
        return {"pairs": len(source), "sha256": hash_of(texts)}
    return {}


class TrainingData:
    """An endless, restartable stream of batches.

    Batches without pairs only report what could not be read before the next batch.

    Args:
        source: Map-style dataset, or pattern of webdataset shards.
        preprocess, context_length: Preprocessing of pictures, and number of tokens in the context of captions.
        batch_size: Number of pairs per batch and process.
        epoch_batches: Batches per epoch; required for shards, derived for map-style data.
        rank, world: Rank of this process, and number of processes.
        max_broken_share: Share of broken pairs up to which map-style data replaces them by others.
        remote: Whether shards may come from the network.
        augmentation: Caption augmentation; None: captions stay unchanged.
        features: Precomputed features of map-style data, used instead of pixels; None: pixels are used.
        tokenizer: Tokenizer of the captions.

    Attributes:
        epoch: Number of the current epoch.
        pairs: Number of its pairs that all processes have taken.
    """

    def __init__(
        self,
        source: PairDataset | str,
        preprocess: Preprocess,
        context_length: int,
        *,
        batch_size: int,
        group: int = 1,
        epoch_batches: int = 0,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
        max_broken_share: float = 1.0,
        remote: bool = False,
        augmentation: Augmentation | None = None,
        features: Features | None = None,
        tokenizer: Tokenizer = CLIP_BPE,
    ) -> None:
        self.epoch = self.pairs = 0
        self._global_batch, self._layout = batch_size * world, [world, max(1, workers)]
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        self._shards: ShardBatches | None = None
        if isinstance(source, str):
            if epoch_batches < 1:
                raise ConfigError("expected epoch_batches with webdataset shards: their length is not known beforehand")
            self._shards = ShardBatches(
                source,
                preprocess,
                context_length,
                batch_size=batch_size,
                seed=seed,
                rank=rank,
                world=world,
                remote=remote,
                augmentation=augmentation,
                tokenizer=tokenizer,
            )
            self._loader: DataLoader[Any] = DataLoader(self._shards, batch_size=None, **options)
            self.epoch_batches = epoch_batches
            self._begin_shards()
        else:
            self._order = GroupedSampler(len(source), batch_size, group=group, seed=seed, rank=rank, world=world)
            self._data = Encoded(
                source,
                preprocess,
                context_length,
                max_broken_share=max_broken_share,
                augmentation=augmentation,
                seed=seed,
                features=features,
                tokenizer=tokenizer,
            )
            self._loader = DataLoader(self._data, batch_sampler=self._order, collate_fn=collate_or_error, **options)
            self.epoch_batches = len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for batch in self._shard_batches(self._shards) if self._shards else self._mapped_batches():
                self.pairs += self._global_batch if len(batch) else 0
                yield batch
            self.epoch, self.pairs = self.epoch + 1, 0
            self._begin_shards()

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, for :meth:`load_state_dict`; to merge processes, take the maximum of their ``places``."""
        state: dict[str, Any] = {"epoch": self.epoch, "pairs": self.pairs}
        if self._shards:
            since = {"layout": self._layout, "first": self._first, "start": self._shards.start}
            state |= {**since, "places": self._places}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state, possibly one of another number of processes or workers.

        With the same numbers, all batches are those that would have followed; otherwise they hold the rest of the epoch in
        another order, each pair once.

        Args:
            state: State returned by :meth:`state_dict`.

        Raises:
            ValueError: The state belongs to other shards.
        """
        self.epoch, self.pairs = int(state["epoch"]), int(state["pairs"])
        if self._shards:
            is_same = list(state["layout"]) == self._layout
            start, self._places = state["start" if is_same else "places"].clone(), state["places"].clone()
            if {start.shape, self._places.shape} != {self._shards.start.shape}:
                raise ValueError(f"expected the places of {len(self._shards.shards)} shards")
            self._shards.start = start
            self._first = int(state["first"]) if is_same else self.pairs // self._global_batch

    def skip(self, batches: int, *, processes: int | None = None) -> None:
        """Skip a number of batches from the beginning.

        Args:
            batches: Number of batches per process.
            processes: Number of processes that read them; None: as many as now.

        Raises:
            ConfigError: The data are shards, and the number of processes differs.
        """
        processes = processes or self._layout[0]
        global_batch, epoch_batches = self._global_batch // self._layout[0] * processes, self.epoch_batches
        if processes != self._layout[0]:
            if self._shards:
                raise ConfigError(
                    "an earlier version saved this run, without what was read of its shards; to resume, use as many "
                    f"processes as it had, {processes}"
                )
            epoch_batches = self._order.size // global_batch
        self.epoch, finished = divmod(batches, epoch_batches)
        self.pairs = finished * global_batch

    def _mapped_batches(self) -> Iterator[Batch]:
        self._order.epoch, self._order.start, self._data.epoch = self.epoch, self.pairs, self.epoch
        return self._loaded()

    def _begin_shards(self) -> None:
        """Reset the positions in shards for a new epoch."""
        if self._shards:
            self._first = 0  # first batch of the epoch to read
            self._places = torch.zeros_like(self._shards.start)  # how far each shard was read, encoded like ``start``
            self._shards.start = torch.zeros_like(self._places)

    def _shard_batches(self, shards: ShardBatches) -> Iterator[Batch]:
        """Yield the rest of an epoch; shards that hold less are read again."""
        finished, count = self.pairs // self._global_batch, self._first
        laps = int(shards.start.max()) // MOST_SAMPLES
        shards.epoch, shards.lap = self.epoch, 0
        while finished < self.epoch_batches and count < self.epoch_batches:
            before, broken, reason = count, 0, ""
            for batch in self._loaded():
                count += 1 if len(batch) else 0
                for number, samples in batch.sample_counts.items():
                    self._places[number] = shards.lap * MOST_SAMPLES + samples
                if batch.broken:
                    broken, reason = broken + len(batch.broken), batch.broken[-1]
                if count > finished or (count == finished and not len(batch)):
                    yield batch
                if count == self.epoch_batches:
                    return
            if count == before and shards.lap >= laps:
                unreadable = f"; {broken} samples cannot be read, the last: {printable(reason)}" if broken else ""
                raise TrainingError(
                    "the shards hold less than one batch per worker of a process; use fewer --workers or processes, or a "
                    f"smaller --batch-size{unreadable}"
                )
            shards.lap += 1

    def _loaded(self) -> Iterator[Batch]:
        """Yield the loader's batches.

        Raises:
            TrainingError: A worker failed; the message gives the reason in one line.
        """
        try:
            for batch in self._loader:
                if isinstance(batch, FineLIPError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise TrainingError(
                "the system ended a data loading process, probably for lack of memory; the same command resumes from the last "
                f"state, with fewer --workers or --workers 0: {printable(error):.200}"
            ) from error
