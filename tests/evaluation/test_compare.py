"""Evaluations side by side, by hand and by command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finelip_fast.cli import main
from finelip_fast.evaluation import compare


def result(path: Path, ranks: list[int], *, pairs: str = "same", context: int = 256, engine: str = "torch") -> Path:
    row: dict[str, Any] = {"context": context, "score": "combined", "intervals": {}}
    for way in ("i2t", "t2i"):
        row[f"{way}_ranks"] = ranks
        row |= {f"{way}_recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
    told = {"checkpoint": "ours", "engine": engine, "pairs_fingerprint": pairs, "pairs": len(ranks), "data": pairs}
    path.write_text(json.dumps({**told, "rows": [row]}))
    return path


def test_a_difference_is_tested_query_by_query(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1] * 10 + [2] * 10)
    b = result(tmp_path / "b.json", [1] * 20, engine="onnx")
    first, second = compare([a, b]).rows
    assert (first["run"], first["i2t_p"], second["run"], second["engine"]) == ("a", None, "b", "onnx")
    assert second["i2t_p"] == pytest.approx(2 / 2**10)  # ten to none
    assert second["t2i_recall@1"] == 1.0


def test_the_command_prints_three_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(result(tmp_path / f"{name}.json", ranks)) for name, ranks in (("a", [1, 2]), ("b", [1, 1]))]
    assert main(["eval", "compare", *files]) == 0
    assert "i2t R@1" in capsys.readouterr().out
    assert main(["eval", "compare", *files, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("|---|")
    assert lines[2].startswith("|a|ours|torch|256|combined|50.0|")
    assert main(["eval", "compare", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["t2i_p"] == 1.0


def test_evaluations_are_compared_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "scenes:test:8", "--quiet", "--engine", "torch"]
    short, long = str(tmp_path / "short.json"), str(tmp_path / "long.json")
    assert main([*command, "--context", "77", "--out", short]) == 0
    assert main([*command, "--alpha-sweep", "scenes:val:8", "--out", long]) == 0
    assert main(["eval", "compare", short, long]) == 0
    told = capsys.readouterr().out
    assert "long" in told
    assert "bundled" in told


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other = result(tmp_path / "a.json", [1]), result(tmp_path / "b.json", [1], pairs="other")
    (tmp_path / "c.json").write_text("{}")
    for files, message in (
        ([a, other], "of other pairs"),
        ([a], "at least two"),
        ([a, tmp_path / "c.json"], "is no result of finelip eval"),
        ([a, tmp_path / "none.json"], "is no result of finelip eval"),
    ):
        assert main(["eval", "compare", *map(str, files)]) == 2
        assert message in capsys.readouterr().err
