"""Sizes of SigLIP and SigLIP 2 from open_clip's model configuration, whose vision tower is a timm model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finelip_fast.config import SIGLIP_EPSILON, SIGLIP_MEAN, SIGLIP_STD, FineLIPConfig, mlp_ratio
from finelip_fast.errors import CheckpointError

# Names in timm's registry, not on a hub: no such name makes timm download anything.
_TIMM_NAME = re.compile(r"vit_\w*siglip\w*")

# Options that all SigLIP models share; our configuration has no fields for other values.
_VISION = {"timm_pool": "map", "timm_proj": "none", "timm_model_pretrained": False}
_TEXT = {
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": SIGLIP_EPSILON},
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
_TEXT_SIZES = ("context_length", "vocab_size", "width", "heads", "layers")
_ACTIVATIONS: list[Any] = [None, {}, {"approximate": "none"}, {"approximate": "tanh"}]


def config_from_siglip(
    model_cfg: Mapping[str, Any],
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    refused: Sequence[str] = (),
) -> FineLIPConfig:
    """Read the sizes from the parts of a configuration; the tokenizer's files give end token, padding and tokenizer.

    Args:
        model_cfg, vision, text, preprocess: The configuration and its parts.
        refused: Options already known to be unsupported here.

    Raises:
        CheckpointError: An option that SigLIP does not have, by name, or a missing size.
    """
    wrong = list(refused)
    wrong += [
        f"{part}.{name}={options.get(name)!r:.60}"
        for part, options, expected in (("vision_cfg", vision, _VISION), ("text_cfg", text, _TEXT))
        for name, value in expected.items()
        if options.get(name) != value
    ]
    wrong += [f"text_cfg.{name}={text.get(name)!r:.40}" for name in _TEXT_SIZES if not _is_size(text.get(name))]
    known = {*_TEXT, *_TEXT_SIZES, "mlp_ratio", "act_kwargs", "hf_tokenizer_name"}
    wrong += [f"text_cfg.{name:.40}={value!r:.40}" for name, value in text.items() if name not in known]
    known = {*_VISION, "image_size", "timm_model_name"}
    wrong += [f"vision_cfg.{name:.40}={value!r:.40}" for name, value in vision.items() if name not in known]
    if text.get("act_kwargs") not in _ACTIVATIONS:
        wrong.append(f"text_cfg.act_kwargs={text['act_kwargs']!r:.60}")
    if model_cfg.get("quick_gelu"):
        wrong.append("quick_gelu")
    if wrong:
        raise CheckpointError(f"expected a SigLIP of open_clip, got {', '.join(wrong[:10])}")
    tower = _tower(vision["timm_model_name"])
    if (vision.get("image_size"), model_cfg.get("embed_dim")) != (tower["image_size"], tower["vision_width"]):
        raise CheckpointError(
            f"expected pictures of {tower['image_size']} pixels and embeddings of width {tower['vision_width']}, those of "
            f"{vision['timm_model_name']}, got {vision.get('image_size')!r:.40} and {model_cfg.get('embed_dim')!r:.40}"
        )
    if remainder := tower["image_size"] % tower["patch_size"]:
        raise CheckpointError(
            f"expected pictures of whole patches, got {tower['image_size']} pixels in patches of {tower['patch_size']}: "
            f"the last {remainder} are never seen; use the model of {tower['image_size'] - remainder} pixels, "
            "open_clip:ViT-SO400M-14-SigLIP-378/webli, whose weights are the same"
        )
    return FineLIPConfig(
        family="siglip",
        embed_dim=model_cfg["embed_dim"],
        **tower,
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_mlp_ratio=text.get("mlp_ratio", 4.0),
        text_tanh_gelu=(text.get("act_kwargs") or {}).get("approximate") == "tanh",
        context_length=text["context_length"],
        text_positions=text["context_length"],
        vocab_size=text["vocab_size"],
        end_token=0,
        quick_gelu=False,
        image_mean=preprocess.get("mean") or SIGLIP_MEAN,
        image_std=preprocess.get("std") or SIGLIP_STD,
        resize_mode=preprocess.get("resize_mode") or "squash",
    )


def _tower(name: Any) -> dict[str, Any]:
    """Read the vision transformer's fields from a timm model that is built without allocating its weights."""
    import timm  # slow to import, and not always needed
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name) or not timm.is_model(name):
        raise CheckpointError(
            f"expected vision_cfg.timm_model_name as a SigLIP of timm {timm.__version__}, such as "
            f"'vit_base_patch16_siglip_224', got {name!r:.80}"
        )
    with torch.device("meta"):
        trunk: Any = timm.create_model(name, pretrained=False, num_classes=0, global_pool="map")
    block = trunk.blocks[0]
    if not isinstance(trunk, VisionTransformer) or trunk.num_prefix_tokens or block.norm1.eps != SIGLIP_EPSILON:
        raise CheckpointError(f"expected a vision transformer without a class token, got timm's {name}")
    hidden, width = block.mlp.fc1.out_features, trunk.embed_dim
    return {
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "vision_width": width,
        "vision_layers": len(trunk.blocks),
        "vision_heads": block.attn.num_heads,
        "vision_mlp_ratio": mlp_ratio(hidden, width),
        "vision_tanh_gelu": type(block.mlp.act).__name__ == "GELUTanh",
    }


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1
