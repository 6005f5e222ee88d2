"""Cursors: short strings that mark where a page of a listing ends; a client passes one back to get the next page."""

from __future__ import annotations

import base64
import re
from typing import NamedTuple

from finelip_fast.errors import InputError

_CURSOR = re.compile(r"([0-9]{1,15})\.([0-9]{1,15})\.([A-Za-z0-9_-]*)")
_LONGEST_ID = 1000  # bytes of an id in a cursor, since cursors are part of URLs


class Cursor(NamedTuple):
    """The last item of a page.

    Attributes:
        oldest: Oldest version that was readable at that time; while it stays the oldest, positions do not change.
        position: Position of the item at that time.
        id: Id of the item, used to find it again after a compaction; also empty if the id is too long for a cursor.
    """

    oldest: int
    position: int
    id: str

    def __str__(self) -> str:
        name = self.id.encode("utf-8", "surrogatepass")
        name = name if len(name) <= _LONGEST_ID else b""
        return f"{self.oldest}.{self.position}.{base64.urlsafe_b64encode(name).decode().rstrip('=')}"

    @classmethod
    def read(cls, text: object) -> Cursor:
        """
        Raises:
            InputError: The text is not a cursor.
        """
        match = _CURSOR.fullmatch(text) if isinstance(text, str) else None
        try:
            if match:
                name = base64.urlsafe_b64decode(match[3] + "=" * (-len(match[3]) % 4))
                return cls(int(match[1]), int(match[2]), name.decode("utf-8", "surrogatepass"))
        except ValueError:  # invalid base64 or UTF-8
            pass
        raise InputError(
            f"expected after to be the cursor of a previous page, got {text!r:.80}; list from the beginning"
        )
