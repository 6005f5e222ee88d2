"""Tables of recorded runs: their comparisons, their provenance, and that those in the README are current."""

from __future__ import annotations

import json

import pytest
import report


def benchmark(contender, median, *, group="1 x 9 scores", **extra):
    info = {"contender": contender, "baseline": "plain", "p20": median / 2, "p80": 2 * median, "max_error": 1e-6}
    return {"group": group, "stats": {"median": median}, "extra_info": info | extra}


def run(*benchmarks, dirty=False):
    return {
        "machine_info": {
            "machine": "x86_64",
            "cpu": {"brand_raw": "A processor"},
            "threads": 2,
            "gpus": [],
            "torch": "2.14.1",
            "triton": None,
            "peaks": {"bytes/s": 1e10, "flops/s": {"float32": 1e11, "int8": 4e11}},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": dirty},
        "datetime": "2026-11-24T20:00:00",
        "benchmarks": list(benchmarks),
    }


@pytest.fixture
def machine(tmp_path):
    """A results folder with one run, and a file that is not a run."""
    folder = tmp_path / "machine"
    folder.mkdir()
    counted = {"bytes": 1e6, "flops": 1e9, "work_dtype": "float32", "share_of_floor": 0.5}
    recorded = run(
        benchmark("plain", 0.02), benchmark("finelip_fast", 0.005, **counted), benchmark("alone", 1.0, group="b")
    )
    (folder / "scores.json").write_text(json.dumps(recorded))
    (folder / "recall.json").write_text("{}")
    return folder


def test_a_group_is_compared_with_its_baseline_fastest_first():
    rows = report.groups(run(benchmark("plain", 0.02), benchmark("finelip_fast", 0.005)))["1 x 9 scores"]
    assert [(row["contender"], row["speedup"]) for row in rows] == [("finelip_fast", 4.0), ("plain", 1.0)]
    assert report.table(rows).splitlines() == [
        "||median|20th to 80th percentile|speed relative to plain|largest error|",
        "|---|---|---|---|---|",
        "|finelip_fast|5 ms|2.5 ms to 10 ms|4x|1.0e-06|",
        "|plain|20 ms|10 ms to 40 ms|1x|1.0e-06|",
    ]


def test_without_its_baseline_a_group_claims_no_speed():
    (rows,) = report.groups(run(benchmark("finelip_fast", 2e-5))).values()
    assert "speed" not in report.table(rows)
    assert "|finelip_fast|20 µs|" in report.table(rows)


def test_a_table_says_where_it_comes_from():
    text = report.source(run(dirty=True))
    assert text == "A processor, 2 threads; PyTorch 2.14.1; commit 0123456789 with changes, 2026-11-24."
    on_gpu = run()
    on_gpu["machine_info"]["gpus"] = ["NVIDIA H200"]
    assert report.source(on_gpu).startswith("NVIDIA H200; ")


def test_a_page_has_every_group_and_the_picture(machine):
    text = report.page(machine)
    assert [line for line in text.splitlines() if line.startswith("##")] == [
        "## scores.json",
        "### 1 x 9 scores",
        "### b",
    ]
    assert "](roofline.png)" in text


def test_the_picture_is_drawn(machine):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    report.roofline(machine)
    assert (machine / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_marks_are_filled_and_filled_again(machine):
    text = "before\n<!-- bench machine/scores.json: 1 x 9 scores -->\nold\n<!-- /bench -->\nafter\n"
    filled = report.filled(text, machine.parent)
    assert "|finelip_fast|5 ms|" in filled
    assert "old" not in filled
    assert filled.startswith("before\n<!-- bench")
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert report.filled(filled, machine.parent) == filled
    with pytest.raises(KeyError, match="no such group"):
        report.filled(text.replace("1 x 9 scores", "no such group"), machine.parent)


def test_a_table_of_recall_has_both_directions(machine):
    rows = [
        {"context_length": 77, "score": "fine"}
        | {f"{way}_recall@{k}": k / 100 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    ]
    (machine / "recall.json").write_text(json.dumps({"rows": rows}))
    filled = report.filled("<!-- recall machine/recall.json -->\nold\n<!-- /recall -->\n", machine.parent)
    assert "|tokens read|score|image→text R@1|" in filled
    assert "|77|fine|1.0|5.0|10.0|1.0|5.0|10.0|" in filled
    assert "old" not in filled


def test_the_pages_of_this_repository_are_current():
    for path in report.marked():
        text = path.read_text(encoding="utf-8")
        assert report.filled(text) == text, f"{path}: run python bench/report.py"
    for folder in report.machines():
        assert report.page(folder) == (folder / "README.md").read_text(encoding="utf-8")


def test_every_plot_of_a_study_has_its_picture():
    for path in (report.RESULTS / "studies").rglob("*.json"):
        for plot in json.loads(path.read_text(encoding="utf-8"))["plots"]:
            assert path.with_name(f"{path.stem}-{plot['name']}.png").is_file()
