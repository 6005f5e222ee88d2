"""Engines: what turns pixels and ids into embeddings, one file per runtime."""

from finelip_fast.engines.base import Engine, open_engine

__all__ = ["Engine", "open_engine"]
