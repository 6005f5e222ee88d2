"""Numbers that are arguments are refused by their names."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from finelip_fast._errors import InputError
from finelip_fast._numbers import share, whole_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library(value: object) -> None:
    number = whole_number("k", value)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "expected k as a whole number, got True"),
        (np.True_, "expected k as a whole number, got "),
        (2.5, "expected k as a whole number, got 2.5"),
        (3.0, "expected k as a whole number, got 3.0"),
        ("3", "expected k as a whole number, got '3'"),
        (None, "expected k as a whole number, got None"),
        ([3], r"expected k as a whole number, got \[3\]"),
        ("3" * 10**6, "expected k as a whole number, got '3{79}$"),
        (0, "expected k of at least 1, got 0"),
        (-(10**30), "expected k of at least 1, got -1000"),
    ],
)
def test_what_is_no_whole_number(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole_number("k", value)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_shares(value: float) -> None:
    assert share("alpha", value) == float(value)


@pytest.mark.parametrize("value", [-0.1, 2, math.nan, math.inf, True, "x", "0.5", None, [0.5], 1j])
def test_what_is_no_share(value: object) -> None:
    with pytest.raises(InputError, match=r"expected alpha in \[0, 1\], got "):
        share("alpha", value)
