"""Sizes of a model, read from the configuration beside its weights and from the weights themselves.

Tensors show widths, layers and lengths. They do not show the number of attention heads, which is known for the widths of
published CLIPs, or the activation, which some layouts imply. Anything still unknown must be given; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from finelip_fast._arguments import one_of, whole_number
from finelip_fast.checkpoint.foreign import LAYOUTS, OURS, SIGLIP, Translation, shortened
from finelip_fast.checkpoint.siglip import config_from_siglip
from finelip_fast.config import (
    CLIP_MEAN,
    CLIP_STD,
    TEXT_HEADS,
    VISION_HEADS,
    VOCAB_SIZE,
    FineLIPConfig,
    mlp_ratio,
)
from finelip_fast.errors import CheckpointError, InputError

ACTIVATIONS = ("quick_gelu", "gelu")

# Options of open_clip's models that are read here, and those that matter only in training.
_MODEL_OPTIONS = {
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype", "output_dict"),
}
_SIZES = {"layers", "width", "mlp_ratio", "output_tokens"}

_BICUBIC = (3, "bicubic")  # 3 is Pillow's code


class Hints(NamedTuple):
    """Properties of weights without a configuration, as given by the user.

    Attributes:
        activation: ``"quick_gelu"`` or ``"gelu"``.
        heads: Attention heads of the vision and the text transformer.
        key: Key of a training script's dictionary under which the weights are stored.
    """

    activation: str | None = None
    heads: tuple[int, int] | None = None
    key: str | None = None

    @classmethod
    def checked(cls, activation: Any, heads: Any, key: Any) -> Hints:
        """
        Raises:
            InputError: An unknown activation, heads that are neither one number nor two, or a key that is not a string.
        """
        if activation is not None:
            one_of("activation", activation, ACTIVATIONS)
        if heads is not None:
            numbers = list(heads) if isinstance(heads, (list, tuple)) else [heads]
            if len(numbers) not in (1, 2):
                raise InputError(f"expected heads to be an integer, or two: vision and text; got {heads!r:.80}")
            counts = [whole_number("heads", number) for number in numbers]
            heads = counts[0], counts[-1]
        if key is not None and not isinstance(key, str):
            raise InputError(f"expected key to be a key of a dictionary, got {key!r:.80}")
        return cls(activation, heads, key)


def config_from_weights(translation: Translation, hints: Hints) -> FineLIPConfig:
    """Determine the sizes of weights without a configuration.

    Args:
        translation: The weights; their layout may imply an activation.
        hints: Properties given by the user; they take precedence over what the layout implies.

    Raises:
        CheckpointError: Heads or an activation that must be given, or any error of :func:`config_from_tensors`.
        ConfigError: Heads that do not divide the width.
    """
    if translation.layout == SIGLIP:
        raise CheckpointError(
            "weights of a SigLIP need their configuration and tokenizer; pass open_clip:MODEL/WEIGHTS, such as "
            "open_clip:ViT-B-16-SigLIP/FILE, or a folder that also has open_clip_config.json, tokenizer.json and "
            "tokenizer_config.json"
        )
    if translation.layout == OURS and not (hints.activation and hints.heads):
        raise CheckpointError(
            "these weights need the config.json that was written with them; put it beside model.safetensors, and pass the "
            "folder"
        )
    config = config_from_tensors(translation.tensors, heads=hints.heads, activation="quick_gelu")
    activation = hints.activation or translation.activation
    if activation is None:
        raise CheckpointError(
            f"cannot tell which activation these weights ({translation.layout}) were trained with. OpenAI's, or trained "
            "from them: finelip convert FILE FOLDER --activation quick_gelu; open_clip's own (LAION, DataComp): "
            "--activation gelu; in Python convert(file, folder, activation=...). Alternatively, pass "
            "open_clip:MODEL/WEIGHTS, whose model determines it"
        )
    return config.replace(quick_gelu=activation == "quick_gelu")


def config_from_tensors(
    tensors: Mapping[str, Tensor], *, activation: str, heads: tuple[int, int] | None = None
) -> FineLIPConfig:
    """Read the sizes of both encoders from weights under our names.

    Args:
        tensors: Weights from :func:`finelip_fast.checkpoint.foreign.translate`.
        activation: ``"quick_gelu"`` or ``"gelu"``.
        heads: Attention heads of the vision and the text transformer. Default: those of published CLIPs with these widths.

    Raises:
        CheckpointError: Weights that are not a CLIP vision transformer's, another vocabulary, or a width that no published
            CLIP has.
        ConfigError: Heads that do not divide the width.
    """
    shapes = _shapes(
        tensors,
        {
            "visual.conv1.weight": 4,
            "visual.positional_embedding": 2,
            "visual.proj": 2,
            "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
            "text.token_embedding.weight": 2,
            "text.positional_embedding": 2,
            "text.transformer.resblocks.0.mlp.c_fc.weight": 2,
        },
    )
    vision_width, _, patch_size, _ = shapes["visual.conv1.weight"]
    vocabulary, text_width = shapes["text.token_embedding.weight"]
    if vocabulary != VOCAB_SIZE:
        raise CheckpointError(
            f"expected CLIP's vocabulary of {VOCAB_SIZE} tokens, got {vocabulary}; other tokenizers are not supported"
        )
    patches = shapes["visual.positional_embedding"][0] - 1
    grid = math.isqrt(max(patches, 0))
    if grid == 0 or grid * grid != patches:
        raise CheckpointError(
            f"expected visual positions for CLS and a square grid of patches, got {patches} besides CLS"
        )
    vision_heads, text_heads = heads or _known_heads(vision_width, text_width)
    return FineLIPConfig(
        embed_dim=shapes["visual.proj"][1],
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=_layers(tensors, "visual."),
        vision_heads=vision_heads,
        vision_mlp_ratio=mlp_ratio(*shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_width=text_width,
        text_layers=_layers(tensors, "text."),
        text_heads=text_heads,
        text_mlp_ratio=mlp_ratio(*shapes["text.transformer.resblocks.0.mlp.c_fc.weight"]),
        context_length=shapes["text.positional_embedding"][0],
        quick_gelu=activation == "quick_gelu",
    )


def config_from_open_clip(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None) -> FineLIPConfig:
    """Read the sizes from an open_clip model configuration.

    Args:
        model_cfg: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, if the weights need it, ``quick_gelu``.
        preprocess_cfg: ``mean``, ``std``, ``resize_mode`` and ``interpolation`` for the pictures; a pretrained tag's entry
            also has its own ``quick_gelu``, which counts because open_clip lists OpenAI's weights under models without it.

    Raises:
        CheckpointError: An option that neither plain CLIP vision transformers nor SigLIP have, by name, or a missing size.
    """
    from open_clip import CLIPTextCfg, CLIPVisionCfg  # takes two seconds

    preprocess = _object("preprocess_cfg", preprocess_cfg)
    model_cfg = _object("model_cfg", model_cfg)
    vision, text = (_object(name, model_cfg.get(name)) for name in ("vision_cfg", "text_cfg"))
    vision_defaults, text_defaults = asdict(CLIPVisionCfg()), asdict(CLIPTextCfg())
    refused = [*_unsupported("", model_cfg, _MODEL_OPTIONS, {}), *_unsupported_pictures(preprocess)]
    if vision.get("timm_model_name") is not None and text.get("no_causal_mask"):
        return config_from_siglip(model_cfg, vision, text, preprocess, refused)
    refused += [
        *_unsupported(
            "vision_cfg.", vision, _SIZES | {"head_width", "patch_size", "image_size", "patch_dropout"}, vision_defaults
        ),
        *_unsupported("text_cfg.", text, _SIZES | {"heads", "context_length"}, text_defaults),
    ]
    vision, text = {**vision_defaults, **vision}, {**text_defaults, **text}
    numbers = {
        "embed_dim": model_cfg.get("embed_dim"),
        **{
            f"vision_cfg.{name}": vision[name] for name in ("layers", "width", "head_width", "patch_size", "image_size")
        },
        **{f"text_cfg.{name}": text[name] for name in ("layers", "width", "heads", "context_length")},
    }
    refused += [f"{name}={value!r:.40}" for name, value in numbers.items() if type(value) is not int or value < 1]
    gelus = [options.get("quick_gelu") for options in (model_cfg, preprocess)]
    refused += [f"quick_gelu={value!r:.40}" for value in gelus if value not in (None, True, False)]
    if refused:
        raise CheckpointError(
            "expected a plain CLIP vision transformer with CLIP's own text transformer and tokenizer, or a SigLIP, got "
            f"{shortened(refused)}, which this library does not support; choose another open_clip model"
        )
    return FineLIPConfig(
        embed_dim=model_cfg["embed_dim"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["width"] // vision["head_width"],
        vision_mlp_ratio=vision["mlp_ratio"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_mlp_ratio=text["mlp_ratio"],
        context_length=text["context_length"],
        quick_gelu=any(gelus),
        image_mean=preprocess.get("mean") or CLIP_MEAN,
        image_std=preprocess.get("std") or CLIP_STD,
        resize_mode=preprocess.get("resize_mode") or "shortest",
    )


def _unsupported_pictures(preprocess: Mapping[str, Any]) -> list[str]:
    """List the options of open_clip's image preprocessing that are not supported here."""
    known: dict[str, list[Any]] = {
        "resize_mode": [None, "shortest", "squash"],
        "interpolation": ["bicubic"],
        "mode": ["RGB"],
    }
    return [
        f"preprocess_cfg.{name}={preprocess[name]!r:.40}"
        for name, values in known.items()
        if name in preprocess and preprocess[name] not in values
    ]


