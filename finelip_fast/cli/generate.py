"""``finelip generate``: a picture of a long description."""

from __future__ import annotations

from typing import Any

import click

from finelip_fast.cli.commands import Command, device_option, shows_progress


@click.command(cls=Command)
@click.argument("text")
@click.option(
    "--checkpoint", required=True, help="Checkpoint: a folder, a file, open_clip:MODEL/WEIGHTS or a hub name."
)
@click.option("--pipeline", required=True, metavar="NAME_OR_FOLDER", help="Pipeline of diffusers for text-to-image.")
@click.option("--out", required=True, metavar="FILE.png", help="Picture to write; its metadata hold what made it.")
@click.option("--seed", type=int, help="Seed of the noise.  [default: a random one]")
@click.option("--steps", type=int, help="Steps of denoising.  [default: the pipeline's]")
@click.option("--guidance", type=float, help="Weight of the description.  [default: the pipeline's]")
@click.option("--negative", metavar="TEXT", help="Description of what is not wanted.")
@click.option(
    "--layer", help="Layer of the text encoders: penultimate, last, as the authors have it.  [default: the pipeline's]"
)
@click.option(
    "--second", default="stretch", help="What gives a second text encoder the length: stretch, windows of 77 tokens."
)
@click.option("--compare-77", is_flag=True, help="Put what the pipeline makes of 77 tokens to the left.")
@device_option
def generate(text: str, **options: Any) -> Any:
    """Make a picture of a long description, and say how much of it is there.

    Weights such as (red:1.2) are text. The checkpoint's own retriever scores the picture and names the words that nothing in
    it met.
    """
    from finelip_fast.diffusion.generation import generate

    return generate(text, **options, progress=shows_progress())
