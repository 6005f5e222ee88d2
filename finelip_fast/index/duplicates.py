"""Items that are alike: by a field of their metadata, such as a file's hash, or by embeddings that are near each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import share
from finelip_fast.index.index import Index
from finelip_fast.kernels import cpu

# Cosines at once: memory that stays small beside the index.
_BLOCK = 2048


def duplicates(
    index: Index, *, similarity: float | None = None, field: str = "sha256", progress: bool = False
) -> list[list[str]]:
    """Groups of items that are alike, each in order of insertion, the groups in that of their first.

    Args:
        index: The index.
        similarity: Cosine of two global embeddings from which on they are alike, in [0, 1]; None: only the field counts.
        field: Field of the metadata that is the same for items of the same content.
        progress: Show a progress bar.

    Raises:
        InputError: A ``similarity`` outside [0, 1].
        StoreError: The index cannot be read.
    """
    items = list(index.items())
    groups = _Groups(len(items))
    first: dict[object, int] = {}
    for number, item in enumerate(items):
        if isinstance(content := item.metadata.get(field), (str, int)):
            groups.join(first.setdefault(content, number), number)
    if similarity is not None:
        for left, right in _near(index.embeddings[:, 0], share("similarity", similarity), progress):
            groups.join(left, right)
    return [[items[number].id for number in group] for group in groups.several()]


def _near(rows: Tensor, similarity: float, progress: bool) -> Iterator[tuple[int, int]]:
    """Pairs of unit rows ``[N, D]`` whose cosine is at least so high."""
    rows = torch.nn.functional.normalize(rows.float(), dim=1)
    blocks = rows.split(_BLOCK)
    with tqdm(total=len(rows), unit="item", disable=not progress, mininterval=0.5) as bar:
        for number, block in enumerate(blocks):
            for following in range(number, len(blocks)):
                pairs = (cpu.product(block, blocks[following].T) >= similarity).nonzero()
                pairs += torch.tensor([number * _BLOCK, following * _BLOCK], device=pairs.device)
                yield from ((left, right) for left, right in pairs.tolist() if left < right)
            bar.update(len(block))


class _Groups:
    """Numbers from 0 in groups that are joined: union by the smaller number, with halved paths."""

    def __init__(self, count: int) -> None:
        self._first = list(range(count))

    def _first_of(self, number: int) -> int:
        while self._first[number] != number:
            self._first[number] = self._first[self._first[number]]
            number = self._first[number]
        return number

    def join(self, left: int, right: int) -> None:
        firsts = sorted((self._first_of(left), self._first_of(right)))
        self._first[firsts[1]] = firsts[0]

    def several(self) -> list[list[int]]:
        """The groups of more than one."""
        groups: dict[int, list[int]] = {}
        for number in range(len(self._first)):
            groups.setdefault(self._first_of(number), []).append(number)
        return [group for group in groups.values() if len(group) > 1]
