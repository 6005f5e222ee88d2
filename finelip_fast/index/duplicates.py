"""Find duplicate items: by a metadata field, such as a file's hash, or by the similarity of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import share
from finelip_fast.index.index import Index
from finelip_fast.index.view import View
from finelip_fast.kernels import cpu
from finelip_fast.kernels.clim.rows import Pieces

# Rows per block of cosines, which keeps memory use small compared with the rows.
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
    if similarity is not None:
        similarity = share("similarity", similarity)
    store = index._searcher.store

    def group(view: View) -> list[list[str]]:
        items = [item for row in view.layout.segments for item in store.catalogue.items(view.version, within=row)]
        groups = _Groups(len(items))
        first: dict[object, int] = {}
        for number, item in enumerate(items):
            if isinstance(content := item.metadata.get(field), (str, int)):
                groups.join(first.setdefault(content, number), number)
        if similarity is not None and items:
            for left, right in _near(_global_rows(view), similarity, progress):
                groups.join(left, right)
        return [[items[number].id for number in numbers] for numbers in groups.several()]

    return store.on_view(group)


def _global_rows(view: View) -> Tensor:
    """Row 0 of all items, float16 ``[N, D]``."""
    view.refuse_shortened()
    return Pieces(view.anchors).take(torch.arange(view.rows) if view.living is None else view.living)[:, 0]


def _near(rows: Tensor, similarity: float, progress: bool) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows ``[N, D]`` whose cosine is at least ``similarity``."""
    blocks = rows.split(_BLOCK)
    with tqdm(total=len(rows), unit="item", disable=not progress, mininterval=0.5) as bar:
        for number, block in enumerate(blocks):
            unit = _normalized(block)
            for following in range(number, len(blocks)):
                pairs = (cpu.product(unit, _normalized(blocks[following]).T) >= similarity).nonzero()
                pairs += torch.tensor([number * _BLOCK, following * _BLOCK], device=pairs.device)
                yield from ((left, right) for left, right in pairs.tolist() if left < right)
            bar.update(len(block))


def _normalized(block: Tensor) -> Tensor:
    """Unit rows in float32; of one block at a time, since all of them would take twice the memory of the rows."""
    return torch.nn.functional.normalize(block.float(), dim=1)


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
