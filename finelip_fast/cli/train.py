"""``finelip train`` and ``finelip adapt``: training runs, whose options are the fields of their configuration."""

from __future__ import annotations

from typing import Any

import click

from finelip_fast.cli.commands import is_quiet
from finelip_fast.cli.fields import FieldsCommand, typed

# Fields of the configuration that are options of ``finelip adapt``.
_ADAPT = (
    "validation",
    "root",
    "alpha",
    "context_length",
    "loss",
    "grounding",
    "contextual",
    "beta",
    "augment",
    "batch_size",
    "group",
    "features",
    "feature_precision",
    "gradient_checkpointing",
    "precision",
    "workers",
    "max_broken_share",
    "eval_every",
    "log_every",
    "tensorboard",
    "threads",
    "device",
    "seed",
)


def _config() -> type[Any]:
    from finelip_fast.training.config import TrainConfig

    return TrainConfig


class _Train(FieldsCommand):
    """A command whose help also lists the recipes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names of the recipes."""
        from finelip_fast.training.config import recipe_names

        formatter.write_paragraph()
        formatter.write_text(f"Recipes: {', '.join(recipe_names())}.")


def _complete_recipe(*_: Any) -> list[str]:
    from finelip_fast.training.config import recipe_names

    names: list[str] = recipe_names()
    return names


@click.command(
    cls=_Train,
    config=_config,
    renamed={"--val": "--validation", "--image-root": "--root", "--accumulate": "--accumulation-steps"},
)
@click.argument("recipe", required=False, shell_complete=_complete_recipe)
def train(recipe: str | None, **options: Any) -> Any:
    """Train a checkpoint; run again with the same --out, it resumes.

    RECIPE is the name of a built-in recipe, or a JSON file; options override its values.
    """
    from finelip_fast.training.config import configure

    config = configure(recipe, options)
    from finelip_fast.training.train import train

    return train(config, progress=not is_quiet())


@click.command(cls=FieldsCommand, config=_config, fields=_ADAPT, required=("validation",))
@click.argument("base")
@click.option("--out", required=True, metavar="FOLDER", help="Folder for the checkpoint, the features and the runs.")
@click.option(
    "--train",
    required=True,
    metavar="DATA",
    help="Pairs to train on: jsonl:FILE, sharegpt4v:FILE or scenes:SPLIT:SIZE.",
)
@click.option("--unfreeze", default="last:2", help="Encoder blocks that the second stage trains: last:N, all, none.")
@click.option("--steps", type=int, help="Steps of the first stage.  [default: 1500]")
@click.option("--encoder-steps", type=int, help="Steps of the second stage.  [default: 500]")
@click.option("--aggregator-lr", type=float, help="Peak learning rate of the aggregators.  [default: 0.001]")
@click.option("--encoder-lr", type=float, help="Peak learning rate of the encoders.  [default: 1e-05]")
def adapt(base: str, **options: Any) -> Any:
    """Turn any CLIP into a FineLIP; run again with the same --out, it resumes.

    The first stage trains the aggregators on features that the encoders of BASE compute once; the second also trains the
    last blocks of the encoders. The checkpoint that is best on the validation pairs is written to --out.
    """
    from finelip_fast.training.adapt import adapt

    return adapt(base, progress=not is_quiet(), **typed(options))
