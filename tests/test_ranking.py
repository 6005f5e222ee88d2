"""Ranks computed from tiles equal those of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import pair_ranks
from finelip_fast.ranking import TOLERANCE, tiled_ranks

ALPHAS = (1.0, 0.0, 0.8)


def unit_rows(*shape: int, seed: int) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def nearly_tied(scores: torch.Tensor) -> bool:
    """Whether any two scores of a row or column are so close that rounding decides their order."""
    ordered = scores.sort(dim=0).values.diff(dim=0), scores.sort(dim=1).values.diff(dim=1)
    return any(bool((gaps < 4 * TOLERANCE).any()) for gaps in ordered)


@settings(deadline=None, max_examples=40)
@given(pictures=st.integers(1, 12), captions=st.integers(1, 3), tile=st.integers(1, 20), seed=st.integers(0, 10_000))
def test_tiles_do_not_matter(pictures: int, captions: int, tile: int, seed: int) -> None:
    images, texts = unit_rows(pictures, 4, 16, seed=seed), unit_rows(pictures * captions, 5, 16, seed=seed + 1)
    owners = torch.arange(pictures).repeat(captions)[
        torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    ]
    for alpha, ranks in zip(ALPHAS, tiled_ranks(images, texts, owners, ALPHAS, tile=tile), strict=True):
        scores = clim_scores(images, texts, alpha=alpha)
        assume(not nearly_tied(scores))
        for actual, expected in zip(ranks, pair_ranks(scores, owners), strict=True):
            assert actual.tolist() == expected.tolist()


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


@pytest.mark.parametrize("tile", [1, 2, 3, 5, 40])
def test_copies_count_against_whatever_tile_they_are_in(tile: int) -> None:
    """Each of 13 pictures occurs three times, with one caption each: among three equal ones, the right one ranks last."""
    different = unit_rows(13, 7, 24, seed=3)
    images = different.repeat(3, 1, 1)
    for i2t, t2i in tiled_ranks(images, images, torch.arange(39), ALPHAS, tile=tile):
        assert i2t.tolist() == t2i.tolist() == [3] * 39


@pytest.mark.parametrize(
    ("pictures", "owners"),
    [(2, [0, 0]), (2, [0, 1, 2]), (2, [0]), (0, [])],
    ids=["one without", "unknown", "too few", "none"],
)
def test_what_cannot_be_ranked_is_refused(pictures: int, owners: list[int]) -> None:
    images, texts = torch.eye(3)[:pictures, None], torch.eye(3)[: len(owners), None]
    with pytest.raises(InputError, match=f"each of the {pictures} pictures"):
        tiled_ranks(images, texts, torch.tensor(owners, dtype=torch.int64), ALPHAS)


class Watched:
    """Rows that record how many were read at once."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.most = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        rows = self.rows[index]
        self.most = max(self.most, len(rows))
        return rows


def test_no_more_than_a_tile_is_read_at_once() -> None:
    images, texts = Watched(unit_rows(200, 2, 8, seed=0)), Watched(unit_rows(400, 2, 8, seed=1))
    tiled_ranks(images, texts, torch.arange(200).repeat(2), ALPHAS, tile=50)
    assert (images.most, texts.most) == (50, 50)
