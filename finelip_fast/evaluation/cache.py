"""Embeddings in parts, in memory or in files that outlive an interrupted run.

A set of embeddings is a folder of files of :data:`PART` rows each; its name is a hash of everything that they depend on. A
file is written whole or not at all, and records the hash of its rows; a file that does not match is encoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finelip_fast._files import utf8_path, write_error, write_whole

PART = 1024  # rows per file: about 130 MB with 64 tokens in float32, and the most that an interrupted run loses

_ROWS = "rows"


class StoredRows:
    """Embeddings ``[N, L, D]`` in parts of ``size`` rows: tensors, or files, which are memory-mapped one at a time.

    Args:
        parts: Parts, all but the last with ``size`` rows.
        count: ``N``.
        size: Number of rows in a part.
    """

    def __init__(self, parts: list[Tensor | Path], count: int, size: int) -> None:
        self._parts, self._count, self._size = parts, count, size
        self._mapped: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        """Return the rows of a slice without a step, or at int64 indices."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(self._count)
            pieces = []
            for number in range(first // self._size, -(-last // self._size)):
                start = number * self._size
                pieces.append(self._part(number)[max(0, first - start) : last - start])
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return torch.stack([self._part(row // self._size)[row % self._size] for row in rows.tolist()])

    def _part(self, number: int) -> Tensor:
        part = self._parts[number]
        if isinstance(part, Tensor):
            return part
        if self._mapped is None or self._mapped[0] != number:
            with utf8_path(part) as path, safe_open(path, framework="pt") as file:
                self._mapped = number, file.get_tensor(_ROWS)  # a view of the mapped file: read when used
        return self._mapped[1]


class PartFolder:
    """Files of one set of embeddings.

    Args:
        cache: Folder of all sets, created if missing.
        key: Everything that the embeddings depend on, as plain values.

    Raises:
        WriteError: The folder cannot be created.
    """

    def __init__(self, cache: Path, key: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = cache / self.key[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def path(self, number: int) -> Path:
        """Return the path of part ``number``, whether or not it exists."""
        return self.folder / f"{number:05d}.safetensors"

    def holds(self, number: int, rows: int) -> bool:
        """Return whether part ``number`` exists, has ``rows`` rows and is as it was written; reads all of it."""
        if not self.path(number).is_file():  # a pipe would block
            return False
        try:
            with utf8_path(self.path(number)) as path, safe_open(path, framework="pt") as file:
                facts, stored = file.metadata() or {}, file.get_tensor(_ROWS)
        except (SafetensorError, OSError):  # a damaged file
            return False
        fits = stored.ndim == 3 and len(stored) == rows
        return fits and facts.get("key") == self.key and facts.get("sha256") == _hash(stored)

    def write(self, number: int, rows: Tensor) -> Path:
        """Write part ``number``, whole or not at all.

        Raises:
            WriteError: The file cannot be written; earlier parts stay.
        """
        rows, path = rows.cpu().contiguous(), self.path(number)
        metadata = {"key": self.key, "sha256": _hash(rows)}
        write_whole(path, lambda temporary: save_file({_ROWS: rows}, temporary, metadata))
        return path


def embed_in_parts(
    count: int,
    embed: Callable[[int, int], Tensor],
    folder: PartFolder | None,
    skipped: Callable[[int], object],
) -> StoredRows:
    """Embed items part by part, only those that are not in ``folder``.

    Args:
        count: Number of items.
        embed: Function that embeds items from a first one to before a last one: ``[n, L, D]``.
        folder: Folder of the parts; None keeps everything in memory, on the device and in the dtype that ``embed`` returns.
        skipped: Function that is called with the number of items of each part that exists already.
    """
    parts: list[Tensor | Path] = []
    for number, first in enumerate(range(0, count, PART)):
        last = min(first + PART, count)
        if folder is None:
            parts.append(embed(first, last))
        elif folder.holds(number, last - first):
            parts.append(folder.path(number))
            skipped(last - first)
        else:
            parts.append(folder.write(number, embed(first, last)))
    return StoredRows(parts, count, PART)


def _hash(rows: Tensor) -> str:
    """Return a hash of the values, dtype and shape."""
    digest = hashlib.sha256(f"{rows.dtype} {tuple(rows.shape)}".encode())
    digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()
