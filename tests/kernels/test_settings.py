"""Measured launch settings: whose count, how they are kept, and what a broken table says."""

from __future__ import annotations

import json

import pytest
import torch

from finelip_fast._errors import KernelError
from finelip_fast.kernels import _settings

CASE = _settings.key("clim", capability=90, dtype=torch.float16, D=512, L=40, Q=1)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """This machine's table, where the test has it to itself."""
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
    assert _settings.tuned("no such case") is None


def test_this_machines_own_settings_come_before_the_shipped_ones(shipped):
    shipped({CASE: {"block_items": 64}, "other": {"block_items": 32}})
    assert _settings.tuned(CASE) == {"block_items": 64}
    _settings.save({CASE: {"block_items": 128}})
    assert _settings.tuned(CASE) == {"block_items": 128}
    assert _settings.tuned("other") == {"block_items": 32}


def test_what_was_tuned_before_stays(own):
    assert _settings.save({"first": {"block_items": 16}}) == own
    _settings.save({"second": {"block_items": 32}})
    assert json.loads(own.read_text()) == {"first": {"block_items": 16}, "second": {"block_items": 32}}
    assert [path.name for path in own.parent.iterdir()] == [own.name]


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_broken_table_says_what_to_do(own, content):
    own.parent.mkdir(parents=True)
    own.write_text(content)
    with pytest.raises(KernelError, match=r"cannot read launch settings from .*settings\.json: .*; delete it"):
        _settings.tuned(CASE)
