"""Explanations of scores: which words match which parts of a picture, and what each adds to the score."""

from __future__ import annotations

from finelip_fast.explain.explanation import Explanation, Match, Word, explain
from finelip_fast.explain.pictures import MAPS
from finelip_fast.explain.pointing import pointing_game

__all__ = ["MAPS", "Explanation", "Match", "Word", "explain", "pointing_game"]
