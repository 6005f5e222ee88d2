"""Recall of a checkpoint on pairs of pictures and captions, and comparisons of several runs on the same pairs."""

from __future__ import annotations

from finelip_fast.evaluation.compare import Comparison, compare
from finelip_fast.evaluation.measure import evaluate
from finelip_fast.evaluation.result import Evaluation, Row, Sweep, read_evaluation

__all__ = ["Comparison", "Evaluation", "Row", "Sweep", "compare", "evaluate", "read_evaluation"]
