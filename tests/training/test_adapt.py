"""Two stages turn a plain CLIP into a FineLIP: announced, resumed, and the better result kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finelip_fast import checkpoint
from finelip_fast.checkpoint import architecture
from finelip_fast.cli import main
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import ConfigError, TrainingError
from finelip_fast.model import FineLIP
from finelip_fast.training import adapt as module
from finelip_fast.training.adapt import adapt, stages
from finelip_fast.training.start import load_base
from finelip_fast.training.train import Trainer

CLIP = FineLIPConfig(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    context_length=77,
    trained_aggregators=False,
)
Adapt = Callable[..., dict[str, Any]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    checkpoint.save(FineLIP(CLIP), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Adapt:
    torch.set_num_threads(1)

    def run(*, base: str = str(base), **changes: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "out": str(tmp_path / "model"),
            "train": "scenes:train:32",
            "validation": "scenes:val:12",
            "batch_size": 8,
            "steps": 4,
            "encoder_steps": 2,
            "workers": 0,
            "tensorboard": False,
            "device": "cpu",
        }
        return adapt(base, progress=False, **(options | changes))

    return run


def logged_steps(folder: Path) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "val_alpha" in line]


def test_the_better_stage_is_the_checkpoint(run: Adapt, base: Path, tmp_path: Path) -> None:
    result = run()
    model = checkpoint.load(tmp_path / "model")
    stage = result["chosen"]
    assert (model.config.trained_aggregators, model.config.context_length, model.alpha) == (True, 256, result["alpha"])
    assert result[f"{stage}_recall@1"] == max(result["aggregators_recall@1"], result["encoders_recall@1"])
    best = checkpoint.load(tmp_path / "model" / stage / "best").state_dict()
    assert all(value.equal(best[name]) for name, value in model.state_dict().items())
    metadata = json.loads((tmp_path / "model" / "config.json").read_text())["metadata"]
    assert (metadata["base"], metadata["stage"]) == ("base", stage)


def test_the_first_stage_trains_the_aggregators_and_the_second_the_last_blocks(
    run: Adapt, base: Path, tmp_path: Path
) -> None:
    run(unfreeze="last:1", encoder_lr=1e-3)
    start = load_base(str(base), 256).state_dict()
    for stage, changed in (("aggregators", ()), ("encoders", ("resblocks.1.",))):
        weights = checkpoint.load(tmp_path / "model" / stage / "last").state_dict()
        assert not weights["image_aggregator.logits.weight"].equal(start["image_aggregator.logits.weight"])
        for name in start:
            if "resblocks" in name:
                assert weights[name].equal(start[name]) != any(part in name for part in changed), name


def test_without_a_second_stage(run: Adapt, tmp_path: Path) -> None:
    result = run(unfreeze="none", encoder_steps=None)
    assert (result["chosen"], "encoders_recall@1" in result) == ("aggregators", False)
    assert not (tmp_path / "model" / "encoders").exists()


def test_names_that_are_not_utf8_are_those_of_a_base_and_of_a_result(
    base: Path, run: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (architecture.VISION_HEADS, architecture.TEXT_HEADS):
        monkeypatch.setitem(table, 32, 2)
    weights = load_base(str(base), 77).state_dict()
    clip = {name.removeprefix("text."): value for name, value in weights.items() if "aggregator" not in name}
    file = tmp_path / "caf\udce9.pt"
    torch.save({**clip, "positional_embedding_res": clip["positional_embedding"]}, file)  # Long-CLIP's layout
    out = tmp_path / "\udce9"
    run(base=str(file), out=str(out), unfreeze="none", encoder_steps=None, steps=1)
    metadata = json.loads((out / "config.json").read_text())["metadata"]
    assert metadata["base"] == r"caf\udce9.pt"


def test_the_same_command_goes_on(run: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = Trainer._train_step, 0

    def stop_in_the_second_stage(trainer: Trainer, batches: Any) -> Any:
        nonlocal count
        count += 1
        trainer._stop = count == 5
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "_train_step", stop_in_the_second_stage)
    with pytest.raises(TrainingError, match="stopped at step 1; the same command resumes from there"):
        run()
    assert not (tmp_path / "model" / "config.json").exists()
    interrupted = run()
    assert count == 6
    assert run() == interrupted
    assert count == 6
    assert [logged_steps(tmp_path / "model" / stage) for stage in ("aggregators", "encoders")] == [[4], [2]]
    straight = run(out=str(tmp_path / "straight"))
    weights = (checkpoint.load(tmp_path / name).state_dict() for name in ("model", "straight"))
    assert all(a.equal(b) for a, b in zip(*(part.values() for part in weights), strict=True))
    assert straight["encoders_recall@1"] == interrupted["encoders_recall@1"]


def test_what_it_takes_is_told_before(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"train": "scenes:train:32", "validation": "scenes:val:12", "steps": 2, "encoder_steps": 1}
    quick = {"batch_size": 8, "workers": 0, "tensorboard": False, "device": "cpu"}
    adapt(str(base), out=str(tmp_path / "model"), **options, **quick)
    forecast = capsys.readouterr().err
    assert re.search(r"features: \d\S* .?B in \S+/features/train, about \d\S* m?s", forecast)
    assert re.search(r"aggregators: 2 steps, about [\d.]+ m?s\s+encoders: 1 steps, about [\d.]+ m?s", forecast)
    adapt(str(base), out=str(tmp_path / "model"), **options, **quick)
    assert "about" not in capsys.readouterr().err


def test_options_go_where_they_belong() -> None:
    options = {"out": "m", "train": "scenes:train:64", "validation": "scenes:val:8", "tensorboard": False}
    first, second = stages("clip", **options, steps=7, encoder_steps=3, augment=["typos:0.1"], aggregator_lr=0.01)
    assert (first.steps, first.augment, first.unfreeze, first.init) == (7, (), "none", "clip")
    assert (second.steps, second.augment, second.unfreeze) == (3, ("typos:0.1",), "last:2")
    assert (first.aggregator_lr, second.aggregator_lr) == (0.01, module._SECOND_SHARE * 0.01)
    assert second.init == str(Path("m") / "aggregators" / "best")
    (alone,) = stages("clip", **options, features="elsewhere", unfreeze="none")
    assert alone.features == "elsewhere"
    with pytest.raises(ConfigError, match="expected no encoder_lr, encoder_steps with unfreeze none"):
        stages("clip", **options, unfreeze="none", encoder_steps=3, encoder_lr=1e-5)


def test_the_command_has_options_of_both_stages(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "adapt", lambda base, **options: calls.append({"base": base, **options}) or {})
    words = "--out m --train scenes:train:64 --validation scenes:val:8 --contextual 0.5 --augment typos:0.1 --steps 3 --quiet"
    assert main(["adapt", str(base), *words.split()]) == 0
    assert calls == [
        {
            "base": str(base),
            "progress": False,
            "out": "m",
            "train": "scenes:train:64",
            "validation": "scenes:val:8",
            "contextual": 0.5,
            "augment": ("typos:0.1",),
            "steps": 3,
            "unfreeze": "last:2",
        }
    ]
    assert main(["adapt", str(base), "--out", "m"]) == 2
    assert "Missing options --train and --validation." in capsys.readouterr().err


def test_the_defaults_are_those_that_the_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    options = stages("clip", out="m", train="scenes:train:64", validation="scenes:val:8", tensorboard=False)
    for name, value in {
        "--steps": options[0].steps,
        "--encoder-steps": options[1].steps,
        "--aggregator-lr": options[0].aggregator_lr,
        "--encoder-lr": options[1].encoder_lr,
        "--unfreeze": options[1].unfreeze,
    }.items():
        assert re.search(rf" {name} (?:(?! --).)*\[default: {value}\]", text), name


def test_several_processes_are_refused(run: Adapt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"run its two trainings with training/train\.py"):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unfreeze": "none", "augment": ["typos:0.1"]}, "expected no augment with unfreeze none"),
        ({"unfreeze": "some"}, "expected unfreeze all, none or last:N, got 'some'"),
        ({"loss": ["contrastive:global"]}, "expected a loss with a term on fine or combined"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    data = {"out": "m", "train": "scenes:train:64", "validation": "scenes:val:8", "tensorboard": False}
    with pytest.raises(ConfigError, match=re.escape(message)):
        stages("clip", **{**data, **options})
