"""Arguments of the wrong type are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import finelip_fast
from finelip_fast import FineLIPConfig, Preprocess
from finelip_fast._arguments import (
    as_embeddings,
    find_device,
    floating_dtype,
    folder_path,
    listed,
    matrices,
    one_of,
    share,
    sound_text,
    strings,
    whole_number,
)
from finelip_fast.errors import ConfigError, EngineError, InputError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_any_library(value: object) -> None:
    number = whole_number("k", value)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "expected k to be an integer, got True"),
        (np.True_, "expected k to be an integer, got "),
        (2.5, "expected k to be an integer, got 2.5"),
        (3.0, "expected k to be an integer, got 3.0"),
        ("3", "expected k to be an integer, got '3'"),
        (None, "expected k to be an integer, got None"),
        ([3], r"expected k to be an integer, got \[3\]"),
        ("3" * 10**6, "expected k to be an integer, got '3{79}$"),
        (0, "expected k of at least 1, got 0"),
        (-(10**30), "expected k of at least 1, got -1000"),
        (101, "expected k of at most 100, got 101"),
    ],
)
def test_what_is_no_whole_number(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole_number("k", value, most=100)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1), Fraction(1, 2)])
def test_shares(value: float) -> None:
    assert share("alpha", value) == float(value)


@pytest.mark.parametrize("value", [-0.1, 2, math.nan, math.inf, True, "x", "0.5", None, [0.5], 1j])
def test_what_is_no_share(value: object) -> None:
    with pytest.raises(InputError, match=r"expected alpha in \[0, 1\], got "):
        share("alpha", value)


# Compares element by element, and has no truth value.
ARRAY = np.zeros(3)


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (lambda value: one_of("mode", value, ("a", "b")), "c", "expected mode to be one of a, b, got 'c'"),
        (lambda value: one_of("mode", value, ("a", "b")), ["a"], r"expected mode to be one of a, b, got \['a'\]"),
        (lambda value: one_of("mode", value, ("a", "b")), ARRAY, "expected mode to be one of a, b, got array"),
        (lambda value: listed("ids", value), "text", r"expected ids to be a list, got the str 'text'; pass \['text'\]"),
        (lambda value: listed("ids", value), {"a": 1}, "expected ids to be a list, got {'a': 1}"),
        (lambda value: listed("ids", value), None, "expected ids to be a list, got None"),
        (lambda value: listed("ids", value), np.array(3), "expected ids to be a list, got array"),
        (lambda value: sound_text("text", value), 7, "expected text to be text that UTF-8 can hold, got 7"),
        (lambda value: sound_text("text", value), "a\udcff", r"expected text to be text that UTF-8 can hold, got 'a\\udcff'"),
        (lambda value: strings("ids", value), "text", r"expected ids to be a list, got the str 'text'; pass \['text'\]"),
        (lambda value: strings("ids", value), ["a", b"b"], "expected ids of type str, got b'b'; convert it first"),
        (lambda value: folder_path("folder", value), "a\0b", "expected folder to be a path without NUL characters, got"),
        (lambda value: folder_path("folder", value), 3, "expected folder to be a path, got 3"),
        (lambda value: folder_path("folder", value), b"folder", "expected folder to be a path, got b'folder'"),
        (lambda value: floating_dtype("dtype", value), "float16", r"floating-point torch.dtype, such as .*, got 'float16'"),
        (lambda value: floating_dtype("dtype", value), torch.int8, r"floating-point torch.dtype, such as .*, got torch.int8"),
        (lambda value: matrices("rows", value, (1, 2, 3)), None, r"expected rows as a tensor \[1, 2, 3\], got None"),
        (lambda value: matrices("rows", value, (1, 2, 3)), ARRAY, r"expected rows as a tensor \[1, 2, 3\], got array"),
        (lambda value: listed("ids", value), "*.jpg", r"pass \['\*\.jpg'\]$"),
        (lambda value: folder_path("folder", value), "", "expected folder to be a path, got ''; the working folder is '.'"),
        (lambda value: as_embeddings("rows", value), [[0.5]], r"expected rows as a tensor or an array .*, got \[\[0.5\]\]"),
        (lambda value: as_embeddings("rows", value), np.array(["a"]), "expected rows of floating-point numbers, got <U1"),
        (lambda value: as_embeddings("rows", value), np.ones(3, int), "expected rows of floating-point numbers, got int64"),
        (lambda value: as_embeddings("rows", value), torch.ones(3).int(), "floating-point numbers, got torch.int32"),
        (lambda value: as_embeddings("rows", value), torch.ones(3).to_sparse(), r"torch.sparse_coo; pass rows.to_dense\(\)"),
        (find_device, True, "expected device to be 'cpu', 'cuda', .*, got True"),
        (find_device, ["cpu"], r"expected device to be 'cpu', .*, a GPU's number or a torch.device, got \['cpu'\]"),
        (find_device, "", "device='' cannot be used: .*; use device='cpu', or leave it out"),
        (find_device, "tpu:0", "device='tpu:0' cannot be used: .*; use device='cpu', or leave it out"),
        (find_device, "cpu:-2", "device='cpu:-2' cannot be used: .*; use device='cpu', or leave it out"),
        (find_device, "meta", "expected device to be 'cpu', 'cuda', .*, got 'meta'"),
        (find_device, -1, "device='-1' cannot be used: .*; use device='cpu', or leave it out"),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_by_name(check: Callable[[object], object], value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(value)


@pytest.mark.parametrize("device", ["cuda:99", 99])
def test_a_device_that_is_not_here_is_named(device: object) -> None:
    with pytest.raises(EngineError, match=f"device='{device}' cannot be used: .*; use device='cpu', or leave it out"):
        find_device(device)


@pytest.mark.parametrize(
    "rows",
    [
        np.linspace(0, 1, 6, dtype=np.float32)[::-1],
        np.linspace(0, 1, 6, dtype=">f4"),
        np.linspace(0, 1, 6, dtype=np.float64),
        np.frombuffer(np.linspace(0, 1, 6, dtype=np.float32).tobytes(), np.float32),
        np.linspace(0, 1, 6, dtype=np.longdouble),
        torch.linspace(0, 1, 6, dtype=torch.float64),
    ],
    ids=["backwards", "other byte order", "float64", "read-only", "long double", "a tensor of float64"],
)
def test_embeddings_come_in_any_floating_format(rows: Any) -> None:
    tensor = as_embeddings("rows", rows)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == pytest.approx(rows.tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: finelip_fast.load(device=0.5), "expected device to be"),
        (lambda: finelip_fast.load(dtype="half"), "expected dtype to be a floating-point torch.dtype"),
        (lambda: finelip_fast.save(None, "folder"), "expected a FineLIP, got None"),
        (lambda: finelip_fast.save(finelip_fast.load(), 3), "expected folder to be a path, got 3"),
        (lambda: finelip_fast.save(finelip_fast.load(), __file__), "expected a folder to write, got the file"),
        (lambda: finelip_fast.load(""), "expected a checkpoint's path or name, got ''; leave it out for the bundled model"),
        (lambda: finelip_fast.FineLIP({"a": 1}), "expected config as a FineLIPConfig, got {'a': 1}"),
        (lambda: FineLIPConfig.from_dict(None), "expected the values of a model configuration in a dictionary, got None"),
        (lambda: FineLIPConfig.from_dict({1: 1}), "unknown fields '1'"),
        (lambda: FineLIPConfig.preset("scenes").choose_alpha("a"), r"expected alpha in \[0, 1\], got 'a'"),
        (lambda: finelip_fast.tokenize("a", 10**30), "expected context_length"),
        (lambda: FineLIPConfig.preset(["ViT-B-16"]), "expected the preset to be one of"),
        (lambda: Preprocess(image_size=True), "expected image_size to be an integer, got True"),
        (lambda: Preprocess(interpolation=["bicubic"]), "expected interpolation to be one of bicubic, bilinear"),
        (lambda: Preprocess(mean=None), "expected mean to be 3 numbers, got None"),
        (lambda: Preprocess(mean=(0, 0, math.nan)), "expected mean to be 3 numbers, got"),
        (lambda: Preprocess(std=(1, 1, 0)), r"expected std to be 3 numbers above 0, got \(1, 1, 0\)"),
        (lambda: Preprocess(std=(1, 1)), r"expected std to be 3 numbers above 0, got \(1, 1\)"),
    ],
)  # fmt: skip
def test_the_library_looks_at_what_it_is_given(call: Callable[[], object], message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        call()
