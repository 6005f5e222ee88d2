"""Translation of other projects' checkpoints to our names.

A state dict is a flat set of names, so one table of renamings covers every layout: OpenAI CLIP and open_clip (text at
the top level or under ``text.``), SigLIP as in open_clip (with timm's vision transformer), Long-CLIP (two tables of
positions), FineLIP as its authors' code saves it (``cross_net``), and transformers' ``CLIPModel``. Sizes come from
:mod:`finelip_fast.checkpoint.architecture`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finelip_fast.config import KEEP_POSITIONS, FineLIPConfig
from finelip_fast.errors import CheckpointError

LAYOUTS = "OpenAI CLIP, open_clip, open_clip's SigLIP, Long-CLIP, FineLIP, transformers' CLIPModel or finelip_fast"

OURS, OPENAI, LONG_CLIP, FINELIP = "finelip_fast", "OpenAI CLIP", "Long-CLIP", "FineLIP"
TRANSFORMERS, SIGLIP = "transformers CLIPModel", "open_clip SigLIP"
# Long-CLIP and FineLIP are trained further from OpenAI's weights.
_ACTIVATIONS: dict[str, str] = dict.fromkeys((OPENAI, LONG_CLIP, FINELIP), "quick_gelu")
# Entries that only OpenAI's archives contain.
_OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}

# Prefixes left by data-parallel and compiled wrappers around the model or parts of it.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# One weight of each layout: any prefix of its name is a prefix of all names.
_FIRST_WEIGHTS = re.compile(
    r"(?:visual\.conv1|visual\.trunk\.patch_embed\.proj|vision_model\.embeddings\.patch_embedding)\.weight$"
)
# Keys under which training scripts store the weights, and the weights' running average.
_NESTS = ("state_dict", "model_state_dict", "model", "module")
_AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema")
# Entries that are not weights of the model; `logit_bias` goes into the configuration.
_IGNORED = {*_OPENAI_SIZES, "attn_mask", "position_ids", "logit_bias", "n_averaged"}

_MOST_LISTED = 10  # names in an error message

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
_TIMM = "visual.trunk."
_TIMM_PARTS = {
    "patch_embed.proj.": "conv1.",
    "pos_embed": "positional_embedding",
    "norm.": "ln_post.",
}
_TIMM_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_TIMM_BLOCK_PARTS = {
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_TRANSFORMERS_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text.text_projection",
}


@dataclass(frozen=True)
class Translation:
    """A state dict under our names.

    Attributes:
        layout: Original layout.
        tensors: Weights under our names, with their float types unchanged; keys that belong to no layout keep their names.
        names: The checkpoint's own name of each weight, by our name.
        averages: Keys of a training script's dictionary that hold averaged weights which were not used.
        key: Key that held the weights which were used; empty if they were not nested.
        logit_bias: Bias that SigLIP's loss adds to the scaled cosine; None if there is none.
    """

    layout: str
    tensors: dict[str, Tensor]
    names: dict[str, str]
    averages: tuple[str, ...] = ()
    key: str = ""
    logit_bias: float | None = None

    @property
    def has_aggregators(self) -> bool:
        return any(name.startswith("image_aggregator.") for name in self.tensors)

    @property
    def activation(self) -> str | None:
        """The activation that the layout implies; None if weights in this layout may have either."""
        return _ACTIVATIONS.get(self.layout)


def translate(entries: Mapping[str, Any], key: str | None = None) -> Translation:
    """Recognise a state dict's layout and translate its weights to our names.

    Args:
        entries: A state dict, possibly inside a training script's dictionary and with wrappers' prefixes.
        key: Key of that dictionary under which the weights are stored. Default: the first of ``state_dict``,
            ``model_state_dict``, ``model`` and ``module`` that is present; a running average only if none is.

    Returns:
        The weights and their original layout. The caller must check whether they are complete.

    Raises:
        CheckpointError: No tensors, no such key, two weights with one name, or inconsistent Long-CLIP tables of positions.
    """
    state_dict, key, averages = _state_dict(entries, key)
    weights = _weights(state_dict)
    layout = _layout(weights, state_dict)
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in weights.items():
        renamed = _rename(name)
        names[renamed] = name
        if name in _TRANSFORMERS_PROJECTIONS and tensor.dim() == 2:
            tensor = tensor.T
        elif name == f"{_TIMM}pos_embed" and tensor.dim() == 3:
            tensor = tensor[0]
        elif tensor.numel() == 1 and (renamed == "logit_scale" or renamed.endswith("_aggregator.scale")):
            tensor = tensor.reshape(())
        _add(tensors, renamed, tensor)
    _join_attention(tensors)
    _join_positions(tensors)
    biases = [
        float(value)
        for name, value in state_dict.items()
        if str(name).rpartition(".")[2] == "logit_bias" and isinstance(value, Tensor) and value.numel() == 1
    ]
    return Translation(layout, tensors, names, averages, key, biases[0] if biases else None)


def text_for_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our text tower's weights to those of transformers' ``CLIPTextModelWithProjection``, without copying.

    Args:
        tensors: A model's weights under our names; weights of other parts are skipped.
    """
    parts = {target: source for source, target in _TRANSFORMERS_PARTS.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == _TRANSFORMERS_PROJECTIONS["text_projection.weight"]:
            renamed["text_projection.weight"] = tensor.T
        elif name.startswith("text."):
            target = _replace(name, parts)
            if ".in_proj_" in target:
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[target.replace(".in_proj_", f".{part}_proj.")] = rows
            else:
                renamed[target] = tensor
    return renamed


def initial_aggregators(config: FineLIPConfig) -> dict[str, Tensor]:
    """Initialise the aggregators with nn.Linear's distribution, from a separate generator, so the same everywhere."""
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


def _state_dict(entries: Mapping[str, Any], key: str | None) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """Find the state dict in a training script's dictionary, its key, and the keys of other averages."""
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"expected a state dict, names to tensors, got a {type(entries).__name__}")
    nests = [name for name, value in entries.items() if isinstance(value, Mapping)]
    if key is not None:
        if key not in nests:
            raise CheckpointError(
                f"expected the key {key!r:.80} of a training's dictionary, which has {shortened(map(str, nests))}"
            )
        return entries[key], key, ()
    outermost, averages = "", [name for name in _AVERAGES if name in nests]
    for _ in _NESTS:
        nest = next((name for name in (*_NESTS, *_AVERAGES) if isinstance(entries.get(name), Mapping)), None)
        if nest is None:
            break
        outermost, entries = outermost or nest, entries[nest]
    return entries, outermost, tuple(name for name in averages if name != outermost)