def config_from_transformers(
    tensors: Mapping[str, Tensor], config: dict[str, Any], preprocessor: dict[str, Any] | None = None
) -> FineLIPConfig:
    """Read the sizes of a transformers ``CLIPModel`` from its tensors, and heads and activation from its ``config.json``.

    Args:
        tensors: Weights from :func:`finelip_fast.checkpoint.foreign.translate`.
        config: ``config.json``. Keys at their defaults may be absent: 12 heads for vision, 8 for text, quick GELU.
        preprocessor: ``preprocessor_config.json``; None: CLIP's own preprocessing.

    Raises:
        CheckpointError: An activation that is not CLIP's, unsupported image preprocessing, or any error of
            :func:`config_from_tensors`.
    """
    # Old files repeat a tower's settings under `*_dict`, which takes precedence.
    vision, text = (
        _object(f"{tower}_config", config.get(f"{tower}_config"))
        | _object(f"{tower}_config_dict", config.get(f"{tower}_config_dict"))
        for tower in ("vision", "text")
    )
    activations = [tower.get("hidden_act", "quick_gelu") for tower in (vision, text)]
    epsilons = [tower.get("layer_norm_eps", 1e-5) for tower in (vision, text)]
    if activations not in [["quick_gelu"] * 2, ["gelu"] * 2] or epsilons != [1e-5] * 2:
        raise CheckpointError(
            "expected hidden_act 'quick_gelu' or 'gelu', the same in both towers, and layer_norm_eps 1e-05, "
            f"got hidden_act {activations!r:.80} and layer_norm_eps {epsilons!r:.80}"
        )
    heads = vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
    sizes = config_from_tensors(tensors, activation=activations[0], heads=heads)
    return sizes.replace(**_pictures(preprocessor or {}, sizes.image_size))


