"""Find duplicate items: by a metadata field, such as a file's hash, or by the similarity of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import share
from finelip_fast.index.index import Index
from finelip_fast.kernels import cpu

# Rows per block of cosines, which keeps memory use small compared with the index.
_BLOCK = 2048


def duplicates(
    index: Index, *, similarity: float | None = None, field: str = "sha256", progress: bool = False
) -> list[list[str]]:
    """Group duplicate items; items are in order of insertion, and groups in the order of their first item.

    Args:
        index: The index.
        similarity: Minimum cosine between the global embeddings of duplicates, in [0, 1]; None: only the field counts.
        field: Metadata field whose value is the same for items with the same content.
        progress: Whether to show a progress bar.

    Raises:
        InputError: ``similarity`` is outside [0, 1].
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
    """Yield the pairs of unit rows ``[N, D]`` whose cosine is at least ``similarity``."""
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
    """Union-find over the numbers from 0: the smaller root wins, and lookups halve paths."""

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
        """The groups with more than one member."""
        groups: dict[int, list[int]] = {}
        for number in range(len(self._first)):
            groups.setdefault(self._first_of(number), []).append(number)
        return [group for group in groups.values() if len(group) > 1]
