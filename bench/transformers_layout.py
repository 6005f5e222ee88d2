"""Save a model's towers in the layout of a transformers CLIP, for peers that read it: weights, sizes and vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finelip_fast.config import FineLIPConfig
from finelip_fast.model import FineLIP

# Parts of names, in order of replacement.
_PARTS = {
    r"^visual\.proj$": "visual_projection.weight",
    r"^text\.text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^text\.": "text_model.",
    r"class_embedding": "embeddings.class_embedding",
    r"conv1\.": "embeddings.patch_embedding.",
    r"token_embedding\.": "embeddings.token_embedding.",
    r"positional_embedding$": "embeddings.position_embedding.weight",
    r"ln_pre\.": "pre_layrnorm.",
    r"ln_post\.": "post_layernorm.",
    r"ln_final\.": "final_layer_norm.",
    r"transformer\.resblocks\.": "encoder.layers.",
    r"ln_(\d)\.": r"layer_norm\1.",
    r"attn\.": "self_attn.",
    r"c_fc\.": "fc1.",
    r"c_proj\.": "fc2.",
}
_PROJECTIONS = ("visual.proj", "text.text_projection")


def write(model: FineLIP, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the files of the tokenizer and preprocessing to a new folder."""
    folder.mkdir(parents=True)
    weights = {name: value.contiguous().clone() for name, value in renamed(model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    files = {"config.json": sizes(model.config), "preprocessor_config.json": preprocessing(model.config)}
    files |= vocabulary(model.config, folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def renamed(model: FineLIP) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of both towers, with queries, keys and values separate and projections transposed."""
    for name, value in model.state_dict().items():
        if name != "logit_scale" and not name.startswith(("visual.", "text.")):
            continue
        target = name
        for part, replacement in _PARTS.items():
            target = re.sub(part, replacement, target)
        if ".in_proj_" in target:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                yield target.replace("in_proj_", f"{letter}_proj."), third
        else:
            yield target, value.T if name in _PROJECTIONS else value


def sizes(config: FineLIPConfig) -> dict[str, Any]:
    def tower(width: int, layers: int, heads: int, ratio: float) -> dict[str, Any]:
        activation = "quick_gelu" if config.quick_gelu else "gelu"
        inner = {"hidden_size": width, "intermediate_size": int(width * ratio), "hidden_act": activation}
        return inner | {"num_hidden_layers": layers, "num_attention_heads": heads, "projection_dim": config.embed_dim}

    vision = tower(config.vision_width, config.vision_layers, config.vision_heads, config.vision_mlp_ratio)
    vision |= {"image_size": config.image_size, "patch_size": config.patch_size}
    text = tower(config.text_width, config.text_layers, config.text_heads, config.text_mlp_ratio)
    text |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.context_length}
    text |= {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    about = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim}
    about |= {"max_length": config.context_length}  # infinity-emb truncates captions there; its default is 20 tokens
    return about | {"vision_config": vision, "text_config": text}


def preprocessing(config: FineLIPConfig) -> dict[str, Any]:
    colours = {"image_mean": config.image_mean, "image_std": config.image_std, "do_normalize": True}
    size = {"size": {"shortest_edge": config.image_size}, "do_resize": True, "resample": 3}
    crop = {"crop_size": {"height": config.image_size, "width": config.image_size}, "do_center_crop": True}
    rescaling = {"do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True}
    return {"image_processor_type": "CLIPImageProcessor"} | colours | size | crop | rescaling


def vocabulary(config: FineLIPConfig, folder: Path) -> dict[str, Any]:
    """Return the files of CLIP's vocabulary, taken from open_clip, except ``merges.txt``, which is written."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    numbers = {
        {"<start_of_text>": start, "<end_of_text>": end}.get(token, token): number
        for token, number in tokenizer.encoder.items()
    }
    pairs = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.context_length}
    return {"vocab.json": numbers, "tokenizer_config.json": about | special, "special_tokens_map.json": special}
