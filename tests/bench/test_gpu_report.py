"""A GPU's day as a record: its races become ordinary tables, relative to the highest rates measured on the GPU."""

from __future__ import annotations

import json

import gpu_report
import pytest
import report

MACHINE = {"step": "machine", "date": "2026-11-29", "torch": "2.11", "gpu": "NVIDIA H200"}
COMMIT = {"commit": {"id": "0123456789abcdef", "dirty": False}}


def rates(bytes_per_second, int8):
    return {"step": "machine", "bytes/s": bytes_per_second, "flops/s": {"int8": int8}}


def scored(contender, p50, step="headline"):
    work = {"bytes": 2e9, "flops": 1e12, "work_dtype": "int8", "share_of_floor": 9.0}
    spread = {"p20": p50, "p50": p50, "p80": p50, "max_error": 0.0}
    return {"step": step, "race": "1 x 1000", "contender": contender, **work, **spread}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "gpu"
    path.mkdir()
    wrong = {"step": "kernels", "kernel": "atrm", "error": 0.5, "allowed": 1e-5, "wrong": "wrong: off by 0.5"}
    swept = {"step": "sweep", "case": "clim sm_90", "settings": {"block_items": 64}, "speedup": 1.25, "failed": 0}
    tests = {
        "step": "tests",
        "exit_code": 1,
        "summary": "=== 1 failed, 2 passed ===",
        "failed": ["tests/test_x.py::test_y"],
    }
    first = [
        MACHINE | COMMIT,
        rates(1e12, 1e14),
        scored("int8", 0.01),
        wrong,
        swept,
        tests,
        {"step": "sweep", "ended": 0},
    ]
    second = [MACHINE | COMMIT, rates(5e11, 2e14), {"step": "peers", "skipped": "3 s left, 40 needed"}]
    for name, lines in (("first", first), ("second", second)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "losses.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return path


def test_a_day_is_a_run_among_the_others(folder):
    (name, day), (_, empty) = report.runs(folder)
    assert (name, empty["benchmarks"]) == ("first.jsonl", [])
    (rows,) = report.groups(day).values()
    assert [row["contender"] for row in rows] == ["finelip_fast, int8"]
    assert rows[0]["share_of_floor"] == pytest.approx(0.5), "1e12 at the second day's 2e14 a second, over 10 ms"
    assert report.source(day) == "NVIDIA H200; PyTorch 2.11; commit 0123456789, 2026-11-29."


def test_the_page_has_what_no_race_is(folder):
    page = report.page(folder)
    assert "|finelip_fast, int8|10 ms|10 ms to 10 ms|50%|0.0e+00|" in page
    assert "|atrm|5.0e-01|1.0e-05|wrong: off by 0.5|" in page
    assert "|clim sm_90|block_items 64|1.25x|" in page
    assert "1 failed, 2 passed\n\n- `tests/test_x.py::test_y`" in page


def test_a_mark_names_a_race_of_a_day(folder):
    mark = f"<!-- bench {folder.name}/first.jsonl: headline: 1 x 1000 -->\n<!-- /bench -->\n"
    assert "|finelip_fast, int8|10 ms|" in report.filled(mark, folder.parent)


def test_other_steps_compare_contenders_as_they_are_named():
    lines = [MACHINE | COMMIT, scored("plain torch", 0.02, step="peers")]
    (benchmark,) = gpu_report.as_run(lines, gpu_report.peaks([[rates(1e12, 1e14)]]))["benchmarks"]
    assert benchmark["extra_info"]["contender"] == "plain torch"
