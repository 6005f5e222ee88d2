"""Conversion of prompts to the tensors that pipelines take instead."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finelip_fast._arguments import strings
from finelip_fast.errors import InputError


class PromptEmbeddings(NamedTuple):
    """Embeddings of prompts as a pipeline takes them: ``pipeline(**embeddings.arguments())``.

    Attributes:
        prompt_embeds: ``[B, T, W]``, features of the tokens; those of two encoders lie side by side in ``W``.
        negative_prompt_embeds: The same for the negative prompts, in the same shape.
        pooled_prompt_embeds: ``[B, D]``, one vector per prompt; None if the pipeline takes none, as in Stable Diffusion 1.5.
        negative_pooled_prompt_embeds: The same for the negative prompts.
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
    """Compute the embeddings that a pipeline makes of prompts, to pass them on or to change them.

    The pipeline's own ``encode_prompt`` computes them, with adapters and textual inversions. Weights such as ``(red:1.2)``
    are read as text.

    Args:
        pipeline: Diffusers pipeline, extended or not, that takes negative prompts.
        prompts: One prompt, or ``B``.
        negative_prompts: One for all prompts, or ``B``. None: the pipeline's default, which is zeros of the same shape in
            Stable Diffusion XL, as it was trained (``force_zeros_for_empty_prompt``), otherwise the empty text.

    Returns:
        :class:`PromptEmbeddings` on the pipeline's device, in its precision, without gradients.

    Raises:
        InputError: Prompts are not texts, the number of negative prompts differs, or the pipeline takes no negative prompts.

    Warns:
        TruncationWarning: An extended pipeline cut a prompt or a negative prompt.
    """
    texts = [prompts] if isinstance(prompts, str) else strings("prompts", prompts)
    negatives: list[str] | None = None
    if negative_prompts is not None:
        several = [negative_prompts] * len(texts) if isinstance(negative_prompts, str) else negative_prompts
        negatives = strings("negative_prompts", several)
    if not texts:
        raise InputError("expected at least one prompt")
    if negatives is not None and len(negatives) != len(texts):
        raise InputError(f"expected 1 or {len(texts)} negative prompts for {len(texts)} prompts, got {len(negatives)}")
    parameters = inspect.signature(getattr(pipeline, "encode_prompt", len)).parameters
    if "negative_prompt" not in parameters:
        raise InputError(
            f"expected a pipeline whose encode_prompt takes a negative prompt, got {type(pipeline).__name__}; "
            "pass it the prompts"
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
