"""Folders in the formats of open_clip and transformers: which configuration applies, shards, and weights in one file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from finelip_fast.checkpoint import load, verify
from finelip_fast.errors import CheckpointError

from .files import OPEN_CLIP_CONFIG, assert_hub_config, assert_same_towers, load_untrained, write_hub_folder


@pytest.mark.parametrize(("kind", "resize_mode"), [("open_clip", "squash"), ("transformers", "shortest")])
def test_folders_of_other_projects(kind, resize_mode, clip_state, model, tmp_path):
    write_hub_folder(kind, clip_state, tmp_path / "hub")
    loaded = load_untrained(tmp_path / "hub")
    assert_hub_config(loaded.config, resize_mode)
    assert_same_towers(loaded, model)
    file = next(path for path in (tmp_path / "hub").iterdir() if path.suffix == ".bin")
    assert load_untrained(file).config == loaded.config
    # Under another name, the file is unrelated to the configuration.
    with pytest.raises(CheckpointError, match="--heads"):
        load(file.rename(file.with_name("mine.bin")))


def test_a_folder_of_one_file(longclip_state, known_widths, model, tmp_path):
    torch.save(longclip_state, tmp_path / "longclip-B.pt")
    (tmp_path / "README.md").write_text("Long-CLIP")
    assert_same_towers(load_untrained(tmp_path), model)
    torch.save(longclip_state, tmp_path / "longclip-L.pt")
    with pytest.raises(
        CheckpointError, match=r"expected config\.json .*longclip-B\.pt, longclip-L\.pt.*pass the path of their file"
    ):
        load(tmp_path)


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return one weight of every name that identifies transformers' layout; the others use OpenAI's names."""
    renamed = dict(state)
    renamed["vision_model.embeddings.patch_embedding.weight"] = renamed.pop("visual.conv1.weight")
    renamed["text_model.embeddings.token_embedding.weight"] = renamed.pop("token_embedding.weight")
    return renamed


@pytest.mark.parametrize("with_transformers_config", [True, False])
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_open_clips_configuration_beside_other_weights(clip_state, tmp_path, layout, with_transformers_config):
    """The weights decide which configuration applies; open_clip's is used if it is the only one."""
    write_hub_folder("transformers", clip_state, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    if not with_transformers_config:
        (tmp_path / "config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    state = as_transformers(clip_state) if layout == "transformers" else clip_state
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = load_untrained(tmp_path)
    assert_hub_config(loaded.config, "shortest" if with_transformers_config and layout == "transformers" else "squash")
    assert load_untrained(tmp_path / "model.safetensors").config == loaded.config


def test_pictures_where_transformers_5_writes_them(clip_state, tmp_path):
    write_hub_folder("transformers", clip_state, tmp_path)
    pictures = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))
    assert_hub_config(load_untrained(tmp_path).config, "shortest")


def test_pictures_that_are_refused_can_be_taken_as_clip_takes_them(clip_state, tmp_path):
    write_hub_folder("transformers", clip_state, tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"resample": 2, "size": 64}))
    with pytest.raises(CheckpointError, match=r"bicubic resizing to 32 pixels.*got size=64, resample=2 .*; without"):
        load(tmp_path)
    path.write_text(json.dumps(values))
    assert_hub_config(load_untrained(tmp_path).config, "shortest")


def write_shards(folder: Path, name: str, state: dict[str, Tensor]) -> list[Path]:
    """Write two shards and their index, as transformers does."""
    stem, suffix = name.split(".")
    names = sorted(state)
    parts = {f"{stem}-0000{n}-of-00002.{suffix}": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        tensors = {key: state[key].contiguous() for key in part}
        safetensors.torch.save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(
            tensors, folder / file
        )
    places = {key: file for file, part in parts.items() for key in part}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return [folder / file for file in parts]


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def sharded(request, clip_state, tmp_path):
    """A transformers folder with its weights in two shards; also the name of the unsharded file, and the shards."""
    write_hub_folder("transformers", clip_state, tmp_path / "hub")
    (tmp_path / "hub/pytorch_model.bin").unlink()
    return tmp_path / "hub", request.param, write_shards(tmp_path / "hub", request.param, clip_state)


def test_shards_are_read_together(sharded, model):
    folder, name, _ = sharded
    loaded = load_untrained(folder)
    assert_hub_config(loaded.config, "shortest")
    assert_same_towers(loaded, model)
    assert load_untrained(folder / f"{name}.index.json").config == loaded.config
    expected = ([], "ok") if name.endswith(".bin") else (None, "none recorded")
    report = verify(folder)
    assert (report["damaged"], report["status"]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards, index: shards[1].unlink(), r"expected its shards beside it, missing .*-00002-of-00002"),
        (lambda shards, index: os.replace(shards[0], shards[1]), "expected its shards beside it"),
        (
            lambda shards, index: shutil.copy(shards[0], shards[1]),
            "each weight in the shard that the index names, missing",
        ),
        (
            lambda shards, index: index.write_text('{"weight_map": {"a": "../b.bin"}}'),
            "expected a file name without a folder",
        ),
        (lambda shards, index: index.write_text('{"weight_map": {"a": 5}}'), "expected a file name without a folder"),
        (lambda shards, index: index.write_text('{"weight_map": []}'), "weight_map to be an object"),
        (lambda shards, index: index.write_text('{"weight_map": {}}'), "got a dictionary with nothing"),
        (lambda shards, index: index.write_text("["), "the index of a model's shards in JSON"),
    ],
)
def test_shards_that_are_not_whole(sharded, change, message):
    folder, name, shards = sharded
    change(shards, folder / f"{name}.index.json")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_one_shard_is_no_checkpoint(sharded):
    folder, name, shards = sharded
    with pytest.raises(
        CheckpointError, match=r"the name is that of a shard; pass their folder, or the index"
    ) as caught:
        load(shards[0])
    advised = str(caught.value).rpartition(" ")[2]
    assert advised == f"{name}.index.json"
    load_untrained(folder / advised)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_shards_on_the_hub(hub, clip_state, model, name):
    remote, calls = hub
    write_hub_folder("transformers", clip_state, remote / "org/large")
    if name.endswith(".json"):
        write_shards(remote / "org/large", "model.safetensors", clip_state)
    else:
        safetensors.torch.save_file(clip_state, remote / "org/large" / name)
    assert_same_towers(load_untrained("org/large"), model)
    assert "pytorch_model.bin" not in [file for _, patterns in calls for file in patterns]