def _weights(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict without the prefixes of wrappers and of modules around the model."""
    pairs = [(_WRAPPERS.sub("", str(name)), value) for name, value in entries.items() if isinstance(value, Tensor)]
    pairs = [(name, tensor) for name, tensor in pairs if name.rpartition(".")[2] not in _IGNORED]
    prefix = next((name[: match.start()] for name, _ in pairs if (match := _FIRST_WEIGHTS.search(name))), "")
    if not (prefix.endswith(".") and all(name.startswith(prefix) for name, _ in pairs)):
        prefix = ""
    tensors: dict[str, Tensor] = {}
    for name, tensor in pairs:
        _add(tensors, name.removeprefix(prefix), tensor)
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


def _layout(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> str:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    for prefix, layout in {
        "image_aggregator.": OURS,
        "cross_net.": FINELIP,
        "positional_embedding_res": LONG_CLIP,
        "text_model.": TRANSFORMERS,
        f"{_TIMM}attn_pool.latent": SIGLIP,
        "text.": "open_clip CustomTextCLIP",
    }.items():
        if has(prefix):
            return layout
    return OPENAI if {str(name).rpartition(".")[2] for name in entries} >= _OPENAI_SIZES else "CLIP"


def _rename(name: str) -> str:
    """Return our name for a weight of any layout; a name that belongs to no layout stays unchanged."""
    if name in _TRANSFORMERS_PROJECTIONS:
        return _TRANSFORMERS_PROJECTIONS[name]
    if name.partition(".")[0] in _TEXT_PARTS or name == "positional_embedding_res":
        return "text." + name
    for aggregator, target in _AGGREGATORS.items():
        if name.startswith(aggregator):
            return target + _replace(name.removeprefix(aggregator), _AGGREGATOR_PARTS)
    if name.startswith(_TIMM):
        return "visual." + _rename_timm(name.removeprefix(_TIMM))
    return _replace(name, _TRANSFORMERS_PARTS) if name.startswith(("vision_model.", "text_model.")) else name


def _rename_timm(name: str) -> str:
    """Return our vision transformer's name for a timm weight; the pool keeps timm's own names."""
    if block := _TIMM_BLOCK.fullmatch(name):
        return f"transformer.resblocks.{block[1]}.{_replace_start(block[2], _TIMM_BLOCK_PARTS)}"
    return _replace_start(name, _TIMM_PARTS)


def _replace_start(name: str, parts: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in parts.items() if name.startswith(old)), name)


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for source, target in parts.items():
        name = name.replace(source, target)
    return name


def _join_attention(tensors: dict[str, Tensor]) -> None:
    """Join transformers' three projections of an attention into CLIP's single one, in place."""
    for query in [name for name in tensors if ".attn.q_proj." in name]:
        three = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        rows = tensors[query]
        if rows.dim() and all(name in tensors and tensors[name].shape == rows.shape for name in three):
            tensors[query.replace(".q_proj.", ".in_proj_")] = torch.cat([tensors.pop(name) for name in three])


def _join_positions(tensors: dict[str, Tensor]) -> None:
    """Join Long-CLIP's two full tables into one, in place: the kept rows from the first, all others from the second."""
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


def shortened(names: Iterable[str]) -> str:
    """Format the first names for an error message, and the number of the others."""
    listed = list(names)
    remainder = f" and {len(listed) - _MOST_LISTED} more" if len(listed) > _MOST_LISTED else ""
    return (", ".join(f"{name:.120}" for name in listed[:_MOST_LISTED]) or "nothing") + remainder