def _pictures(values: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Express the image preprocessing of transformers' CLIP in our fields; an absent key means what the model expects.

    Raises:
        CheckpointError: Preprocessing that is not supported here, by name.
    """
    kinds = {name: values.get(name, "CLIP") for name in ("image_processor_type", "feature_extractor_type")}
    refused = {name: kind for name, kind in kinds.items() if not str(kind).startswith("CLIP")}
    size, crop = values.get("size"), values.get("crop_size")
    squashes = isinstance(size, dict) and "height" in size
    crops = values.get("do_center_crop", True)
    steps = {
        "do_resize": [True],
        "do_rescale": [True],
        "do_normalize": [True, False],
        "do_center_crop": [True, not squashes],
    }
    refused |= {name: values[name] for name, known in steps.items() if values.get(name, True) not in [*known, None]}
    sides = {"size": size, **({"crop_size": crop} if crops else {})}
    refused |= {name: side for name, side in sides.items() if side is not None and _sides(side) != {image_size}}
    if values.get("resample", 3) not in [*_BICUBIC, None]:
        refused["resample"] = values["resample"]
    factor = values.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        refused["rescale_factor"] = factor
    if refused:
        listing = shortened(f"{name}={value!r:.60}" for name, value in refused.items())
        raise CheckpointError(
            f"expected CLIP's preprocessing: bicubic resizing to {image_size} pixels, centre crop or squashing, values "
            f"scaled from 0..255 to 0..1; got {listing} in the preprocessor's configuration, which is not supported; without "
            "these keys the default preprocessing is used, which may not match the model's training"
        )
    normalizes = values.get("do_normalize", True) is not False
    return {
        "image_mean": (values.get("image_mean") or CLIP_MEAN) if normalizes else (0.0, 0.0, 0.0),
        "image_std": (values.get("image_std") or CLIP_STD) if normalizes else (1.0, 1.0, 1.0),
        "resize_mode": "squash" if squashes else "shortest",
    }


def _sides(size: Any) -> set[Any]:
    """Return the numbers of a size as transformers writes it: one number, a list, or an object."""
    if isinstance(size, dict):
        if not {*size} <= {"shortest_edge", "height", "width"}:
            return set()
        size = list(size.values())
    numbers = size if isinstance(size, list) else [size]
    return {number if type(number) is int else None for number in numbers}


def _shapes(tensors: Mapping[str, Tensor], dimensions: Mapping[str, int]) -> dict[str, list[int]]:
    missing = [name for name in dimensions if name not in tensors]
    if missing:
        raise CheckpointError(
            f"expected the weights of {LAYOUTS}, with a vision transformer; "
            f"missing {shortened(missing)}; found {shortened(tensors)}"
        )
    for name, count in dimensions.items():
        if tensors[name].dim() != count or 0 in tensors[name].shape:
            raise CheckpointError(f"expected {name} with {count} dimensions, got the shape {list(tensors[name].shape)}")
    return {name: list(tensors[name].shape) for name in dimensions}


def _layers(tensors: Mapping[str, Tensor], tower: str) -> int:
    blocks = tower + "transformer.resblocks."
    return len({name.removeprefix(blocks).partition(".")[0] for name in tensors if name.startswith(blocks)})


def _known_heads(vision_width: int, text_width: int) -> tuple[int, int]:
    vision, text = VISION_HEADS.get(vision_width), TEXT_HEADS.get(text_width)
    if vision is None or text is None:
        tower, width, known = (
            ("vision", vision_width, VISION_HEADS) if vision is None else ("text", text_width, TEXT_HEADS)
        )
        raise CheckpointError(
            f"cannot tell the number of attention heads of the {tower} transformer: expected the width of a published CLIP "
            f"({', '.join(map(str, known))}), got {width}; pass them: finelip convert FILE FOLDER --heads VISION TEXT, in "
            "Python convert(file, folder, heads=(vision, text))"
        )
    return vision, text


def _unsupported(
    prefix: str, options: Mapping[str, Any], understood: Iterable[str], neutral: Mapping[str, Any]
) -> list[str]:
    """List the options that are not among the understood ones and not at their neutral value."""
    return [
        f"{prefix}{name:.40}={value!r:.40}"
        for name, value in options.items()
        if name not in understood and not (name in neutral and neutral[name] == value)
    ]


def _object(name: str, value: Any) -> dict[str, Any]:
    """Check a part of a configuration; an absent part becomes empty."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"expected {name} to be an object, got {value!r:.40}")
    return value or {}
