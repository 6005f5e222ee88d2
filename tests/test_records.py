"""Records of studies: the same numbers as text, Markdown, JSON and plot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from finelip_fast import records
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
    paths = RECORD.save(tmp_path / "new", command="finelip study made-up")
    names = ["made-up.json", "made-up.md", "made-up-lines.png", "made-up-names.png"]
    assert [path.name for path in paths] == names
    stored = json.loads(paths[0].read_text())
    assert stored["tables"][0]["rows"][0]["value (%)"] == 12.34567
    assert stored["command"] == "finelip study made-up"
    assert stored["machine"]["threads"] >= 1
    assert stored["versions"]["torch"]
    page = paths[1].read_text()
    assert "|name|value (%)|\n|---|---|\n|a|12.35|\n|longer||" in page
    assert "It is so." in page
    assert "With data nothing." in page
    assert str(Path.home()) not in page + paths[0].read_text()
    for path in paths[2:]:
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


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plot: Plot) -> Any:
    """Return the axes of a plot as they were when it was saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *arguments, **options: (figures.append(self), save(self, *arguments, **options))
    )
    dataclasses.replace(RECORD, plots=(plot,)).save(tmp_path, command="")
    return figures[0].axes[0]


@pytest.mark.parametrize("log_x", [False, True], ids=["linear", "logarithmic"])
def test_a_plot_has_a_title_numbers_and_a_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log_x: bool) -> None:
    """Token counts may be strings, because other studies mix them with names; zero is visible on both axes."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    axes = drawn(
        monkeypatch,
        tmp_path,
        Plot("x", "tokens", "recall (%)", (Series("a", ["0", "2", "64"], [90.0, 95, 97]),), log_x),
    )
    assert axes.get_title() == "A title"
    assert axes.lines[0].get_xdata().tolist() == [0, 2, 64]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2", "64"]
    assert axes.get_xlim()[0] <= 0 <= axes.get_ylim()[1]
    assert axes.get_ylim()[0] <= 0
    positions = axes.transData.transform([(0, 0), (2, 0), (64, 0)])[:, 0]
    assert 0 < positions[0] < positions[1] < positions[2]


def test_a_long_curve_has_few_ticks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A label for each of a hundred values could not be read."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    costs = [number / 700 for number in range(100)]
    axes = drawn(monkeypatch, tmp_path, Plot("x", "hours", "recall (%)", (Series("a", costs, costs),)))
    assert 2 < len(axes.get_xticks()) <= 12


def test_names_stand_on_the_upright_axis_beside_a_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    axes = drawn(
        monkeypatch, tmp_path, Plot("x", "tokens", "recall (%)", (Series("a", ["64", "windows"], [90.0, 95]),))
    )
    assert [text.get_text() for text in axes.get_yticklabels()] == ["64", "windows"]
    assert axes.get_xlim()[0] <= 0


def test_a_saved_record_is_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    data, _, *pictures = RECORD.save(tmp_path, command="")
    for path in pictures:
        path.unlink()
    assert records.redraw(data) == pictures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
