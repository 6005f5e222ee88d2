"""Commands whose options are the fields of a run's configuration, which is imported only when they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import click

from finelip_fast.cli.commands import Command, Several
from finelip_fast.cli.values import OneOf, with_type


class FieldsCommand(Command):
    """A command with the fields of a configuration as options. The value of an option that was not typed is None or ().

    Args:
        config: Function that imports and returns the dataclass, with fields from :func:`finelip_fast.training.fields.option`.
        fields: Names of the fields; None: all.
        required: Names of the fields without which the command cannot run.
    """

    def __init__(
        self,
        *args: Any,
        config: Callable[[], type[Any]],
        fields: tuple[str, ...] | None = None,
        required: tuple[str, ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._config, self._fields, self._required = config, fields, required
        self._options: list[click.Parameter] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, the options of the configuration, and those of every command."""
        if self._options is None:
            config = self._config()
            hints = get_type_hints(config)
            fields = [
                field for field in dataclasses.fields(config) if self._fields is None or field.name in self._fields
            ]
            self._options = [_option(field, hints[field.name], field.name in self._required) for field in fields]
        parameters = super().get_params(ctx)
        count = len(self.params) - 2  # without --json and --quiet
        return [*parameters[:count], *self._options, *parameters[count:]]


def typed(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were typed."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _option(field: dataclasses.Field[Any], kind: Any, required: bool) -> click.Option:
    """Return the option for a field, whose value the configuration checks."""
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    text = text[0].upper() + text[1:] + "."
    if field.default not in (dataclasses.MISSING, "", ()):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f"  [default: {default}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, show_default=False, help=text)
    words = field.metadata["words"]
    if kind in (int, float, str):
        option = click.Option([flag], type=OneOf(*words, closed=False) if words else kind, required=required, help=text)
    else:
        kind = get_args(kind)[0]
        option = Several([flag], metavar="N" if kind is int else "TERM", type=kind, help=text)
    with_type(option)
    return option
