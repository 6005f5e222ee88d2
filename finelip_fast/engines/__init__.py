"""Engines, which turn pixels and ids into embeddings, one file per runtime."""

from finelip_fast.engines.base import ENGINES, Engine, EngineName
from finelip_fast.engines.choice import open_engine, why_not

__all__ = ["ENGINES", "Engine", "EngineName", "open_engine", "why_not"]
