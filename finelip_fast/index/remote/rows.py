"""Rows of a store, as read from a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from finelip_fast._json import check_value
from finelip_fast.errors import StoreError


class Keys(NamedTuple):
    """Keys that items are compared by, for consecutive rows."""

    ids: list[str]
    crcs: list[int]
    metadata_crcs: list[int]

    def only(self, rows: Sequence[int]) -> Keys:
        return Keys(
            [self.ids[row] for row in rows], [self.crcs[row] for row in rows], [self.metadata_crcs[row] for row in rows]
        )


class Batch(NamedTuple):
    """Several rows; ``texts`` are their metadata as JSON, ``tokens`` float16 ``[n, L, D]``."""

    ids: list[str]
    texts: list[str]
    crcs: list[int]
    metadata_crcs: list[int]
    tokens: Tensor

    def metadata(self, uri: str, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Metadata of the given rows; None: all rows.

        Raises:
            StoreError: The metadata of a row is not a JSON object, or too deep; the message names the item.
        """
        metadata = []
        for row in range(len(self.ids)) if rows is None else rows:
            try:
                value = json.loads(self.texts[row])
                check_value(value, surrogates=True)  # from paths that are not text, in old stores
                if not isinstance(value, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                raise StoreError(
                    f"item {self.ids[row]!r:.80} of the store at {uri}: expected metadata as an object of JSON: {error!s:.200}"
                ) from None
            metadata.append(value)
        return metadata


def refuse_damaged(ids: Sequence[str], uri: str) -> None:
    if ids:
        listed = ", ".join(map(repr, ids[:20])) + (f" and {len(ids) - 20} more" if len(ids) > 20 else "")
        raise StoreError(
            f"{len(ids)} rows of the store at {uri} are not what was written: {listed}; delete them with "
            "LanceStore.delete, and push them again from an index that has them"
        )
