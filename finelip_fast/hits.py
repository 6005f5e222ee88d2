"""The hits of a search, and how notebooks and pages show them."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from finelip_fast._files import write_text_whole
from finelip_fast._terminal import printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# Limits on what a notebook shows, so that its file stays small whatever was found.
_MOST_ROWS, _MOST_THUMBNAILS = 100, 24
_SIDE = 160  # of a thumbnail in a notebook, in pixels
_LARGE_SIDE = 320  # of one on a page, since phone screens show two or three pixels for each
_LONGEST_TEXT = 300  # characters of an id, and of its metadata


Verdict = Literal["stands out", "perhaps", "does not stand out"]

# Probabilities of a match from which a hit gets these verdicts.
_STANDS_OUT, _PERHAPS = 0.9, 0.1


@dataclass(frozen=True)
class Hit:
    """One item found by a search.

    Attributes:
        id: Id of the item.
        score: ``alpha * global_score + (1 - alpha) * fine_score``; hits are ordered by it. Without trained aggregators, it is
            ``global_score``.
        global_score: Cosine of the two global embeddings, in [-1, 1].
        fine_score: Late interaction of all tokens in both directions, in [-0.2, 2]; None without trained aggregators.
        metadata: Metadata of the item.
        mode: Search mode that found it: ``"exact"``, ``"exact-int8"`` (the same result), ``"two-stage"`` or ``"sketch"``.
        path: Absolute path of a picture that was added from a folder; None for any other item.
        stands_out: How far the score stands out from those of all items searched, from 0 to 1: the probability that the hit
            matches, calibrated on the bundled model's drawn scenes, and a guide for other checkpoints. None if unknown,
            as with fewer than 50 items.
        shard: Folder of the shard that holds the item, from a server of shards, in which ids may repeat; otherwise None.
    """

    id: str
    score: float
    global_score: float
    fine_score: float | None
    metadata: dict[str, Any] = field(hash=False)
    mode: str = "exact"
    path: str | None = None
    stands_out: float | None = None
    shard: str | None = None

    @property
    def verdict(self) -> Verdict | None:
        """``stands_out`` in words: at least 0.9, at least 0.1, or less; None if it is unknown."""
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
    """The hits of one query, best first: a list that a notebook shows as a table with thumbnails.

    The first 24 hits have a thumbnail if their picture is on this machine. No file is read until the table is shown. Slices,
    sums and copies are Hits, too.
    """

    @overload
    def __getitem__(self, at: SupportsIndex, /) -> Hit: ...
    @overload
    def __getitem__(self, at: slice, /) -> Hits: ...
    def __getitem__(self, at: SupportsIndex | slice, /) -> Hit | Hits:
        return Hits(super().__getitem__(at)) if isinstance(at, slice) else super().__getitem__(at)

    def __add__(self, hits: list[Hit], /) -> Hits:  # type: ignore[override]  # a list also takes lists of other things
        return Hits(super().__add__(hits))

    def copy(self) -> Hits:
        return Hits(self)

    @property
    def note(self) -> str | None:
        """A remark that nothing matches if the best hit does not stand out, otherwise None."""
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

    def to_html(
        self,
        path: str | PathLike[str] | None = None,
        *,
        text: str | None = None,
        image: str | None = None,
        alpha: float | None = None,
        why: Mapping[int, str] | None = None,
    ) -> str:
        """Return a self-contained page with a thumbnail of each hit, its scores, and their meaning.

        Args:
            path: File that the page is also written to.
            text, image: Description or file of the picture that was searched with.
            alpha: Weight of the global score, to be shown; ``Retriever.alpha``.
            why: Addresses of explanations by rank, counted from 1.

        Raises:
            WriteError: The file cannot be written.
        """
        from finelip_fast._pages import render

        page = render(
            "sheet.html",
            text=text,
            image=image,
            image_thumbnail=None if image is None else _encoded(thumbnail(image, _LARGE_SIDE)),
            meanings=score_meanings(self, alpha),
            note=self.note,
            cards=[_card(hit) for hit in self],
            why=why or {},
        )
        if path is not None:
            write_text_whole(Path(path), page)
        return page


def hits_of(
    items: Sequence[Sequence[Any]],
    scores: Tensor,
    global_scores: Tensor,
    fine_scores: Tensor | None,
    stands_out: Tensor | None = None,
    *,
    mode: Callable[[Any], str],
    path: Callable[[Any], Path | None],
    shard: Callable[[Any], str] | None = None,
) -> list[Hits]:
    """Return the results of a search with ``Q`` queries as hits.

    Args:
        items: Catalogue entries of the items, ``Q`` lists of ``k``, best first.
        scores, global_scores, fine_scores, stands_out: Attributes of the hits, ``[Q, k]``; None, or a NaN: unknown.
        mode, path, shard: Functions from an item to the mode that found it, to the file of its picture, and to its shard.
    """

    def hit(item: Any, score: float, global_score: float, fine_score: float | None, standing: float | None) -> Hit:
        file = None if (place := path(item)) is None else str(place)
        standing = None if standing is None or math.isnan(standing) else standing
        folder = None if shard is None else shard(item)
        return Hit(item.id, score, global_score, fine_score, item.metadata, mode(item), file, standing, folder)

    unknown = [[None] * len(row) for row in items]
    tensors = (scores, global_scores, fine_scores, stands_out)
    tables = [unknown if tensor is None else tensor.tolist() for tensor in tensors]
    return [Hits(map(hit, *rows)) for rows in zip(items, *tables, strict=True)]


def score_meanings(hits: Hits, alpha: float | None = None) -> dict[str, str]:
    """Return the meanings of scores by name; empty if there are no hits.

    Args:
        hits: Hits of one search.
        alpha: Weight of the global score, to be shown.
    """
    if not hits:
        return {}
    cosine = "how alike the query and the hit are as wholes: a cosine, 1 at most"
    if hits[0].fine_score is None:
        return {"score": "the global score, by which hits are ordered", "global": cosine}
    parts = "global and fine, weighted" if alpha is None else f"{alpha:g} times global plus {1 - alpha:g} times fine"
    return {
        "score": f"{parts}, by which hits are ordered",
        "global": cosine,
        "fine": "how well each detail of one is met by a detail of the other, both ways: 2 at most",
    }


def picture_file(hit: Hit) -> str | None:
    """Return the file of a hit's picture; None if there is none on this machine."""
    path = hit.path or hit.id
    return path if is_local_file(path) else None


