"""Batches of webdataset shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from finelip_fast._json import parse_json
from finelip_fast._terminal import printable
from finelip_fast.datasets import Example
from finelip_fast.errors import InputError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.batch import Batch, Encoding, collate, encode_example
from finelip_fast.training.shards import CAPTIONS, PICTURES, shard_names, shard_samples

# Number of broken samples in shards that are reported even before a batch is full.
_REPORT = 100

MOST_SAMPLES = 1 << 40  # per shard


class ShardBatches(IterableDataset[Batch]):
    """Batches of webdataset shards (``jpg|png|webp`` + ``txt`` or ``json`` with ``caption``), shuffled by shard.

    Each process and worker reads its own shards, in an order fixed by the seed, the epoch and the numbers of processes and
    workers. Samples that cannot be read are skipped, as is the rest of a damaged shard; if many accumulate, a batch
    without pairs reports them. Requires the ``webdataset`` package.

    Args:
        pattern: Pattern of shards, as accepted by :func:`finelip_fast.training.shards.shard_names`.
        preprocess, context_length, batch_size: Preprocessing of pictures, tokens in the context of captions, pairs per batch.
        seed: Seed of the order.
        rank, world: Rank of this process, and number of processes.
        remote: Whether shards may come from the network.
        augmentation: Caption augmentation, with foreign sentences from the previous sample; None: captions stay unchanged.
        tokenizer: Tokenizer of the captions.

    Attributes:
        epoch, lap: Epoch and lap to read: shards that hold less than an epoch are read again.
        start: int64 ``[shards]``, position from which to read each shard: laps times ``MOST_SAMPLES``, plus samples.

    Raises:
        ConfigError: The pattern is not accepted by :func:`finelip_fast.training.shards.shard_names`.
    """

    def __init__(
        self,
        pattern: str,
        preprocess: Preprocess,
        context_length: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        remote: bool = False,
        augmentation: Augmentation | None = None,
        tokenizer: Tokenizer = CLIP_BPE,
    ) -> None:
        self.augmentation, self.tokenizer = augmentation, tokenizer
        self.shards, self.remote = shard_names(pattern, remote=remote), remote
        self.preprocess, self.context_length, self.batch_size = preprocess, context_length, batch_size
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = self.lap = 0
        self.start = torch.zeros(len(self.shards), dtype=torch.int64)

    def __iter__(self) -> Iterator[Batch]:
        items: list[Encoding] = []
        broken: list[str] = []
        sample_counts: dict[int, int] = {}
        for number, count, encoded in self._encoded():
            sample_counts[number] = count
            if isinstance(encoded, str):
                broken.append(encoded)
            else:
                items.append(encoded)
            if len(items) == self.batch_size:
                yield replace(collate(items), broken=broken, sample_counts=sample_counts)
                items, broken, sample_counts = [], [], {}
            elif len(broken) == _REPORT:
                yield _report(broken)
                broken = []
        if broken:
            yield _report(broken)

    def _encoded(self) -> Iterator[tuple[int, int, Encoding | str]]:
        """Yield the shard's number, the sample's number from 1, and its tensors or the reason why there are none."""
        order = list(range(len(self.shards)))
        Random(self.seed * 1_000_003 + self.epoch).shuffle(order)
        worker = get_worker_info()
        mine = order[self.rank :: self.world]
        for number in mine[worker.id :: worker.num_workers] if worker else mine:
            laps, start = divmod(int(self.start[number]), MOST_SAMPLES)
            count, before = 0, ""
            try:
                for count, sample in enumerate(shard_samples(self.shards[number], remote=self.remote), start=1):
                    name = f"{self.shards[number]}:{sample['__key__']}"
                    example = _shard_example_or_reason(sample, name)
                    if (self.lap, count) > (laps, start):
                        random = Random(f"{self.seed}/{self.epoch}/{self.lap}/{number}/{count}")
                        yield number, count, self._encode(example, name, random, before)
                    before = before if isinstance(example, str) else example.caption
            except TrainingError as error:
                yield number, count + 1, str(error)

    def _encode(self, example: Example | str, name: str, random: Random, before: str) -> Encoding | str:
        """Encode a sample, or return the reason why that fails; ``before`` is the caption of the previous sample."""
        if isinstance(example, str):
            return example
        if self.augmentation is not None:
            example = self.augmentation(example, random, lambda: before)
        try:
            return encode_example(example, self.preprocess, self.context_length, self.tokenizer)
        except (InputError, OSError) as error:
            return f"{printable(name)}: {error}"


def _report(broken: list[str]) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    return Batch(none, none, none, none, none, none, none, none, none, 0, broken)


def _shard_example_or_reason(sample: dict[str, Any], name: str) -> Example | str:
    try:
        return _shard_example(sample, name)
    except InputError as error:
        return f"{printable(name)}: {error}"


def _shard_example(sample: dict[str, Any], name: str) -> Example:
    """Return the pair of a sample.

    Raises:
        InputError: The sample has no picture or no caption, or the caption is not text.
    """
    image = next((sample[suffix] for suffix in PICTURES if suffix in sample), None)
    caption, reason = None, ""
    try:
        if "txt" in sample:
            caption = sample["txt"].decode("utf-8-sig")
        elif "json" in sample:
            caption = parse_json(sample["json"], "json", error=InputError, kind=dict).get("caption")
    except (UnicodeDecodeError, InputError) as error:
        reason = f": {error}"
    if image is None or not isinstance(caption, str):
        present = sorted(key for key in sample if not key.startswith("__"))
        raise InputError(
            f"expected a picture ({', '.join(PICTURES)}) and a caption ({', '.join(CAPTIONS)}), "
            f"found {present!r:.200}{reason:.200}"
        )
    return Example(image, caption, name)
