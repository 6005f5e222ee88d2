"""The table of compiled kernels: which candidate represents an autotuned kernel, and what is printed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import compile_table
from ahead_of_time import Compiled
from compile_table import GPUS, compile_best, cuts_table, table
from counted import CARDS, count

ROW = {
    "kernel": "clim, Q=1: scores_kernel",
    "package": "finelip-fast",
    "shape": "40 x 512",
    "dtype": "float16",
    "capability": 80,
    "registers": 126,
    "shared_kib": 32.0,
    "spilled_bytes": 0,
    "wgmma": False,
    "fits": True,
    "programs_per_sm": 4,
}


class Candidate(SimpleNamespace):
    """A recorded launch with a known compilation result."""

    def __init__(self, block, *, registers=32, shared_kib=0, spilled=0, error=None):
        super().__init__(constants={"BLOCK": block, "DTYPE": float}, num_warps=4, num_stages=2)
        self.answer = error or Compiled(registers, shared_kib << 10, spilled, 90, 4, ptx="", ttir="")

    def compile(self, capability):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_lines_are_kernels_and_columns_are_gpus():
    hopper = ROW | {"capability": 90, "registers": 121, "shared_kib": 96.0, "wgmma": True, "programs_per_sm": 2}
    blackwell = ROW | {"package": "flash-maxsim", "capability": 120, "fits": False, "programs_per_sm": 0}
    assert table([ROW, hopper, blackwell]).splitlines() == [
        "| kernel | package | L x D | dtype | sm_80 | sm_90 | sm_100 | sm_120 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| clim, Q=1: scores_kernel | finelip-fast | 40 x 512 | float16 "
        "| 126 / 32.0 / 0 / 4 | 121 / 96.0 / 0 / 2 wgmma |  |  |",
        "| clim, Q=1: scores_kernel | flash-maxsim | 40 x 512 | float16 |  |  |  | 126 / 32.0 / 0 / 0 does not fit |",
    ]


def test_a_peer_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(compile_table.importlib.util, "find_spec", lambda name: None)
    rows = compile_table.missing()
    assert [row["package"] for row in rows] == ["late-interaction-kernels", "flash-maxsim"]
    assert table(rows).count("not installed: pip install flash-maxsim") == len(GPUS)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([Candidate(1, shared_kib=100), Candidate(2, shared_kib=50)], 2),  # more run concurrently
        ([Candidate(1, spilled=8), Candidate(2, shared_kib=100)], 2),  # no spills first
        ([Candidate(1, shared_kib=300), Candidate(2, spilled=8)], 2),  # fitting comes before everything else
        ([Candidate(1), Candidate(2)], 1),
        ([Candidate(1, error=ValueError("no")), Candidate(2)], 2),
    ],
)
def test_the_best_candidate_stands_for_an_autotuned_kernel(candidates, best):
    row = compile_best(candidates, 90)
    assert row["settings"]["BLOCK"] == best
    assert row["settings"]["note"].startswith("best of 2 that the package would try")
    assert row["settings"]["DTYPE"] == "<class 'float'>"


def test_one_candidate_needs_no_note():
    assert "note" not in compile_best([Candidate(1)], 90)["settings"]


def test_what_does_not_compile_says_why():
    row = compile_best([Candidate(1, error=ValueError("at line 3:\nno such operation | here"))], 90)
    assert row == {"error": "ValueError: no such operation | here"}
    assert r"no such operation \| here" in table([ROW | row])


CUT = {
    "queries": 8,
    "dtype": "int8",
    "capability": 90,
    "shipped": True,
    "l2_bytes": 63232.0,
    "share_of_floor": 0.834,
    "cut": {"items": 128, "queries": 3, "width": 512, "warps": 8, "stages": 2, "descriptor": True},
    **{name: ROW[name] for name in ("registers", "shared_kib", "spilled_bytes", "wgmma", "fits", "programs_per_sm")},
}


def test_lines_of_cuts_say_what_is_shipped_and_what_is_left_of_the_floor():
    blackwell = CUT | {"capability": 120, "shipped": False, "fits": False, "programs_per_sm": 0}
    *_, line = cuts_table([CUT, blackwell]).splitlines()
    numbers = "126 / 32.0 / 0"
    assert line == (
        f"| 8 | int8 | 128 x 3, 512, 8, 2, TMA | 61.8 |  | **{numbers} / 4, 83%** |  | {numbers} / 0 does not fit |"
    )


@pytest.mark.parametrize(("block_width", "l2"), [(64, 40 * 1024 * (1 + 40 / 128)), (512, 40 * 1024 * (1 + 1 / 128))])
def test_queries_in_one_piece_are_counted_once_a_program(block_width, l2):
    """An item of 40 x 512 in float16 takes 40 KiB, and so does a query."""
    constants = {"QUERY_TOKENS": 40, "QUERY_COLUMNS": 40, "COLUMNS": 64, "QUERIES": 1, "ITEM_TOKENS": 40, "WIDTH": 512}
    counts = count({**constants, "BLOCK_ITEMS": 128, "BLOCK_WIDTH": block_width}, 1, torch.float16)
    assert counts == (40 * 1024, l2, 2 * 40 * 40 * 512, 2 * 64 * 40 * 512)
    assert counts.share_of_floor(CARDS[90], torch.float16) == 1  # memory is the bottleneck


def test_what_each_block_of_queries_reads_again_is_counted():
    constants = {"QUERY_TOKENS": 40, "QUERY_COLUMNS": 40, "COLUMNS": 128, "QUERIES": 3, "ITEM_TOKENS": 40, "WIDTH": 512}
    counts = count({**constants, "BLOCK_ITEMS": 128, "BLOCK_WIDTH": 64}, 8, torch.float16)
    assert counts.l2 == 3 * 40 * 1024 + 8 * 40 * 40 * 1024 / 128
    assert counts.done == 3 * 128 * 2 * 40 * 512
    assert 0.5 < counts.share_of_floor(CARDS[90], torch.float16) < 0.6


def test_peers_rows_are_kept_as_long_as_versions_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_table, "OUT", tmp_path / "kernels.json")
    versions = {"triton": "3.8.0", "flash-maxsim": "0.3.0"}
    assert compile_table.recorded_rows(versions) == {}
    peer = ROW | {"package": "flash-maxsim"}
    compile_table.OUT.write_text(json.dumps({"versions": versions, "rows": [ROW, peer]}))
    assert compile_table.recorded_rows(versions) == {80: [peer]}
    assert compile_table.recorded_rows(versions | {"triton": "3.9.0"}) == {}


def test_the_page_of_this_repository_is_current():
    record = json.loads(compile_table.OUT.read_text(encoding="utf-8"))
    assert compile_table.page(record) == compile_table.OUT.with_name("README.md").read_text(encoding="utf-8")
