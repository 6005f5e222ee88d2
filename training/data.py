"""Batches for training: the same ones for a seed, whatever the number of workers (but for shards), again after a restart.

A pair that cannot be read does not stop a run: another example takes its place, so that every batch keeps its size on every
process, and the reason travels with the batch to be reported and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from finelip_fast._json import parse_json
from finelip_fast._terminal import printable
from finelip_fast.datasets import Example, PairDataset
from finelip_fast.datasets.base import FileExamples
from finelip_fast.datasets.survey import hash_of
from finelip_fast.errors import ConfigError, FineLIPError, ImageError, InputError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.batch import Batch, Encoding, collate, encode_example
from finelip_fast.training.features import Features
from finelip_fast.training.shards import CAPTIONS, PICTURES, shard_names, shard_samples, shard_size

# Examples tried in place of a broken one, at least; more, until fewer broken ones than are allowed would come so by a chance
# of one in 1e12.
_SUBSTITUTES, _CHANCE = 100, 1e-12

# Pairs that are drawn until one is of another picture.
_STRANGERS_TRIED = 10

# Broken samples of shards in a row that are reported, though no batch is full.
_REPORT = 100

_LAP = 1 << 40  # samples of a shard, at most


class Encoded(Dataset[Encoding]):
    """A dataset of pairs as tensors.

    Args:
        pairs: Pairs; the place of one that cannot be read is taken by another from elsewhere in the data, where those that
            are missing together are not.
        preprocess, context_length: What turns a pair into tensors.
        max_broken_share: Share of broken pairs up to which another one is looked for.
        augmentation: Changes of captions; None: they stay as they are.
        seed: Seed of the changes.
        features: Features of the pairs in place of their pixels and beside their ids; None: there are none.
        tokenizer: What makes tokens of a caption.

    Attributes:
        epoch: A pair's caption is changed otherwise in each.
    """

    def __init__(
        self,
        pairs: PairDataset,
        preprocess: Preprocess,
        context_length: int,
        *,
        max_broken_share: float = 1.0,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        features: Features | None = None,
        tokenizer: Tokenizer = CLIP_BPE,
    ) -> None:
        self.features, self.tokenizer = features, tokenizer
        self._without_image: Callable[[int], Example] = getattr(pairs, "without_image", pairs.__getitem__)
        self._look = self._without_image if features else pairs.__getitem__
        self.pairs, self.preprocess, self.context_length = pairs, preprocess, context_length
        self.max_broken_share, self.augmentation, self.seed = max_broken_share, augmentation, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Encoding:
        """The pair of a number, or the first of the others that can be read.

        Raises:
            TrainingError: More than the allowed share of the pairs, or all of them, cannot be read.
        """
        broken: list[str] = []
        order = _spread(len(self.pairs), index)
        while len(broken) < len(self.pairs) and not self._are_too_many(len(broken)):
            number = next(order)
            example = self._augmented(self._look(number), number)
            try:
                return self._encoded(example, number)._replace(broken=broken)
            except ImageError as error:  # names the picture
                broken.append(str(error))
            except (InputError, OSError) as error:
                broken.append(f"{example.image_id}: {error}")
        raise TrainingError(
            f"{len(broken)} of {len(self.pairs)} pairs were tried in turn, and none can be read; the last: "
            f"{printable(broken[-1])}; where the paths start from another folder, give --root, else mend the data"
        )

    def _encoded(self, example: Example, number: int) -> Encoding:
        if self.features is None:
            return encode_example(example, self.preprocess, self.context_length, self.tokenizer)
        features = self.features
        encoding = encode_example(example, lambda _: features.picture(number), self.context_length, self.tokenizer)
        return encoding._replace(tokens=features.caption(number))

    def _augmented(self, example: Example, number: int) -> Example:
        if self.augmentation is None:
            return example
        random = Random(f"{self.seed}/{self.epoch}/{number}")
        return self.augmentation(example, random, partial(self._other_caption, example.image_id, random))

    def _other_caption(self, image_id: str, random: Random) -> str:
        """A caption of another picture, unless nearly all pairs are of one."""
        draws = (self._without_image(random.randrange(len(self.pairs))) for _ in range(_STRANGERS_TRIED))
        example = next(draws)
        while example.image_id == image_id and (another := next(draws, None)) is not None:
            example = another
        return example.caption

    def __getitems__(self, indices: Sequence[int]) -> list[Encoding | TrainingError]:
        """Several pairs; an error is the last of them, as it is: raised in a worker, it would come with a traceback."""
        encodings: list[Encoding | TrainingError] = []
        try:
            encodings.extend(self[index] for index in indices)
        except TrainingError as error:
            encodings.append(error)
        return encodings

    def _are_too_many(self, broken: int) -> bool:
        return broken >= _SUBSTITUTES and self.max_broken_share**broken < _CHANCE


def _spread(size: int, start: int) -> Iterator[int]:
    """All numbers below ``size`` from ``start`` on, neighbours far apart: by steps of the golden ratio."""
    step = next(step for step in range(max(1, round(size * 0.618)), size + 1) if math.gcd(step, size) == 1)
    return ((start + count * step) % size for count in range(size))


def _collate_or_error(items: Sequence[Encoding | TrainingError]) -> Batch | TrainingError:
    encodings = [item for item in items if isinstance(item, Encoding)]
    errors = [item for item in items if isinstance(item, TrainingError)]
    return errors[0] if errors else collate(encodings)


def _report(broken: list[str]) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    return Batch(none, none, none, none, none, none, none, none, none, 0, broken)


class GroupedSampler(Sampler[list[int]]):
    """This process's share of each global batch, in an order fixed by seed and epoch.

    Neighbouring examples (``group`` of them) stay together in a batch: where a dataset puts look-alikes side by side, each
    batch then holds hard negatives. The global batches do not depend on the number of processes.

    Args:
        size: Examples in the dataset; a last incomplete batch is left out.
        batch_size: Pairs in a batch of one process; a multiple of ``group``.
        group: Examples that stay together; 1 shuffles freely.
        rank, world: This process and how many there are.

    Attributes:
        start: Examples of the epoch that were already taken.
    """

    def __init__(self, size: int, batch_size: int, *, group: int, seed: int, rank: int, world: int) -> None:
        if batch_size % group:
            raise ConfigError(f"expected batch_size a multiple of group={group}, got {batch_size}")
        if size < batch_size * world:
            raise ConfigError(
                f"expected at least one global batch of {batch_size * world} examples, got {size}; "
                "give a smaller --batch-size, or more data"
            )
        self.size, self.batch_size, self.group, self.seed = size, batch_size, group, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups = torch.randperm(self.size // self.group, generator=generator)
        order = (groups[:, None] * self.group + torch.arange(self.group)).flatten()
        global_batch = self.batch_size * self.world
        for first in range(self.start, len(order) - global_batch + 1, global_batch):
            mine = first + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()


class ShardBatches(IterableDataset[Batch]):
    """Batches of webdataset shards (``jpg|png|webp`` + ``txt`` or ``json`` with ``caption``), shuffled by shard.

    Each process and worker has shards of its own. The order is fixed by seed, epoch and their numbers. A sample that cannot be
    read is passed over, and so is the rest of a shard; many in a row are reported by a batch without pairs. Needs the
    ``webdataset`` package.

    Args:
        pattern: Shards, as :func:`finelip_fast.training.shards.shard_names` takes them.
        preprocess, context_length, batch_size: What turns samples into batches.
        seed: Seed of the order.
        rank, world: This process and how many there are.
        remote: Whether shards may come from the network.
        augmentation: Changes of captions; sentences of others are of the sample before. None: they stay as they are.
        tokenizer: What makes tokens of a caption.

    Attributes:
        epoch, lap: What is read: shards that hold less than an epoch are read again.
        start: int64 ``[shards]``, where each shard is read from: laps times ``_LAP``, and samples.

    Raises:
        ConfigError: A pattern that :func:`finelip_fast.training.shards.shard_names` does not take.
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
        """Samples as tensors, or the reason why there are none, behind the shard's number and the sample's, from 1."""
        order = list(range(len(self.shards)))
        Random(self.seed * 1_000_003 + self.epoch).shuffle(order)
        worker = get_worker_info()
        mine = order[self.rank :: self.world]
        for number in mine[worker.id :: worker.num_workers] if worker else mine:
            laps, start = divmod(int(self.start[number]), _LAP)
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
        """A sample's tensors, or why there are none; ``before`` is the caption of the sample before it."""
        if isinstance(example, str):
            return example
        if self.augmentation is not None:
            example = self.augmentation(example, random, lambda: before)
        try:
            return encode_example(example, self.preprocess, self.context_length, self.tokenizer)
        except (InputError, OSError) as error:
            return f"{printable(name)}: {error}"


