"""Prompts to the tensors that pipelines take in their place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finelip_fast._arguments import strings
from finelip_fast.errors import InputError


class PromptEmbeddings(NamedTuple):
    """Prompts as a pipeline takes them: ``pipeline(**embeddings.arguments())``.

    Attributes:
        prompt_embeds: ``[B, T, W]``, features of the tokens; two encoders' lie side by side in ``W``.
        negative_prompt_embeds: The same of the negative prompts, of the same shape.
        pooled_prompt_embeds: ``[B, D]``, one vector for each prompt; None where the pipeline takes none, as Stable Diffusion
            1.5.
        negative_pooled_prompt_embeds: The same of the negative prompts.
    """

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None

    def arguments(self) -> dict[str, Tensor]:
        """Tensors that are not None, by the names of a pipeline's arguments."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


@torch.no_grad()
def prompt_embeddings(
    pipeline: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None
) -> PromptEmbeddings:
    """The embeddings that a pipeline makes of prompts, to pass or to change them.

    They are the pipeline's own: its ``encode_prompt`` computes them, with adapters and textual inversions. Text is text:
    weights such as ``(red:1.2)`` are read as they stand.

    Args:
        pipeline: Pipeline of diffusers, extended or not; one that guides by a negative prompt.
        prompts: One prompt, or ``B``.
        negative_prompts: One for all prompts, or ``B``. None: what the pipeline takes without one: zeros of the same shape
            in Stable Diffusion XL, as it was trained (``force_zeros_for_empty_prompt``), otherwise the empty text.

    Returns:
        :class:`PromptEmbeddings` on the pipeline's device, in its precision, without gradients.

    Raises:
        InputError: Prompts that are no texts, or negative prompts of another number; a pipeline without negative prompts.

    Warns:
        TruncationWarning: An extended pipeline cut a prompt or a negative prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else strings("prompts", prompts)
    negatives: list[str] | None = None
    if negative_prompts is not None:
        several = [negative_prompts] * len(texts) if isinstance(negative_prompts, str) else negative_prompts
        negatives = strings("negative_prompts", several)
    if not texts or (negatives is not None and len(negatives) != len(texts)):
        number = "none" if negatives is None else len(negatives)
        raise InputError(
            f"expected prompts, and one negative prompt for all or one for each, got {len(texts)} and {number}"
        )
    parameters = inspect.signature(getattr(pipeline, "encode_prompt", len)).parameters
    if "negative_prompt" not in parameters:
        raise InputError(
            f"expected a pipeline whose encode_prompt takes a negative prompt, got {type(pipeline).__name__}; pass it prompts"
        )
    unused = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
    encoded = pipeline.encode_prompt(
        prompt=texts,
        **unused,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negatives,
    )
    return PromptEmbeddings(*encoded, *(None,) * (4 - len(encoded)))
