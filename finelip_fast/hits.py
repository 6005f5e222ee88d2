"""What a search finds, and how a notebook shows it."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

from finelip_fast._terminal import printable
from finelip_fast.preprocess import open_image

# What a notebook shows, so that its file stays small whatever was found.
_MOST_ROWS, _MOST_THUMBNAILS = 100, 24
_SIDE = 160  # of a thumbnail, in pixels
_LONGEST_TEXT = 300  # characters of an id, and of its metadata


Verdict = Literal["stands out", "perhaps", "does not stand out"]

# Probabilities that a hit matches, from which on it is called so.
_STANDS_OUT, _PERHAPS = 0.9, 0.1


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
        stands_out: How far the score stands out of those of the items that were searched, from 0 to 1: a probability that the
            hit matches, calibrated on the bundled model's drawn scenes, and a guide for other checkpoints. None: not
            known, of fewer than 50 items.
    """

    id: str
    score: float
    global_score: float
    fine_score: float | None
    metadata: dict[str, Any]
    mode: str = "exact"
    path: str | None = None
    stands_out: float | None = None

    @property
    def verdict(self) -> Verdict | None:
        """``stands_out`` in words: from 0.9 on, from 0.1 on, or less; None where it is not known."""
        if self.stands_out is None:
            return None
        if self.stands_out >= _STANDS_OUT:
            return "stands out"
        return "perhaps" if self.stands_out >= _PERHAPS else "does not stand out"

    def __str__(self) -> str:
        parts = f"global {self.global_score:.4f}"
        if self.fine_score is not None:
            parts += f", fine {self.fine_score:.4f}"
        verdict = f"{self.verdict:18}  " if self.verdict else ""
        return f"{self.score:.4f}  ({parts})  {verdict}{printable(self.id)}"


class Hits(list[Hit]):
    """The hits of one query, best first: a list, which a notebook shows as a table with thumbnails.

    A thumbnail is made of a hit whose picture lies on this machine, for the first 24 of them. Nothing is read
    until the table is shown.
    """

    @property
    def note(self) -> str | None:
        """Says so where nothing matches: the best hit does not stand out."""
        if self and self[0].verdict == "does not stand out":
            return "nothing here matches: the best hit scores no higher than pictures that have nothing to do with the query"
        return None

    def __str__(self) -> str:
        lines = [f"{rank:3}  {hit}" for rank, hit in enumerate(self, start=1)] or ["no hits"]
        return "\n".join([*lines, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        from finelip_fast._pages import render  # Jinja2, which only a notebook needs here

        rows = [_row(rank, hit) for rank, hit in enumerate(self[:_MOST_ROWS])]
        return render("hits.html", rows=rows, more=len(self) - len(rows), note=self.note)


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
