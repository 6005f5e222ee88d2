"""``finelip explain``: why a picture and a description score as they do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from finelip_fast._terminal import printable


def add_command(add: Callable[..., argparse.ArgumentParser], model: argparse.ArgumentParser) -> None:
    """Give the ``finelip`` command its ``explain``; ``add`` makes one of name, function, description and parent parsers."""
    explain = add(
        "explain",
        _explain,
        "Show which words met which parts of a picture, and what each adds to the score; always by PyTorch.",
        model,
    )
    explain.add_argument("image", help="the picture")
    explain.add_argument("text", help="the description")
    explain.add_argument("--out", metavar="FILE.html", help="write a page: move over words and over the picture")
    explain.add_argument("--phrase", help="words of the description; with --overlay")
    explain.add_argument("--overlay", metavar="FILE.png", help="write the picture, lit where --phrase is found")
    explain.add_argument("--tokens", default="raw", help="map of --overlay: raw (default) or aggregated")
    explain.add_argument("--alpha", type=float, help="weight of the global score (default: the checkpoint's)")


def _explain(options: argparse.Namespace) -> Any:
    from finelip_fast._arguments import find_device
    from finelip_fast._files import write_error
    from finelip_fast.checkpoint import load
    from finelip_fast.errors import InputError
    from finelip_fast.explain import MAPS, explain

    if (options.phrase is None) != (options.overlay is None):
        raise InputError("expected --phrase and --overlay together, got one of them")
    if options.tokens not in MAPS:
        raise InputError(f"expected --tokens of {MAPS}, got {options.tokens!r}")
    model = load(options.checkpoint, find_device(options.device or "cpu"))
    explanation = explain(model, options.image, options.text, alpha=options.alpha)
    figure = explanation.overlay(options.phrase, tokens=options.tokens) if options.overlay else None

    def write(path: str, how: Callable[[str], object]) -> None:
        try:
            how(path)
        except OSError as error:
            raise write_error(path, error) from None
        print(printable(path), file=sys.stderr)

    if figure is not None:
        options.write.append(lambda: write(options.overlay, figure.savefig))
    if options.out:
        options.write.append(lambda: write(options.out, explanation.to_html))
    return explanation
