"""Numbers that are arguments: refused by their names where they are given, not where they fail."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from finelip_fast._errors import InputError


def whole_number(name: str, value: Any, *, least: int = 1) -> int:
    """An integer of any library, no truth value.

    Raises:
        InputError: Something else, or one below ``least``; says what it is called.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"expected {name} as a whole number, got {value!r:.80}")
    if number < least:
        raise InputError(f"expected {name} of at least {least}, got {number}")
    return number


def share(name: str, value: Any) -> float:
    """A number from 0 to 1, no truth value and no NaN.

    Raises:
        InputError: Something else; says what it is called.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"expected {name} in [0, 1], got {value!r:.80}")
    return float(value)
