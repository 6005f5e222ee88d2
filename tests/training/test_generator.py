"""The generator of scenes, and the study of what it draws: trained in small, resumed to the bit, judged by known pictures."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finelip_fast import load
from finelip_fast.cli import main
from finelip_fast.datasets.scenes import Scenes
from finelip_fast.errors import ConfigError, InputError
from finelip_fast.studies import drawing
from finelip_fast.training.generator import Condition, Generator, GeneratorConfig, as_pixels, train_generator

pytest.importorskip("diffusers")

TINY = GeneratorConfig(
    out="",
    tokens=32,
    scenes=64,
    size=16,
    channels=(8, 16),
    steps=4,
    batch_size=4,
    warmup_steps=1,
    save_every=2,
    device="cpu",
)


def trained(folder: Path, **changes: object) -> Path:
    train_generator(dataclasses.replace(TINY, out=str(folder), **changes), progress=False)
    return folder


def test_a_run_that_was_stopped_draws_what_one_in_one_go_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finelip_fast.training import generator

    keep, steps = generator._save, []

    def stop_after_two(folder: Path, step: int, *parts: object) -> None:
        keep(folder, step, *parts)
        steps.append(step)
        if len(steps) == 1:
            raise KeyboardInterrupt

    captions = [scene.caption for scene in Scenes("test", 2)]
    expected = Generator.load(trained(tmp_path / "whole"), "cpu").draw(captions, steps=2)
    monkeypatch.setattr(generator, "_save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halves")
    resumed = Generator.load(trained(tmp_path / "halves"), "cpu")
    assert steps == [2, 4]
    pictures = resumed.draw(captions, steps=2)
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.equal(pictures, expected)
    assert (resumed.draw(captions[:1], steps=2)[0] - expected[0]).abs().max() < 1e-4  # whatever is drawn beside it
    with pytest.raises(ConfigError, match=r"holds a run with .*tokens=32.* asked for .*tokens=77"):
        trained(tmp_path / "halves", tokens=77)


def test_captions_are_read_up_to_the_tokens_that_were_asked_for() -> None:
    caption = Scenes("test", 1)[0].caption
    features, mask = Condition(load(), 77)([caption, ""])
    assert features.shape == (2, 77, 128)
    assert mask.sum(dim=1).tolist() == [77, 2]
    with pytest.raises(ConfigError, match=r"expected tokens in 3\.\.256, got 300"):
        Condition(load(), 300)


def test_the_study_tells_how_much_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for tokens in (32, 77):
        trained(tmp_path / f"of-{tokens}", tokens=tokens, steps=1)
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
    assert [row["generator"] for row in rows] == ["of-32", "of-77", "the renderer, at 16 pixels"]
    assert rows[2]["told within 77 tokens (%)"] == rows[2]["told later (%)"] == 100
    assert "Chance is 50 %" in record["finding"]
    assert main([*command, "--scenes", "7", "--quiet"]) == 2


def test_a_picture_of_the_sibling_has_none_of_the_details() -> None:
    """Each scene's picture is another's of its family, to which all that the two differ in is nearer."""
    scenes = list(Scenes("test", 8))
    details = [detail for at in range(8) for detail in drawing._details(scenes, at)]
    assert {detail.token >= 76 for detail in details} == {True, False}
    swapped = as_pixels([scenes[at - at % 4 + (at + 1) % 4] for at in range(8)], 64)
    against_it = [
        detail for detail in details if detail.sibling == detail.scene - detail.scene % 4 + (detail.scene + 1) % 4
    ]
    measures = drawing._measures(swapped, scenes, against_it, load())
    assert measures["told later (%)"] == measures["told within 77 tokens (%)"] == 0
    with pytest.raises(InputError, match="expected scenes a multiple of 4"):
        drawing.drawing(drawing.DrawingSetting((), scenes=6))


def test_the_script_says_what_it_takes() -> None:
    script = Path(__file__).parents[2] / "training/generator.py"
    answer = subprocess.run([sys.executable, "-P", str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--tokens" in answer.stdout
