"""The study of generated pictures, judged with known pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finelip_fast import load
from finelip_fast.cli import main
from finelip_fast.datasets.scenes import Scenes
from finelip_fast.errors import InputError
from finelip_fast.studies import drawing
from finelip_fast.training.generator import as_pixels, train_generator
from finelip_fast.training.generator_config import GeneratorConfig

pytest.importorskip("diffusers")


def trained(folder: Path, context_length: int) -> None:
    config = GeneratorConfig(
        out=str(folder),
        context_length=context_length,
        scenes=64,
        image_size=16,
        channels=(8, 16),
        steps=1,
        batch_size=4,
        device="cpu",
    )
    train_generator(config, progress=False)


def test_the_study_tells_how_much_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for context_length in (32, 77):
        trained(tmp_path / f"of-{context_length}", context_length)
    command = [
        "study",
        "drawing",
        "--generators",
        "of-32",
        "of-77",
        "--scenes",
        "8",
        "--steps",
        "2",
        "--out",
        "studies",
    ]
    assert main([*command, "--quiet"]) == 0
    record = json.loads((tmp_path / "studies/drawing.json").read_text())
    rows = record["tables"][0]["rows"]
    assert [row["drawn by"] for row in rows] == ["of-32", "of-77", "the renderer, at 16 pixels"]
    assert rows[2]["described within 77 tokens (%)"] == rows[2]["described later (%)"] == 100
    assert "chance is 50 %" in record["finding"]
    assert main([*command, "--scenes", "7", "--quiet"]) == 2


def test_a_picture_of_the_sibling_has_none_of_the_details() -> None:
    """Each scene has the picture of another of its family, which matches all details in which they differ."""
    scenes = list(Scenes("test", 8))
    details = [detail for at in range(8) for detail in drawing._details(scenes, at)]
    assert {detail.token >= 76 for detail in details} == {True, False}
    swapped = as_pixels([scenes[at - at % 4 + (at + 1) % 4] for at in range(8)], 64)
    against_it = [
        detail for detail in details if detail.sibling == detail.scene - detail.scene % 4 + (detail.scene + 1) % 4
    ]
    measures = drawing._measures(swapped, scenes, against_it, load())
    assert measures["described later (%)"] == measures["described within 77 tokens (%)"] == 0
    with pytest.raises(InputError, match="expected scenes to be a multiple of 4"):
        drawing.drawing(drawing.DrawingSetting((), scenes=6))
