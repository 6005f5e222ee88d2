"""The table of compiled kernels: which candidate stands for an autotuned kernel, and what is printed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compile_table
from ahead_of_time import Compiled
from compile_table import GPUS, compile_best, table

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
    """A recorded launch whose compiler's answer is known."""

    def __init__(self, block, *, registers=32, shared_kib=0, spilled=0, error=None):
        super().__init__(constants={"BLOCK": block, "DTYPE": float}, num_warps=4, num_stages=2)
        self.answer = error or Compiled(registers, shared_kib << 10, spilled, 90, 4, ptx="", ttir="")

    def compile(self, capability):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_lines_are_kernels_and_columns_are_gpus():
    hopper = ROW | {"capability": 90, "registers": 121, "shared_kib": 96.0, "wgmma": True, "programs_per_sm": 2}
    other = ROW | {"package": "flash-maxsim", "capability": 120, "fits": False, "programs_per_sm": 0}
    assert table([ROW, hopper, other]).splitlines() == [
        "| kernel | package | L x D | dtype | sm_80 | sm_90 | sm_120 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| clim, Q=1: scores_kernel | finelip-fast | 40 x 512 | float16 "
        "| 126 / 32.0 / 0 / 4 | 121 / 96.0 / 0 / 2 wgmma |  |",
        "| clim, Q=1: scores_kernel | flash-maxsim | 40 x 512 | float16 |  |  | 126 / 32.0 / 0 / 0 does not fit |",
    ]


def test_a_peer_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(compile_table.importlib.util, "find_spec", lambda name: None)
    rows = compile_table.missing()
    assert [row["package"] for row in rows] == ["late-interaction-kernels", "flash-maxsim"]
    assert table(rows).count("not installed: pip install flash-maxsim") == len(GPUS)


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([Candidate(1, shared_kib=100), Candidate(2, shared_kib=50)], 2),  # more side by side
        ([Candidate(1, spilled=8), Candidate(2, shared_kib=100)], 2),  # no spills first
        ([Candidate(1, shared_kib=300), Candidate(2, spilled=8)], 2),  # that it runs before all
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


def test_the_page_of_this_repository_is_current():
    found = json.loads(compile_table.OUT.read_text(encoding="utf-8"))
    assert compile_table.page(found) == compile_table.OUT.with_name("README.md").read_text(encoding="utf-8")
