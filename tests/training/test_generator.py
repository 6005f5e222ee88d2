"""The generator of scenes: trained at a small size, and resumed bit for bit."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finelip_fast import load
from finelip_fast._command_line import run_main
from finelip_fast.datasets.scenes import Scenes
from finelip_fast.errors import ConfigError, WriteError
from finelip_fast.training.generator import Condition, Generator, GeneratorConfig, train_generator

pytest.importorskip("diffusers")

TINY = GeneratorConfig(
    out="",
    context_length=32,
    scenes=64,
    image_size=16,
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
    assert (resumed.draw(captions[:1], steps=2)[0] - expected[0]).abs().max() < 1e-4  # whatever else is in the batch
    with pytest.raises(ConfigError, match="holds a run of other context_length: give another --out"):
        trained(tmp_path / "halves", context_length=77)


def test_captions_are_read_up_to_the_tokens_that_were_asked_for() -> None:
    caption = Scenes("test", 1)[0].caption
    features, mask = Condition(load(), 77)([caption, ""])
    assert features.shape == (2, 77, 128)
    assert mask.sum(dim=1).tolist() == [77, 2]
    with pytest.raises(ConfigError, match=r"expected context_length in 3\.\.256, got 300"):
        Condition(load(), 300)


def test_what_cannot_be_trained_or_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected image_size a multiple of 4, .* got 18"):
        trained(tmp_path / "odd", image_size=18)
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        Generator.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        trained(tmp_path / "file" / "below")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scenes, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "early")
    with pytest.raises(ConfigError, match="has kept no state yet"):
        Generator.load(tmp_path / "early")


def test_the_script_says_what_it_takes() -> None:
    script = Path(__file__).parents[2] / "training/generator.py"
    answer = subprocess.run([sys.executable, "-P", str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--context-length" in answer.stdout


@pytest.mark.parametrize(
    ("words", "fault", "code", "message"),
    [
        ([], None, 2, "error: the following arguments are required: --out; see generator.py --help\n"),
        (
            ["--out", "run", "--steps", "x"],
            None,
            2,
            "error: argument --steps: invalid int value: 'x'; see generator.py",
        ),
        (["--out", "run", "--device", "tpux"], None, 2, "error: device='tpux' cannot be used"),
        (["--out", "run"], ConfigError("expected a"), 2, "error: expected a\n"),
        (["--out", "run"], PermissionError(13, "Permission denied", "run"), 2, "error: run: Permission denied\n"),
        (["--out", "run"], KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_the_script_ends_as_every_command(
    words: list[str],
    fault: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise fault or AssertionError

    monkeypatch.setattr(sys, "argv", ["training/generator.py", *words])
    if fault is not None:
        monkeypatch.setattr("finelip_fast.training.generator.train_generator", fail)
    assert run_main("finelip_fast.training.generator") == code
    assert capsys.readouterr().err.startswith(message)
