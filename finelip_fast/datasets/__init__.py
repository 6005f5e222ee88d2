"""Pairs of picture and caption: generated scenes, and readers for published and plain layouts.

Every map-style dataset is a sequence of :class:`Example`; :func:`open_dataset` opens one by name.
"""

from __future__ import annotations

from finelip_fast.datasets.base import Example, PairDataset, Region, open_dataset
from finelip_fast.datasets.scenes import Scene, Scenes

__all__ = ["Example", "PairDataset", "Region", "Scene", "Scenes", "open_dataset"]
