"""``finelip explain``: why a picture and a description score as they do."""

from __future__ import annotations

from typing import Any

import click

from finelip_fast.cli.commands import (
    Command,
    alpha_option,
    check_file,
    device_option,
    standalone_checkpoint_option,
    text_argument,
    write_after_result,
)
from finelip_fast.cli.values import PICTURE, OneOf


@click.command(cls=Command, renamed={"--out": "--html"})
@click.argument("image", type=PICTURE)
@text_argument
@click.option(
    "--html", metavar="FILE.html", help="Interactive HTML page to write: hover over the words and over the picture."
)
@click.option("--phrase", help="Words of the description to show with --overlay.")
@click.option("--overlay", metavar="FILE.png", help="Picture to write, highlighted where --phrase is found.")
@click.option(
    "--tokens", type=OneOf("raw", "aggregated"), default="raw", help="Tokens that --overlay shows: raw, aggregated."
)
@alpha_option
@standalone_checkpoint_option
@device_option
def explain(
    image: str,
    text: str,
    html: str | None,
    phrase: str | None,
    overlay: str | None,
    tokens: str,
    alpha: float | None,
    checkpoint: str | None,
    device: str | None,
) -> Any:
    """Show which words of a description matched which parts of a picture, and what each adds to the score."""
    from finelip_fast._arguments import find_device
    from finelip_fast.checkpoint import load
    from finelip_fast.errors import InputError
    from finelip_fast.explain import explain

    if (phrase is None) != (overlay is None):
        raise InputError("expected --phrase and --overlay together, got one of them")
    check_file("--overlay", overlay)
    check_file("--html", html)
    explanation = explain(load(checkpoint, find_device(device)), image, text, alpha=alpha)

    if phrase is not None and overlay is not None:
        figure = explanation.overlay(phrase, tokens=tokens)
        write_after_result(overlay, figure.savefig)
    if html is not None:
        write_after_result(html, explanation.to_html)
    return explanation
