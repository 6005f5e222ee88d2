"""``finelip search --preview``: thumbnails between the lines of a terminal, drawn by textual-image.

On import, textual-image asks the terminal whether it supports sixel pictures or kitty's graphics protocol; all others get
coloured half blocks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

from finelip_fast.errors import InputError
from finelip_fast.hits import Hits, picture_file, thumbnail

_ROWS = 8  # maximum height of a thumbnail in the terminal
_SIDE = 320  # pixels: 40 per row on a sharp screen


def open_preview() -> Callable[[Hits], Iterator[str]]:
    """Return a function that shows hits in this terminal: it draws a hit's picture and yields the line to print below it.

    Raises:
        InputError: There is no terminal that could show them, or textual-image is not installed.
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
    """Return whether a terminal prints and answers, as it is asked what it can show; one without a size shows nothing."""
    streams = (sys.stdin, sys.stdout)
    return all(stream is not None and stream.isatty() for stream in streams) and os.get_terminal_size().columns > 0
