"""Text encoders for pipelines: FineLIP's as a transformers model, and a second one that takes as many tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_fast.checkpoint.building import CLIP_CONTEXT, Contents
from finelip_fast.checkpoint.foreign import text_for_transformers
from finelip_fast.config import EOT_TOKEN, START_TOKEN
from finelip_fast.diffusion import text_models
from finelip_fast.encoders import stretch_positions
from finelip_fast.errors import InputError

CLIP_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)

_FIRST_ENCODERS = {  # by whether they project, and the layer they return instead of the one that the pipeline reads
    (False, None): CLIPTextModel,
    (False, "last"): text_models.LastLayerTextModel,
    (False, "penultimate"): text_models.PenultimateLayerTextModel,
    (True, None): CLIPTextModelWithProjection,
    (True, "last"): text_models.LastLayerTextModelWithProjection,
}
_SECOND_ENCODERS = {  # by whether they read windows, and whether they return the last layer
    (False, False): CLIPTextModelWithProjection,
    (False, True): text_models.LastLayerTextModelWithProjection,
    (True, False): text_models.WindowedTextModelWithProjection,
    (True, True): text_models.WindowedLastLayerTextModelWithProjection,
}
# A tokenizer that pads with "!", as the second of Stable Diffusion XL does, reads exclamation marks as the bare "!".
_SENTENCE_END = re.compile(r"""[.!?…]+["'’”)\]]*</w>|!""")
_CLAUSE_END = re.compile(r"[,;:]</w>")


def first_encoder(encoder: Any, contents: Contents, layer: str | None) -> Any:
    """Make FineLIP's text tower to replace a pipeline's CLIP-L, with its class, precision and device.

    Args:
        encoder: Text encoder of the pipeline, which stays unchanged.
        contents: Sizes and weights of a checkpoint.
        layer: Layer to return instead of the one that the pipeline reads; None: that one.

    Raises:
        InputError: The widths of the two do not match.
    """
    sizes = contents.config
    projects = isinstance(encoder, CLIPTextModelWithProjection)
    widths = {"text width": (encoder.config.hidden_size, sizes.text_width)}
    if projects:
        widths["embed_dim"] = (encoder.config.projection_dim, sizes.embed_dim)
    for name, (expected, got) in widths.items():
        if got != expected:
            raise InputError(
                f"expected a checkpoint of {name} {expected}, that of the pipeline's {type(encoder).__name__}, got {got}; "
                "Stable Diffusion 1.5, XL and 3 and FLUX take a ViT-L/14, whose text width is 768"
            )
    config = copy.deepcopy(encoder.config)
    config.update(
        {
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.text_width,
            "intermediate_size": int(sizes.text_width * sizes.text_mlp_ratio),
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "max_position_embeddings": sizes.context_length,
            "hidden_act": "quick_gelu" if sizes.quick_gelu else "gelu",
            "layer_norm_eps": 1e-5,
            "bos_token_id": START_TOKEN,
            "eos_token_id": EOT_TOKEN,  # older configurations say 2, with which the highest id is the end token
        }
    )
    weights = {
        name: tensor.to(encoder.device, encoder.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in text_for_transformers(contents.tensors).items()
    }
    return _model(_FIRST_ENCODERS[projects, layer], config, weights, encoder)


def second_encoder(encoder: Any, tokenizer: Any, length: int, *, last: bool, windows: bool) -> Any:
    """Make a pipeline's second CLIP encoder for ``length`` tokens, sharing the memory of its weights with the present one.

    Args:
        encoder: Encoder of the pipeline, which stays unchanged.
        tokenizer: Tokenizer of the encoder.
        length: Number of tokens of a prompt.
        last: Whether to return the last layer where the pipeline expects the penultimate one.
        windows: Whether to read rows beyond its positions in windows; otherwise, its table of positions is stretched.

    Raises:
        InputError: The encoder has more positions, or those for windows are already stretched.
    """
    rows = encoder.config.max_position_embeddings
    if rows > length:
        raise InputError(
            f"expected a second encoder of at most {length} positions, as the checkpoint has, got {rows}; extend the original "
            f"pipeline, or pass context_length={rows}"
        )
    if windows and rows > CLIP_CONTEXT:
        raise InputError(
            f"expected a second encoder of {CLIP_CONTEXT} positions for windows, got {rows}, already stretched; extend the "
            "original pipeline"
        )
    config, weights = copy.deepcopy(encoder.config), encoder.state_dict()
    if hasattr(config, "windows"):  # from an earlier extension
        del config.windows
    if windows:
        config.windows = {
            "end": EOT_TOKEN,
            "padding": tokenizer.pad_token_id,
            "sentence_ends": _ids(tokenizer, _SENTENCE_END),
            "clause_ends": _ids(tokenizer, _CLAUSE_END),
        }
    elif rows < length:
        config.max_position_embeddings = length
        name = next(name for name in weights if name.endswith("position_embedding.weight"))
        weights[name] = stretch_positions(weights[name].cpu(), length).to(weights[name].device)
    return _model(_SECOND_ENCODERS[windows, last], config, weights, encoder)


def _model(kind: Any, config: Any, weights: Mapping[str, Tensor], encoder: Any) -> Any:
    """Make a model from exactly these weights, without copies, to replace an encoder."""
    with torch.device("meta"):
        model = kind(config)
    # Only some versions and classes have this prefix in the names.
    bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    model.load_state_dict({name: bare[name.removeprefix("text_model.")] for name in model.state_dict()}, assign=True)
    positions = torch.arange(config.max_position_embeddings, device=encoder.device)
    getattr(model, "text_model", model).embeddings.position_ids = positions[None]  # not in any state dict
    return model.requires_grad_(next(encoder.parameters()).requires_grad).eval()


def _ids(tokenizer: Any, pattern: re.Pattern[str]) -> list[int]:
    """Ids of the tokens that match a pattern."""
    return sorted(index for token, index in tokenizer.get_vocab().items() if pattern.fullmatch(token))
