"""Validation pairs, and the criterion for the best checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import finelip_fast
from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.base import FileExamples
from finelip_fast.engines import open_engine
from finelip_fast.errors import TrainingError
from finelip_fast.evaluation import evaluate
from finelip_fast.metrics import WAYS
from finelip_fast.training import validation
from finelip_fast.training.features import compute
from finelip_fast.training.validation import mean_recall, validate

PICTURES = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Scenes as files, each with two captions that are not adjacent."""
    folder = tmp_path_factory.mktemp("pictures")
    size = finelip_fast.load(device="cpu").config.image_size
    pairs = []
    for variant in ("clean", "plain"):
        scenes = open_dataset(f"scenes:val:{PICTURES}:{variant}", image_size=size)
        for number, example in enumerate(scenes[index] for index in range(PICTURES)):
            example.image.save(folder / f"{number}.png")
            pairs.append((folder / f"{number}.png", example.caption))
    return pairs


def evaluated(pairs: FileExamples) -> dict[str, float]:
    """Return what ``finelip eval`` measures with the combined score."""
    engine = open_engine("torch", None, "cpu")
    result = evaluate(engine, pairs, progress=False)
    (combined,) = (row.metrics for row in result.rows if row.score == "combined")
    return {"val_alpha": engine.alpha, **{f"val_{name}": value for name, value in combined.items() if "recall" in name}}


def test_recall_is_what_an_evaluation_of_several_captions_a_picture_measures(pairs: list[tuple[Path, str]]) -> None:
    data = FileExamples(pairs)
    metrics = validate(finelip_fast.load(device="cpu"), data, name="mine")
    assert metrics == evaluated(data)
    assert metrics["val_i2t_recall@1"] > 0.5


def test_features_take_the_encoders_place(pairs: list[tuple[Path, str]], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    data = FileExamples([(tmp_path / "broken.png", "a tree"), *pairs])
    model = finelip_fast.load(device="cpu")
    features = compute(model, data, tmp_path / "features")
    model.visual = model.text = None
    assert validate(model, data, name="mine", features=features) == evaluated(FileExamples(pairs))


def test_pictures_that_cannot_be_read_are_left_out_with_their_captions(
    pairs: list[tuple[Path, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = [(tmp_path / "broken.png", caption) for caption in ("a red house", "a tree")]
    model = finelip_fast.load(device="cpu")
    metrics = validate(model, FileExamples([pairs[0], broken[0], *pairs[1:], broken[1]]), name="mine")
    (message,) = caplog.messages
    assert message.startswith("skipped in validation: ")
    assert metrics == evaluated(FileExamples(pairs))
    expected = "none of the 1 pictures of validation='mine' can be read; .* pass --root"
    with pytest.raises(TrainingError, match=expected):
        validate(model, FileExamples(broken), name="mine")


def test_alpha_is_that_of_the_best_recall_then_of_the_best_mrr_then_the_first(
    pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recalls, ranks = {0.0: 0.5, 0.3: 0.7, 0.6: 0.7, 0.9: 0.7}, {0.0: 1.0, 0.3: 0.7, 0.6: 0.8, 0.9: 0.8}
    monkeypatch.setattr(validation, "tiled_ranks", lambda images, texts, picture_of, alphas: alphas)
    monkeypatch.setattr(
        validation,
        "pair_summary",
        lambda alpha: {
            f"{way}_{name}": of[alpha] for way in WAYS for name, of in (("recall@1", recalls), ("mrr", ranks))
        },
    )
    model = finelip_fast.load(device="cpu")
    metrics = validate(model, FileExamples(pairs), name="mine", alphas=tuple(recalls))
    assert metrics == {"val_alpha": 0.6, "val_i2t_recall@1": 0.7, "val_t2i_recall@1": 0.7}
    model.config = model.config.replace(trained_aggregators=False)
    monkeypatch.setitem(recalls, 1.0, 0.1)
    monkeypatch.setitem(ranks, 1.0, 0.1)
    assert validate(model, FileExamples(pairs), name="mine", alphas=(0.0, 0.3))["val_alpha"] == 1.0


def test_the_mean_counts_both_directions_and_no_validation_is_the_worst() -> None:
    assert mean_recall({"val_i2t_recall@1": 0.25, "val_t2i_recall@1": 0.75, "val_i2t_recall@5": 1.0}) == 0.5
    assert mean_recall({}) < mean_recall({"val_i2t_recall@1": 0.0, "val_t2i_recall@1": 0.0})
