"""Batches for training: the same ones for a seed, whatever the number of workers (but for shards), again after a restart.

A picture that cannot be read does not stop a run: the next readable example takes its place, so that every batch keeps its
size on every process, and its path travels with the batch to be reported and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from finelip_fast._json import parse_json
from finelip_fast._terminal import printable
from finelip_fast.datasets import Example, PairDataset
from finelip_fast.encoders import caption_lengths
from finelip_fast.errors import ConfigError, ImageError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import encode_batch, expected_truncation, token_spans
from finelip_fast.training.shards import PICTURES, shard_names, shard_samples

# Examples tried in place of an unreadable one before the data is called unusable.
_SUBSTITUTES = 100


class Encoding(NamedTuple):
    """One pair as tensors.

    Attributes:
        pixels: ``[3, H, W]``.
        ids: int64 ``[T]``.
        image_id: 63 bits; equal for pairs of one picture.
        spans: int64 ``[R, 2]``, the tokens ``first .. last + 1`` of each phrase whose place in the picture is known.
        boxes: float32 ``[R, 4]``, that place, ``x0, y0, x1, y1`` in [0, 1].
        labels: int64 ``[R]``, equal for phrases that describe the same.
        is_cut: Whether the caption was longer than the context.
        broken: Paths of pictures that could not be read before this one, each with the reason.
    """

    pixels: Tensor
    ids: Tensor
    image_id: int
    spans: Tensor
    boxes: Tensor
    labels: Tensor
    is_cut: bool
    broken: Sequence[str] = ()


@dataclass
class Batch:
    """``B`` pairs, ready for the model; ``R`` phrases of them have a known place in their picture.

    Attributes:
        pixels: ``[B, 3, H, W]``.
        ids: int64 ``[B, T]``.
        image_ids: int64 ``[B]``; equal for pairs of one picture.
        owners: int64 ``[R]``, the pair that each phrase belongs to.
        spans, boxes, labels: ``[R, 2]``, ``[R, 4]``, ``[R]``, as in :class:`Encoding`.
        captions_cut: How many of the captions were longer than the context.
        broken: Paths of pictures that could not be read, each with the reason.
    """

    pixels: Tensor
    ids: Tensor
    image_ids: Tensor
    owners: Tensor
    spans: Tensor
    boxes: Tensor
    labels: Tensor
    captions_cut: int
    broken: list[str]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed: moved, say."""
        changed: Any = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by the data loader)."""
        return self.map(Tensor.pin_memory)


class Encoded(Dataset[Encoding]):
    """A dataset of pairs as tensors."""

    def __init__(self, pairs: PairDataset, preprocess: Preprocess, context_length: int) -> None:
        self.pairs, self.preprocess, self.context_length = pairs, preprocess, context_length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Encoding:
        broken: list[str] = []
        for step in range(min(_SUBSTITUTES, len(self.pairs))):
            example = self.pairs[(index + step) % len(self.pairs)]
            try:
                return encode_example(example, self.preprocess, self.context_length)._replace(broken=broken)
            except ImageError as error:
                broken.append(str(error))
        raise _unusable(broken)


def _unusable(broken: list[str]) -> TrainingError:
    return TrainingError(f"{len(broken)} pictures in a row cannot be read; the last: {broken[-1]}")


def encode_example(example: Example, preprocess: Preprocess, context_length: int) -> Encoding:
    """A pair as tensors; phrases that the context cuts off or into are left out."""
    with expected_truncation():
        tokens = encode_batch([example.caption], context_length)
    spans = token_spans(example.caption, [(region.start, region.end) for region in example.regions])
    known = [
        (span, region)
        for span, region in zip(spans, example.regions, strict=True)
        if span[0] < span[1] < context_length
    ]
    return Encoding(
        preprocess(example.image),
        tokens.ids[0],
        _number(example.image_id),
        torch.tensor([span for span, _ in known], dtype=torch.int64).reshape(-1, 2),
        torch.tensor([region.box for _, region in known], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([_number(region.label) for _, region in known], dtype=torch.int64),
        is_cut=tokens.n_cut > 0,
    )


def _number(name: str) -> int:
    """63 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") >> 1


def collate(items: Sequence[Encoding]) -> Batch:
    """Stack examples to a batch; the ids are cut to the longest caption."""
    ids = torch.stack([item.ids for item in items])
    longest = int(caption_lengths(ids).max())
    phrases = torch.tensor([len(item.spans) for item in items])
    return Batch(
        torch.stack([item.pixels for item in items]),
        ids[:, :longest],
        torch.tensor([item.image_id for item in items]),
        torch.arange(len(items)).repeat_interleave(phrases),
        torch.cat([item.spans for item in items]),
        torch.cat([item.boxes for item in items]),
        torch.cat([item.labels for item in items]),
        sum(item.is_cut for item in items),
        [path for item in items for path in item.broken],
    )


