"""Model sizes from configurations and from weights alone: what is known, what must be given, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from finelip_fast.checkpoint import config_from_open_clip, import_state_dict
from finelip_fast.checkpoint.architecture import Hints, config_from_transformers, config_from_weights
from finelip_fast.checkpoint.foreign import translate
from finelip_fast.config import CLIP_MEAN, TEXT_HEADS, VISION_HEADS, FineLIPConfig
from finelip_fast.errors import CheckpointError, ConfigError, InputError


def outline(vision_width: int = 768, text_width: int = 512) -> dict[str, Tensor]:
    """Return weights in OpenAI's layout that have shapes but no data."""
    shapes = {
        "visual.conv1.weight": (vision_width, 3, 14, 14),
        "visual.positional_embedding": (257, vision_width),
        "visual.proj": (vision_width, 512),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (4 * vision_width, vision_width),
        "token_embedding.weight": (49408, text_width),
        "positional_embedding": (77, text_width),
        "transformer.resblocks.0.mlp.c_fc.weight": (4 * text_width, text_width),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def as_openai_archive(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}


def as_longclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"positional_embedding_res": torch.empty(77, 512, device="meta")}


def as_finelip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return as_longclip(state) | {"cross_net.aggr_net.scale": torch.ones(1)}


def described(state: dict[str, Tensor], **hints: Any) -> FineLIPConfig:
    return config_from_weights(translate(state), Hints(**hints))


# Weights alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vision_width", "text_width", "heads"),
    [
        (768, 512, (12, 8)),
        (1024, 768, (16, 12)),
        (1280, 1024, (16, 16)),
        (1408, 1024, (16, 16)),
        (1664, 1280, (16, 20)),
    ],
    ids=["ViT-B", "ViT-L", "ViT-H", "ViT-g", "ViT-bigG"],
)
def test_the_heads_of_published_clips_are_known(vision_width: int, text_width: int, heads: tuple[int, int]) -> None:
    config = described(outline(vision_width, text_width), activation="gelu")
    assert (config.vision_heads, config.text_heads) == heads


def test_known_heads_are_those_of_every_model_that_open_clip_lists() -> None:
    known: tuple[dict[int, set[int]], dict[int, set[int]]] = ({}, {})
    for name in open_clip.list_models():
        try:
            config = config_from_open_clip(open_clip.get_model_config(name))
        except CheckpointError:
            continue
        if config.family == "siglip":  # always comes with a configuration
            continue
        known[0].setdefault(config.vision_width, set()).add(config.vision_heads)
        known[1].setdefault(config.text_width, set()).add(config.text_heads)
    for heads, table in zip(known, (VISION_HEADS, TEXT_HEADS), strict=True):
        assert heads == {width: {count} for width, count in table.items()}


def test_the_models_of_open_clip_that_are_documented_are_listed_and_read() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/models.md").read_text()
    names = set(re.findall(r"`(?:open_clip:)?(ViT-[\w-]+)/([a-z]\w+)`", page))
    assert len(names) >= 8
    for model, tag in names:
        assert config_from_open_clip(open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)), (
            model,
            tag,
        )
        assert open_clip.get_pretrained_cfg(model, tag), (model, tag)


@pytest.mark.parametrize(
    ("widths", "message"),
    [((320, 512), r"vision transformer: expected the width of .*\(384, 512, .*got 320.*--heads VISION TEXT"),
     ((768, 320), r"text transformer: expected the width of .*\(256, 384, .*got 320.*heads=\(vision, text\)")],
)  # fmt: skip
def test_other_widths_are_asked_about(widths: tuple[int, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        described(outline(*widths), activation="gelu")
    config = described(outline(*widths), activation="gelu", heads=(4, 8))
    assert (config.vision_heads, config.text_heads) == (4, 8)


@pytest.mark.parametrize("layout", [as_openai_archive, as_longclip, as_finelip])
def test_layouts_that_stand_for_an_activation(layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    assert described(layout(outline())).quick_gelu
    assert not described(layout(outline()), activation="gelu").quick_gelu


def test_an_activation_that_nothing_shows_is_asked_for() -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot tell which activation .*\(CLIP\).*--activation quick_gelu; .*--activation gelu"
    ):
        described(outline())
    assert described(outline(), activation="quick_gelu").quick_gelu
    assert not described(outline(), activation="gelu").quick_gelu


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"activation": "relu"}, "activation to be one of quick_gelu, gelu, got 'relu'"),
        ({"heads": ()}, "heads to be an integer, or two"),
        ({"heads": (1, 2, 3)}, "heads to be an integer, or two"),
        ({"heads": 0}, "heads of at least 1"),
        ({"heads": "12"}, "heads to be an integer"),
        ({"key": 5}, "key to be a key of a dictionary"),
    ],
)
def test_hints_of_another_kind_are_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        import_state_dict(outline(), **argument)


# Pictures, as transformers' preprocessor_config.json has them ------------------------------------------------------------

OPENAI_PICTURES = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}


def pictures(**changes: Any) -> FineLIPConfig:
    tensors = translate(outline()).tensors
    return config_from_transformers(tensors, {}, OPENAI_PICTURES | changes)


@pytest.mark.parametrize(
    ("changes", "resize_mode"),
    [
        ({}, "shortest"),
        ({"size": 224, "crop_size": 224}, "shortest"),
        ({"size": None, "crop_size": None, "resample": None}, "shortest"),
        ({"size": {"height": 224, "width": 224}}, "squash"),
        ({"size": {"height": 224, "width": 224}, "do_center_crop": False, "crop_size": 7}, "squash"),
    ],
)
def test_pictures_as_clip_takes_them(changes: dict[str, Any], resize_mode: str) -> None:
    config = pictures(**changes)
    assert (config.resize_mode, config.image_mean) == (resize_mode, CLIP_MEAN)


def test_pictures_that_are_not_normalised() -> None:
    config = pictures(do_normalize=False)
    assert (config.image_mean, config.image_std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 2},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_center_crop": False},
        {"do_normalize": "no"},
        {"rescale_factor": 1 / 127.5},
        {"size": {"shortest_edge": 256}},
        {"size": {"height": 224, "width": 336}},
        {"size": {"longest_edge": 224}},
        {"size": 256},
        {"crop_size": {"height": 256, "width": 256}},
        {"image_processor_type": "ViTImageProcessor"},
    ],
)
def test_pictures_that_are_prepared_in_another_way_are_refused_by_name(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(CheckpointError, match=rf"bicubic resizing to 224 pixels.* got {name}=.*not supported"):
        pictures(**changes)


@pytest.mark.parametrize("change", [{"interpolation": "bilinear"}, {"mode": "L"}])
def test_pictures_of_open_clip_that_are_prepared_in_another_way(change: dict[str, str]) -> None:
    (name,) = change
    with pytest.raises(CheckpointError, match=rf"preprocess_cfg\.{name}='{change[name]}'"):
        config_from_open_clip(open_clip.get_model_config("ViT-B-16"), change)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="multiple of vision_heads"):
        described(outline(), activation="gelu", heads=(5, 8))
