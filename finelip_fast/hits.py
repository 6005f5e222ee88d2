"""What a search finds, and how a notebook shows it."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import dataclass
from typing import Any

from finelip_fast._terminal import printable
from finelip_fast.preprocess import open_image

# What a notebook shows, so that its file stays small whatever was found.
_MOST_ROWS, _MOST_THUMBNAILS = 100, 24
_SIDE = 160  # of a thumbnail, in pixels
_LONGEST_TEXT = 300  # characters of an id, and of its metadata


@dataclass(frozen=True)
class Hit:
    """One found item.

    Attributes:
        id: What it was added as.
        score: ``alpha * global_score + (1 - alpha) * fine_score``; hits are ordered by it. Without trained aggregators
            ``global_score``.
        global_score: Cosine of the two global embeddings, in [-1, 1].
        fine_score: Late interaction of all tokens in both directions, in [-0.2, 2]; None without trained aggregators.
        metadata: What was given with it.
        mode: How it was found: ``"exact"``, ``"exact-int8"`` (the same result) or ``"two-stage"``.
        path: File of a picture that came from a folder, absolute; None: of anything else.
    """

    id: str
    score: float
    global_score: float
    fine_score: float | None
    metadata: dict[str, Any]
    mode: str = "exact"
    path: str | None = None

    def __str__(self) -> str:
        parts = f"global {self.global_score:.4f}"
        if self.fine_score is not None:
            parts += f", fine {self.fine_score:.4f}"
        return f"{self.score:.4f}  ({parts})  {printable(self.id)}"


class Hits(list[Hit]):
    """The hits of one query, best first: a list, which a notebook shows as a table with thumbnails.

    A thumbnail is made of a hit whose picture lies on this machine, for the first 24 of them. Nothing is read
    until the table is shown.
    """

    def __str__(self) -> str:
        return "\n".join(f"{rank:3}  {hit}" for rank, hit in enumerate(self, start=1)) or "no hits"

    def _repr_html_(self) -> str:
        from finelip_fast._pages import render  # Jinja2, which only a notebook needs here

        rows = [_row(rank, hit) for rank, hit in enumerate(self[:_MOST_ROWS])]
        return render("hits.html", rows=rows, more=len(self) - len(rows))


def _row(rank: int, hit: Hit) -> dict[str, Any]:
    return {
        "hit": hit,
        "id": _shortened(hit.id),
        "metadata": _shortened(json.dumps(hit.metadata, ensure_ascii=False)) if hit.metadata else "",
        "thumbnail": _thumbnail(hit.path or hit.id) if rank < _MOST_THUMBNAILS else None,
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


def _thumbnail(path: str) -> str | None:
    """A small JPEG of a picture in base64; None where there is no such file, or no picture in it."""
    if path.startswith(("//", "\\\\")):  # another machine's, to which Windows would connect
        return None
    try:
        if not os.path.isfile(path):
            return None
        image = open_image(path)
        image.thumbnail((_SIDE, _SIDE))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=80)
    except Exception:  # whatever is wrong with a file, the table is shown
        return None
    return base64.b64encode(content.getvalue()).decode()
