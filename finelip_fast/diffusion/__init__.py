"""Long prompts for text-to-image: FineLIP's text encoder in diffusers pipelines.

:func:`extend` replaces the text encoders and tokenizers of a pipeline and nothing else: generation from text and from
pictures, inpainting, ControlNet, LoRA and the refiner remain those of diffusers. ``diffusers`` and ``transformers`` are only
imported when a function is called (``pip install 'finelip-fast[diffusion]'``).
"""

from __future__ import annotations

from finelip_fast.diffusion.extension import extend
from finelip_fast.diffusion.prompts import PromptEmbeddings, prompt_embeddings

__all__ = ["PromptEmbeddings", "extend", "prompt_embeddings"]
