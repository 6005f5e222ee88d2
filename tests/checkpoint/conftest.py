"""A small model as a checkpoint of ours, its weights in other projects' layouts, and hubs without a network."""

from __future__ import annotations

import os

import huggingface_hub
import open_clip
import pytest
from torch import Tensor

from finelip_fast.checkpoint import architecture, save

from .files import OPEN_CLIP_CONFIG


@pytest.fixture(scope="module")
def model(make_model):
    """A model with one head of 64 columns in each tower."""
    return make_model(vision_heads=1, text_heads=1, context_length=77)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder to damage. The weights are hard links, so replace the file instead of writing to it."""
    (tmp_path / "ours").mkdir()
    os.link(saved / "model.safetensors", tmp_path / "ours/model.safetensors")
    (tmp_path / "ours/config.json").write_bytes((saved / "config.json").read_bytes())
    return tmp_path / "ours"


@pytest.fixture(scope="module")
def clip_state(model) -> dict[str, Tensor]:
    """The model in OpenAI's layout, without aggregators."""
    return {
        name.removeprefix("text."): tensor for name, tensor in model.state_dict().items() if "aggregator" not in name
    }


@pytest.fixture(scope="module")
def longclip_state(clip_state) -> dict[str, Tensor]:
    """The same model in Long-CLIP's layout, which identifies its activation."""
    table = clip_state["positional_embedding"]
    return clip_state | {"positional_embedding_res": table.clone()}


@pytest.fixture
def known_widths(monkeypatch):
    """Register a published CLIP of these tests' width, so that files without a configuration can be read."""
    for table in (architecture.VISION_HEADS, architecture.TEXT_HEADS):
        monkeypatch.setitem(table, 64, 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without a network: repositories in a folder, from which a call downloads the files that its patterns name."""
    remote, local, calls = tmp_path / "remote", tmp_path / "local", []

    def snapshot_download(repository, *, allow_patterns):
        calls.append((repository, tuple(allow_patterns)))
        source, target = remote / repository, local / repository
        if not source.is_dir():
            raise OSError("404")
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (source / name).is_file():
                (target / name).write_bytes((source / name).read_bytes())
        return str(target)

    def list_repo_files(repository):
        return [
            str(path.relative_to(remote / repository)) for path in (remote / repository).rglob("*") if path.is_file()
        ]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    return remote, calls


@pytest.fixture
def tiny_open_clip(monkeypatch):
    """A small model in open_clip's list of models."""
    configs = {"ViT-Tiny-Test": OPEN_CLIP_CONFIG["model_cfg"]}
    monkeypatch.setattr(open_clip, "list_models", lambda: list(configs))
    monkeypatch.setattr(open_clip, "get_model_config", configs.get)
    return "ViT-Tiny-Test"
