"""Fields of a run's configuration, each defined once: its meaning and its values, for checks and for the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any, get_args, get_type_hints

from finelip_fast.errors import ConfigError

_LARGEST = (1 << 63) - 1
_MAX_TEXT = 4096
_PLURALS = {int: "integers", str: "texts"}


def option(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    words: Collection[str] = (),
) -> Any:
    """Define a field that is an option of a command.

    Args:
        text: Meaning of the field, for the command's help.
        default: Default; missing: the field is required.
        least, most: Bounds of a number, or of each number of a tuple. Without any, integers have those of 64 bits.
        below: Bound that the number must not reach.
        words: Words that a text must be one of; empty: any text.
    """
    metadata = {"help": text, "least": least, "most": most, "below": below, "words": words}
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check the types and the values of a configuration, whose fields are from :func:`option`; lists become tuples.

    Args:
        config: Frozen dataclass with fields of type ``bool``, ``int``, ``float``, ``str``, or tuples of these.

    Raises:
        ConfigError: A field is invalid; the message gives the field, the expected value and the actual one.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, value = hints[field.name], getattr(config, field.name)
        if kind in (bool, int, float, str):
            require(_fits(value, kind), f"{field.name} of type {kind.__name__}", value)
            _check_value(field, kind, value)
        else:
            kind = get_args(kind)[0]
            fits = isinstance(value, (list, tuple)) and all(_fits(item, kind) for item in value)
            require(fits, f"{field.name} as a list of {_PLURALS[kind]}", value)
            for item in value:
                _check_value(field, kind, item)
            object.__setattr__(config, field.name, tuple(value))


def require(condition: bool, expected: str, got: object) -> None:
    """
    Raises:
        ConfigError: The condition is false.
    """
    if not condition:
        raise ConfigError(f"expected {expected}, got {got!r:.80}")


def _fits(value: Any, kind: type) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def _check_value(field: dataclasses.Field[Any], kind: type, value: Any) -> None:
    name, bounds = field.name, field.metadata
    if kind is str:
        fits = "\0" not in value and len(value) <= _MAX_TEXT
        require(fits, f"{name} of at most {_MAX_TEXT} characters without NUL", value)
        if words := list(bounds["words"]):
            require(value in words, f"{name} {', '.join(words[:-1])} or {words[-1]}", value)
    elif kind is not bool:
        least, most, below = bounds["least"], bounds["most"], bounds["below"]
        if kind is int:
            least, most = -_LARGEST if least is None else least, _LARGEST if most is None else most
        require(least is None or value >= least, f"{name} of at least {least}", value)
        require(most is None or value <= most, f"{name} of at most {most}", value)
        require(below is None or value < below, f"{name} below {below}", value)
        require(math.isfinite(value), f"{name} as a finite number", value)
