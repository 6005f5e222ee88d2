"""Other projects' checkpoints in our names and sizes.

A state dict is a flat set of names, so one table of renamings serves every layout: OpenAI CLIP and open_clip (text at
the top level or under ``text.``), Long-CLIP (two tables of positions), FineLIP as its authors released it
(``cross_net``), and transformers' ``CLIPModel``. Sizes come from the tensors. What tensors cannot tell (heads,
activation, the pictures' normalisation) comes from the configuration that lies beside them, where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from finelip_fast.config import CLIP_MEAN, CLIP_STD, KEEP_POSITIONS, VOCAB_SIZE, FineLIPConfig
from finelip_fast.errors import CheckpointError

LAYOUTS = "OpenAI CLIP, open_clip, Long-CLIP, FineLIP, transformers' CLIPModel or finelip_fast"

# Left by data-parallel and compiled wrappers.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Keys that training scripts put the weights under.
_NESTS = ("state_dict", "model_state_dict", "model")
# Entries without a weight in them; `logit_bias` only shifts a training loss.
_IGNORED = {"input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "logit_bias"}

_TEXT_PARTS = {"positional_embedding", "text_projection", "token_embedding", "ln_final", "transformer"}
_AGGREGATORS = {"cross_net.aggr_net.": "image_aggregator.", "cross_net.cap_aggr_net.": "text_aggregator."}
_AGGREGATOR_PARTS = {"weight.0.": "norm.", "weight.1.": "hidden.", "weight.3.": "logits."}
_TRANSFORMERS_PARTS = {
    "vision_model.": "visual.",
    "text_model.": "text.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",  # transformers' own spelling
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.": "attn.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_TRANSFORMERS_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text.text_projection",
}


@dataclass(frozen=True)
class Translation:
    """A state dict in our names.

    Attributes:
        layout: Whose layout it was.
        tensors: Weights under our names, float types as they came; keys that no layout has keep their names.
        names: The checkpoint's own name of each weight that was renamed.
    """

    layout: str
    tensors: dict[str, Tensor]
    names: dict[str, str]

    @property
    def has_aggregators(self) -> bool:
        return any(name.startswith("image_aggregator.") for name in self.tensors)


def translate(entries: Mapping[str, Any]) -> Translation:
    """Recognise a state dict's layout and bring its weights to our names.

    Args:
        entries: A state dict, possibly inside a training script's dictionary and with wrappers' prefixes.

    Returns:
        The weights and whose layout they came in. Whether they are complete is the caller's question.

    Raises:
        CheckpointError: No tensors, two of one name, or Long-CLIP tables of positions that do not agree.
    """
    weights = _weights(entries)
    layout = _layout(weights)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in weights.items():
        renamed = _rename(name)
        names[renamed] = name
        if name in _TRANSFORMERS_PROJECTIONS and tensor.dim() == 2:
            tensor = tensor.T
        elif tensor.numel() == 1 and (renamed == "logit_scale" or renamed.endswith("_aggregator.scale")):
            tensor = tensor.reshape(())
        _add(tensors, renamed, tensor)
    _join_attention(tensors)
    _join_positions(tensors)
    return Translation(layout, tensors, names)


def config_from_tensors(
    tensors: Mapping[str, Tensor],
    *,
    quick_gelu: bool = True,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> FineLIPConfig:
    """Sizes of both encoders, read from weights in our names.

    Args:
        tensors: Weights from :func:`translate`.
        quick_gelu: Whether they were trained with the quick GELU, which the tensors do not show.
        vision_heads, text_heads: Attention heads, which tensors do not tell either. Default: one for every 64 columns
            of width, as in every CLIP of OpenAI's.

    Raises:
        CheckpointError: Weights of no CLIP vision transformer, another vocabulary, or heads that must be given.
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
        raise CheckpointError(f"expected CLIP's vocabulary of {VOCAB_SIZE} tokens, got {vocabulary}: another tokenizer")
    patches = shapes["visual.positional_embedding"][0] - 1
    grid = math.isqrt(max(patches, 0))
    if grid == 0 or grid * grid != patches:
        raise CheckpointError(
            f"expected visual positions of CLS and a square grid of patches, got {patches} beside CLS"
        )
    return FineLIPConfig(
        embed_dim=shapes["visual.proj"][1],
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=_layers(tensors, "visual."),
        vision_heads=vision_heads or _default_heads(vision_width, "vision_heads"),
        vision_mlp_ratio=_ratio(shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        text_width=text_width,
        text_layers=_layers(tensors, "text."),
        text_heads=text_heads or _default_heads(text_width, "text_heads"),
        text_mlp_ratio=_ratio(shapes["text.transformer.resblocks.0.mlp.c_fc.weight"]),
        context_length=shapes["text.positional_embedding"][0],
        quick_gelu=quick_gelu,
    )


def config_from_open_clip(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None) -> FineLIPConfig:
    """Sizes from an open_clip model configuration.

    Args:
        model_cfg: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and, where the weights want it, ``quick_gelu``.
        preprocess_cfg: ``mean``, ``std`` and ``resize_mode`` of the pictures; a pretrained tag's entry also has its own
            ``quick_gelu``, which counts because open_clip lists OpenAI's weights under models without it. The
            interpolation is bicubic here whatever it says.

    Raises:
        CheckpointError: An option that plain CLIP vision transformers do not have, by name, or a missing size.
    """
    preprocess = _object("preprocess_cfg", preprocess_cfg)
    model_cfg = _object("model_cfg", model_cfg)
    vision, text = (_object(name, model_cfg.get(name)) for name in ("vision_cfg", "text_cfg"))
    vision_defaults, text_defaults = asdict(CLIPVisionCfg()), asdict(CLIPTextCfg())
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
    training = {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale", "cast_dtype", "output_dict"}
    sizes = {"layers", "width", "mlp_ratio", "output_tokens"}
    refused = [
        *_unsupported("", model_cfg, known | training, {}),
        *_unsupported(
            "vision_cfg.", vision, sizes | {"head_width", "patch_size", "image_size", "patch_dropout"}, vision_defaults
        ),
        *_unsupported("text_cfg.", text, sizes | {"heads", "context_length"}, text_defaults),
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
    resize_mode: Any = preprocess.get("resize_mode") or "shortest"
    if resize_mode not in ["shortest", "squash"]:
        refused.append(f"preprocess_cfg.resize_mode={resize_mode!r:.40}")
    if refused:
        raise CheckpointError(
            "expected a plain CLIP vision transformer with CLIP's own text transformer and tokenizer, got "
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
        resize_mode=resize_mode,
    )


def config_from_transformers(
    tensors: Mapping[str, Tensor], config: dict[str, Any], preprocessor: dict[str, Any] | None = None
) -> FineLIPConfig:
    """Sizes of a transformers ``CLIPModel``: from its tensors, with heads and activation from its ``config.json``.

    Args:
        tensors: Weights from :func:`translate`.
        config: ``config.json``. Keys at their defaults may be absent: 12 heads for vision, 8 for text, quick GELU.
        preprocessor: ``preprocessor_config.json``; None takes CLIP's own.

    Raises:
        CheckpointError: An activation or a normalisation that is not CLIP's, or as :func:`config_from_tensors`.
    """
    # Old files repeat a tower's settings under `*_dict`, which wins.
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
    pictures = preprocessor or {}
    size = pictures.get("size")
    return config_from_tensors(
        tensors,
        quick_gelu=activations[0] == "quick_gelu",
        vision_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
    ).replace(
        image_mean=pictures.get("image_mean") or CLIP_MEAN,
        image_std=pictures.get("image_std") or CLIP_STD,
        resize_mode="squash" if isinstance(size, dict) and "height" in size else "shortest",
    )


def initial_aggregators(config: FineLIPConfig) -> dict[str, Tensor]:
    """The aggregators' random start: nn.Linear's distribution, from a generator of its own, so the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    width, hidden, tokens = config.embed_dim, config.aggregator_hidden, config.aggregated_tokens

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)

    start: dict[str, Tensor] = {}
    for aggregator in ("image_aggregator", "text_aggregator"):
        start |= {
            f"{aggregator}.scale": torch.ones(()),
            f"{aggregator}.norm.weight": torch.ones(width),
            f"{aggregator}.norm.bias": torch.zeros(width),
            f"{aggregator}.hidden.weight": uniform(hidden, width, fan_in=width),
            f"{aggregator}.hidden.bias": uniform(hidden, fan_in=width),
            f"{aggregator}.logits.weight": uniform(tokens, hidden, fan_in=hidden),
            f"{aggregator}.logits.bias": uniform(tokens, fan_in=hidden),
        }
    return start


def _weights(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, out of its nests and without wrappers' prefixes."""
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"expected a state dict, names to tensors, got a {type(entries).__name__}")
    for _ in _NESTS:
        entries = next((entries[key] for key in _NESTS if isinstance(entries.get(key), Mapping)), entries)
    tensors: dict[str, Tensor] = {}
    for name, value in entries.items():
        plain = _WRAPPERS.sub("", str(name))
        if isinstance(value, Tensor) and plain.rpartition(".")[2] not in _IGNORED:
            _add(tensors, plain, value)
    if not tensors:
        raise CheckpointError(
            f"expected a state dict, names to tensors, got a dictionary with {shortened(map(str, entries))}"
        )
    return tensors


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise CheckpointError(
            f"expected one weight of the name {name!r:.80}, got two, under a prefix or another layout's name"
        )
    tensors[name] = tensor


def _layout(tensors: Mapping[str, Tensor]) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    for prefix, layout in {
        "image_aggregator.": "finelip_fast",
        "cross_net.": "FineLIP",
        "positional_embedding_res": "Long-CLIP",
        "text_model.": "transformers CLIPModel",
        "text.": "open_clip CustomTextCLIP",
    }.items():
        if has(prefix):
            return layout
    return "CLIP"


def _rename(name: str) -> str:
    """Our name of a weight of any layout; a name of no layout stays."""
    if name in _TRANSFORMERS_PROJECTIONS:
        return _TRANSFORMERS_PROJECTIONS[name]
    if name.partition(".")[0] in _TEXT_PARTS or name == "positional_embedding_res":
        return "text." + name
    for aggregator, target in _AGGREGATORS.items():
        if name.startswith(aggregator):
            return target + _replace(name.removeprefix(aggregator), _AGGREGATOR_PARTS)
    return _replace(name, _TRANSFORMERS_PARTS) if name.startswith(("vision_model.", "text_model.")) else name


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for source, target in parts.items():
        name = name.replace(source, target)
    return name


def _join_attention(tensors: dict[str, Tensor]) -> None:
    """transformers' three projections of an attention become CLIP's single one, in place."""
    for query in [name for name in tensors if ".attn.q_proj." in name]:
        three = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        rows = tensors[query]
        if rows.dim() and all(name in tensors and tensors[name].shape == rows.shape for name in three):
            tensors[query.replace(".q_proj.", ".in_proj_")] = torch.cat([tensors.pop(name) for name in three])


def _join_positions(tensors: dict[str, Tensor]) -> None:
    """Long-CLIP's two full tables become one: the kept rows of the first, all others of the second, in place."""
    rest = tensors.pop("text.positional_embedding_res", None)
    if rest is None:
        return
    positions = tensors.get("text.positional_embedding")
    if positions is None or positions.shape != rest.shape or rest.dim() != 2:
        shape = "none" if positions is None else str(list(positions.shape))
        raise CheckpointError(
            "expected positional_embedding and positional_embedding_res of one shape, "
            f"got {shape} and {list(rest.shape)}: not a Long-CLIP checkpoint"
        )
    tensors["text.positional_embedding"] = torch.cat([positions[:KEEP_POSITIONS], rest[KEEP_POSITIONS:]])


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


def _default_heads(width: int, argument: str) -> int:
    if width % 64:
        raise CheckpointError(
            f"cannot tell the attention heads of width {width}, no multiple of 64: give {argument} to import_state_dict"
        )
    return width // 64


def _ratio(shape: list[int]) -> float:
    """Hidden width over width, such that truncating ``width * ratio`` gives the hidden width back."""
    hidden, width = shape
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _unsupported(
    prefix: str, options: Mapping[str, Any], understood: Iterable[str], neutral: Mapping[str, Any]
) -> list[str]:
    """Options beyond the understood ones that are not at their neutral value."""
    return [
        f"{prefix}{name:.40}={value!r:.40}"
        for name, value in options.items()
        if name not in understood and not (name in neutral and neutral[name] == value)
    ]


def _object(name: str, value: Any) -> dict[str, Any]:
    """A part of a configuration; an absent one is empty."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"expected {name} as an object, got {value!r:.40}")
    return value or {}


def shortened(names: Iterable[str], limit: int = 10) -> str:
    """Names for an error message, ten at most."""
    listed = list(names)
    remainder = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(f"{name:.120}" for name in listed[:limit]) or "nothing") + remainder
