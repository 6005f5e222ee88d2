"""Helpers shared by the checkpoint tests: files to write, damage and compare."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from finelip_fast.checkpoint import UntrainedAggregatorsWarning, load
from finelip_fast.config import KEEP_POSITIONS


def load_untrained(*args, **kwargs):
    with pytest.warns(UntrainedAggregatorsWarning, match=re.escape(str(args[0]))):
        return load(*args, **kwargs)


def assert_same_weights(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def assert_same_towers(loaded, model):
    """Assert that the encoders are equal; of the positions, only the rows that stretching leaves unchanged."""
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "text.positional_embedding":
            assert torch.equal(weights[name][:KEEP_POSITIONS], tensor[:KEEP_POSITIONS])
        elif "aggregator" not in name:
            assert torch.equal(weights[name], tensor), name


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def rename_field(folder, old, new):
    path = folder / "config.json"
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def change_weights(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"width": 64, "heads": 8, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "squash", "size": [32, 32]},
}


def write_hub_folder(kind: str, state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "open_clip":
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    elif kind == "transformers":
        vision = {"num_attention_heads": 4, "hidden_act": "gelu"}
        text = {"num_attention_heads": 8, "hidden_act": "gelu"}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "clip", "vision_config": vision, "text_config": text})
        )
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
        # Only the configuration beside the weights matters here; names have tests of their own.
        torch.save(state, folder / "pytorch_model.bin")


def assert_hub_config(config, resize_mode):
    assert (config.vision_heads, config.text_heads, config.quick_gelu) == (4, 8, False)
    assert (config.image_mean, config.image_std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert (config.context_length, config.resize_mode) == (256, resize_mode)
