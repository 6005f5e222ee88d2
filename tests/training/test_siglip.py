"""FineLIP trained from a SigLIP: as a whole, or only its aggregators on features of frozen encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import finelip_fast
from finelip_fast.tokenizer import encode_batch, expected_truncation
from finelip_fast.training.adapt import adapt
from finelip_fast.training.batch import encode_example
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.train import Trainer, train

CONTEXT = 24
pytestmark = pytest.mark.filterwarnings("ignore::finelip_fast.errors.TruncationWarning")
OPTIONS: dict[str, Any] = {
    "context_length": CONTEXT,
    "loss": ["contrastive:global", "contrastive:fine"],
    "batch_size": 4,
    "steps": 2,
    "encoder_lr": 1e-3,
    "aggregator_lr": 1e-3,
    "warmup_steps": 0,
    "precision": "fp32",
    "workers": 0,
    "tensorboard": False,
    "threads": 1,
    "device": "cpu",
    "train": "scenes:train:8",
    "validation": "scenes:val:4",
}


@pytest.fixture
def configure(open_clip_siglip: Any, tmp_path: Path) -> Any:
    def build(**changes: Any) -> TrainConfig:
        places = {"init": str(open_clip_siglip.folder), "out": str(tmp_path / "run")}
        return TrainConfig(**(OPTIONS | places | changes))

    return build


def load(folder: Path) -> finelip_fast.FineLIP:
    return finelip_fast.load(folder)


def test_a_run_trains_all_of_it_and_keeps_its_tokenizer(configure: Any, open_clip_siglip: Any) -> None:
    config = configure(ema_decay=0.5)
    train(config, progress=False)
    model = load(Path(config.out) / "last")
    assert (model.config.family, model.config.context_length, model.config.trained_aggregators) == (
        "siglip",
        CONTEXT,
        True,
    )
    assert model.config.logit_bias is None
    assert model.tokenizer.content == (open_clip_siglip.folder / "tokenizer.json").read_bytes()
    with pytest.warns(finelip_fast.UntrainedAggregatorsWarning):
        start = finelip_fast.load(open_clip_siglip.folder)
    unchanged = [name for name, value in start.state_dict().items() if torch.equal(value, model.state_dict()[name])]
    # Softmax is invariant to a shift of all logits; words that occur in no caption are not trained, others are.
    assert set(unchanged) <= {"visual.attn_pool.kv.bias", "image_aggregator.norm.bias", "text_aggregator.norm.bias"}


def test_all_text_positions_are_trained(configure: Any) -> None:
    trainer = Trainer(configure(freeze_positions=20), torch.device("cpu"))
    before = trainer.model.text.positional_embedding.detach().clone()
    trainer._train_step([next(iter(trainer.data))])
    assert (trainer.model.text.positional_embedding != before).any(dim=1).all()


def test_gradient_checkpointing_gives_the_same_step(configure: Any) -> None:
    weights = []
    for checkpointing in (False, True):
        trainer = Trainer(configure(gradient_checkpointing=checkpointing), torch.device("cpu"))
        trainer._train_step([next(iter(trainer.data))])
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=0, msg=name)


def test_the_last_blocks_are_trained_with_what_stands_behind_them(configure: Any) -> None:
    model = Trainer(configure(unfreeze="last:1"), torch.device("cpu")).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"visual.attn_pool.latent", "visual.ln_post.weight", "text.text_projection.weight"} <= trained
    assert "visual.conv1.weight" not in trained
    assert not {name for name in trained if "resblocks.0." in name}


def test_a_run_on_features_is_one_without(configure: Any, tmp_path: Path) -> None:
    losses = []
    for name, features in (("plain", ""), ("features", str(tmp_path / "features"))):
        config = configure(unfreeze="none", out=str(tmp_path / name), features=features, steps=4, log_every=1)
        train(config, progress=False)
        lines = map(json.loads, (Path(config.out) / "log.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_gradients_reach_the_table_through_long_captions(configure: Any) -> None:
    model = Trainer(configure(), torch.device("cpu")).model
    with expected_truncation():
        ids = encode_batch(["the red car " * 20], CONTEXT, tokenizer=model.tokenizer).ids
    model.encode_text(ids)[0, 0, 0].backward()
    assert (model.text.positional_embedding.grad != 0).any(dim=1).all()


def test_phrases_are_found_among_its_own_tokens(configure: Any) -> None:
    trainer = Trainer(configure(), torch.device("cpu"))
    example = trainer._open("scenes:train:1")[0]
    encoding = encode_example(example, trainer.preprocess, 2048, trainer.model.tokenizer)
    assert len(encoding.spans) == len(example.regions)
    for (first, last), region in zip(encoding.spans.tolist(), example.regions, strict=True):
        phrase = trainer.model.tokenizer.tokens(example.caption[region.start : region.end])
        text = trainer.model.tokenizer.parsed.decode(encoding.ids[first:last].tolist())
        assert len(phrase) - 1 <= last - first <= len(phrase) + 1
        assert text.split()[-1] == trainer.model.tokenizer.parsed.decode(phrase).split()[-1]


def test_two_stages_make_a_finelip_of_it(open_clip_siglip: Any, tmp_path: Path) -> None:
    options = {
        name: OPTIONS[name]
        for name in ("train", "validation", "batch_size", "steps", "workers", "tensorboard", "device")
    }
    result = adapt(
        str(open_clip_siglip.folder), out=str(tmp_path / "model"), encoder_steps=2, progress=False, **options
    )
    model = load(tmp_path / "model")
    assert (model.config.family, model.config.context_length, model.alpha) == ("siglip", 256, result["alpha"])
    assert model.tokenizer.content == (open_clip_siglip.folder / "tokenizer.json").read_bytes()
