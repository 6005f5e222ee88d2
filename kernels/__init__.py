"""The two operations of FineLIP: token aggregation (ATRM) and late interaction (CLIM)."""

from finelip_fast.kernels.atrm.ops import atrm
from finelip_fast.kernels.clim.candidates import cosine_candidates
from finelip_fast.kernels.clim.ops import clim_scores
from finelip_fast.kernels.clim.quantize import QuantizedItems, quantize, quantize_items
from finelip_fast.kernels.clim.search import clim_topk, clim_topk_int8
from finelip_fast.kernels.dispatch import describe
from finelip_fast.kernels.settings import summary as tuned_settings

__all__ = [
    "QuantizedItems",
    "atrm",
    "clim_scores",
    "clim_topk",
    "clim_topk_int8",
    "cosine_candidates",
    "describe",
    "quantize",
    "quantize_items",
    "tuned_settings",
]
