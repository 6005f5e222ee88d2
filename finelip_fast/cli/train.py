"""``finelip train`` and ``finelip adapt``: training runs, whose options are the fields of their configuration."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, get_type_hints

import click

from finelip_fast.cli.commands import Command, Several, is_quiet
from finelip_fast.cli.values import OneOf, with_type

# Fields of the configuration that are options of ``finelip adapt``.
_ADAPT = (
    *(
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
    ),
    *("group", "features", "feature_precision", "gradient_checkpointing", "precision", "workers", "max_broken_share"),
    *("eval_every", "log_every", "tensorboard", "threads", "device", "seed"),
)


class _Trains(Command):
    """A command with fields of the configuration as options, which are loaded only when needed.

    Args:
        fields: Names of the fields; None: all.
        required: Names of the fields without which the command cannot run.
    """

    def __init__(
        self, *args: Any, fields: tuple[str, ...] | None = None, required: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fields, self.required = fields, required

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, the options of the configuration, and those of every command."""
        parameters = super().get_params(ctx)
        count = len(self.params) - 2  # without --json and --quiet
        return [*parameters[:count], *_options(self.fields, self.required), *parameters[count:]]


class _Train(_Trains):
    """A command whose help also lists the recipes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names of the recipes."""
        from finelip_fast.training.config import recipe_names

        formatter.write_paragraph()
        formatter.write_text(f"Recipes: {', '.join(recipe_names())}.")


@cache
def _options(names: tuple[str, ...] | None, required: tuple[str, ...]) -> tuple[click.Option, ...]:
    from finelip_fast.training.config import TrainConfig

    hints = get_type_hints(TrainConfig)
    fields = [field for field in dataclasses.fields(TrainConfig) if names is None or field.name in names]
    return tuple(_option(field, hints[field.name], field.name in required) for field in fields)


def _option(field: dataclasses.Field[Any], kind: Any, required: bool) -> click.Option:
    """Return the option for a field; its value is None if not given, so that a recipe's value stays."""
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    text = text[0].upper() + text[1:] + "."
    if field.default not in (dataclasses.MISSING, "", ()):
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f"  [default: {default}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, show_default=False, help=text)
    if kind in (int, float, str):
        option = click.Option([flag], type=_words().get(field.name, kind), required=required, help=text)
        with_type(option)
        return option
    return Several([flag], metavar="TERM", help=text)


@cache
def _words() -> dict[str, OneOf]:
    """Words that fields take; the configuration refuses all others."""
    from finelip_fast.config import PRESETS

    return {
        "preset": OneOf(*PRESETS, closed=False),
        "accumulation": OneOf("cached", "separate", closed=False),
        "precision": OneOf("auto", "fp32", "bf16", closed=False),
        "feature_precision": OneOf("fp32", "bf16", "int8", closed=False),
        "device": OneOf("auto", "cpu", "cuda", closed=False),
    }


def _complete_recipe(*_: Any) -> list[str]:
    from finelip_fast.training.config import recipe_names

    names: list[str] = recipe_names()
    return names


@click.command(
    cls=_Train,
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


@click.command(cls=_Trains, fields=_ADAPT, required=("validation",))
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
    values = {name: value for name, value in options.items() if value not in (None, ())}
    from finelip_fast.training.adapt import adapt

    return adapt(base, progress=not is_quiet(), **values)
