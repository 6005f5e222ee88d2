"""Recall of a checkpoint on pairs of pictures and captions, and what several runs on the same pairs say of each other."""

from __future__ import annotations

from finelip_fast.evaluation.compare import Comparison, compare
from finelip_fast.evaluation.result import Evaluation, Row, read_evaluation
from finelip_fast.evaluation.run import evaluate

__all__ = ["Comparison", "Evaluation", "Row", "compare", "evaluate", "read_evaluation"]