def _shard_example_or_reason(sample: dict[str, Any], name: str) -> Example | str:
    try:
        return _shard_example(sample, name)
    except InputError as error:
        return f"{printable(name)}: {error}"


def _shard_example(sample: dict[str, Any], name: str) -> Example:
    """The pair of a sample.

    Raises:
        InputError: No picture, no caption, or one that is no text.
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


def identity_of(source: PairDataset | str, *, remote: bool = False) -> dict[str, Any]:
    """What tells data from other data of the same name, as far as it is cheap to know.

    Args:
        source: A map-style dataset, or the pattern of webdataset shards.
        remote: Whether shards may come from the network.

    Returns:
        Of pairs of files their number and a hash of paths and captions; of shards their number, and the bytes and a hash of
        names and sizes of those that are files. Nothing of others.

    Raises:
        TrainingError: A shard that is a file and cannot be found.
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

    Batches without pairs report what cannot be read before the next one.

    Args:
        source: A map-style dataset, or the pattern of webdataset shards.
        preprocess, context_length: What turns a pair into tensors.
        batch_size: Pairs of one process at a time.
        epoch_batches: Batches of an epoch; needed for shards, derived for map-style data.
        rank, world: This process and how many there are.
        max_broken_share: Share of broken pairs up to which map-style data has others take their place.
        remote: Whether shards may come from the network.
        augmentation: Changes of captions; None: they stay as they are.
        features: Features of map-style data in place of pixels; None: there are none.
        tokenizer: What makes tokens of a caption.

    Attributes:
        epoch: Number of the epoch.
        pairs: Pairs of it that all processes have taken.
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
            self._loader = DataLoader(self._data, batch_sampler=self._order, collate_fn=_collate_or_error, **options)
            self.epoch_batches = len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for batch in self._shard_batches(self._shards) if self._shards else self._mapped_batches():
                self.pairs += self._global_batch if len(batch) else 0
                yield batch
            self.epoch, self.pairs = self.epoch + 1, 0
            self._begin_shards()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, for :meth:`load_state_dict`; of all processes' ``places`` in shards the largest count."""
        state: dict[str, Any] = {"epoch": self.epoch, "pairs": self.pairs}
        if self._shards:
            since = {"layout": self._layout, "first": self._first, "start": self._shards.start}
            state |= {**since, "places": self._places}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, also one of another number of processes or workers.

        With as many as before all batches are those that would have come; else they hold the rest of the epoch in another
        order, each pair once.

        Args:
            state: What :meth:`state_dict` gave.

        Raises:
            ValueError: A state of other shards.
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
        """Go on behind so many batches of the beginning.

        Args:
            batches: Batches of each process.
            processes: How many there were; None: as many as now.

        Raises:
            ConfigError: Shards, of which other processes read.
        """
        processes = processes or self._layout[0]
        global_batch, epoch_batches = self._global_batch // self._layout[0] * processes, self.epoch_batches
        if processes != self._layout[0]:
            if self._shards:
                raise ConfigError(
                    f"this run was saved by an earlier version, which did not keep what was read of its shards; give as many "
                    f"processes as it had, {processes}, to go on"
                )
            epoch_batches = self._order.size // global_batch
        self.epoch, finished = divmod(batches, epoch_batches)
        self.pairs = finished * global_batch

    def _mapped_batches(self) -> Iterator[Batch]:
        self._order.epoch, self._order.start, self._data.epoch = self.epoch, self.pairs, self.epoch
        return self._loaded()

    def _begin_shards(self) -> None:
        """Forget which shards were read: an epoch begins."""
        if self._shards:
            self._first = 0  # batch of the epoch that is read first
            self._places = torch.zeros_like(self._shards.start)  # up to which shards were read, as ``start``
            self._shards.start = torch.zeros_like(self._places)

    def _shard_batches(self, shards: ShardBatches) -> Iterator[Batch]:
        """The rest of an epoch of shards; those that hold less are read again."""
        finished, count = self.pairs // self._global_batch, self._first
        laps = int(shards.start.max()) // _LAP
        shards.epoch, shards.lap = self.epoch, 0
        while finished < self.epoch_batches and count < self.epoch_batches:
            before, broken, reason = count, 0, ""
            for batch in self._loaded():
                count += 1 if len(batch) else 0
                for number, samples in batch.sample_counts.items():
                    self._places[number] = shards.lap * _LAP + samples
                if batch.broken:
                    broken, reason = broken + len(batch.broken), batch.broken[-1]
                if count > finished or (count == finished and not len(batch)):
                    yield batch
                if count == self.epoch_batches:
                    return
            if count == before and shards.lap >= laps:
                unreadable = f"; {broken} samples cannot be read, the last: {printable(reason)}" if broken else ""
                raise TrainingError(
                    "the shards hold less than one batch per worker of a process: give fewer --workers or processes, or a "
                    f"smaller --batch-size{unreadable}"
                )
            shards.lap += 1

    def _loaded(self) -> Iterator[Batch]:
        """The loader's batches.

        Raises:
            TrainingError: What went wrong in a worker, as a line.
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
                "a data loading process was ended by the system, as it does where memory is short; the same command goes on "
                f"from the last state, with fewer --workers or with --workers 0: {printable(error):.200}"
            ) from error
