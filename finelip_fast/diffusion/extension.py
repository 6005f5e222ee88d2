"""FineLIP's text encoder in a diffusers pipeline."""

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
    pipeline                    encoders                                               layer read from them
    ==========================  =====================================================  ==================================
    Stable Diffusion XL         CLIP-L is replaced, the second one is extended         penultimate
    its refiner                 the second, its only one, is extended                  penultimate
    Stable Diffusion 1.4, 1.5   CLIP-L is replaced                                     last, after the final LayerNorm
    Stable Diffusion 3          CLIP-L is replaced, the second one is extended         penultimate, and pooled
    FLUX                        CLIP-L is replaced; T5, which reads the words, stays   pooled only
    ==========================  =====================================================  ==================================

    The same holds for image-to-image, inpainting and ControlNet pipelines. Encoders and tokenizers are new objects, and the
    second encoder shares its weights with the old one, so other users of the old objects are not affected. Prompt and negative
    prompt have the same length. Padding follows the configuration of the pipeline's own tokenizers: end tokens for the first
    encoder and ``!`` (id 0) for the second in Stable Diffusion XL, since the U-Net attends to padding and was trained with it.

    Extend a pipeline before adding adapters (LoRA), textual inversions or offloading to it.

    Args:
        pipeline: Diffusers pipeline, changed in place.
        checkpoint: Checkpoint, as accepted by :func:`finelip_fast.load`, or a model; image encoder and aggregators are unused.
        layer: Layer that the pipeline's U-Net or transformer gets: ``"penultimate"`` or ``"last"``. FineLIP's authors use
            the last layer, after the final LayerNorm and before the projection, in Stable Diffusion XL; the penultimate layer
            in Stable Diffusion 1.4 and 1.5, also after the final LayerNorm, is what ``clip_skip=1`` means there. None: the
            pipeline's own.
        second: Method of lengthening the second encoder: ``"stretch"`` stretches its positions
            (:func:`finelip_fast.checkpoint.stretch_positions`), untrained, as FineLIP's authors do; ``"windows"`` reads
            windows of its own 77 positions, which end at the ends of sentences if possible.
        context_length: Number of tokens of a prompt. None: the checkpoint's, or 256 for plain CLIP.

    Returns:
        The pipeline.

    Raises:
        InputError: The pipeline has no CLIP text encoder, or has adapters, offloading or quantized encoders; the widths do not
            match; or an argument is invalid or of no use to this pipeline.
        CheckpointError, ConfigError: As raised by :func:`finelip_fast.load`.

    Warns:
        TruncationWarning: From then on, whenever the pipeline cuts a prompt or a negative prompt.
    """
    check_choices(layer, second)
    require_packages()
    from finelip_fast.diffusion.encoders import CLIP_ENCODERS, first_encoder, second_encoder

    kind = type(pipeline).__name__
    parts: Any = pipeline  # diffusers sets the types when it is opened
    encoders = {name: getattr(parts, name, None) for name in ("text_encoder", "text_encoder_2")}
    encoders = {name: encoder for name, encoder in encoders.items() if isinstance(encoder, CLIP_ENCODERS)}
    first, two = encoders.get("text_encoder"), encoders.get("text_encoder_2")
    if not encoders or not hasattr(parts, "register_modules"):
        raise InputError(
            f"expected a diffusers pipeline with a CLIP text encoder (Stable Diffusion 1.4, 1.5, XL, its refiner, 3, or "
            f"FLUX), got {kind}"
        )
    for name, encoder in encoders.items():
        _check_untouched(name, encoder)
    reads: Layer = "last" if two is None else "penultimate"
    if two is None and second == "windows":
        raise InputError(f"expected second='stretch', got 'windows': {kind} has no second CLIP encoder")
    if two is None and layer is not None and hasattr(parts, "text_encoder_2"):
        raise InputError(
            f"expected no layer, got {layer!r}: {kind} reads only the pooled embedding of its CLIP encoder"
        )
    exchanged = None if layer == reads else layer

    contents = _contents(checkpoint, context_length)
    if contents.config.family != "clip":
        raise InputError(
            f"expected a checkpoint of CLIP's family, with which {kind} was trained, got {contents.config.family}; "
            "pass a FineLIP, Long-CLIP or CLIP of a ViT-L/14"
        )
    length = contents.config.context_length
    replaced: dict[str, Any] = {}
    if first is not None:
        replaced["tokenizer"] = long_tokenizer(parts.tokenizer, length)
        replaced["text_encoder"] = first_encoder(first, contents, exchanged)
    if two is not None:
        tokenizer = long_tokenizer(parts.tokenizer_2, length)
        last, windows = exchanged == "last", second == "windows"
        replaced["tokenizer_2"] = tokenizer
        replaced["text_encoder_2"] = second_encoder(two, tokenizer, length, last=last, windows=windows)
    parts.register_modules(**replaced)
    if hasattr(parts, "tokenizer_max_length"):  # which Stable Diffusion 3 and FLUX read instead of the tokenizer's
        parts.tokenizer_max_length = length
    return pipeline


def check_choices(layer: Any, second: Any) -> None:
    """
    Raises:
        InputError: The layer, or the method for the second encoder, is unknown to :func:`extend`.
    """
    if layer is not None:
        one_of("layer", layer, LAYERS)
    one_of("second", second, SECONDS)


def _contents(checkpoint: str | os.PathLike[str] | FineLIP | None, context_length: int | None) -> Contents:
    """Sizes and weights of a checkpoint; its aggregators may be untrained."""
    if isinstance(checkpoint, FineLIP):
        contents = Contents(checkpoint.config, checkpoint.state_dict())
        return contents if context_length is None else lengthen(contents, context_length, "the model")
    opened = open_checkpoint(checkpoint, context_length)
    warn_of_averages(checkpoint, opened, stacklevel=4)
    return opened.contents


def _check_untouched(name: str, encoder: Any) -> None:
    """Refuse an encoder with additions that a new one would lack."""
    if getattr(encoder, "peft_config", None):
        raise InputError(f"expected a {name} without adapters; extend the pipeline first, then load_lora_weights")
    if getattr(encoder, "is_quantized", False):
        raise InputError(
            f"expected a {name} in floating point, got a quantized one; load the pipeline without quantizing it"
        )
    if hasattr(encoder, "_hf_hook") or hasattr(encoder, "_diffusers_hook"):
        raise InputError(
            f"expected a {name} without offloading; extend the pipeline first, then enable_model_cpu_offload, or call "
            "remove_all_hooks first"
        )
