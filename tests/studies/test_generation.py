"""Pictures of short and long prompts are drawn once, and judged by the Fréchet distance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import finelip_fast
from finelip_fast.cli import main
from finelip_fast.errors import ConfigError, InputError
from finelip_fast.studies import generation as module
from finelip_fast.studies.generation import GenerationSetting, Moments, frechet_distance, generation


def moments(features: torch.Tensor) -> Moments:
    gathered = Moments(features.shape[1])
    for part in features.split(7):
        gathered.add(part)
    return gathered


def test_the_distance_is_frechets() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(50, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    second = torch.randn(40, 6, generator=generator) + 0.5
    covariances = [np.cov(features.double().numpy().T) for features in (first, second)]
    # The product itself is not symmetric.
    root = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    expected = ((first - second.mean(0)).mean(0) ** 2).sum().item() + sum(map(np.trace, covariances)) - 2 * root
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(moments(first), moments(first)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(moments(first), moments(first + 2)) == pytest.approx(6 * 4, rel=1e-5)


@pytest.fixture(scope="module")
def setting(
    make_model: Callable[..., Any], tiny_pipelines: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> GenerationSetting:
    folder = tmp_path_factory.mktemp("generation")
    finelip_fast.save(make_model(text_layers=3), folder / "checkpoint")
    finelip_fast.save(make_model(context_length=77, seed=3), folder / "judge")
    tiny_pipelines.xl().save_pretrained(folder / "pipeline")
    places = {name: str(folder / name) for name in ("checkpoint", "judge", "pipeline", "pictures")}
    return GenerationSetting(**places, data="scenes:test:3", steps=1, device="cpu", progress=False)


def test_both_lengths_are_drawn_and_judged(setting: GenerationSetting) -> None:
    record = generation(setting)
    described, short, long = record.tables[0].rows
    assert [row["pictures"] for row in (short, long)] == ["drawn from 77 tokens", "drawn from 256 tokens"]
    assert described["FID"] == 0 < short["FID"] != long["FID"]
    assert "Of 3 descriptions, 256 tokens instead of 77 take the distance" in record.finding
    assert record.finding.endswith("columns the distance is biased.")
    files = sorted(path.relative_to(setting.pictures).as_posix() for path in Path(setting.pictures).rglob("*.png"))
    assert files == [f"{length}/{number:06}.png" for length in (256, 77) for number in range(3)]


def test_a_run_that_goes_on_draws_what_is_missing(setting: GenerationSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    before = generation(setting).tables
    lost = Path(setting.pictures) / "256" / "000001.png"
    content = lost.read_bytes()
    lost.unlink()
    counts, draw = [], module.draw
    monkeypatch.setattr(module, "draw", lambda *arguments: counts.append(1) or draw(*arguments))
    assert generation(setting).tables == before
    assert (len(counts), lost.read_bytes()) == (1, content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "holds pictures of other steps: give another --pictures"),
        ({"pipeline": "elsewhere/pipeline"}, "holds pictures of other pipeline"),
        ({"data": "scenes:test:2", "seed": 5}, "holds pictures of other seed, data"),
    ],
)
def test_pictures_of_another_run_are_refused(setting: GenerationSetting, changes: dict[str, Any], message: str) -> None:
    generation(setting)
    with pytest.raises(ConfigError, match=message):
        generation(dataclasses.replace(setting, **changes))


def test_what_cannot_be_judged_is_refused(setting: GenerationSetting, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least 2 pictures, whose features have a spread, got 1"):
        generation(dataclasses.replace(setting, data="scenes:test:1", pictures=str(tmp_path)))
    with pytest.raises(InputError, match="expected steps of at least 1, got 0"):
        generation(dataclasses.replace(setting, steps=0))
    with pytest.raises(InputError, match=r"expected layer .*, got 'first'"):
        generation(dataclasses.replace(setting, layer="first"))  # type: ignore[arg-type]


def test_the_command(setting: GenerationSetting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"pipeline", "checkpoint", "data", "pictures", "judge", "steps", "device"}
    words = [word for name in sorted(options) for word in (f"--{name}", str(getattr(setting, name)))]
    assert main(["study", "generation", *words, "--out", str(tmp_path), "--quiet"]) == 0
    assert "drawn from 256 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "generation.json").read_text())["settings"]["judge"] == "judge"
