"""Features that frozen encoders compute once: training on them equals training without them, up to rounding."""

from __future__ import annotations

import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast import checkpoint
from finelip_fast.config import FineLIPConfig
from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.base import FileExamples
from finelip_fast.encoders import ImageEncoder, TextEncoder
from finelip_fast.errors import ConfigError, ImageError, TrainingError
from finelip_fast.frozen import FrozenImageEncoder, why_not
from finelip_fast.kernels import cpu
from finelip_fast.model import FineLIP
from finelip_fast.training import features as module
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.features import Features, compute
from finelip_fast.training.pairs import Encoded
from finelip_fast.training.train import train

CONFIG = FineLIPConfig(
    embed_dim=16,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    vision_heads=1,
    text_width=16,
    text_layers=1,
    text_heads=1,
)
COLOURS = ["red", "green", "blue", "black", "white"]


@pytest.fixture
def model() -> FineLIP:
    torch.manual_seed(0)
    return FineLIP(CONFIG)


@pytest.fixture
def pairs(tmp_path: Path) -> FileExamples:
    """Five pictures; the first three have two captions each, which are not adjacent."""
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
    captions = [
        *((number, f"a {colour} square") for number, colour in enumerate(COLOURS)),
        (0, "red"),
        (1, "green alone"),
        (2, "b"),
    ]
    return FileExamples([(tmp_path / f"{number}.png", caption) for number, caption in captions])


