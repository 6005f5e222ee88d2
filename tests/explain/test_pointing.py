"""The pointing game on scenes, whose boxes are known."""

from __future__ import annotations

import pytest

import finelip_fast
from finelip_fast.datasets import open_dataset
from finelip_fast.explain import pointing_game


def test_the_bundled_model_points_at_what_is_meant() -> None:
    model = finelip_fast.load()
    played = pointing_game(model, open_dataset("scenes:val:8", image_size=128), progress=False)
    chance, raw, aggregated = (
        sum(phrase[name] for phrase in played) / len(played) for name in ("chance", "raw", "aggregated")
    )
    assert len(played) > 40
    assert chance < 0.15
    assert raw > 0.75
    assert aggregated > 3 * chance


def test_pairs_without_boxes_are_refused() -> None:
    with pytest.raises(finelip_fast.FineLIPError, match="phrases have boxes"):
        pointing_game(finelip_fast.load(), open_dataset("scenes:val:1:typos", image_size=128), progress=False)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(finelip_fast.InputError, match="batch_size of at least 1, got 0"):
        pointing_game(finelip_fast.load(), open_dataset("scenes:val:1", image_size=128), batch_size=0, progress=False)
