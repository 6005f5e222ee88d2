"""Pairs of a map-style dataset as tensors, and the order in which a process reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

import torch
from torch.utils.data import Dataset, Sampler

from finelip_fast._terminal import printable
from finelip_fast.datasets import Example, PairDataset
from finelip_fast.errors import ConfigError, ImageError, InputError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer
from finelip_fast.training.augment import Augmentation
from finelip_fast.training.batch import Batch, Encoding, collate, encode_example
from finelip_fast.training.features import Features

# Minimum number of examples to try instead of a broken one; more are tried until the chance that an allowed share of broken
# pairs gives so many in a row falls below 1e-12.
_SUBSTITUTES, _CHANCE = 100, 1e-12

# Maximum number of pairs drawn to find one with another picture.
_STRANGERS_TRIED = 10


class Encoded(Dataset[Encoding]):
    """A dataset of pairs as tensors.

    Args:
        pairs: Pairs; one that cannot be read is replaced by another from elsewhere in the data, since missing pairs often
            lie side by side.
        preprocess, context_length: Preprocessing of pictures, and number of tokens in the context of captions.
        max_broken_share: Share of broken pairs up to which replacements are tried.
        augmentation: Caption augmentation; None: captions stay unchanged.
        seed: Seed of the augmentation.
        features: Precomputed features of the pairs, used instead of pixels and in addition to ids; None: pixels are used.
        tokenizer: Tokenizer of the captions.

    Attributes:
        epoch: Number of the epoch; a pair's caption is augmented differently in each.
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
        """Return the pair at an index, or the first of the others that can be read.

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
            f"none of the {len(broken)} pairs tried, of {len(self.pairs)}, can be read; the last: "
            f"{printable(broken[-1])}; if their paths start from another folder, pass --root, otherwise repair the data"
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
        """Draw a caption of another picture, unless nearly all pairs have the same one."""
        draws = (self._without_image(random.randrange(len(self.pairs))) for _ in range(_STRANGERS_TRIED))
        example = next(draws)
        while example.image_id == image_id and (another := next(draws, None)) is not None:
            example = another
        return example.caption

    def __getitems__(self, indices: Sequence[int]) -> list[Encoding | TrainingError]:
        """Return several pairs. An error is returned as the last item: raised in a worker, it would carry a traceback."""
        encodings: list[Encoding | TrainingError] = []
        try:
            encodings.extend(self[index] for index in indices)
        except TrainingError as error:
            encodings.append(error)
        return encodings

    def _are_too_many(self, broken: int) -> bool:
        return broken >= _SUBSTITUTES and self.max_broken_share**broken < _CHANCE


def _spread(size: int, start: int) -> Iterator[int]:
    """Iterate over all numbers below ``size`` from ``start`` on, in golden-ratio steps that keep neighbours far apart."""
    step = next(step for step in range(max(1, round(size * 0.618)), size + 1) if math.gcd(step, size) == 1)
    return ((start + count * step) % size for count in range(size))


def collate_or_error(items: Sequence[Encoding | TrainingError]) -> Batch | TrainingError:
    """Collate the result of :meth:`Encoded.__getitems__` into a batch, or return the error in it."""
    encodings = [item for item in items if isinstance(item, Encoding)]
    errors = [item for item in items if isinstance(item, TrainingError)]
    return errors[0] if errors else collate(encodings)


class GroupedSampler(Sampler[list[int]]):
    """This process's share of each global batch, in an order fixed by seed and epoch.

    Neighbouring examples (``group`` of them) stay together in a batch: if a dataset puts look-alikes side by side, each
    batch then holds hard negatives. The global batches do not depend on the number of processes.

    Args:
        size: Number of examples in the dataset; an incomplete last batch is dropped.
        batch_size: Number of pairs per batch and process; a multiple of ``group``.
        group: Number of examples that stay together; 1 shuffles freely.
        rank, world: Rank of this process, and number of processes.

    Attributes:
        start: Number of examples of the epoch already taken.
    """

    def __init__(self, size: int, batch_size: int, *, group: int, seed: int, rank: int, world: int) -> None:
        if batch_size % group:
            raise ConfigError(f"expected batch_size a multiple of group={group}, got {batch_size}")
        if size < batch_size * world:
            raise ConfigError(
                f"expected at least one global batch of {batch_size * world} examples, got {size}; "
                "use a smaller --batch-size, or more data"
            )
        self.size, self.batch_size, self.group, self.seed = size, batch_size, group, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator takes 64 bits.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 64))
        groups = torch.randperm(self.size // self.group, generator=generator)
        order = (groups[:, None] * self.group + torch.arange(self.group)).flatten()
        global_batch = self.batch_size * self.world
        for first in range(self.start, len(order) - global_batch + 1, global_batch):
            mine = first + self.rank * self.batch_size
            yield order[mine : mine + self.batch_size].tolist()
