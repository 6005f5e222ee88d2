"""The ablation: the score of each variant, and a command that trains, resumes and records."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from finelip_fast import checkpoint, tokenize
from finelip_fast.cli import main
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import ConfigError
from finelip_fast.kernels import clim_scores
from finelip_fast.model import FineLIP
from finelip_fast.studies.ablation import runs as ablation_runs
from finelip_fast.studies.ablation.record import record
from finelip_fast.studies.ablation.runs import Run, _stored, choose_alpha
from finelip_fast.studies.ablation.variants import ADDITIONS, LOSSES, PARTS, AblatedFineLIP, Arm, Variant
from finelip_fast.training.config import TrainConfig

TINY = FineLIPConfig(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    text_width=32,
    text_layers=1,
    text_heads=1,
    context_length=256,
)
CAPTIONS = ["a red door", "a house with a red door and a green roof", "a dog", "a red door"]


@pytest.fixture(scope="module")
def model() -> FineLIP:
    torch.manual_seed(0)
    return FineLIP(TINY).eval()


@pytest.fixture(scope="module")
def pixels(model: FineLIP) -> torch.Tensor:
    return torch.randn(3, 3, model.config.image_size, model.config.image_size)


@torch.no_grad()
def test_raw_tokens_are_scored_without_padding(model: FineLIP, pixels: torch.Tensor) -> None:
    """A caption's score depends only on its own tokens, not on its batch."""
    raw = AblatedFineLIP(model, PARTS["CLIM only"])
    images = raw.encode_image(pixels)
    scores = raw.score(images, raw.encode_text(tokenize(CAPTIONS, 32)), alpha=0.0)
    patches = torch.nn.functional.normalize(model.visual(pixels), dim=-1)
    torch.testing.assert_close(images, patches)
    for column, caption in enumerate(CAPTIONS):
        ids = tokenize([caption], 32)
        last = int((ids != 0).sum()) - 1
        tokens = torch.nn.functional.normalize(model.text(ids), dim=-1)
        end_first = torch.cat([tokens[:, last : last + 1], tokens[:, :last]], dim=1)
        torch.testing.assert_close(
            scores[:, column], clim_scores(patches, end_first, alpha=0.0)[:, 0], rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_the_whole_model_is_the_model(model: FineLIP, pixels: torch.Tensor) -> None:
    ablated, ids = AblatedFineLIP(model, PARTS["ATRM and CLIM"]), tokenize(CAPTIONS, 32)
    images, texts = ablated.encode_image(pixels), ablated.encode_text(ids)
    torch.testing.assert_close(images, model.encode_image(pixels))
    expected = clim_scores(model.encode_image(pixels), model.encode_text(ids), alpha=0.8)
    torch.testing.assert_close(ablated.score(images, texts), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pooled_tokens_are_one_unit_row(model: FineLIP, pixels: torch.Tensor) -> None:
    pooled = AblatedFineLIP(model, PARTS["ATRM only"])
    for rows in (pooled.encode_image(pixels), pooled.encode_text(tokenize(CAPTIONS, 32))):
        assert rows.shape[1] == 1
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:2]))
    assert pooled.alpha == 1.0  # nothing else to compare


def test_only_variants_with_a_fine_loss_are_scored_by_tokens() -> None:
    fine = {name for name, variant in {**PARTS, **LOSSES}.items() if variant.is_fine}
    assert fine == {*PARTS, *LOSSES} - {"neither", "ATRM only", "global contrast"}
    assert not Variant(("adaptive_margin:global:2",)).is_fine


