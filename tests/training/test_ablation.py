"""The ablation: what each variant's score is, and that its command trains, resumes and records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finelip_fast import checkpoint, tokenize
from finelip_fast.config import FineLIPConfig
from finelip_fast.kernels import clim_scores
from finelip_fast.model import FineLIP
from finelip_fast.training import ablation
from finelip_fast.training.ablation import LOSSES, PARTS, AblatedFineLIP, Variant

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
    """A caption's score is that of its own tokens, whatever stands beside it in the batch."""
    raw = AblatedFineLIP(model, PARTS["CLIM only"])
    images = raw.encode_image(pixels)
    scores = raw.score(images, raw.encode_text(tokenize(CAPTIONS, 32)), alpha=0.0)
    patches = torch.nn.functional.normalize(model.visual(pixels), dim=-1)
    torch.testing.assert_close(images, patches)
    for column, caption in enumerate(CAPTIONS):
        ids = tokenize([caption], 32)
        last = int((ids != 0).sum()) - 1
        tokens = torch.nn.functional.normalize(model.text(ids), dim=-1)
        own = torch.cat([tokens[:, last : last + 1], tokens[:, :last]], dim=1)
        torch.testing.assert_close(scores[:, column], clim_scores(patches, own, alpha=0.0)[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_whole_model_is_the_model(model: FineLIP, pixels: torch.Tensor) -> None:
    whole, ids = AblatedFineLIP(model, PARTS["ATRM and CLIM"]), tokenize(CAPTIONS, 32)
    images, texts = whole.encode_image(pixels), whole.encode_text(ids)
    torch.testing.assert_close(images, model.encode_image(pixels))
    expected = clim_scores(model.encode_image(pixels), model.encode_text(ids), alpha=0.8)
    torch.testing.assert_close(whole.score(images, texts), expected, rtol=0, atol=1e-6)


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
def recipes(tmp_path: Path, model: FineLIP) -> list[str]:
    """A start and what follows it, in small."""
    shared = {
        "train": "scenes:train:64",
        "val": "scenes:val:4",
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
    return ["--recipe", str(tmp_path / "after.json"), "--start", str(tmp_path / "start.json"), "--quiet"]


def test_the_command_trains_once_and_records(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["neither", "CLIM only", "contrast", "triplet (the paper's)", "ATRM and CLIM"]
    command = [*recipes, "--variants", *names, "--seeds", "0", "1", "--data", "scenes:test:8"]
    command += ["--out", str(tmp_path / "studies")]
    assert ablation.main(command) == 0
    assert "CLIM only" in capsys.readouterr().out
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    # "contrast" and "ATRM and CLIM" are one variant.
    assert [path.parent.name for path in results] == [
        *("clim-only-0", "clim-only-1", "contrast-0", "contrast-1", "neither-0", "neither-1"),
        *("triplet-the-paper-s-0", "triplet-the-paper-s-1"),
    ]
    recorded = json.loads((tmp_path / "studies/ablation.json").read_text())
    assert "'triplet (the paper'\"'\"'s)'" in recorded["command"]
    parts, losses = recorded["tables"]
    assert [row["parts"] for row in parts["rows"]] == ["neither", "CLIM only", "ATRM and CLIM"]
    assert [row["losses"] for row in losses["rows"]] == ["global contrast", "triplet (the paper's)", "contrast"]
    assert losses["rows"][1]["error beside the triplet's"] == "1.00x"
    written = [path.stat().st_mtime_ns for path in results]
    assert ablation.main([*command, "--name", "again"]) == 0
    assert (tmp_path / "studies/again-losses.png").exists()
    assert [path.stat().st_mtime_ns for path in results] == written


def test_a_variant_has_its_own_learning_rates(recipes: list[str], tmp_path: Path) -> None:
    names = ["contrast on three scores", "contrast on three scores, grounding"]
    command = [*recipes, "--variants", *names, "--seeds", "0", "--data", "scenes:test:4", "--out", str(tmp_path)]
    assert ablation.main(command) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["tables"][0]["rows"]
    assert [row["learning rates"] for row in rows] == ["1x", "2x"]
    slow, fast = (json.loads((tmp_path / f"runs/{ablation._slug(name)}-0/config.json").read_text()) for name in names)
    assert fast["encoder_lr"] == 2 * slow["encoder_lr"]
    assert fast["aggregator_lr"] == 2 * slow["aggregator_lr"]


def test_a_group_that_compares_nothing_has_no_table(recipes: list[str], tmp_path: Path) -> None:
    for names, tables in (
        (["global contrast", "triplet (the paper's)"], ["losses"]),
        (["neither"], ["parts", "losses"]),
    ):
        command = [*recipes, "--variants", *names, "--seeds", "0", "--data", "scenes:test:4", "--out", str(tmp_path)]
        assert ablation.main(command) == 0
        recorded = json.loads((tmp_path / "ablation.json").read_text())
        assert [table["title"].partition(":")[0] for table in recorded["tables"]] == tables


def test_runs_of_other_options_are_refused(
    recipes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*recipes, "--variants", "neither", "--seeds", "0", "--out", str(tmp_path / "studies")]
    assert ablation.main([*command, "--data", "scenes:test:8"]) == 0
    assert ablation.main([*command, "--data", "scenes:test:4"]) == 2
    assert "holds a run of other options" in capsys.readouterr().err