Configure = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split features into several parts of each kind."""
    monkeypatch.setattr(module, "_PICTURES", 2)
    monkeypatch.setattr(module, "_CAPTIONS", 3)


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def test_features_are_the_encoders(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    features = compute(model, pairs, tmp_path / "features")
    assert len(parts(tmp_path / "features")) == 3 + 3
    for index in range(len(pairs)):
        example = pairs[index]
        patches = model.visual(model.preprocess(example.image)[None])[0]
        tokens, lengths = model.text_tokens(finelip_fast.tokenize([example.caption]))
        assert (features.picture(index).dtype, len(features.caption(index))) == (torch.float16, int(lengths))
        torch.testing.assert_close(features.picture(index).float(), patches, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(features.caption(index).float(), tokens[0], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(why_not("int8") is not None, reason="needs int8 instructions")
def test_features_of_another_precision_are_near_and_others(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    exact, rounded = (compute(model, pairs, tmp_path / name, precision=name) for name in ("fp32", "int8"))
    torch.testing.assert_close(rounded.caption(0), exact.caption(0), rtol=0, atol=0.1)
    assert not rounded.caption(0).equal(exact.caption(0))
    with pytest.raises(ConfigError, match="holds features of other precision"):
        compute(model, pairs, tmp_path / "fp32", precision="int8")


def test_a_precision_that_the_processor_lacks_is_refused(
    model: FineLIP, pairs: FileExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has", lambda feature: False)
    with pytest.raises(ConfigError, match=r"another feature_precision than 'int8': .*; fp32 always works"):
        compute(model, pairs, tmp_path, precision="int8")


def test_a_picture_of_several_captions_is_encoded_once(
    model: FineLIP, pairs: FileExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    forward = FrozenImageEncoder.forward
    monkeypatch.setattr(
        FrozenImageEncoder, "forward", lambda self, pixels: counts.append(len(pixels)) or forward(self, pixels)
    )
    compute(model, pairs, tmp_path / "features")
    assert sum(counts) == len(COLOURS)


def test_progress_is_shown_or_not(
    model: FineLIP, pairs: FileExamples, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compute(model, pairs, tmp_path / "shown")
    assert "features" in capsys.readouterr().err
    compute(model, pairs, tmp_path / "hidden", progress=False)
    train(configure(features=str(tmp_path / "features"), steps=1), progress=False)
    assert capsys.readouterr().err == ""


def test_what_is_missing_is_computed_again_and_nothing_else(
    model: FineLIP, pairs: FileExamples, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    compute(model, pairs, folder)
    before = parts(folder)
    lost = ["captions-000002.safetensors", "pictures-000001.safetensors"]
    for name in lost:
        (folder / name).unlink()
    compute(model, pairs, folder)
    after = parts(folder)
    assert after.keys() == before.keys()
    assert [name for name in before if after[name] != before[name]] == lost


def test_a_folder_that_is_removed_and_computed_again_has_the_new_features(
    model: FineLIP, pairs: FileExamples, tmp_path: Path
) -> None:
    outdated = compute(model, pairs, tmp_path / "features")
    old_features = outdated.picture(0), outdated.caption(0)
    shutil.rmtree(tmp_path / "features")
    second_model = FineLIP(CONFIG)
    features, expected = (compute(second_model, pairs, tmp_path / name) for name in ("features", "elsewhere"))
    assert torch.equal(features.picture(0), expected.picture(0))
    assert torch.equal(features.caption(0), expected.caption(0))
    assert not torch.equal(features.picture(0), old_features[0])
    assert not torch.equal(features.caption(0), old_features[1])


def test_processes_share_the_work(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    compute(model, pairs, tmp_path / "features", rank=1, world=2)
    assert len(parts(tmp_path / "features")) == 3
    compute(model, pairs, tmp_path / "features", rank=0, world=2)
    assert len(parts(tmp_path / "features")) == 6


def test_features_of_anything_else_are_refused(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    compute(model, pairs, folder)
    with pytest.raises(ConfigError, match="holds features of other data: give another --features"):
        compute(model, FileExamples(pairs.pairs[:4]), folder)
    with pytest.raises(ConfigError, match="holds features of other encoders"):
        compute(FineLIP(CONFIG), pairs, folder)
    shorter = FineLIP(CONFIG.replace(context_length=16))
    with pytest.raises(ConfigError, match="other encoders and other context_length"):
        compute(shorter, pairs, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"quick_gelu": False},
        {"image_mean": (0.5, 0.5, 0.5)},
        {"image_std": (0.5, 0.5, 0.5)},
        {"resize_mode": "squash"},
        {"vision_heads": 2},
        {"text_heads": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_features_of_encoders_that_differ_but_in_weights_are_refused(
    model: FineLIP, pairs: FileExamples, tmp_path: Path, change: dict[str, Any]
) -> None:
    compute(model, pairs, tmp_path)
    changed = FineLIP(CONFIG.replace(**change))
    changed.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match="holds features of other encoders: give"):
        compute(changed, pairs, tmp_path)


def test_what_training_changes_does_not_change_the_features(
    model: FineLIP, pairs: FileExamples, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    compute(model, pairs, folder)
    before = parts(folder)
    model.config = model.config.replace(alpha=0.5)
    torch.nn.init.normal_(model.image_aggregator.scale)
    compute(model, pairs, folder)
    assert parts(folder) == before


def test_a_picture_that_changes_is_encoded_again(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    compute(model, pairs, folder)
    before = parts(folder)
    Image.new("RGB", (32, 32), "purple").save(tmp_path / "3.png")
    features = compute(model, pairs, folder)
    assert [name for name, time in parts(folder).items() if time != before[name]] == ["pictures-000001.safetensors"]
    assert torch.equal(features.picture(3), compute(model, pairs, tmp_path / "elsewhere").picture(3))


def test_a_disk_without_room_is_said_before_anything_is_computed(
    model: FineLIP, pairs: FileExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(
        ConfigError,
        match=r"expected .* MB of free space for features in .*, found 1 kB; pass --features",
    ):
        compute(model, pairs, tmp_path / "features")
    assert not parts(tmp_path / "features")


def test_what_float16_cannot_hold_is_refused(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    with torch.no_grad():
        model.visual.proj *= 1e6
    with pytest.raises(TrainingError, match="features of pictures-000000 are too large for float16"):
        compute(model, pairs, tmp_path / "features")


def test_a_cut_part_is_named(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    features = compute(model, pairs, tmp_path / "features")
    picture = features.picture(0).clone()
    path = tmp_path / "features" / "pictures-000000.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TrainingError, match=r"pictures-000000.*the same command computes them again"):
        features.picture(0)
    assert torch.equal(compute(model, pairs, tmp_path / "features").picture(0), picture)


def test_a_picture_that_cannot_be_read_counts_as_broken(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    (tmp_path / "3.png").write_bytes(b"none")
    data = Encoded(pairs, model.preprocess, 256, features=compute(model, pairs, tmp_path / "features"))
    encoding = data[3]
    assert encoding.pixels.shape == (17, 16)
    (message,) = encoding.broken
    assert "3.png" in message


def test_a_picture_that_was_not_readable_is_tried_again(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    folder, picture = tmp_path / "features", tmp_path / "3.png"
    expected = compute(model, pairs, tmp_path / "expected").picture(3)
    content = picture.read_bytes()
    picture.unlink()
    features, before = compute(model, pairs, folder), parts(folder)
    with pytest.raises(ImageError, match=r"3\.png"):
        features.picture(3)
    compute(model, pairs, folder)
    assert parts(folder) == before, "computed again in vain"
    picture.write_bytes(content)
    assert torch.equal(compute(model, pairs, folder).picture(3), expected)
    assert [name for name, time in parts(folder).items() if time != before[name]] == ["pictures-000001.safetensors"]


# Training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def configure(model: FineLIP, tmp_path: Path) -> Configure:
    torch.set_num_threads(1)
    checkpoint.save(model, tmp_path / "base")
    data = "scenes:val:24"

    def build(**changes: object) -> TrainConfig:
        options = {
            "out": str(tmp_path / "run"),
            "train": data,
            "validation": "scenes:val:12",
            "init": str(tmp_path / "base"),
            "unfreeze": "none",
            "batch_size": 8,
            "steps": 6,
            "warmup_steps": 0,
            "aggregator_lr": 3e-3,
            "precision": "fp32",
            "workers": 0,
            "log_every": 1,
            "eval_every": 3,
            "tensorboard": False,
            "device": "cpu",
        }
        return TrainConfig(**(options | changes))

    return build


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_training_on_features_is_one_without(configure: Configure, tmp_path: Path, accumulation_steps: int) -> None:
    results = {}
    for name, features in (("with", str(tmp_path / "features")), ("without", "")):
        options = {"features": features, "accumulation_steps": accumulation_steps}
        results[name] = train(configure(out=str(tmp_path / name), **options))
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-3)
    first, second = (checkpoint.load(tmp_path / name / "last").state_dict() for name in results)
    start = checkpoint.load(tmp_path / "base").state_dict()
    for name, value in start.items():
        is_frozen = name.startswith(("visual.", "text."))
        assert (torch.equal(first[name], value), torch.equal(second[name], value)) == (is_frozen, is_frozen), name
        assert (first[name] - second[name]).abs().max() < 2e-3, name
    assert results["with"].keys() == results["without"].keys()


def test_a_training_on_features_in_bfloat16_validates(configure: Configure, tmp_path: Path) -> None:
    config = configure(features=str(tmp_path / "features"), precision="bf16", stop_at=3)
    assert train(config)["val_t2i_recall@1"] > 0


def test_the_encoders_run_once(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(features=str(tmp_path / "features"), stop_at=3)
    train(config)
    for encoder in (ImageEncoder, TextEncoder):
        monkeypatch.setattr(encoder, "forward", lambda *_: pytest.fail("an encoder ran"))
    train(configure(features=str(tmp_path / "features")))
    assert len(losses(tmp_path / "run")) == 6


def test_a_run_on_features_goes_on_to_the_bit(configure: Configure, tmp_path: Path) -> None:
    features = str(tmp_path / "features")
    train(configure(features=features, out=str(tmp_path / "whole")))
    train(configure(features=features, stop_at=3))
    train(configure(features=features))
    uninterrupted, parted = (checkpoint.load(tmp_path / name / "last").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(uninterrupted[name], value) for name, value in parted.items())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_it_will_take_is_said_before(model: FineLIP, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        compute(model, open_dataset("scenes:val:4", image_size=32), tmp_path / "features")
    assert caplog.messages == [
        f"features of 4 pictures and 4 captions: 24.4 kB in {tmp_path / 'features'}, 24.4 kB of them to compute"
    ]


def test_a_folder_whose_name_is_not_utf8_holds_features(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    features, expected = compute(model, pairs, folder), compute(model, pairs, tmp_path / "features")
    assert torch.equal(features.picture(4), expected.picture(4))
    assert torch.equal(features.caption(4), expected.caption(4))
    before = parts(folder)
    compute(model, pairs, folder)
    assert parts(folder) == before


def test_features_go_to_other_processes(model: FineLIP, pairs: FileExamples, tmp_path: Path) -> None:
    import pickle

    features = compute(model, pairs, tmp_path / "features")
    again: Features = pickle.loads(pickle.dumps(features))
    assert torch.equal(again.picture(4), features.picture(4))
