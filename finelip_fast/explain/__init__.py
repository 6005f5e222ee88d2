"""Seeing why: which words met which parts of a picture, and what each adds to the score."""

from __future__ import annotations

from finelip_fast.explain.explanation import MAPS, Explanation, Match, Word, explain
from finelip_fast.explain.pointing import pointing_game

__all__ = ["MAPS", "Explanation", "Match", "Word", "explain", "pointing_game"]
