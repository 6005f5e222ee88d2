"""Ranks from tiles are those of the whole matrix."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.evaluation.ranking import tiled_ranks
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import pair_ranks

ALPHAS = (1.0, 0.0, 0.8)


def unit_rows(*shape: int, seed: int) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


@settings(deadline=None, max_examples=40)
@given(pictures=st.integers(1, 12), captions=st.integers(1, 3), tile=st.integers(1, 20), seed=st.integers(0, 10_000))
def test_tiles_do_not_matter(pictures: int, captions: int, tile: int, seed: int) -> None:
    images, texts = unit_rows(pictures, 4, 16, seed=seed), unit_rows(pictures * captions, 5, 16, seed=seed + 1)
    owners = torch.arange(pictures).repeat(captions)[
        torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    ]
    for alpha, found in zip(ALPHAS, tiled_ranks(images, texts, owners, ALPHAS, tile=tile), strict=True):
        for ours, whole in zip(found, pair_ranks(clim_scores(images, texts, alpha=alpha), owners), strict=True):
            assert ours.tolist() == whole.tolist()


def test_copies_and_what_rounding_cannot_tell_count_against() -> None:
    rows = unit_rows(1, 3, 16, seed=0)
    copies = rows.expand(4, -1, -1)
    (i2t, t2i), *_ = tiled_ranks(copies, copies, torch.arange(4), ALPHAS, tile=3)
    assert i2t.tolist() == t2i.tolist() == [4] * 4
    near = copies * (1 - 1e-7 * torch.arange(4)[:, None, None])
    assert tiled_ranks(near, copies, torch.arange(4), (0.8,))[0][0].tolist() == [4] * 4


def test_captions_of_one_picture_do_not_count_against_each_other() -> None:
    images = torch.eye(3)[:, None]
    texts = images[[0, 0, 1, 2, 2]]
    (i2t, t2i), *_ = tiled_ranks(images, texts, torch.tensor([0, 0, 1, 2, 2]), ALPHAS, tile=2)
    assert i2t.tolist() == [1, 1, 1]
    assert t2i.tolist() == [1] * 5


def test_nan_counts_against() -> None:
    images, texts = unit_rows(3, 2, 8, seed=0), unit_rows(3, 2, 8, seed=0)
    images[1] = torch.nan
    i2t, t2i = tiled_ranks(images, texts, torch.arange(3), (0.8,), tile=2)[0]
    assert i2t[1] == 3
    assert t2i[1] == 3
    assert t2i[0] >= 2
