"""Model sizes: derived values, refused values, and the round trip through ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from finelip_fast.config import PRESETS, FineLIPConfig
from finelip_fast.errors import ConfigError, FineLIPError
from finelip_fast.model import FineLIP


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = FineLIPConfig.preset(name, quick_gelu=False, trained_aggregators=False, image_mean=(0.1, 0.2, 0.3))
    assert FineLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_round_trip_keeps_sizes_that_are_not_the_derived_ones():
    config = FineLIPConfig.preset("scenes", aggregated_tokens=5, aggregator_hidden=11, resize_mode="squash")
    again = FineLIPConfig.from_dict(config.to_dict())
    assert (again.aggregated_tokens, again.aggregator_hidden, again.resize_mode) == (5, 11, "squash")


@pytest.mark.parametrize(
    ("name", "patches", "aggregated", "hidden"),
    [
        ("ViT-B-32", 49, 9, 102),
        ("ViT-B-16", 196, 39, 102),  # 39, as in the released weights
        ("ViT-L-14", 256, 51, 153),
        ("ViT-L-14-336", 576, 115, 153),
        ("scenes", 64, 12, 25),
    ],
)
def test_derived_sizes(name, patches, aggregated, hidden):
    config = FineLIPConfig.preset(name)
    assert config.patches == patches
    assert config.aggregated_tokens == aggregated == int(patches * 0.4 * 0.5)
    assert config.tokens == aggregated + 1
    assert config.aggregator_hidden == hidden == int(0.2 * config.embed_dim)


@pytest.mark.parametrize(
    ("name", "embed_dim", "vision", "text"),
    [
        ("ViT-B-16", 512, (768, 12, 12), (512, 12, 8)),
        ("ViT-L-14", 768, (1024, 24, 16), (768, 12, 12)),
    ],
)
def test_presets_are_clips_sizes(name, embed_dim, vision, text):
    config = FineLIPConfig.preset(name)
    assert (config.embed_dim, config.context_length, config.vocab_size) == (embed_dim, 256, 49408)
    assert (config.vision_width, config.vision_layers, config.vision_heads) == vision
    assert (config.text_width, config.text_layers, config.text_heads) == text
    assert config.quick_gelu


def test_a_model_of_few_patches_still_aggregates_one_token():
    config = FineLIPConfig.preset("scenes", image_size=16, embed_dim=4, aggregated_tokens=0, aggregator_hidden=0)
    assert (config.patches, config.aggregated_tokens, config.aggregator_hidden) == (1, 1, 1)


def test_is_frozen_and_replaced_by_copy():
    config = FineLIPConfig.preset("scenes")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.embed_dim = 1
    assert config.replace(context_length=248).context_length == 248
    assert config.context_length == 256


def test_alpha_is_the_papers_unless_it_is_given_and_1_without_trained_aggregators():
    config = FineLIPConfig.preset("scenes")
    assert (config.alpha, config.replace(alpha=0.25).alpha) == (0.8, 0.25)
    untrained = config.replace(trained_aggregators=False, alpha=0.25)
    assert (untrained.alpha, untrained.replace(trained_aggregators=True).alpha) == (1.0, 0.8)
    values = config.to_dict()
    del values["alpha"]  # as in folders of earlier versions
    assert FineLIPConfig.from_dict(values) == config


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"expected a preset of ViT-B-16, .*, scenes, got 'ViT-B/16'"):
        FineLIPConfig.preset("ViT-B/16")


def test_unknown_and_missing_fields_are_named():
    values = FineLIPConfig.preset("scenes").to_dict()
    del values["text_width"], values["embed_dim"]
    values |= {"widht": 3, "a": 1}
    message = r"unknown fields \['a', 'widht'\], missing fields \['embed_dim', 'text_width'\]; known are .*'vocab_size'"
    with pytest.raises(ConfigError, match=message):
        FineLIPConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 15}, "expected image_size a multiple of patch_size, got 128"),
        ({"vision_heads": 5}, "expected vision_width a multiple of vision_heads, got 192"),
        ({"text_heads": 3}, "expected text_width a multiple of text_heads, got 128"),
        ({"context_length": 2}, "expected context_length of at least 3, got 2"),
        ({"resize_mode": "stretch"}, "expected resize_mode 'shortest' or 'squash', got 'stretch'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        FineLIPConfig.preset("scenes", **changes)
    assert isinstance(caught.value, FineLIPError)
    assert isinstance(caught.value, ValueError)


SIGLIP = {"family": "siglip", "quick_gelu": False, "embed_dim": 192, "text_positions": 64}


def test_a_siglip_goes_through_json_and_keeps_its_positions():
    config = FineLIPConfig.preset("scenes", **SIGLIP, pad_token=1, end_token=1, tokenizer="0" * 64, text_tanh_gelu=True)
    assert FineLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(context_length=100).text_positions == 64


def test_a_clip_is_written_as_before_there_were_others():
    names = {
        "family",
        "text_positions",
        "pad_token",
        "end_token",
        "tokenizer",
        "vision_tanh_gelu",
        "text_tanh_gelu",
        "logit_bias",
    }
    assert not names & set(FineLIPConfig.preset("scenes").to_dict())
    assert names - {"logit_bias", "pad_token", "vision_tanh_gelu"} <= set(
        FineLIPConfig.preset("scenes", **SIGLIP, end_token=1, tokenizer="0" * 64, text_tanh_gelu=True).to_dict()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "blip"}, "family 'clip' or 'siglip', got 'blip'"),
        ({"text_positions": 5}, "text_positions of 0 in the family 'clip', got 5"),
        ({"end_token": 5}, "end_token of 49407 in the family 'clip', got 5"),
        ({"tokenizer": "0" * 64}, "tokenizer of '' in the family 'clip', got '000"),
        (SIGLIP | {"logit_bias": "-10"}, "logit_bias as a number, got '-10'"),
        (SIGLIP | {"logit_bias": float("nan")}, "logit_bias as a number, got nan"),
        (SIGLIP | {"tokenizer": "abc"}, "tokenizer as a SHA-256 in hex, or empty, got 'abc'"),
        (SIGLIP | {"embed_dim": 128}, "vision_width equal to embed_dim, 128, got 192"),
        (SIGLIP | {"text_positions": 0}, "text_positions of 2 to context_length, 256, got 0"),
        (SIGLIP | {"context_length": 63}, "text_positions of 2 to context_length, 63, got 64"),
        (SIGLIP | {"end_token": 49408}, "end_token below vocab_size, 49408, got 49408"),
        (SIGLIP | {"quick_gelu": True, "text_tanh_gelu": True}, "quick_gelu or tanh approximations of GELU, not both"),
    ],
)
def test_families_are_not_mixed(changes, message):
    with pytest.raises(ConfigError, match=message):
        FineLIPConfig.preset("scenes", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_layers": 1_000_000_000}, r"vision_layers as an int of 1 to 256, got 1000000000"),
        ({"text_layers": 0}, "text_layers as an int of 1 to 256, got 0"),
        ({"text_heads": True}, "text_heads as an int .*, got True"),
        ({"vision_width": 192.0}, "vision_width as an int .*, got 192.0"),
        ({"embed_dim": "128"}, "embed_dim as an int .*, got '128'"),
        ({"context_length": 1 << 40}, "context_length as an int of 1 to 8192"),
        ({"aggregated_tokens": -1}, "aggregated_tokens as an int of 0 .the default. to 16384, got -1"),
        ({"image_size": 16384, "patch_size": 1}, "at most 16384 patches of a picture"),
        ({"vision_mlp_ratio": math.nan}, "vision_mlp_ratio above 0, to 64, got nan"),
        ({"text_mlp_ratio": math.inf}, "text_mlp_ratio above 0, to 64, got inf"),
        ({"text_mlp_ratio": 1e-9}, "text_mlp_ratio that leaves a hidden width"),
        ({"quick_gelu": 1}, "quick_gelu as True or False, got 1"),
        ({"image_std": [0.1, 0.0, 0.1]}, "image_std as three numbers between 0 and"),
        ({"image_mean": "abc"}, "image_mean as three numbers"),
        ({"image_mean": (0.1, math.nan, 0.1)}, "image_mean as three numbers"),
        ({"resize_mode": ["squash"]}, "resize_mode 'shortest' or 'squash'"),
        ({"alpha": 1.5}, r"alpha in \[0, 1\], got 1.5"),
        ({"alpha": "0.8"}, r"alpha in \[0, 1\], got '0.8'"),
        ({"alpha": math.nan}, r"alpha in \[0, 1\], got nan"),
    ],
)
def test_values_are_of_their_type_and_within_bounds(changes, message):
    with pytest.raises(ConfigError, match=message):
        FineLIPConfig.from_dict(FineLIPConfig.preset("scenes").to_dict() | changes)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name):
    config = FineLIPConfig.preset(name, vision_mlp_ratio=3.3)
    with torch.device("meta"):
        model = FineLIP(config)
    assert config.parameters == sum(tensor.numel() for tensor in model.state_dict().values())
