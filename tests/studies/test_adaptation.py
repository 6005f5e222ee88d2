"""The study of adaptations: what is trained, the reported cost, and that nothing is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finelip_fast import checkpoint
from finelip_fast.cli import main
from finelip_fast.datasets import open_dataset
from finelip_fast.errors import ConfigError, TrainingError
from finelip_fast.studies import adaptation
from finelip_fast.studies.adaptation import ADAPTATIONS, EVERYTHING


@pytest.fixture
def command(tmp_path: Path, make_model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small version of the study, on a CLIP without trained aggregators."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save(make_model(context_length=77, trained_aggregators=False), tmp_path / "clip")
    recipe = {
        "out": "runs",
        "train": "scenes:train:32",
        "validation": "scenes:val:8",
        "batch_size": 8,
        "steps": 4,
        "eval_every": 2,
        "warmup_steps": 0,
        "group": 4,
        "tensorboard": False,
        "device": "cpu",
        "augment": ["sentences:0.5"],
        "gradient_checkpointing": True,
    }
    (tmp_path / "everything.json").write_text(json.dumps(recipe))
    options = ["--base", "clip", "--recipe", "everything.json", "--data", "scenes:test:8", "--runs", "runs", "--quiet"]
    return ["study", "adaptation", *options, "--steps", "6", "--encoder-steps", "2", "--out", "studies"]


def test_all_ways_are_measured_beside_the_base_and_nothing_is_done_twice(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    record = json.loads((tmp_path / "studies/adaptation.json").read_text())
    (table,), (plot,) = record["tables"], record["plots"]
    assert [row["trained"] for row in table["rows"]] == ["the base", *ADAPTATIONS, EVERYTHING]
    costs = {row["trained"]: row["core-hours"] for row in table["rows"]}
    assert (
        costs["the base"]
        == 0
        < costs["aggregators alone"]
        < min(costs["then the last 2 blocks"], costs["then all blocks"])
    )
    for series in plot["series"]:
        assert series["x"] == sorted(series["x"])
        assert series["x"][-1] == pytest.approx(costs[series["label"]])  # validated at the last step
        assert series["y"][0] == plot["series"][0]["y"][0]
    assert [len(series["x"]) for series in plot["series"]] == [4, 5, 5, 3]
    assert EVERYTHING.capitalize() in record["finding"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        *("features", "aggregators", "last-2", "all", "everything", "setting.json"),
    }
    states = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert main([*command, "--out", "again"]) == 0
    assert states == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "again/adaptation.json").read_text())["tables"] == record["tables"]
    capsys.readouterr()
    assert main([*command, "--steps", "7"]) == 2
    assert "holds runs of another steps: give another --runs" in capsys.readouterr().err


def test_the_pairs_of_the_recipe_start_from_its_root(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    lines = []
    for number, example in enumerate(open_dataset("scenes:val:8", image_size=32)):
        example.image.save(tmp_path / "pictures" / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": example.caption}) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    recipe = json.loads((tmp_path / "everything.json").read_text())
    recipe |= {"train": "jsonl:pairs.jsonl", "validation": "jsonl:pairs.jsonl", "root": "pictures"}
    (tmp_path / "everything.json").write_text(json.dumps(recipe))
    assert main([*command, "--steps", "1", "--encoder-steps", "1"]) == 0


def test_a_run_that_was_stopped_has_cost_what_it_took_before_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 3600.0, 5000.0, 12200.0])
    monkeypatch.setattr(adaptation.time, "process_time", lambda: next(clock))

    def stopped() -> None:
        raise TrainingError("stopped at step 3")

    with pytest.raises(TrainingError):
        adaptation._hours(tmp_path, stopped)
    assert adaptation._hours(tmp_path, lambda: None) == 3.0
    assert adaptation._hours(tmp_path, stopped) == 3.0  # not repeated
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"expected what a run has cost .* as hours"):
        adaptation._hours(tmp_path, stopped)


def test_what_stops_a_run_is_what_is_raised(tmp_path: Path) -> None:
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaptation._hours(tmp_path / "run", work)
    assert (tmp_path / "run" / "cost.json").is_file()
