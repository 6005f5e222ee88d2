"""Batches for training: the same ones for a seed, whatever the number of workers (but for shards), again after a restart.

A picture that cannot be read does not stop a run: the next readable example takes its place, so that every batch keeps its
size on every process, and its path travels with the batch to be reported and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from finelip_fast._errors import ConfigError, ImageError, TrainingError
from finelip_fast.datasets import Example, PairDataset
from finelip_fast.encoders import caption_lengths
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import expected_truncation, tokenize

# Examples tried in place of an unreadable one before the data is called unusable.
_SUBSTITUTES = 100


@dataclass
class Batch:
    """``B`` pairs, ready for the model.

    Attributes:
        pixels: ``[B, 3, H, W]``.
        ids: int64 ``[B, T]``.
        image_ids: int64 ``[B]``; equal for pairs of one picture.
        broken: Paths of pictures that could not be read, each with the reason.
    """

    pixels: Tensor
    ids: Tensor
    image_ids: Tensor
    broken: list[str]

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return Batch(self.pixels.pin_memory(), self.ids.pin_memory(), self.image_ids.pin_memory(), self.broken)


class Encoded(Dataset[tuple[Tensor, Tensor, int, list[str]]]):
    """A dataset of pairs as pixels, ids and picture ids."""

    def __init__(self, pairs: PairDataset, preprocess: Preprocess, context_length: int) -> None:
        self.pairs, self.preprocess, self.context_length = pairs, preprocess, context_length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, list[str]]:
        broken = []
        for step in range(min(_SUBSTITUTES, len(self.pairs))):
            example = self.pairs[(index + step) % len(self.pairs)]
            try:
                return *encode_example(example, self.preprocess, self.context_length), broken
            except ImageError as error:
                broken.append(str(error))
        raise _unusable(broken)


def _unusable(broken: list[str]) -> TrainingError:
    return TrainingError(f"{len(broken)} pictures in a row cannot be read; the last: {broken[-1]}")


def encode_example(example: Example, preprocess: Preprocess, context_length: int) -> tuple[Tensor, Tensor, int]:
    """Pixels ``[3, H, W]``, ids ``[T]`` and a 63-bit picture id."""
    with expected_truncation():
        ids = tokenize([example.caption], context_length)[0]
    digest = hashlib.blake2b(example.image_id.encode(), digest_size=8).digest()
    return preprocess(example.image), ids, int.from_bytes(digest, "big") >> 1


def collate(items: list[tuple[Tensor, Tensor, int, list[str]]]) -> Batch:
    """Stack examples to a batch; the ids are cut to the longest caption."""
    pixels, ids, image_ids, broken = zip(*items, strict=True)
    stacked = torch.stack(ids)
    longest = int(caption_lengths(stacked).max())
    return Batch(
        torch.stack(pixels), stacked[:, :longest], torch.tensor(image_ids), [path for some in broken for path in some]
    )


class GroupedSampler(Sampler[list[int]]):
    """This process's share of each global batch, in an order fixed by seed and epoch.

    Neighbouring examples (``group`` of them) stay together in a batch: where a dataset puts look-alikes side by side, each
    batch then holds hard negatives. The global batches do not depend on the number of processes.

    Args:
        size: Examples in the dataset; a last incomplete batch is left out.
        batch_size: Of one process; a multiple of ``group``.
        group: Examples that stay together; 1 shuffles freely.
        rank, world: This process and how many there are.
    """

    def __init__(self, size: int, batch_size: int, *, group: int, seed: int, rank: int, world: int) -> None:
        if batch_size % group:
            raise ConfigError(f"expected batch_size a multiple of group={group}, got {batch_size}")
        if size < batch_size * world:
            raise ConfigError(f"expected at least one global batch of {batch_size * world} examples, got {size}")
        self.size, self.batch_size, self.group, self.seed = size, batch_size, group, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = torch.randperm(self.size // self.group, generator=generator)
        order = (groups[:, None] * self.group + torch.arange(self.group)).flatten()
        for batch in range(self.start, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class ShardExamples(IterableDataset[tuple[Tensor, Tensor, int, list[str]]]):
    """webdataset shards (``jpg|png|webp`` + ``txt`` or ``json`` with ``caption``), shuffled by shard, split over processes.

    The order is fixed by seed, epoch and number of workers; a restart reads past what was already seen. Needs the
    ``webdataset`` package.
    """

    def __init__(self, pattern: str, preprocess: Preprocess, context_length: int, *, seed: int) -> None:
        self.pattern, self.preprocess, self.context_length, self.seed = pattern, preprocess, context_length, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int, list[str]]]:
        import random

        import webdataset as wds

        shards = list(wds.shardlists.expand_urls(self.pattern))
        random.Random(self.seed * 1_000_003 + self.epoch).shuffle(shards)
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(shards), wds.split_by_node, wds.split_by_worker, wds.tarfile_to_samples()
        )
        broken: list[str] = []
        for sample in _readable(pipeline):
            name = f"{sample['__url__']}:{sample['__key__']}"
            try:
                encoded = encode_example(_shard_example(sample, name), self.preprocess, self.context_length)
            except ImageError as error:
                broken.append(f"{name}: {error}")
                if len(broken) == _SUBSTITUTES:
                    raise _unusable(broken) from None
                continue
            yield *encoded, broken
            broken = []


def _readable(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    import tarfile

    try:
        yield from samples
    except (OSError, EOFError, tarfile.TarError) as error:  # webdataset adds the shard's name to it
        raise TrainingError(f"cannot read a webdataset shard: {error}") from error


def _shard_example(sample: dict[str, Any], name: str) -> Example:
    import json

    image = next((sample[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample), None)
    try:
        caption = sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["caption"]
    except (KeyError, TypeError, ValueError):  # absent, or neither UTF-8 nor such an object
        caption = None
    if image is None or not isinstance(caption, str):
        present = sorted(key for key in sample if not key.startswith("__"))
        raise TrainingError(f"{name}: expected a picture (jpg, png, webp) and a caption (txt, json), found {present}")
    return Example(image, caption, name)


class TrainingData:
    """An endless, restartable stream of batches.

    Args:
        source: A map-style dataset, or the pattern of webdataset shards.
        preprocess, context_length: What turns a pair into tensors.
        batch_size: Pairs of one process at a time.
        epoch_batches: Batches of an epoch; needed for shards, derived for map-style data.
        position: Batches already taken, to go on behind them.
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
        position: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.position = position
        loader_options: dict[str, Any] = {"collate_fn": collate, "num_workers": workers, "pin_memory": pin_memory}
        if isinstance(source, str):
            if epoch_batches < 1:
                raise ConfigError("expected epoch_batches with webdataset shards: their length is not known beforehand")
            self._order: Any = ShardExamples(source, preprocess, context_length, seed=seed)
            self._loader = DataLoader(self._order, batch_size=batch_size, drop_last=True, **loader_options)
            self.epoch_batches = epoch_batches
        else:
            self._order = GroupedSampler(len(source), batch_size, group=group, seed=seed, rank=rank, world=world)
            data = Encoded(source, preprocess, context_length)
            self._loader = DataLoader(data, batch_sampler=self._order, **loader_options)
            self.epoch_batches = len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, done = divmod(self.position, self.epoch_batches)
            self._order.epoch = epoch
            if isinstance(self._order, GroupedSampler):
                self._order.start = done
                batches: Iterable[Batch] = self._loader
            else:
                batches = self._shard_batches(done)
            for batch in batches:
                self.position += 1
                yield batch

    def _shard_batches(self, done: int) -> Iterator[Batch]:
        """One epoch of shards behind the first ``done`` batches; shards that hold less are read again."""
        taken = 0
        while taken < self.epoch_batches:
            before = taken
            for batch in self._loader:
                taken += 1
                if taken > done:
                    yield batch
                if taken == self.epoch_batches:
                    return
            if taken == before:
                raise TrainingError("the shards hold less than one batch per worker: fewer workers, or a smaller batch")