def is_local_file(path: str) -> bool:
    """Return whether a path, possibly written by a stranger, leads to a regular file on this machine."""
    if path.startswith(("//", "\\\\")):  # on another machine, to which Windows would connect
        return False
    return os.path.isfile(path)  # unlike Path's, never raises


def thumbnail(path: str, side: int) -> Image | None:
    """Return a copy of a picture, at most ``side`` pixels wide and high; None if the file has no readable picture."""
    from finelip_fast.preprocess import open_image  # PyTorch, which hits from a server do not need

    try:
        image = open_image(path)
        image.thumbnail((side, side))
    except Exception:  # whatever is wrong with one file, the other hits are shown
        return None
    return image


def _row(rank: int, hit: Hit) -> dict[str, Any]:
    return {
        "hit": hit,
        "id": _shortened(hit.id),
        "metadata": _shortened(json.dumps(hit.metadata, ensure_ascii=False)) if hit.metadata else "",
        "thumbnail": _hit_thumbnail(hit, _SIDE) if rank < _MOST_THUMBNAILS else None,
    }


def _card(hit: Hit) -> dict[str, Any]:
    file = picture_file(hit)
    return {
        "hit": hit,
        "id": _shortened(hit.id),
        "address": None if file is None else Path(file).absolute().as_uri(),
        "thumbnail": _hit_thumbnail(hit, _LARGE_SIDE),
        "metadata": {
            name: _shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for name, value in hit.metadata.items()
        },
    }


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"


def _hit_thumbnail(hit: Hit, side: int) -> str | None:
    file = picture_file(hit)
    return None if file is None else _encoded(thumbnail(file, side))


def _encoded(image: Image | None) -> str | None:
    """A JPEG in base64."""
    if image is None:
        return None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return base64.b64encode(content.getvalue()).decode()
