"""Pictures of descriptions: the files written, the settings recorded, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast.cli import main
from finelip_fast.diffusion import extend, generation
from finelip_fast.diffusion.generation import DrawnPicture, generate
from finelip_fast.errors import CheckpointError, InputError, TruncationWarning, WriteError
from finelip_fast.explain import explain

LONG = "A man in a pink coat carries a yellow umbrella past the red door of a small grey house, today. " * 9


@pytest.fixture(scope="module")
def material(
    make_model: Callable[..., Any], tiny_pipelines: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Folders of a checkpoint and a pipeline."""
    folder = tmp_path_factory.mktemp("generation")
    finelip_fast.save(make_model(text_layers=3), folder / "checkpoint")
    tiny_pipelines.xl().save_pretrained(folder / "pipeline")
    return {"checkpoint": str(folder / "checkpoint"), "pipeline": str(folder / "pipeline"), "device": "cpu"}


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def difference(left: Any, right: Any) -> int:
    """Return the largest pixel difference of two pictures; 1 is rounding."""
    return int(np.abs(left.astype(int) - right).max())


def test_a_picture_and_what_made_it(material: dict[str, str], tmp_path: Path) -> None:
    out, text = tmp_path / "a.png", LONG + "Ein Löwe 🦁."
    generation = generate(
        text, out=str(out), seed=7, steps=2, guidance_scale=3.5, negative_prompt="ugly", progress=False, **material
    )
    picture = Image.open(out)
    assert picture.size == (32, 32)
    assert picture.text == generation.settings  # type: ignore[attr-defined]
    assert generation.settings == {
        "prompt": text,
        "negative_prompt": "ugly",
        "seed": "7",
        "steps": "2",
        "guidance_scale": "3.5",
        "checkpoint": material["checkpoint"],
        "pipeline": material["pipeline"],
        "layer": "the pipeline's own",
        "second": "stretch",
        "context_length": "256",
        "software": f"finelip-fast {finelip_fast.__version__}",
    }
    (drawn,) = generation.pictures
    explanation = explain(finelip_fast.load(material["checkpoint"]), picture.convert("RGB"), text)
    assert drawn.score == pytest.approx(explanation.score, abs=1e-5)
    assert drawn.words == len(explanation.words)
    assert drawn.unmet == tuple(word.bare for word in explanation.unmet)
    assert 0 < len(drawn.unmet) < drawn.words
    # Each part of the settings matters, and the same settings give the same picture.
    first = pixels(out)
    for change in (
        {},
        {"seed": 8},
        {"negative_prompt": "blurred"},
        {"layer": "last"},
        {"second": "windows"},
        {"guidance_scale": 9.0},
    ):
        recipe: dict[str, Any] = {"seed": 7, "steps": 2, "guidance_scale": 3.5, "negative_prompt": "ugly", **change}
        generate(text, out=str(out), progress=False, **recipe, **material)
        assert (difference(pixels(out), first) > 1) == bool(change), change


def test_both_lengths_side_by_side(material: dict[str, str], tiny_pipelines: ModuleType, tmp_path: Path) -> None:
    """The left half is from the original pipeline; the right half equals the picture without a comparison."""
    import torch

    side_by_side, alone = tmp_path / "both.png", tmp_path / "alone.png"
    generation = generate(LONG, out=str(side_by_side), seed=7, steps=2, compare_77=True, progress=False, **material)
    generate(LONG, out=str(alone), seed=7, steps=2, progress=False, **material)
    left, gap, right = np.split(pixels(side_by_side), [32, 40], axis=1)
    assert difference(right, pixels(alone)) <= 1
    assert difference(left, right) > 1
    assert (gap == 255).all()
    plain = tiny_pipelines.xl()
    plain.set_progress_bar_config(disable=True)
    picture = plain(LONG, generator=torch.Generator().manual_seed(7), num_inference_steps=2).images[0]
    assert difference(left, np.asarray(picture)) <= 1
    assert [drawn.tokens for drawn in generation.pictures] == [77, 256]
    assert len(str(generation).splitlines()) == 3


@pytest.mark.parametrize(
    ("drawn", "line"),
    [
        (DrawnPicture(77, 0.25, 9, ()), "77 tokens: score 0.2500, 9 of 9 words were met"),
        (
            DrawnPicture(256, 0.25, 9, ("red", "door", "red")),
            "256 tokens: score 0.2500, 6 of 9 words were met; nothing met red, door",
        ),
        (
            DrawnPicture(256, 0.25, 30, tuple("abcdefghijklmn")),
            "256 tokens: score 0.2500, 16 of 30 words were met; nothing met a, b, c, d, e, f, g, h, i, j, k, l and 2 more",
        ),
        (
            DrawnPicture(256, 0.25, 9, None),
            "256 tokens: score 0.2500; which words were met is not known: this checkpoint has no trained aggregators",
        ),
    ],
)
def test_what_is_said_of_a_picture(drawn: DrawnPicture, line: str) -> None:
    assert str(drawn) == line


