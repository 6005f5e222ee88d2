"""``finelip generate``: a picture from a long description."""

from __future__ import annotations

from typing import Any

import click

from finelip_fast.cli.commands import Command, device_option, shows_progress, text_argument
from finelip_fast.cli.values import OneOf


@click.command(cls=Command)
@text_argument
@click.option(
    "--checkpoint", required=True, help="Checkpoint: a folder, a file, open_clip:MODEL/WEIGHTS or a hub name."
)
@click.option("--pipeline", required=True, metavar="NAME_OR_FOLDER", help="Text-to-image pipeline of diffusers.")
@click.option(
    "--out",
    required=True,
    metavar="FILE.png",
    help="Picture to write; its metadata record the prompt and the settings.",
)
@click.option("--seed", type=int, help="Seed of the noise.  [default: a random one]")
@click.option("--steps", type=int, help="Denoising steps.  [default: the pipeline's]")
@click.option("--guidance-scale", type=float, help="Guidance scale.  [default: the pipeline's]")
@click.option("--negative-prompt", metavar="TEXT", help="Negative prompt.")
@click.option(
    "--layer",
    type=OneOf("penultimate", "last"),
    help="Layer of the text encoders: penultimate, or last, as FineLIP's authors use.  [default: the pipeline's]",
)
@click.option(
    "--second",
    type=OneOf("stretch", "windows"),
    default="stretch",
    help="How a second text encoder reads long prompts: stretch its positions, or windows of 77 tokens.",
)
@click.option("--compare-77", is_flag=True, help="Show the picture that 77 tokens give, too, on the left.")
@device_option
def generate(text: str, **options: Any) -> Any:
    """Generate a picture from a long description, and report how much of the description it shows.

    Prompt weights such as (red:1.2) are read as plain text. The checkpoint's own retriever scores the picture and lists the
    words that nothing in it matched.
    """
    from finelip_fast.diffusion.generation import generate

    return generate(text, **options, progress=shows_progress())
