"""Records of studies: the same numbers as text, Markdown, JSON and picture."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from finelip_fast.records import Plot, Record, Series, Table

RECORD = Record(
    name="made-up",
    title="A title",
    tables=(Table("Numbers", [{"name": "a", "value (%)": 12.34567}, {"name": "longer", "value (%)": None}]),),
    plots=(
        Plot(
            "lines", "tokens", "recall (%)", (Series("one", [77, 256], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]),), log_x=True
        ),
        Plot("names", "", "recall (%)", (Series("", ["a", "b"], [1.0, 2.0]),)),
    ),
    settings={"data": "nothing"},
    finding="It is so.",
)


def test_a_record_is_saved_with_where_it_comes_from(tmp_path: Path) -> None:
    written = RECORD.save(tmp_path / "new", command="finelip study made-up")
    names = ["made-up.json", "made-up.md", "made-up-lines.png", "made-up-names.png"]
    assert [path.name for path in written] == names
    stored = json.loads(written[0].read_text())
    assert stored["tables"][0]["rows"][0]["value (%)"] == 12.34567
    assert stored["command"] == "finelip study made-up"
    assert stored["machine"]["threads"] >= 1
    assert stored["versions"]["torch"]
    page = written[1].read_text()
    assert "|name|value (%)|\n|---|---|\n|a|12.35|\n|longer||" in page
    assert "It is so." in page
    assert "With data nothing." in page
    assert str(Path.home()) not in page + written[0].read_text()
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_record_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    settings = {"data": f"urban1k:{tmp_path}/urban1k", "init": "open_clip:ViT-B-16/openai"}
    record = dataclasses.replace(RECORD, settings=settings, plots=())
    command = f"finelip study x --checkpoint {tmp_path}/model/ --data={tmp_path}/a.jsonl --out bench/results s3://a/b"
    data, page = record.save(tmp_path, command=command)
    assert str(tmp_path) not in data.read_text() + page.read_text()
    stored = json.loads(data.read_text())
    assert stored["command"] == "finelip study x --checkpoint model --data=a.jsonl --out bench/results s3://a/b"
    assert stored["settings"] == {"data": "urban1k:urban1k", "init": "open_clip:ViT-B-16/openai"}


def test_a_record_prints_its_tables() -> None:
    assert str(RECORD).splitlines()[3:5] == ["name    value (%)", "a       12.35"]


def test_a_table_may_have_bars_in_its_cells_and_no_rows() -> None:
    assert Table("", [{"a|b": "c|d"}]).markdown() == "|a\\|b|\n|---|\n|c\\|d|"
    assert str(Table("", [])) == Table("", []).markdown() == ""


def test_plots_without_matplotlib_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'finelip-fast\[plots\]'"):
        RECORD.save(tmp_path, command="")
