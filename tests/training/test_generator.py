"""The generator of scenes: trained at a small size, and resumed bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from finelip_fast import cli, load
from finelip_fast.datasets.scenes import Scenes
from finelip_fast.errors import ConfigError, WriteError
from finelip_fast.training.generator import Condition, Generator, read_config, train_generator
from finelip_fast.training.generator_config import GeneratorConfig

pytest.importorskip("diffusers")

TINY = GeneratorConfig(
    out="run",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "expected image_size a multiple of 4, since 2 channels halve it so often, got 18"),
        ({"channels": (10, 20)}, "expected channels of multiples of 8, got 10"),
        ({"channels": (8, 1 << 40)}, "expected channels of at most 65536, got"),
        ({"channels": (8,)}, r"expected two or more channels, got \(8,\)"),
        ({"channels": (8, 16.0)}, "expected channels as a list of integers, got"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0"),
        ({"scenes": 0}, "expected scenes of at least 1, got 0"),
        ({"scenes": 10**8}, "expected scenes of at most 10000000, got 100000000"),
        ({"seed": 10**22}, "expected seed of at most"),
        ({"ema_decay": 2.0}, "expected ema_decay below 1, got 2.0"),
        ({"learning_rate": float("nan")}, "expected learning_rate of at least 0, got nan"),
        ({"save_every": 0}, "expected save_every of at least 1, got 0"),
        ({"unconditional": -1.0}, "expected unconditional of at least 0, got -1.0"),
        ({"out": ""}, "expected out, a folder, got ''"),
    ],
    ids=str,
)
def test_refuses_before_the_folder_is_taken(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **{"out": str(tmp_path / "run"), **changes})


def test_a_run_that_never_saved_does_not_take_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Scenes, "__getitem__", out_of_memory)
        with pytest.raises(MemoryError):
            trained(tmp_path, batch_size=4096)
    assert Generator.load(trained(tmp_path), "cpu").condition.context_length == 32


def test_the_command_trains_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "generator", "--out", str(tmp_path), "--device", "cpu", "--quiet", "--save-every", "1"]
    words += ["--context-length", "32", "--scenes", "64", "--image-size", "16", "--channels", "8", "16", "--steps", "1"]
    assert cli.main([*words, "--batch-size", "4"]) == 0
    assert read_config(tmp_path).channels == (8, 16)
    capsys.readouterr()
    assert cli.main([*words, "--batch-size", "2"]) == 2
    assert "holds a run of other batch_size: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: Missing option --out."),
        (["--out", "run", "--steps", "x"], "error: expected --steps to be an integer, got 'x'"),
        (["--out", "run", "--steps", "0"], "error: expected --steps of at least 1, got 0"),
        (["--out", "run", "--device", "tpux"], "error: --device tpux cannot be used"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_the_command_says_what_is_wrong(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "generator", *words]) == 2
    assert message in capsys.readouterr().err
