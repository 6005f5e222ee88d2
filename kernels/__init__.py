"""The two operations of FineLIP: token aggregation (ATRM) and late interaction (CLIM)."""

from finelip_fast.kernels._dispatch import describe
from finelip_fast.kernels.atrm import atrm
from finelip_fast.kernels.clim import clim_scores, clim_topk

__all__ = ["atrm", "clim_scores", "clim_topk", "describe"]
