"""Type checks of JSON values: a value matches a dataclass or an annotation, or an error says where it differs."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", type(None): "null"}


def typed(value: Any, kind: Any, place: str = "") -> Any:
    """Convert a value to a type: lists become tuples if the type says so, and objects become dataclasses.

    Args:
        value: Value that a JSON reader returned.
        kind: ``bool``, ``int``, ``float``, ``str``, ``None``, ``Any``; a list, a tuple, a dictionary with string keys or a
            union of kinds; or a dataclass with the object's fields.
        place: Position of the value for the message, such as ``rows[2].score``.

    Raises:
        ValueError: The type differs, a number is not finite, or a field is missing or unknown.
    """
    if kind is Any:
        return value
    if kind in _NAMES or kind is None:
        return _scalar(value, type(None) if kind is None else kind, place)
    if dataclasses.is_dataclass(kind):
        return kind(**_fields(value, get_type_hints(kind), place))  # type: ignore[operator]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else typed(value, next(part for part in parts if part is not type(None)), place)
    if origin is dict:
        _require(isinstance(value, dict), value, "an object", place)
        return {key: typed(part, parts[1], f"{place}[{key!r:.40}]") for key, part in value.items()}
    _require(isinstance(value, (list, tuple)), value, "a list", place)
    if origin is tuple and parts[-1] is not Ellipsis:
        _require(len(value) == len(parts), value, f"a list of {len(parts)}", place)
        return tuple(
            typed(part, part_kind, f"{place}[{at}]")
            for at, (part, part_kind) in enumerate(zip(value, parts, strict=True))
        )
    # One pass over the types is enough for a list of integers or texts, which may be long.
    if parts[0] not in (int, str) or {type(part) for part in value} - {parts[0]}:
        value = [typed(part, parts[0], f"{place}[{at}]") for at, part in enumerate(value)]
    return tuple(value) if origin is tuple else value


def _fields(values: Any, hints: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields of an object, each converted to its type."""
    _require(isinstance(values, dict), values, "an object", place)
    for problem, names in (("no", hints.keys() - values.keys()), ("an unknown", values.keys() - hints.keys())):
        if names:
            raise ValueError(f"{problem} field {min(names)!r:.80}{place and f' in {place}'}")
    return {name: typed(values[name], kind, f"{place}.{name}" if place else name) for name, kind in hints.items()}


def _scalar(value: Any, kind: type, place: str) -> Any:
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    _require(fits and not (isinstance(value, float) and not math.isfinite(value)), value, _NAMES[kind], place)
    return value


def _require(condition: bool, value: Any, expected: str, place: str) -> None:
    if not condition:
        raise ValueError(f"expected {expected}{place and f' as {place}'}, found {value!r:.80}")
