"""Validation pairs, and what the best checkpoint is chosen by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finelip_fast
from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.base import FileExamples
from finelip_fast.errors import TrainingError
from finelip_fast.metrics import recall
from finelip_fast.training.validation import mean_recall, validate


def test_pairs_whose_picture_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = finelip_fast.load(device="cpu")
    scenes = open_dataset("scenes:val:3", image_size=model.config.image_size)
    pairs = []
    for number, example in enumerate(scenes[index] for index in range(3)):
        example.image.save(tmp_path / f"{number}.png")
        pairs.append((tmp_path / f"{number}.png", example.caption))
    sound = FileExamples(pairs)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = FileExamples([pairs[0], (tmp_path / "broken.png", "a red house"), *pairs[1:]])
    metrics = validate(model, broken, name="mine")
    (message,) = caplog.messages
    assert message.startswith("skipped in validation: ")
    with torch.no_grad():
        images = model.encode_image(model.preprocess.batch(path for path, _ in pairs))
        texts = model.encode_text(finelip_fast.tokenize([caption for _, caption in pairs], model.config.context_length))
    assert metrics == {f"val_{name}": value for name, value in recall(model.score(images, texts)).items()}
    assert metrics == validate(model, sound, name="mine")
    with pytest.raises(TrainingError, match="none of the pictures of validation='mine' can be read"):
        validate(model, FileExamples([(tmp_path / "broken.png", "a red house")]), name="mine")


def test_the_mean_counts_both_directions_and_no_validation_is_the_worst() -> None:
    assert mean_recall({"val_i2t_recall@1": 0.25, "val_t2i_recall@1": 0.75, "val_i2t_recall@5": 1.0}) == 0.5
    assert mean_recall({}) < mean_recall({"val_i2t_recall@1": 0.0, "val_t2i_recall@1": 0.0})
