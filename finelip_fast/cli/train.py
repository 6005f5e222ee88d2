"""``finelip train``: a training run, whose options are the fields of its configuration."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, get_type_hints

import click

from finelip_fast.cli.commands import Command, Several, shows_progress


class _Train(Command):
    """A command whose options are read from the configuration when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The options of the configuration, and those of every command."""
        shared = super().get_params(ctx)
        return [shared[0], *_options(), *shared[1:]]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names of the recipes."""
        from finelip_fast.training.config import recipe_names

        formatter.write_paragraph()
        formatter.write_text(f"Recipes: {', '.join(recipe_names())}.")


@cache
def _options() -> tuple[click.Option, ...]:
    from finelip_fast.training.config import TrainConfig

    hints = get_type_hints(TrainConfig)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(TrainConfig))


def _option(field: dataclasses.Field[Any], kind: Any) -> click.Option:
    """The option of a field; None where it is not given, so that a recipe's value stays."""
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    text = text[0].upper() + text[1:] + "."
    if field.default not in (dataclasses.MISSING, ""):
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f"  [default: {default}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, show_default=False, help=text)
    if kind in (int, float, str):
        return click.Option([flag], type=kind, help=text)
    return Several([flag], metavar="TERM", help=text)


def _complete_recipe(*_: Any) -> list[str]:
    from finelip_fast.training.config import recipe_names

    names: list[str] = recipe_names()
    return names


@click.command(cls=_Train, renamed={"--val": "--validation", "--image-root": "--root"})
@click.argument("recipe", required=False, shell_complete=_complete_recipe)
def train(recipe: str | None, **options: Any) -> Any:
    """Train a checkpoint; started again with the same --out, the run resumes.

    RECIPE is the name of a recipe of the package, or a JSON file; options change its values.
    """
    from finelip_fast.training.config import configure

    config = configure(recipe, options)
    from finelip_fast.training.train import train

    return train(config, progress=shows_progress())
