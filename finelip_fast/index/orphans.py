"""Segments that no version names: they belong to changes that never finished, or to ones whose record is lost.

:mod:`finelip_fast.index.recovery` adds their items again. Items that are deleted meanwhile are noted, so that they stay
deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

from finelip_fast._files import plain_name
from finelip_fast.errors import FineLIPError, StoreError
from finelip_fast.index.arrays import files_in
from finelip_fast.index.catalogue import Catalogue
from finelip_fast.index.lists import Listed, read_list

# Keys of the catalogue's notes: segments that a change has replaced, and rows of unnamed segments whose items were deleted.
_REPLACED, _DELETED = "replaced", "deleted"


def retire(catalogue: Catalogue, names: Iterable[str]) -> None:
    """Note that the files of segments may be removed."""
    catalogue.keep(_REPLACED, sorted({*replaced(catalogue), *names}))


def forget_replaced(catalogue: Catalogue) -> None:
    """Note that the files of replaced segments are gone."""
    catalogue.keep(_REPLACED, [])


def replaced(catalogue: Catalogue) -> list[str]:
    """Names of segments that changes have replaced and whose files may still exist."""
    names, where = catalogue.note(_REPLACED) or [], _where(catalogue, _REPLACED)
    if not isinstance(names, list):
        raise StoreError(f"{where}: expected names of segments, found {names!r:.80}")
    return [plain_name(name, where, error=StoreError) for name in names]


def unnamed(catalogue: Catalogue) -> list[str]:
    """Names of the segments that no version names."""
    if catalogue.lists is None:
        return []
    # Wait for changes in progress, whose files are not named yet; where no change can be made, there are none.
    with nullcontext() if catalogue.read_only else catalogue.undisturbed():
        known = catalogue.segment_names() | set(replaced(catalogue))
        files = files_in(catalogue.lists)
    return [path.name for path in files if path.suffix in (".safetensors", ".npy") and path.name not in known]


def unnamed_lists(catalogue: Catalogue) -> dict[str, Listed]:
    """Lists of the complete segments that no version names, in the order in which these were added."""
    lists = {}
    for name in unnamed(catalogue):
        assert catalogue.lists is not None
        try:
            lists[name] = read_list(catalogue.lists, name)
        except FineLIPError:  # from a writer that was killed before it was complete
            continue
    return dict(sorted(lists.items(), key=lambda pair: pair[1].version))


def deleted(catalogue: Catalogue) -> dict[str, set[int]]:
    """Rows of unnamed segments whose items were deleted after they had been added again, by segment name."""
    rows = catalogue.note(_DELETED) or {}
    try:
        return {name: set(map(int, numbers)) for name, numbers in rows.items()}
    except (AttributeError, TypeError, ValueError):
        raise StoreError(f"{_where(catalogue, _DELETED)}: expected rows of segments, found {rows!r:.80}") from None


def note_deleted(catalogue: Catalogue, ids: Iterable[str]) -> None:
    """Within a change, note that these items are deleted, if unnamed segments hold them too."""
    leaving, before = set(ids), deleted(catalogue)
    rows = {
        name: sorted(before.get(name, set()) | {row for row, item in enumerate(listed.ids) if item in leaving})
        for name, listed in unnamed_lists(catalogue).items()
    }
    if any(rows.values()):
        catalogue.keep(_DELETED, rows)


def _where(catalogue: Catalogue, key: str) -> str:
    return f"the note {key!r} of {catalogue.path}"
