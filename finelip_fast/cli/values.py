"""Types of the values that commands take: each is completed by the shell, and refused by the name of its option."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from finelip_fast.errors import InputError


class Value(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4
    """A value that is refused as the library refuses arguments: what was expected of which option, and what was got."""

    def refuse(self, expected: str, value: Any, param: click.Parameter | None) -> NoReturn:
        """
        Raises:
            InputError: Always; the message gives the option or the argument as it is typed.
        """
        name = "a value" if param is None else max(param.opts, key=len)
        name = name if isinstance(param, click.Option) else name.upper()
        raise InputError(f"expected {name} {expected}, got {value!r:.80}")


class OneOf(Value):
    """One of several words.

    Args:
        words: Words that are completed.
        closed: Whether all others are refused.
    """

    name = "name"

    def __init__(self, *words: str, closed: bool = True) -> None:
        self.words, self._closed = words, closed

    def get_metavar(self, param: click.Parameter, *_: Any, **__: Any) -> str | None:
        """Return the name of the option; the help text lists the words."""
        return (param.name or "").upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word."""
        if self._closed and value not in self.words:
            self.refuse(f"to be one of {', '.join(self.words)}", value, param)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the words that begin as typed."""
        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]


class Number(Value):
    """A number within bounds.

    Args:
        least, most: Bounds; None: none.
        integral: Whether it has no fraction.
    """

    def __init__(self, least: float | None = None, most: float | None = None, *, integral: bool = True) -> None:
        self.name = "n" if integral else "number"
        self._least, self._most, self._integral = least, most, integral

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        try:
            number = int(value) if self._integral else float(value)
        except (ValueError, OverflowError):
            self.refuse("to be an integer" if self._integral else "to be a number", value, param)
        least, most = self._least, self._most
        if (least is not None and number < least) or (most is not None and number > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            self.refuse(bounds, number, param)
        return number


class Place(Value):
    """A file or a folder, whose name the shell completes.

    Args:
        name: Word for it in help texts.
        kind: ``dir``, or ``file`` for both.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name, self._kind = name, kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Leave the completion to the shell."""
        return [CompletionItem(incomplete, type=self._kind)]


class _Picture(Place):
    """A picture file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if isinstance(value, str) and os.path.isdir(value):
            self.refuse("to be a picture, not a folder", value, param)
        return value


class _Description(Value):
    """A description of a picture."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the description."""
        if isinstance(value, str) and not value.strip():
            raise InputError(f"expected a description, got an empty one: {value!r:.80}")
        return value


FOLDER, FILE, CHECKPOINT, PICTURE = (
    Place("folder", "dir"),
    Place("file", "file"),
    Place("checkpoint", "file"),
    _Picture("file", "file"),
)
DESCRIPTION, WHOLE, NUMBER = _Description(), Number(), Number(integral=False)

# By the first word of a metavar, or the name of a parameter without one.
_BY_METAVAR = {
    "FOLDER": FOLDER,
    "OUT": FOLDER,
    "ROOT": FOLDER,
    "NAME_OR_FOLDER": FOLDER,
    "FILE": FILE,
    "CHECKPOINT": CHECKPOINT,
    "SOURCE": CHECKPOINT,
    "BASE": CHECKPOINT,
    "INIT": CHECKPOINT,
    "JUDGE": CHECKPOINT,
}


def with_type(param: click.Parameter) -> click.Parameter:
    """Give a parameter without a type of its own the one that its metavar or its name stands for, and return it."""
    if param.type is click.STRING:
        word = re.match(r"\W*(\w*)", param.metavar or (param.name or "").upper())
        param.type = _BY_METAVAR.get(word[1] if word else "", param.type)
    elif param.type in (click.INT, click.FLOAT):
        param.type = WHOLE if param.type is click.INT else NUMBER
    return param