@pytest.fixture
def recipes(tmp_path: Path, model: FineLIP, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small versions of the start's recipe and of the one that follows it."""
    monkeypatch.chdir(tmp_path)  # recipes write to the current folder
    shared = {
        "train": "scenes:train:64",
        "validation": "scenes:val:4",
        "batch_size": 4,
        "warmup_steps": 0,
        "freeze_positions": 0,
        "precision": "fp32",
        "workers": 0,
        "tensorboard": False,
        "device": "cpu",
    }
    checkpoint.save(model, tmp_path / "tiny")
    start, runs = tmp_path / "runs/start", tmp_path / "runs"
    first = {**shared, "out": str(start), "init": str(tmp_path / "tiny"), "loss": ["contrastive:global"], "steps": 2}
    after = {**shared, "out": str(runs), "init": f"{start}/last", "steps": 2}
    for name, values in (("start", first), ("after", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    files = ["--recipe", str(tmp_path / "after.json"), "--start", str(tmp_path / "start.json")]
    return [*files, "--validation", "scenes:val:4", "--quiet"]


def test_the_command_trains_once_and_records(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["neither", "CLIM only", "contrast", "triplet (the paper's)", "ATRM and CLIM"]
    command = [*recipes, "--variants", *names, "--seeds", "0", "1", "--data", "scenes:test:8"]
    command += ["--out", str(tmp_path / "studies")]
    assert main(["study", "ablation", *command]) == 0
    printed = capsys.readouterr()
    assert "CLIM only" in printed.out
    assert all(
        line.endswith((".json", ".md", ".png")) for line in printed.err.splitlines()
    )  # no progress bar, including the start's training
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    # "contrast" and "ATRM and CLIM" are the same variant.
    assert [path.parent.name for path in results] == [
        f"{name}-1x-{seed}" for name in ("clim-only", "contrast", "neither", "triplet-the-paper-s") for seed in (0, 1)
    ]
    recorded = json.loads((tmp_path / "studies/ablation.json").read_text())
    assert "'triplet (the paper'\"'\"'s)'" in recorded["command"]
    parts, losses = recorded["tables"]
    assert [row["parts"] for row in parts["rows"]] == ["neither", "CLIM only", "ATRM and CLIM"]
    assert [row["losses"] for row in losses["rows"]] == ["global contrast", "triplet (the paper's)", "contrast"]
    assert losses["rows"][1]["error beside the triplet's"] == "1.00x"
    times = [path.stat().st_mtime_ns for path in results]
    assert main(["study", "ablation", *command, "--name", "again"]) == 0
    assert (tmp_path / "studies/again-losses.png").exists()
    assert [path.stat().st_mtime_ns for path in results] == times


def test_what_is_added_to_the_loss_and_the_captions_is_trained_with(
    recipes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finelip_fast.studies.ablation.runs.ProcessPoolExecutor", AtOnce)
    command = [*recipes, "--variants", *ADDITIONS, "--seeds", "0", "--rates", "1", "--data", "scenes:test:8"]
    assert main(["study", "ablation", *command, "--out", str(tmp_path / "studies")]) == 0
    (additions,) = json.loads((tmp_path / "studies/ablation.json").read_text())["tables"]
    assert [row["additions"] for row in additions["rows"]] == list(ADDITIONS)
    runs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/config.json")}
    settings = {name: (run["contextual"], run["gamma"], len(run["augment"])) for name, run in runs.items()}
    assert settings == {
        "start": (0.0, 0.5, 0),
        "nothing-added-1x-0": (0.0, 0.5, 0),
        "contextual-alignment-1x-0": (0.5, 0.5, 0),
        "margins-of-0-25-1x-0": (0.0, 0.25, 0),
        "augmented-captions-1x-0": (0.0, 0.5, 4),
    }


class AtOnce:
    """An executor without processes."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_the_rate_of_each_variant_is_chosen_on_validation_pairs(
    recipes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed chooses the rate; the others and the reported figures follow, and nothing is trained twice."""
    names = ["neither", "triplet (the paper's)"]
    command = [*recipes, "--variants", *names, "--rates", "0.5", "2", "4", "--validation", "scenes:val:4"]
    command += ["--seeds", "1", "0", "--data", "scenes:test:8", "--out", str(tmp_path / "studies")]
    best = {PARTS["neither"]: 2.0, LOSSES["triplet (the paper's)"]: 0.5}

    def run_one(config: TrainConfig, variant: Variant, data: list[str]) -> Run:
        run = real_run_one(config, variant, data)
        won = config.encoder_lr == best[variant] * TrainConfig.encoder_lr
        return Run(run.commit, {pairs: {"1": dict.fromkeys(run.measured[pairs]["1"], float(won))} for pairs in data})

    real_run_one = ablation_runs.run_one
    monkeypatch.setattr(ablation_runs, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(ablation_runs, "run_one", run_one)
    assert main(["study", "ablation", *command]) == 0
    folders = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")}
    assert set(folders) == {
        *("neither-0.5x-1", "neither-2x-1", "neither-4x-1", "neither-2x-0"),
        *(f"triplet-the-paper-s-{rate}x-1" for rate in ("0.5", "2", "4")),
        "triplet-the-paper-s-0.5x-0",
    }
    assert set(folders["neither-2x-1"]["measured"]) == {"scenes:val:4", "scenes:test:8"}
    assert set(folders["neither-4x-1"]["measured"]) == {"scenes:val:4"}
    assert set(folders["neither-2x-0"]["measured"]) == {"scenes:val:4", "scenes:test:8"}
    assert folders["neither-4x-1"]["config"]["encoder_lr"] == 4 * TrainConfig.encoder_lr
    assert folders["neither-4x-1"]["config"]["aggregator_lr"] == 4 * TrainConfig.aggregator_lr
    recorded = json.loads((tmp_path / "studies/ablation.json").read_text())
    losses, rates = (table["rows"] for table in recorded["tables"])
    assert [(row["losses"], row["learning rates"]) for row in losses] == [("global contrast", "2x"), (names[1], "0.5x")]
    assert rates == [
        {"variant": "neither", "0.5x": "0.0", "2x": "100.0", "4x": "0.0"},
        {"variant": "triplet (the paper's)", "0.5x": "100.0", "2x": "0.0", "4x": "0.0"},
    ]
    assert recorded["settings"]["trained at commit"].startswith(folders["neither-2x-1"]["commit"][:10])


def measures(**recalls: float) -> dict[str, dict[str, float]]:
    """Return a run's metrics by weight: ``_0_8=0.5`` sets recall@1 and mrr to 0.5 both ways at a weight of 0.8."""
    names = [f"{way}_{name}" for way in ("i2t", "t2i") for name in ("recall@1", "mrr")]
    return {weight.strip("_").replace("_", "."): dict.fromkeys(names, value) for weight, value in recalls.items()}


def test_the_weight_of_an_arm_is_that_of_the_best_mean_over_its_runs() -> None:
    runs = [measures(_0=0.5, _0_8=0.6, _1=0.4), measures(_0=0.9, _0_8=0.7, _1=0.4)]
    assert choose_alpha(runs) == "0"
    runs[1]["0"] = measures(_0=0.8)["0"]
    runs[0]["0.8"]["i2t_mrr"] = 0.9  # equal recall, so reciprocal rank decides
    assert choose_alpha(runs) == "0.8"
    assert choose_alpha([measures(_1=0.3)]) == "1"


def test_errors_are_compared_at_the_papers_weight_and_at_chosen_ones() -> None:
    """Each loss uses the weight chosen on validation pairs, not the best one on the reported pairs."""
    measured = {
        "global contrast": (measures(_1=0.2), measures(_1=0.2)),
        "triplet (the paper's)": (measures(_0=0.9, _0_8=0.1, _1=0.1), measures(_0=0.6, _0_8=0.5, _1=0.3)),
        "contrast": (measures(_0=0.3, _0_8=0.9, _1=0.1), measures(_0=0.9, _0_8=0.7, _1=0.3)),
    }
    runs = {
        Arm(LOSSES[name], 1.0): [Run("0" * 10, {"val": val, "test": test})] for name, (val, test) in measured.items()
    }
    result = record(runs, {}, data="test", validation="val", name="ablation")
    rows = result.tables[-1].rows
    column, error = "at chosen alpha (%)", "error beside the triplet's"
    assert [(row["chosen alpha"], row["fine alone (%)"], row[column]) for row in rows] == [
        *(("", "", "20.0"), ("0", "60.0", "60.0"), ("0.8", "90.0", "70.0"))
    ]
    assert [row[error] for row in rows] == ["1.60x", "1.00x", "0.60x"]
    assert [row[f"{error}, at chosen alphas"] for row in rows] == ["2.00x", "1.00x", "0.75x"]
    assert {series.label: series.y for series in result.plots[-1].series} == {
        "alpha 0.8": pytest.approx([20, 50, 70]),
        "chosen alpha": pytest.approx([20, 60, 70]),
    }


def test_nothing_is_chosen_on_the_pairs_that_are_measured(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*recipes, "--variants", "neither", "--out", str(tmp_path / "studies")]
    assert main(["study", "ablation", *command, "--validation", "scenes:test:4", "--data", "scenes:test:4"]) == 2
    assert "other pairs than those measured" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()  # refused before any training


def test_a_group_that_compares_nothing_has_no_table(recipes: list[str], tmp_path: Path) -> None:
    for names, tables in (
        (["global contrast", "triplet (the paper's)"], ["losses"]),
        (["neither"], ["parts", "losses"]),
    ):
        command = [*recipes, "--variants", *names, "--seeds", "0", "--data", "scenes:test:4", "--out", str(tmp_path)]
        assert main(["study", "ablation", *command]) == 0
        recorded = json.loads((tmp_path / "ablation.json").read_text())
        assert [table["title"].partition(":")[0] for table in recorded["tables"]] == tables


def test_a_finished_run_is_measured_on_other_pairs_without_training(recipes: list[str], tmp_path: Path) -> None:
    command = [*recipes, "--variants", "neither", "--seeds", "0", "--out", str(tmp_path / "studies")]
    weights = tmp_path / "runs/neither-1x-0/state.pt"
    assert main(["study", "ablation", *command, "--data", "scenes:test:8"]) == 0
    trained = weights.stat().st_mtime_ns
    assert main(["study", "ablation", *command, "--data", "scenes:test:4"]) == 0
    assert weights.stat().st_mtime_ns == trained
    result = json.loads((tmp_path / "runs/neither-1x-0/result.json").read_text())
    assert set(result["measured"]) == {"scenes:val:4", "scenes:test:8", "scenes:test:4"}


@pytest.mark.parametrize("option", ["--steps", "--jobs"])
def test_zero_steps_and_zero_jobs_are_refused(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert main(["study", "ablation", *recipes, option, "0", "--out", str(tmp_path / "studies")]) == 2
    assert f"expected {option} of at least 1, got 0" in capsys.readouterr().err


def test_runs_of_other_options_are_refused(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*recipes, "--variants", "neither", "--seeds", "0", "--data", "scenes:test:4"]
    command += ["--out", str(tmp_path / "studies")]
    assert main(["study", "ablation", *command]) == 0
    assert main(["study", "ablation", *command, "--steps", "3"]) == 2
    advice = re.search(
        r"(\S+) holds a run with other options; pass another --runs, or delete that folder", capsys.readouterr().err
    )
    assert advice
    shutil.rmtree(advice[1])
    assert main(["study", "ablation", *command, "--steps", "3"]) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": []},
        {"measured": {"scenes:test:4": {}}},
        {"measured": {"scenes:test:4": {"1": {"i2t_mrr": 1}}}},
        {"dirty": None},
        {"config": 5},
        {"commit": 3},
    ],
    ids=str,
)
def test_a_damaged_result_of_a_run_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "result.json"
    sound = {
        "variant": {},
        "config": {},
        "commit": None,
        "dirty": False,
        "measured": {"scenes:test:4": measures(_1=0.5)},
    }
    path.write_text(json.dumps(sound))
    assert _stored(path) == sound
    path.write_text(json.dumps(sound | changes))
    with pytest.raises(ConfigError, match=r"result\.json: expected a run's result .*; delete that folder"):
        _stored(path)
