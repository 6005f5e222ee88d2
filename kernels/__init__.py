"""The two operations of FineLIP: token aggregation (ATRM) and late interaction (CLIM)."""

from finelip_fast.kernels._candidates import cosine_candidates
from finelip_fast.kernels._dispatch import describe
from finelip_fast.kernels._quantize import QuantizedItems, quantize, quantize_items
from finelip_fast.kernels._settings import summary as tuned_settings
from finelip_fast.kernels.atrm import atrm
from finelip_fast.kernels.clim import clim_scores, clim_topk, clim_topk_int8

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