class GroupedSampler(Sampler[list[int]]):
    """This process's share of each global batch, in an order fixed by seed and epoch.

    Neighbouring examples (``group`` of them) stay together in a batch: where a dataset puts look-alikes side by side, each
    batch then holds hard negatives. The global batches do not depend on the number of processes.

    Args:
        size: Examples in the dataset; a last incomplete batch is left out.
        batch_size: Pairs in a batch of one process; a multiple of ``group``.
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


class ShardExamples(IterableDataset[Encoding]):
    """webdataset shards (``jpg|png|webp`` + ``txt`` or ``json`` with ``caption``), shuffled by shard, split over processes.

    The order is fixed by seed, epoch and number of workers; a restart reads past what was already seen. Needs the
    ``webdataset`` package.

    Raises:
        ConfigError: A pattern that :func:`finelip_fast.training.shards.shard_names` does not take.
    """

    def __init__(
        self, pattern: str, preprocess: Preprocess, context_length: int, *, seed: int, remote: bool = False
    ) -> None:
        self.shards, self.remote = shard_names(pattern, remote=remote), remote
        self.preprocess, self.context_length, self.seed = preprocess, context_length, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Encoding]:
        import random

        from webdataset.shardlists import split_by_node, split_by_worker

        shards = list(self.shards)
        random.Random(self.seed * 1_000_003 + self.epoch).shuffle(shards)
        broken: list[str] = []
        for shard in split_by_worker(split_by_node(shards)):
            for sample in shard_samples(shard, remote=self.remote):
                name = f"{shard}:{sample['__key__']}"
                try:
                    encoded = encode_example(_shard_example(sample, name), self.preprocess, self.context_length)
                except ImageError as error:
                    broken.append(f"{printable(name)}: {error}")
                    if len(broken) == _SUBSTITUTES:
                        raise _unusable(broken) from None
                    continue
                yield encoded._replace(broken=broken)
                broken = []


def _shard_example(sample: dict[str, Any], name: str) -> Example:
    image = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
    caption, reason = None, ""
    try:
        if "txt" in sample:
            caption = sample["txt"].decode()
        elif "json" in sample:
            caption = parse_json(sample["json"], "json", error=TrainingError, kind=dict).get("caption")
    except (UnicodeDecodeError, TrainingError) as error:
        reason = f": {error}"
    if image is None or not isinstance(caption, str):
        present = sorted(key for key in sample if not key.startswith("__"))
        raise TrainingError(
            f"{printable(name)}: expected a picture (jpg, png, webp) and a caption (txt, json), "
            f"found {present!r:.200}{reason:.200}"
        )
    return Example(image, caption, name)


class TrainingData:
    """An endless, restartable stream of batches.

    Args:
        source: A map-style dataset, or the pattern of webdataset shards.
        preprocess, context_length: What turns a pair into tensors.
        batch_size: Pairs of one process at a time.
        epoch_batches: Batches of an epoch; needed for shards, derived for map-style data.
        position: Batches already taken, to go on behind them.
        remote: Whether shards may come from the network.
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
        remote: bool = False,
    ) -> None:
        self.position = position
        loader_options: dict[str, Any] = {"collate_fn": collate, "num_workers": workers, "pin_memory": pin_memory}
        if isinstance(source, str):
            if epoch_batches < 1:
                raise ConfigError("expected epoch_batches with webdataset shards: their length is not known beforehand")
            self._order: Any = ShardExamples(source, preprocess, context_length, seed=seed, remote=remote)
            self._loader = DataLoader(self._order, batch_size=batch_size, drop_last=True, **loader_options)
            self.epoch_batches = epoch_batches
        else:
            self._order = GroupedSampler(len(source), batch_size, group=group, seed=seed, rank=rank, world=world)
            data = Encoded(source, preprocess, context_length)
            self._loader = DataLoader(data, batch_sampler=self._order, **loader_options)
            self.epoch_batches = len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            epoch, finished = divmod(self.position, self.epoch_batches)
            self._order.epoch = epoch
            if isinstance(self._order, GroupedSampler):
                self._order.start = finished
                batches: Iterable[Batch] = self._loader
            else:
                batches = self._shard_batches(finished)
            for batch in batches:
                self.position += 1
                yield batch

    def _shard_batches(self, finished: int) -> Iterator[Batch]:
        """One epoch of shards behind the first ``done`` batches; shards that hold less are read again."""
        count = 0
        while count < self.epoch_batches:
            before = count
            for batch in self._loader:
                count += 1
                if count > finished:
                    yield batch
                if count == self.epoch_batches:
                    return
            if count == before:
                raise TrainingError("the shards hold less than one batch per worker: fewer workers, or a smaller batch")
