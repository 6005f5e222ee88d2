"""Measured launch settings: precedence, storage, and errors for a broken table."""

from __future__ import annotations

import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import KernelError
from finelip_fast.kernels import settings as _settings


class Cut(NamedTuple):
    block_items: int


@dataclass(frozen=True)
class Switched:
    block_items: int
    described: bool = False


CASE = _settings.key("clim", capability=90, dtype=torch.float16, D=512, L=40, Q=1)


@pytest.fixture(autouse=True)
def settings_file(tmp_path, monkeypatch):
    """This machine's table of settings, private to the test."""
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "cache"))
    _settings._tables.cache_clear()
    yield _settings.cache_file()
    _settings._tables.cache_clear()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    def ship(table):
        path = tmp_path / "shipped.json"
        path.write_text(json.dumps(table))
        monkeypatch.setattr(_settings, "SHIPPED", path)

    return ship


def test_a_case_is_named_by_what_matters():
    assert CASE == "clim sm_90 float16 D=512 L=40 Q=1"


def test_the_shipped_table_is_one():
    assert isinstance(json.loads(_settings.SHIPPED.read_text()), dict)
    assert _settings.tuned("no such case", Cut) is None


def test_this_machines_own_settings_come_before_the_shipped_ones(shipped):
    shipped({CASE: {"block_items": 64}, "other": {"block_items": 32}})
    assert _settings.tuned(CASE, Cut) == Cut(64)
    _settings.save({CASE: {"block_items": 128}})
    assert _settings.tuned(CASE, Cut) == Cut(128)
    assert _settings.tuned("other", Cut) == Cut(32)


def test_what_was_tuned_before_stays(settings_file):
    assert _settings.save({"first": {"block_items": 16}}) == settings_file
    _settings.save({"second": {"block_items": 32}})
    assert json.loads(settings_file.read_text()) == {"first": {"block_items": 16}, "second": {"block_items": 32}}
    assert [path.name for path in settings_file.parent.iterdir()] == [settings_file.name]


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "{",
            "[]",
            "3",
            '{"a": 3}',
            '{"a": []}',
            '{"a": {"b": "16"}}',
            '{"a": {"b": null}}',
            '{"a": {"b": [true]}}',
        ),
        *('{"a": {"b": 1.5}}', '{"a": {"b": -16}}', '{"a": {"b": 0}}', '{"a": {"b": 1000000000}}', "[" * 100_000),
    ],
    ids=lambda content: content[:30],
)
def test_a_broken_table_says_what_to_do(settings_file, content):
    settings_file.parent.mkdir(parents=True)
    settings_file.write_text(content)
    with pytest.raises(KernelError, match=r"settings\.json.*(expected|found) .*; delete it to go back to the defaults"):
        _settings.tuned(CASE, Cut)


def test_a_pipe_in_the_place_of_a_table_is_not_waited_for(settings_file):
    settings_file.parent.mkdir(parents=True)
    os.mkfifo(settings_file)
    with pytest.raises(KernelError, match="expected a regular file, got a pipe; delete"):
        _settings.tuned(CASE, Cut)


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_a_damaged_table_is_refused_or_right(settings_file, damage_json, data):
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    settings_file.write_bytes(damage_json(data, {CASE: {"block_items": 16}, "other": {"block_items": 32}}))
    _settings._tables.cache_clear()
    with suppress(KernelError):
        tuned = _settings.tuned(CASE, Cut)
        assert tuned is None or 1 <= tuned.block_items <= 1 << 16


def test_truth_values_are_kept_as_such(settings_file):
    _settings.save({CASE: asdict(Switched(64, described=True))})
    assert _settings.tuned(CASE, Switched) == Switched(64, described=True)


@pytest.mark.parametrize("values", [{"block_items": True}, {"block_items": 16, "described": 1}], ids=str)
def test_numbers_and_truth_values_are_not_mistaken_for_each_other(settings_file, values):
    _settings.save({CASE: values})
    with pytest.raises(
        KernelError, match=r"are from another version: (block_items is True|described is 1); tune again"
    ):
        _settings.tuned(CASE, Switched)


@pytest.mark.parametrize("numbers", [{}, {"block_items": 16, "swizzle": 2}], ids=str)
def test_settings_of_another_version_say_what_to_do(settings_file, numbers):
    _settings.save({CASE: numbers})
    with pytest.raises(
        KernelError, match=r"'clim sm_90 .* are from another version: .*; tune again, or delete .*settings"
    ):
        _settings.tuned(CASE, Cut)


def test_tuners_side_by_side_lose_nothing(settings_file):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: _settings.save({str(number): {"block_items": 16}}), range(40)))
    assert _settings.names() == set(map(str, range(40)))
    assert [path.name for path in settings_file.parent.iterdir()] == [settings_file.name]


def test_another_table_can_be_written(settings_file, tmp_path):
    table = tmp_path / "table.json"
    assert _settings.save({CASE: {"block_items": 16}}, table) == table
    assert json.loads(table.read_text()) == {CASE: {"block_items": 16}}
    assert not settings_file.exists()


# The launcher of every kernel, at sizes that its tests use.
LAUNCHES = {
    "clim.launches": ("ClimSettings", (90, torch.float16, 512, 1, 40), "clim sm_90 float16 D=512 L=40 Q=1"),
    "clim.gradient_triton": (
        "ClimGradientSettings",
        (80, torch.float16, 512, 40),
        "clim_gradient sm_80 float16 D=512 L=40",
    ),
    "atrm.triton": ("AtrmSettings", (90, 512, 39, torch.bfloat16, 8), "atrm sm_90 bfloat16 D=512 K=39 B=1"),
    "atrm.gradient_triton": ("AtrmGradientSettings", (90, 512, 39), "atrm_gradient sm_90 float32 D=512 K=39"),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_takes_tuned_settings_before_its_defaults(name):
    pytest.importorskip("triton")
    module = importlib.import_module(f"finelip_fast.kernels.{name}")
    kind, fields, case = LAUNCHES[name]
    launch = module.Launch(*fields)
    assert launch.case == case
    module.settings_for.cache_clear()
    default = module.settings_for(launch)
    assert type(default).__name__ == kind
    tuned = {field: not value if isinstance(value, bool) else value + 1 for field, value in asdict(default).items()}
    _settings.save({case: tuned})  # takes effect immediately
    assert asdict(module.settings_for(launch)) == tuned
    module.settings_for.cache_clear()


def test_one_few_and_many_queries_are_cases_of_their_own():
    clim = pytest.importorskip("finelip_fast.kernels.clim.launches")
    cases = [clim.Launch(90, torch.float16, 512, count, 40).case.split("Q=")[1] for count in (1, 2, 16, 17, 1000)]
    assert cases == ["1", "8", "8", "64", "64"]