def test_the_command(
    material: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # where bars are shown
    out = tmp_path / "a.png"
    words = ["generate", LONG, "--out", str(out), "--steps", "2", "--compare-77"]
    for name, value in material.items():
        words += [f"--{name}", value]
    assert main([*words, "--seed", "3", "--guidance-scale", "4"]) == 0
    printed = capsys.readouterr()
    first, *lines = printed.out.splitlines()
    assert first == f"{out}: seed 3, steps 2, guidance scale 4.0"
    assert [line.split(":")[0] for line in lines] == ["  77 tokens", "  256 tokens"]
    assert "/2 [" in printed.err
    assert "truncated" not in printed.err

    assert main([*words, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err == ""
    assert result["out"] == str(out)
    assert result["settings"]["guidance_scale"] == "5.0"
    assert Image.open(out).text["seed"] == result["settings"]["seed"] != "3"  # type: ignore[attr-defined]
    assert {"tokens", "score", "words", "unmet"} == set(result["pictures"][0])


def test_a_pipeline_that_was_extended_is_not_what_it_was(
    material: dict[str, str], tiny_pipelines: ModuleType, tmp_path: Path
) -> None:
    extend(tiny_pipelines.xl(), material["checkpoint"], layer="last").save_pretrained(tmp_path / "extended")
    again = {**material, "pipeline": str(tmp_path / "extended"), "out": str(tmp_path / "a.png")}
    with pytest.raises(
        InputError, match="expected a pipeline of 77 tokens to compare with, got 256; it is already extended"
    ):
        generate(LONG, compare_77=True, progress=False, **again)  # type: ignore[arg-type]
    generate(LONG, steps=1, progress=False, **again)  # type: ignore[arg-type]


def test_without_aggregators_no_word_is_met_or_not(
    material: dict[str, str], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    finelip_fast.save(make_model(text_layers=3, trained_aggregators=False), tmp_path / "plain")
    plain = {**material, "checkpoint": str(tmp_path / "plain"), "out": str(tmp_path / "a.png")}
    with pytest.warns(finelip_fast.UntrainedAggregatorsWarning):
        (drawn,) = generate(LONG, steps=1, progress=False, **plain).pictures  # type: ignore[arg-type]
    assert drawn.unmet is None


def test_cut_text_is_reported(material: dict[str, str], tmp_path: Path) -> None:
    with pytest.warns(TruncationWarning, match="was cut to 256 tokens"):
        generate(LONG * 2, out=str(tmp_path / "a.png"), steps=1, progress=False, **material)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"out": "a.jpg"}, InputError, "expected out to be a .png file in an existing folder, got 'a.jpg'"),
        ({"out": "nowhere/a.png"}, InputError, "in an existing folder"),
        ({"text": " "}, InputError, "expected a description"),
        ({"seed": -1}, InputError, "expected seed of at least 0"),
        ({"steps": 0}, InputError, "expected steps of at least 1"),
        ({"steps": 5000}, InputError, "expected steps of at most 1000, got 5000"),
        ({"guidance_scale": float("nan")}, InputError, "expected guidance_scale to be a finite number, got nan"),
        ({"guidance_scale": "7"}, InputError, "expected guidance_scale to be a finite number, got '7'"),
        ({"text": "a \udcff"}, InputError, "expected text to be text that UTF-8 can hold"),
        ({"text": 7}, InputError, "expected text to be text"),
        ({"negative_prompt": "\udcff"}, InputError, "expected negative_prompt to be text that UTF-8 can hold"),
        ({"pipeline": 7}, InputError, "expected pipeline to be a folder or a name, got 7"),
        ({"checkpoint": None}, InputError, "expected checkpoint to be a folder or a name, got None"),
        ({"out": ""}, InputError, "expected out to be a path"),
        ({"out": None}, InputError, "expected out to be a path"),
        ({"out": "x" * 300 + ".png"}, InputError, "expected out to be a .png file, got .*too long"),
        ({"layer": "first"}, InputError, "expected layer to be one of"),
        (
            {"pipeline": "nowhere/at/all"},
            CheckpointError,
            "cannot be opened as a diffusers text-to-image pipeline",
        ),
        ({"checkpoint": "nowhere"}, CheckpointError, "no such file or folder"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_generated(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    material: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments: dict[str, Any] = {"text": LONG, "out": "a.png", "steps": 1, **material, **change}
    with pytest.raises(error, match=message):
        generate(arguments.pop("text"), progress=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_file(material: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(InputError, match=r"expected out to be a file, got '.*a\.png', which is none"):
        generate("a cat", out=str(tmp_path / "a.png"), steps=1, progress=False, **material)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    material: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(generation, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(WriteError, match=r"cannot write .*a\.png: Permission denied"):
        generate("a cat", out=str(tmp_path / "a.png"), progress=False, **material)


def test_pickles_and_code_beside_a_pipeline_are_not_run(
    material: dict[str, str], tiny_pipelines: ModuleType, tmp_path: Path
) -> None:
    """Untrusted folders may request executable weights, a class from the folder, or a module to import."""
    import shutil

    evil = "raise SystemExit('ran')\n"
    for number, change in enumerate(
        (
            {"_class_name": ["pipeline", "StableDiffusionXLPipeline"]},
            {"unet": ["unet_code", "UNet2DConditionModel"]},
            {"unet": ["antigravity", "UNet2DConditionModel"]},
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(material["pipeline"], folder)
        for code in ("pipeline.py", "unet/unet_code.py", "unet_code.py"):
            (folder / code).write_text(evil)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(CheckpointError):
            generate("a cat", out=str(tmp_path / "a.png"), progress=False, **{**material, "pipeline": str(folder)})
    folder = tmp_path / "pickled"
    shutil.copytree(material["pipeline"], folder)
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weights = folder / part / f"{name}.safetensors"
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="safetensors"):
        generate("a cat", out=str(tmp_path / "a.png"), progress=False, **{**material, "pipeline": str(folder)})
