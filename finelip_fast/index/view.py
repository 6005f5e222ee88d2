"""A view: one immutable version of an index, ready to search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from finelip_fast.errors import StoreError
from finelip_fast.index import remedies
from finelip_fast.index.catalogue import Item, Layout
from finelip_fast.index.residence import resident
from finelip_fast.index.segments import Segment, joined
from finelip_fast.index.standing import sampled_rows
from finelip_fast.kernels import QuantizedItems, quantize
from finelip_fast.kernels.clim.rows import Pieces, is_gpu

# More pieces than this are concatenated once, instead of being iterated over in each search.
_MOST_PIECES = 32
# Files that are read from at the same time; systems allow 1024 or fewer.
_OPEN_FILES = 128


class View:
    """The segments of a version, and the rows in them that are items.

    A *row* counts all rows of all segments, as the kernels do; a *position* is the catalogue's; the *number* of an item counts
    existing items in order of insertion.

    Args:
        layout: Layout from the catalogue.
        segments: Opened segments of the layout.
        device: Device that searches.
        cache: Folder for data that can be recomputed; None: there is none.

    Attributes:
        filtered: Rows that match filters, by filter, as searches keep them.
    """

    def __init__(self, layout: Layout, segments: Sequence[Segment], device: torch.device, cache: Path | None) -> None:
        self.layout, self.segments, self.device, self.cache = layout, segments, device, cache
        lengths = torch.tensor([0, *(segment.rows for segment in layout.segments)])
        self._firsts = torch.tensor([segment.first for segment in layout.segments], dtype=torch.int64)
        self._offsets = lengths.cumsum(0)
        self._lengths = lengths[1:]
        self.rows = int(self._offsets[-1])
        self._dead = self.rows_at(layout.dead)
        self.filtered: dict[str, Tensor] = {}

    @property
    def version(self) -> int:
        return self.layout.version

    def __len__(self) -> int:
        return self.rows - len(self._dead)

    @cached_property
    def living(self) -> Tensor | None:
        """The rows that are items, ascending; None: all."""
        if not len(self._dead):
            return None
        alive = torch.ones(self.rows, dtype=torch.bool)
        alive[self._dead] = False
        return alive.nonzero()[:, 0]

    def living_in(self, segment: int) -> Tensor:
        """The rows of one segment that are items, counted from its first row."""
        start, stop = self._offsets[segment : segment + 2].tolist()
        if self.living is None:
            return torch.arange(stop - start)
        first, last = torch.searchsorted(self.living, torch.tensor([start, stop])).tolist()
        rows: Tensor = self.living[first:last] - start
        return rows

    def is_complete(self, segment: int) -> bool:
        """Whether compaction would leave a segment as it is."""
        return len(self.living_in(segment)) == len(self.segments[segment]) and self.segments[segment].is_current

    def rows_at(self, positions: Sequence[int]) -> Tensor:
        """Rows of ascending positions; positions in no segment of the view are left out."""
        at = torch.tensor(positions, dtype=torch.int64)
        if not len(self.segments):
            return at[:0]
        segment = (torch.searchsorted(self._firsts, at, right=True) - 1).clamp_min(0)
        row = at - self._firsts[segment]
        inside = (row >= 0) & (row < self._lengths[segment])
        return (self._offsets[segment] + row)[inside]

    def positions(self, rows: Tensor) -> Tensor:
        segment = torch.searchsorted(self._offsets, rows, right=True) - 1
        return self._firsts[segment] + rows - self._offsets[segment]

    def numbers(self, rows: Tensor) -> Tensor:
        return rows if self.living is None else torch.searchsorted(self.living, rows)

    def read(self, rows: Tensor) -> Tensor:
        """Embeddings ``[m, L, D]`` of rows in any order, from the disk if they are not in memory.

        Raises:
            FileNotFoundError: A segment is gone, because another process has compacted the index.
            StoreError: A segment cannot be read.
        """
        if not len(rows):
            return torch.empty(0, 0, 0, dtype=torch.float16)
        if self.tokens and is_gpu(self.tokens[0].device):
            return Pieces(self.tokens).take(rows)
        rows, order = rows.cpu().sort()
        segments = torch.searchsorted(self._offsets, rows, right=True) - 1
        shape = self.segments[0].arrays["tokens" if self.tokens else "values"].shape[1:]
        result = torch.empty(len(rows), *shape, dtype=self.segments[0].dtype)
        numbers, counts = segments.unique_consecutive(return_counts=True)
        parts = zip(numbers.tolist(), result.split(counts.tolist()), rows.split(counts.tolist()), strict=True)
        while opened := list(islice(parts, _OPEN_FILES)):
            with ExitStack() as resources:
                reading = []
                for number, part, rows_within in opened:
                    rows_within = rows_within - self._offsets[number]
                    reading.append(self.segments[number].reading(rows_within, part, resources))
                for finish in reading:
                    finish()
        is_sorted = bool((order.diff() > 0).all())
        return result if is_sorted else result[order.argsort()]

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor]:
        """An evenly spread sample of items that every search compares its scores with: int8 and scales, on the device."""
        return quantize(self.read(sampled_rows(self.rows, self.living)).to(self.device))

    def refuse_shortened(self) -> None:
        """Check that mapped files have not become shorter, since a search would then end the process.

        Raises:
            StoreError: A segment has become shorter.
        """
        for segment in self.segments:
            segment.refuse_shortened()
            if segment.has_lost_copies:
                vars(self).pop("quantized", None)

    def refuse_damaged(self, items: Iterable[Item]) -> None:
        """Compare the embeddings of found items with their checksums, if they have any.

        Raises:
            StoreError: An embedding differs; the message names the item.
        """
        for item in items:
            at = int(torch.searchsorted(self._firsts, item.position, right=True)) - 1
            row = item.position - int(self._firsts[at])
            if item.crc not in (None, self.segments[at].checksum(row)):
                raise StoreError(
                    f"item {item.id!r} is damaged: row {row} of segment {self.segments[at].name} is not what was written; "
                    f"restore the file, or keep the rest with {remedies.repair(self.segments[at].folder)}"
                )

    def arrays_at(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Arrays of a segment with the items at these positions, in their order; embeddings are identical to the bit."""
        at = torch.tensor(positions, dtype=torch.int64)
        segments = torch.searchsorted(self._firsts, at, right=True) - 1
        numbers, counts = segments.unique_consecutive(return_counts=True)
        rows = (at - self._firsts[segments]).split(counts.tolist())
        return joined([(self.segments[number], part) for number, part in zip(numbers.tolist(), rows, strict=True)])

    @cached_property
    def tokens(self) -> list[Tensor] | None:
        """All embeddings: one mapped piece per segment, or few pieces on a GPU if they fit. None: only int8 is stored."""
        if not all("tokens" in segment.arrays for segment in self.segments):
            return None
        return self._resident("tokens", [segment.arrays["tokens"] for segment in self.segments])

    @cached_property
    def anchors(self) -> list[Tensor]:
        """Global embeddings ``[n, 1, D]``, float16 as stored, in pieces as in :attr:`tokens`."""
        return self._resident("anchors", [segment.anchors for segment in self.segments])

    @cached_property
    def quantized(self) -> QuantizedItems:
        """All embeddings in int8, computed if missing: a quarter of an hour for a million items on two cores."""
        parts = [segment.quantized(self.cache) for segment in self.segments]
        fields = ((f"int8 {name}", [getattr(part, name) for part in parts]) for name in QuantizedItems._fields)
        return QuantizedItems(*(self._resident(name, pieces) for name, pieces in fields))

    @property
    def is_quantized(self) -> bool:
        """Whether the int8 copies exist already."""
        return "quantized" in vars(self) or all(segment.is_quantized(self.cache) for segment in self.segments)

    @cached_property
    def globals(self) -> tuple[list[Tensor], list[Tensor]]:
        """Global embeddings in int8 and their scales, in pieces on the device."""
        fields = [
            self._resident(name, [segment.arrays[name] for segment in self.segments])
            for name in ("globals", "global_scales")
        ]
        if len(fields[0]) > _MOST_PIECES:
            fields = [[torch.cat(pieces)] for pieces in fields]
        values, scales = fields
        return values, scales

    def _resident(self, name: str, pieces: list[Tensor]) -> list[Tensor]:
        """The pieces of one name, one per segment; joined on the GPU if there is one and they fit."""
        if not pieces or not is_gpu(self.device):
            return pieces
        return resident(name, pieces, [segment.copies for segment in self.segments], self.device)
