"""Long prompts for text-to-image: FineLIP's text encoder in the pipelines of diffusers.

:func:`extend` exchanges text encoders and tokenizers of a pipeline, and nothing of the pipeline itself: generating from text
and from pictures, inpainting, ControlNet, LoRA and the refiner stay diffusers' own. ``diffusers`` and ``transformers`` are
imported when a function is called (``pip install 'finelip-fast[diffusion]'``).
"""

from __future__ import annotations

from finelip_fast.diffusion.extension import extend
from finelip_fast.diffusion.prompts import PromptEmbeddings, prompt_embeddings

__all__ = ["PromptEmbeddings", "extend", "prompt_embeddings"]
