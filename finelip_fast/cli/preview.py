"""``finelip search --preview``: thumbnails between the lines of a terminal, drawn by textual-image.

It asks the terminal, when it is imported, whether it shows sixel pictures or knows kitty's graphics protocol; all others get
half blocks in colour.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from finelip_fast.errors import InputError
from finelip_fast.hits import Hits, picture_file, thumbnail

_ROWS = 8  # of the terminal, at most, for a thumbnail
_SIDE = 320  # pixels: rows of 40 on a sharp screen


def open_preview() -> Callable[[Hits], Iterator[str]]:
    """What shows hits in this terminal: it draws a hit's picture, and gives the line to print below.

    Raises:
        InputError: There is no terminal that could show them; or textual-image is missing.
    """
    if not _in_terminal():
        raise InputError(
            "expected --preview in a terminal, got a file or a pipe; --html FILE writes thumbnails to a page instead"
        )
    try:
        from rich.console import Console
        from textual_image.renderable import Image
    except ImportError:
        raise InputError("--preview needs the package textual-image: pip install 'finelip-fast[preview]'") from None
    console = Console(file=sys.stdout)

    def show(hits: Hits) -> Iterator[str]:
        for rank, hit in enumerate(hits, start=1):
            file = picture_file(hit)
            if file is not None and (picture := thumbnail(file, _SIDE)) is not None:
                console.print(Image(picture, width="auto", height="auto"), height=_ROWS)
            yield f"{rank:3}  {hit}"
        if hits.note:
            yield hits.note

    return show


def _in_terminal() -> bool:
    """Whether a terminal prints and answers: what it can show is asked there. One that tells no size shows nothing."""
    streams = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams) and os.get_terminal_size().columns > 0
