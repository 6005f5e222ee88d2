"""Checkpoints by name: on the hub, in open_clip's list, and unknown names."""

from __future__ import annotations

import re

import huggingface_hub
import open_clip
import pytest
import torch

from finelip_fast.checkpoint import load, save
from finelip_fast.errors import CheckpointError

from .files import assert_hub_config, assert_same_towers, assert_same_weights, load_untrained, write_hub_folder


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize(("kind", "resize_mode"), [("open_clip", "squash"), ("transformers", "shortest")])
def test_hub_names(prefix, kind, resize_mode, hub, clip_state, model):
    remote, _ = hub
    write_hub_folder(kind, clip_state, remote / "org/clip-model")
    loaded = load_untrained(prefix + "org/clip-model")
    assert_hub_config(loaded.config, resize_mode)
    assert_same_towers(loaded, model)


def test_our_format_on_the_hub_comes_without_anything_else(hub, model):
    remote, calls = hub
    save(model, remote / "org/ours")
    (remote / "org/ours/pytorch_model.bin").write_bytes(b"large")
    assert_same_weights(load("org/ours"), model)
    assert [patterns for _, patterns in calls] == [
        ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json"),
        ("model.safetensors",),
    ]


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_hub_repository_of_one_file(hub, longclip_state, known_widths, model, prefix):
    remote, calls = hub
    (remote / "org/LongCLIP-B").mkdir(parents=True)
    torch.save(longclip_state, remote / "org/LongCLIP-B/longclip-B.pt")
    (remote / "org/LongCLIP-B/README.md").touch()
    assert_same_towers(load_untrained(f"{prefix}org/LongCLIP-B"), model)
    assert [patterns for _, patterns in calls][1:] == [("longclip-B.pt",)]


def test_a_hub_repository_of_several_files(hub, longclip_state, known_widths, model):
    remote, calls = hub
    (remote / "org/many").mkdir(parents=True)
    for name in ("a@336px.pt", "b.safetensors"):
        torch.save(longclip_state, remote / "org/many" / name)
    with pytest.raises(
        CheckpointError, match=r"a single file of weights, found a@336px\.pt, b\.safetensors; choose a file"
    ) as caught:
        load("org/many")
    assert len(calls) == 1  # only the configurations, no weights
    assert_same_towers(load_untrained(str(caught.value).rpartition(" ")[2]), model)
    with pytest.raises(CheckpointError, match="no such file on"):
        load("hf-hub:org/many/c.pt")


def test_a_file_that_came_before_is_read_without_a_network(hub, longclip_state, known_widths, model, monkeypatch):
    remote, _ = hub
    (remote / "org/one").mkdir(parents=True)
    torch.save(longclip_state, remote / "org/one/x.pt")
    load_untrained("org/one")

    def unreachable(repository):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    assert_same_towers(load_untrained("org/one"), model)
    (remote / "org/other").mkdir()
    with pytest.raises(CheckpointError, match=r"the list of files of huggingface\.co/org/other: ConnectionError"):
        load("org/other")


def test_hub_failures(hub):
    remote, _ = hub
    with pytest.raises(
        CheckpointError, match=r"nobody/none: .*tried config\.json.*huggingface\.co/nobody/none: OSError: 404"
    ):
        load("nobody/none")
    (remote / "org/data").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="found nothing"):
        load("org/data")


@pytest.mark.parametrize(
    "name", ["missing", "./missing/folder", "missing/clip.pt", "hf-hub:clip", "/no/such/model.safetensors"]
)
def test_missing_paths_touch_no_network(name, hub):
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: no such file or folder.*open_clip:MODEL/WEIGHTS"):
        load(name)
    assert hub[1] == []


def test_open_clip_names(tiny_open_clip, clip_state, model, tmp_path, monkeypatch):
    torch.save(clip_state, tmp_path / "clip.bin")
    tag = {"hf_hub": "org/tiny/", "mean": (0.5,) * 3, "std": (0.2,) * 3, "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, pretrained: tag if pretrained == "web" else {})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "clip.bin") if cfg is tag else "")
    loaded = load_untrained(f"open_clip:{tiny_open_clip}/web")
    assert_hub_config(loaded.config, "squash")
    assert_same_towers(loaded, model)
    from_file = load_untrained(f"open_clip:{tiny_open_clip}/{tmp_path / 'clip.bin'}")
    assert (from_file.config.vision_heads, from_file.config.text_heads, from_file.config.quick_gelu) == (4, 8, False)


def test_open_clip_failures(monkeypatch):
    def unreachable(cfg):
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    for name, message in {
        "open_clip:ViT-Z/openai": "no model 'ViT-Z'.*open_clip:MODEL/WEIGHTS",
        "open_clip:ViT-B-16": r"pretrained tag of ViT-B-16 \(openai, .*got ''",
        "open_clip:ViT-B-16/nope": "got 'nope'",
        "open_clip:RN50/openai": r"vision_cfg\.layers",
        "open_clip:ViT-B-16/openai": "tried timm/.*: no route.*pass its path: open_clip:ViT-B-16-quickgelu/PATH",
        "open_clip:ViT-B-16/laion2b_s34b_b88k": "no route.*pass its path: open_clip:ViT-B-16/PATH",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load(name)


def test_what_cannot_be_downloaded_is_given_by_its_path(tiny_open_clip, clip_state, model, tmp_path, monkeypatch):
    def unreachable(cfg):
        raise ConnectionError("no route")

    tag = {"hf_hub": "org/tiny/", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, pretrained: tag if pretrained == "web" else {})
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    torch.save(clip_state, tmp_path / "clip.bin")
    with pytest.raises(CheckpointError, match="or download it elsewhere and pass its path: ") as caught:
        load(f"open_clip:{tiny_open_clip}/web")
    advised = str(caught.value).rpartition("pass its path: ")[2]
    assert_same_towers(load_untrained(advised.replace("PATH", str(tmp_path / "clip.bin"))), model)


def test_an_open_clip_model_of_another_activation(
    tiny_open_clip, longclip_state, known_widths, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, pretrained: {})
    torch.save(longclip_state, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"ViT-Tiny-Test uses plain GELU.*Long-CLIP.*pass the path of the file"):
        load(f"open_clip:{tiny_open_clip}/{tmp_path / 'clip.pt'}")
    assert_same_towers(load_untrained(tmp_path / "clip.pt"), model)
