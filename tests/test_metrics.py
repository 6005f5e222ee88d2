"""Recall and ranks, held to sorting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.metrics import ranks, recall

SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.8, 0.7, 0.05, 0.0],
        [0.3, 0.2, 0.1, 0.4],
        [0.1, 0.2, 0.3, 0.5],
    ]
)


def test_ranks_by_eye():
    assert ranks(SCORES).tolist() == [1, 2, 4, 1]
    assert ranks(SCORES.T).tolist() == [1, 1, 3, 1]
    assert ranks(SCORES).dtype == torch.int64


def test_recall_by_eye():
    assert recall(SCORES, ks=(1, 2, 3, 4)) == {
        "i2t_recall@1": 0.5,
        "i2t_recall@2": 0.75,
        "i2t_recall@3": 0.75,
        "i2t_recall@4": 1.0,
        "t2i_recall@1": 0.75,
        "t2i_recall@2": 0.75,
        "t2i_recall@3": 1.0,
        "t2i_recall@4": 1.0,
    }
    assert list(recall(SCORES)) == [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


def test_ties_and_nan_count_against_the_query():
    assert recall(torch.zeros(5, 5), ks=(1, 4, 5)) == pytest.approx(
        {f"{way}_recall@{k}": value for way in ("i2t", "t2i") for k, value in ((1, 0), (4, 0), (5, 1))}
    )
    assert ranks(torch.full((3, 3), torch.nan)).tolist() == [3, 3, 3]
    own_is_nan = torch.eye(3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))
    assert ranks(own_is_nan).tolist() == [3, 1, 1]


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 12))
def test_ranks_are_positions_in_sorted_order_and_recall_grows_with_k(seed, size):
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    by_hand = [1 + sorted(row, reverse=True).index(row[index]) for index, row in enumerate(scores.tolist())]
    assert ranks(scores).tolist() == by_hand
    values = recall(scores, ks=tuple(range(1, size + 1)))
    by_direction = {way: [values[f"{way}_recall@{k}"] for k in range(1, size + 1)] for way in ("i2t", "t2i")}
    for shares in by_direction.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
