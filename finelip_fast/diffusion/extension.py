"""FineLIP's text encoder in a pipeline of diffusers."""

from __future__ import annotations

import os
from typing import Any, Literal, TypeVar

from finelip_fast._arguments import one_of
from finelip_fast.checkpoint.building import Contents, lengthen
from finelip_fast.checkpoint.loading import open_checkpoint, warn_of_averages
from finelip_fast.diffusion.packages import require_packages
from finelip_fast.diffusion.tokenizers import long_tokenizer
from finelip_fast.errors import InputError
from finelip_fast.model import FineLIP

Layer = Literal["penultimate", "last"]
Second = Literal["stretch", "windows"]
LAYERS: tuple[Layer, ...] = ("penultimate", "last")
SECONDS: tuple[Second, ...] = ("stretch", "windows")

Pipeline = TypeVar("Pipeline")


def extend(
    pipeline: Pipeline,
    checkpoint: str | os.PathLike[str] | FineLIP | None,
    *,
    layer: Layer | None = None,
    second: Second = "stretch",
    context_length: int | None = None,
) -> Pipeline:
    """Put FineLIP's text encoder into a pipeline, which then reads prompts of 256 tokens.

    ==========================  =====================================================  ==================================
    pipelines                   encoders                                               layer that they read
    ==========================  =====================================================  ==================================
    Stable Diffusion XL         CLIP-L is exchanged, the second one is extended        penultimate
    its refiner                 the second, its only one, is extended                  penultimate
    Stable Diffusion 1.4, 1.5   CLIP-L is exchanged                                    last, after the final LayerNorm
    Stable Diffusion 3          CLIP-L is exchanged, the second one is extended        penultimate, and pooled
    FLUX                        CLIP-L is exchanged; T5, which reads the words, stays  pooled alone
    ==========================  =====================================================  ==================================

    Those for pictures, inpainting and ControlNet likewise. Encoders and tokenizers are new objects, and the second encoder
    shares its weights with the old one, so what else uses those is not changed. Prompt and negative prompt have one length.
    Each encoder is padded as the pipeline's own tokenizers are configured, in Stable Diffusion XL the first with end tokens
    and the second with ``!`` (id 0), since the U-Net attends to padding and was trained on that one.

    Extend a pipeline before adapters (LoRA), textual inversions or offloading are added to it.

    Args:
        pipeline: Pipeline of diffusers; changed in place.
        checkpoint: Whatever :func:`finelip_fast.load` takes, or a model; its image encoder and aggregators are not used.
        layer: Layer that stands where a pipeline reads the penultimate: ``"penultimate"`` is diffusers' own, ``"last"``,
            after the final LayerNorm and before the projection, that of FineLIP's authors. None: the pipeline's own.
        second: What gives the second encoder the length: ``"stretch"`` stretches its positions
            (:func:`finelip_fast.checkpoint.stretch_positions`), untrained, as FineLIP's authors do; ``"windows"`` reads
            windows of its own 77 positions, which end at ends of sentences where they can.
        context_length: Tokens of a prompt. None: the checkpoint's, or 256 for plain CLIP.

    Returns:
        The pipeline.

    Raises:
        InputError: A pipeline without a CLIP text encoder, or one with adapters, offloading or quantized encoders; widths that
            do not fit; an argument that is none of the above, or that this pipeline has no use for.
        CheckpointError, ConfigError: Where :func:`finelip_fast.load` raises them.

    Warns:
        TruncationWarning: Whenever the pipeline cuts a prompt or a negative prompt, from then on.
    """
    check_choices(layer, second)
    require_packages()
    from finelip_fast.diffusion.encoders import CLIP_ENCODERS, first_encoder, second_encoder

    kind = type(pipeline).__name__
    parts: Any = pipeline  # of types that diffusers sets when it is opened
    encoders = {name: getattr(parts, name, None) for name in ("text_encoder", "text_encoder_2")}
    encoders = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, CLIP_ENCODERS)}
    first, two = encoders.get("text_encoder"), encoders.get("text_encoder_2")
    if not encoders or not hasattr(parts, "register_modules"):
        raise InputError(
            f"expected a pipeline of diffusers with a CLIP text encoder (Stable Diffusion 1.4, 1.5, XL, its refiner, 3, or "
            f"FLUX), got {kind}"
        )
    for name, encoder in encoders.items():
        _check_untouched(name, encoder)
    if two is None:
        _check_single(kind, layer, second)

    contents = _contents(checkpoint, context_length)
    if contents.config.family != "clip":
        raise InputError(
            f"expected a checkpoint of CLIP's family, with which {kind} was trained, got {contents.config.family}; "
            "give a FineLIP, Long-CLIP or CLIP of a ViT-L/14"
        )
    length, last = contents.config.context_length, layer == "last"
    replaced: dict[str, Any] = {}
    if first is not None:
        replaced["tokenizer"] = long_tokenizer(parts.tokenizer, length)
        replaced["text_encoder"] = first_encoder(first, contents, last=last)
    if two is not None:
        tokenizer = long_tokenizer(parts.tokenizer_2, length)
        windows = second == "windows"
        replaced["tokenizer_2"] = tokenizer
        replaced["text_encoder_2"] = second_encoder(two, tokenizer, length, last=last, windows=windows)
    parts.register_modules(**replaced)
    if hasattr(parts, "tokenizer_max_length"):  # which Stable Diffusion 3 and FLUX ask in the tokenizer's place
        parts.tokenizer_max_length = length
    return pipeline


def check_choices(layer: Any, second: Any) -> None:
    """
    Raises:
        InputError: No layer, or no second encoder, that :func:`extend` knows.
    """
    if layer is not None:
        one_of("layer", layer, LAYERS)
    one_of("second", second, SECONDS)


def _contents(checkpoint: str | os.PathLike[str] | FineLIP | None, context_length: int | None) -> Contents:
    """A checkpoint's sizes and weights; whether its aggregators are trained is no matter here."""
    if isinstance(checkpoint, FineLIP):
        contents = Contents(checkpoint.config, checkpoint.state_dict())
        return contents if context_length is None else lengthen(contents, context_length, "the model")
    opened = open_checkpoint(checkpoint, context_length)
    warn_of_averages(checkpoint, opened, stacklevel=4)
    return opened.contents


def _check_untouched(name: str, encoder: Any) -> None:
    """Refuse an encoder that carries what a new one would lack."""
    if getattr(encoder, "peft_config", None):
        raise InputError(f"expected a {name} without adapters; extend the pipeline first, then load_lora_weights")
    if getattr(encoder, "is_quantized", False):
        raise InputError(
            f"expected a {name} in floating point, got a quantized one; load the pipeline with it as it was"
        )
    if hasattr(encoder, "_hf_hook") or hasattr(encoder, "_diffusers_hook"):
        raise InputError(
            f"expected a {name} without offloading; extend the pipeline first, then enable_model_cpu_offload, or call "
            "remove_all_hooks before"
        )


def _check_single(kind: str, layer: Layer | None, second: Second) -> None:
    """Refuse choices that a pipeline with one CLIP encoder does not have."""
    if layer == "penultimate":
        raise InputError(
            f"expected layer='last' or none, got 'penultimate': {kind} has one CLIP encoder and reads its last layer; for the "
            "one before, pass clip_skip=1 to the pipeline"
        )
    if second == "windows":
        raise InputError(f"expected second='stretch', got 'windows': {kind} has no second CLIP encoder")
