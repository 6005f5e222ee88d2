"""Reports on adding items to an index."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finelip_fast._terminal import printable


@dataclass
class AddReport:
    """Result for the items passed to ``add_images`` or ``add_texts``.

    Attributes:
        added: ids of the items added, in order.
        skipped: ``(id, reason)`` for each item that could not be read; for a file, its path instead of its id.
    """

    added: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def keep(self, ids: list[str]) -> None:
        """Report ids as added."""
        self.added += ids

    def __str__(self) -> str:
        return _summary(len(self.added), self.skipped)


@dataclass
class FolderReport:
    """Result for a folder, however large.

    Attributes:
        added: number of pictures added.
        changed: number of pictures whose content had changed, embedded again.
        moved: number of pictures that have a new path and kept their embedding.
        removed: number of items removed because their file no longer exists.
        gone: number of items that were kept although their file no longer exists.
        skipped: ``(path, reason)`` for everything that could not be read or is not a picture. A picture that was readable
            before and is not now keeps its item, as it was embedded then; the reason says so.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    gone: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def keep(self, ids: list[str]) -> None:
        """Report ids as added."""
        self.added += len(ids)

    def separate_changed(self, paths: Collection[str], index: Path | None) -> None:
        """Count files with changed content as changed, not added; for unreadable ones, say that their items stay.

        Args:
            paths: Files of items that the index has with other content.
            index: Folder of the index.
        """
        from finelip_fast.index import remedies  # with PyTorch, which reports from a server do not need

        unread = {path for path, _ in self.skipped}.intersection(paths)
        self.changed = len(paths) - len(unread)
        self.added -= self.changed
        self.skipped = [
            (path, f"{reason}; {remedies.outdated(path, index)}" if path in unread else reason)
            for path, reason in self.skipped
        ]

    def __iadd__(self, addition: FolderReport) -> FolderReport:
        for name in ("added", "changed", "moved", "removed", "gone", "skipped"):
            setattr(self, name, getattr(self, name) + getattr(addition, name))
        return self

    def __str__(self) -> str:
        counts = [f"{getattr(self, name)} {name}" for name in ("changed", "moved", "removed") if getattr(self, name)]
        counts += [f"{self.gone} gone, which --sync removes"] if self.gone else []
        return _summary(self.added, self.skipped, *counts)


def _summary(added: int, skipped: Sequence[tuple[str, str]], *counts: str) -> str:
    lines = (f"  {printable(item)}: {printable(reason)}" for item, reason in skipped)
    return "\n".join([", ".join([f"{added} added", *counts, f"{len(skipped)} skipped"]), *lines])
