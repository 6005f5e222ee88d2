"""The only JSON reader: size, depth, numbers and text are bounded, and errors name the file and the position in it.

Values that it returns can be printed, compared, copied and written again: no NaN, no infinity, no integer beyond 64 bits, no
nesting that overflows a stack, and no lone surrogate, which UTF-8 cannot encode.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from finelip_fast._files import read_bytes, read_text, write_error, write_text_whole
from finelip_fast.errors import FineLIPError

MAX_BYTES = 1 << 30
MAX_DEPTH = 64

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS: dict[type, str] = {dict: "an object", list: "a list"}


def read_json(
    path: str | PathLike[str],
    *,
    error: type[FineLIPError],
    expected: str = "JSON",
    kind: type | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Read the value in a JSON file.

    Args:
        path: Path of a regular file; a pipe or a device is refused, not waited for.
        error: Class of every error raised; its message starts with the path.
        expected: Expected content, as a noun phrase for the message.
        kind: ``dict`` or ``list`` if the outermost value must be one.
        max_bytes: Size above which a file is refused unread.

    Raises:
        error: The file cannot be read or is too large, or :func:`parse_json` raises it.
    """
    return parse_json(
        read_bytes(path, error=error, max_bytes=max_bytes), path, error=error, expected=expected, kind=kind
    )


def read_json_lines(
    path: str | PathLike[str],
    *,
    error: type[FineLIPError],
    expected: str,
    max_bytes: int = MAX_BYTES,
    surrogates: bool = False,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON Lines file, one per line that is not blank, each with its path and line for messages.

    Args:
        path, error, expected, max_bytes: The same as for :func:`read_json`.
        surrogates: The same as for :func:`parse_json`.

    Raises:
        error: The file cannot be read, is not UTF-8 or is too large, or a line is not an object.
    """
    # Not splitlines(), which also splits at separators that may occur inside a JSON string.
    for number, line in enumerate(read_text(path, error=error, max_bytes=max_bytes).split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of files that were joined
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, error=error, expected=expected, kind=dict, surrogates=surrogates)


def stated_otherwise(
    path: Path, statement: Mapping[str, Any], *, error: type[FineLIPError], expected: str, max_bytes: int
) -> list[str]:
    """Return the names of values that differ in the file of a folder; a missing file is written, and its folder created.

    Args:
        path: File that says whose contents the folder holds.
        statement: Expected values, which JSON can hold.
        error, expected, max_bytes: The same as for :func:`read_json`.

    Raises:
        WriteError: The folder or the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise write_error(path.parent, reason) from reason
    if not path.exists():
        write_text_whole(path, json.dumps(dict(statement), indent=2) + "\n")
        return []
    stored = read_json(path, error=error, expected=expected, kind=dict, max_bytes=max_bytes)
    return [name for name in statement if stored.get(name) != statement[name]]


def parse_json(
    text: str | bytes,
    where: object,
    *,
    error: type[FineLIPError],
    expected: str = "JSON",
    kind: type | None = None,
    surrogates: bool = False,
) -> Any:
    """Parse the value in a JSON text.

    Args:
        text: JSON; bytes are UTF-8.
        where: Start of the message: a path, or a path and a line.
        error, expected, kind: The same as for :func:`read_json`.
        surrogates: Whether to allow lone surrogates, by which Python represents file names that are not UTF-8.

    Raises:
        error: The text is not JSON, is another kind of value, is nested deeper than ``MAX_DEPTH``, or contains a number that
            is not finite or beyond 64 bits, or a lone surrogate.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode().removeprefix("\ufeff")
        value = _DECODER.decode(text)
        is_text = surrogates or not (
            _ESCAPED_SURROGATE.search(text) or (not text.isascii() and _SURROGATE.search(text))
        )
        # A line of a data file has few brackets and need not be traversed.
        if not is_text or text.count("[") + text.count("{") > MAX_DEPTH:
            check_value(value, surrogates=is_text)
    except json.JSONDecodeError as fault:
        reason = f"{fault.msg} at line {fault.lineno}, column {fault.colno}"
    except RecursionError:
        reason = f"nesting deeper than {MAX_DEPTH}"
    except ValueError as fault:  # from the checks, or bytes that are not UTF-8
        reason = str(fault)
    else:
        if kind is None or isinstance(value, kind):
            return value
        reason = f"found {_KINDS.get(type(value), f'the value {value!r:.40}')} instead of {_KINDS[kind]}"
    raise error(f"{where}: expected {expected}: {reason}")


def check_value(value: Any, *, surrogates: bool = False, depth: int = MAX_DEPTH) -> None:
    """Refuse a JSON value that is nested deeper than ``depth`` or contains a lone surrogate.

    Args:
        value: Nested dictionaries, lists, strings and numbers.
        surrogates: Whether to allow lone surrogates; if the text is known to have none, this saves the search.

    Raises:
        ValueError: The value is refused; the message says why.
    """
    if isinstance(value, str):
        if not surrogates and _SURROGATE.search(value):
            raise ValueError(f"half of a surrogate pair in the text {value!r:.40}, which UTF-8 cannot hold")
    elif isinstance(value, (dict, list, tuple)):
        if depth == 0:
            raise ValueError(f"nesting deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key in value:
                check_value(key, surrogates=surrogates, depth=depth - 1)
            value = value.values()
        for part in value:
            check_value(part, surrogates=surrogates, depth=depth - 1)


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= (number := int(digits)) < 1 << 64:
        raise ValueError(f"an integer beyond 64 bits, {digits:.20}…")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"a number that is not finite, {digits:.20}")
    return number


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_finite)
