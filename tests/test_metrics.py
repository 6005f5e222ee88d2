"""Ranks and metrics, checked against sorting, counting and small tables by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast import metrics
from finelip_fast.errors import InputError
from finelip_fast.metrics import (
    WAYS,
    best_ranks,
    bootstrap_interval,
    mcnemar,
    pair_ranks,
    pair_summary,
    quality,
    recall,
    summary,
)

SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3],
        [0.8, 0.7, 0.05, 0.0],
        [0.3, 0.2, 0.1, 0.4],
        [0.1, 0.2, 0.3, 0.5],
    ]
)


def test_ranks_by_eye():
    i2t, t2i = pair_ranks(SCORES)
    assert i2t.tolist() == [1, 2, 4, 1]
    assert t2i.tolist() == [1, 1, 3, 1]
    assert i2t.dtype == t2i.dtype == torch.int64


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
    assert pair_ranks(torch.full((3, 3), torch.nan))[0].tolist() == [3, 3, 3]
    right_is_nan = torch.eye(3).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))
    assert pair_ranks(right_is_nan)[0].tolist() == [3, 1, 1]


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 12))
def test_ranks_are_positions_in_sorted_order_and_recall_grows_with_k(seed, size):
    scores = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    by_hand = [1 + sorted(row, reverse=True).index(row[index]) for index, row in enumerate(scores.tolist())]
    assert pair_ranks(scores)[0].tolist() == by_hand
    values = recall(scores, ks=tuple(range(1, size + 1)))
    by_direction = {way: [values[f"{way}_recall@{k}"] for k in range(1, size + 1)] for way in ("i2t", "t2i")}
    for shares in by_direction.values():
        assert shares == sorted(shares)
        assert shares[-1] == 1.0


NAN, INF = math.nan, math.inf


def bools(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


@pytest.mark.parametrize(
    ("scores", "right", "rank"),
    [
        pytest.param([0.9, 0.5, 0.4, 0.1], "0110", 2, id="the-best-right-one-counts"),
        pytest.param([0.9, 0.9, 0.9, 0.1], "1110", 1, id="right-ones-may-tie"),
        pytest.param([0.5, 0.5, 0.5, 0.1], "0110", 2, id="a-tie-with-a-wrong-one-counts-against"),
        pytest.param([NAN, 0.5, 0.4, NAN], "0110", 3, id="wrong-nan-counts-against"),
        pytest.param([0.3, NAN, 0.4, 0.1], "0110", 1, id="right-nan-yields-to-another-right-one"),
        pytest.param([0.3, NAN, NAN, -INF], "0110", 3, id="only-nan-is-right"),
        pytest.param([0.3, INF, -INF, 0.1], "0110", 1, id="infinity"),
        pytest.param([0.3, 0.2, 0.1, NAN], "1111", 1, id="nothing-is-wrong"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_ranks_by_eye(scores, right, rank, dtype):
    ranks = best_ranks(torch.tensor([scores], dtype=dtype), bools(right)[None])
    assert ranks.tolist() == [rank]
    assert ranks.dtype == torch.int64


def test_pair_ranks_by_eye():
    scores = torch.tensor([[0.1, 0.9, 0.8, 0.3, 0.2], [0.6, 0.7, 0.5, 0.4, 0.2]])
    i2t, t2i = pair_ranks(scores, torch.tensor([0, 1, 0, 1, 1]))
    assert i2t.tolist() == [2, 1]  # picture 0: caption 2 comes after caption 1
    assert t2i.tolist() == [2, 2, 1, 1, 2]  # the last is a tie


def pessimistic_rank(scores: list[float], right: list[bool]) -> int:
    """Return the first right item's rank when ties and NaN are resolved against the right items."""
    unclear = {True: -INF, False: INF}
    known = [
        (unclear[label] if math.isnan(score) else score, label) for score, label in zip(scores, right, strict=True)
    ]
    return 1 + [label for _, label in sorted(known, key=lambda item: (-item[0], item[1]))].index(True)


@st.composite
def captioned(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scores with many ties, and at least one caption per picture, in any order."""
    pictures, extras = draw(st.integers(1, 6)), draw(st.lists(st.integers(0, 5), max_size=8))
    picture_of = draw(st.permutations([*range(pictures), *(index % pictures for index in extras)]))
    size = pictures * len(picture_of)
    scores = draw(st.lists(st.sampled_from([NAN, -INF, -1.0, 0.0, 0.5, 1.0, INF]), min_size=size, max_size=size))
    return torch.tensor(scores).view(pictures, -1), torch.tensor(picture_of)


@settings(deadline=None)
@given(case=captioned(), data=st.data())
def test_pair_ranks_are_positions_in_pessimistic_order_and_follow_a_permutation(case, data):
    scores, picture_of = case
    i2t, t2i = pair_ranks(scores, picture_of)
    owners = picture_of.tolist()
    for picture, row in enumerate(scores.tolist()):
        assert i2t[picture] == pessimistic_rank(row, [owner == picture for owner in owners])
    for caption, column in enumerate(scores.T.tolist()):
        assert t2i[caption] == pessimistic_rank(column, [owners[caption] == picture for picture in range(len(scores))])
    order = torch.tensor(data.draw(st.permutations(range(len(owners)))))
    moved_i2t, moved_t2i = pair_ranks(scores[:, order], picture_of[order])
    assert moved_i2t.equal(i2t)
    assert moved_t2i.equal(t2i[order])


def counted_recall(scores: torch.Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """Recall of pairs counted along the diagonal; any item not ranked below the right one counts against it."""
    shares = {}
    for way, matrix in (("i2t", scores), ("t2i", scores.T)):
        ranks = (~(matrix < matrix.diagonal()[:, None])).sum(dim=1)
        shares |= {f"{way}_recall@{k}": (ranks <= k).double().mean().item() for k in ks}
    return shares


@settings(deadline=None)
@given(data=st.data(), size=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_caption_a_picture_is_the_plain_protocol_to_the_bit(data, size, dtype):
    values = st.sampled_from([NAN, -INF, -1.0, 0.0, 0.5, 1.0, INF])
    scores = torch.tensor(data.draw(st.lists(values, min_size=size**2, max_size=size**2)), dtype=dtype).view(size, size)
    assert recall(scores, ks=(1, 2, 5)) == counted_recall(scores, (1, 2, 5))
    for ranks, given_rows in zip(pair_ranks(scores), pair_ranks(scores, torch.arange(size)), strict=True):
        assert ranks.equal(given_rows)


def test_more_captions_than_pictures_need_to_be_told_whose_they_are():
    message = r"expected as many pictures as captions without picture_of, got scores \[2, 3\]; pass picture_of"
    for rank in (recall, pair_ranks):
        with pytest.raises(InputError, match=message):
            rank(torch.zeros(2, 3))


def test_metrics_are_of_tensors():
    for call in (
        lambda: pair_ranks(torch.eye(2).numpy()),
        lambda: best_ranks(torch.eye(2), [[True]]),
        lambda: summary([1, 2]),
        lambda: bootstrap_interval([1.0]),
        lambda: mcnemar([True], [False]),
    ):
        with pytest.raises(InputError, match=r"expected \w+ as a tensor, got (.|\n)*; pass torch\.as_tensor\(\w+\)"):
            call()


def test_a_summary_of_both_directions_is_that_of_each():
    ranks = torch.tensor([4, 1, 10]), torch.tensor([1, 2])
    expected = {
        f"{way}_{name}": value
        for way, way_ranks in zip(WAYS, ranks, strict=True)
        for name, value in summary(way_ranks, (1, 4)).items()
    }
    actual = pair_summary(ranks, (1, 4))
    assert actual == expected
    assert next(iter(actual)) == "i2t_recall@1"
    with pytest.raises(InputError, match="from 1, got 0"):
        pair_summary((torch.tensor([1]), torch.tensor([0])))


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bool), r"scores \[Q, N\] of floats, not empty, got \[3\]"),
        (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), r"not empty, got \[0, 3\]"),
        (torch.eye(2).long(), torch.eye(2) > 0, "of floats, not empty, got .* of int64"),
        (torch.eye(2), torch.eye(2), r"right \[2, 2\] of bools, like scores, got \[2, 2\] of float32"),
        (torch.eye(2), torch.ones(2, 3) > 0, r"right \[2, 2\] of bools, like scores, got \[2, 3\]"),
        (torch.eye(2), torch.tensor([[True, True], [False, False]]), "got none for query 1"),
    ],
)
def test_best_ranks_refuses(scores, right, message):
    with pytest.raises(InputError, match=message):
        best_ranks(scores, right)


@pytest.mark.parametrize(
    ("scores", "picture_of", "message"),
    [
        (torch.zeros(3), torch.arange(3), r"scores \[P, C\]"),
        (torch.zeros(2, 0), torch.arange(0), "not empty"),
        (torch.zeros(2, 3), torch.arange(2), r"picture_of \[3\] of int64, got \[2\]"),
        (torch.zeros(2, 3), torch.zeros(3), r"picture_of \[3\] of int64, got \[3\] of float32"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), "from 0 to 1, got 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1, 1]), "from 0 to 1, got -1 to 1"),
        (torch.zeros(2, 3), torch.tensor([1, 1, 1]), "got none for query 0"),
    ],
)
def test_pair_ranks_refuses(scores, picture_of, message):
    with pytest.raises(InputError, match=message):
        pair_ranks(scores, picture_of)


def test_summary_by_eye():
    assert summary(torch.tensor([4, 1, 10, 1]), ks=(1, 4)) == pytest.approx(
        {"recall@1": 0.5, "recall@4": 0.75, "mean_rank": 4.0, "median_rank": 2.5, "mrr": (0.25 + 1 + 0.1 + 1) / 4}
    )
    assert list(summary(torch.tensor([7]))) == ["recall@1", "recall@5", "recall@10", "mean_rank", "median_rank", "mrr"]


@given(values=st.lists(st.integers(1, 50), min_size=1, max_size=30))
def test_summary_is_what_the_standard_library_counts(values):
    assert summary(torch.tensor(values), ks=(1, 5)) == pytest.approx(
        {
            "recall@1": statistics.mean(value <= 1 for value in values),
            "recall@5": statistics.mean(value <= 5 for value in values),
            "mean_rank": statistics.mean(values),
            "median_rank": statistics.median(values),
            "mrr": 1 / statistics.harmonic_mean(values),
        }
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.arange(0), "ranks .* not empty"),
        (torch.ones(2), r"integers, not empty, got \[2\] of float32"),
        (torch.ones(2, dtype=torch.bool), "of bool"),
        (torch.ones(2, 2, dtype=torch.int64), r"\[2, 2\]"),
        (torch.tensor([1, 0]), "from 1, got 0"),
    ],
)
def test_summary_refuses(values, message):
    with pytest.raises(InputError, match=message):
        summary(values)


@pytest.mark.parametrize(
    ("ks", "message"), [(5, "ks to be a list"), ((0,), "ks of at least 1"), ((1.5,), "ks to be an integer")]
)
def test_cut_offs_are_whole_numbers(ks, message):
    with pytest.raises(InputError, match=message):
        summary(torch.tensor([1, 2]), ks)


def test_quality_by_eye():
    values = {"i2t_recall@1": 0.2, "i2t_mrr": 0.3, "t2i_recall@1": 0.4, "t2i_mrr": 0.6}
    assert quality(values) == (0.3, 0.45)
    assert quality(values, dict.fromkeys(values, 0.5)) == (0.4, 0.475)


def test_bootstrap_has_the_width_of_the_normal_interval():
    hits = torch.arange(1000) % 10 < 3
    low, high = bootstrap_interval(hits)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert bootstrap_interval(hits) == (low, high)
    assert bootstrap_interval(hits, seed=1) != (low, high)
    inner_low, inner_high = bootstrap_interval(hits, confidence=0.5)
    assert low < inner_low < 0.3 < inner_high < high


def test_bootstrap_holds_the_true_mean_as_often_as_it_says():
    samples = torch.rand(200, 60, generator=torch.Generator().manual_seed(0))
    intervals = [bootstrap_interval(sample, confidence=0.8, resamples=300) for sample in samples]
    assert statistics.mean(low <= 0.5 <= high for low, high in intervals) == pytest.approx(0.8, abs=0.08)


def test_captions_that_are_found_together_are_drawn_together():
    by_picture = torch.arange(100) % 2 == 0
    captions, groups = by_picture.repeat_interleave(5), torch.arange(100).repeat_interleave(5)
    assert bootstrap_interval(captions, groups=groups) == pytest.approx(bootstrap_interval(by_picture))
    low, high = bootstrap_interval(captions)
    assert high - low < 0.6 * 0.2  # singly, they look like five times the evidence: narrower by the root of five
    renamed = 7 - 3 * groups  # numbers are only names, and the order of values is irrelevant
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(captions[order], groups=renamed[order]) == pytest.approx((0.4, 0.6), abs=0.03)


def test_groups_of_different_sizes_weigh_by_their_members():
    values, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([5, 5, 5, 9])
    assert bootstrap_interval(values, confidence=0.2, groups=groups) == (0.75, 0.75)  # one of each: half of all draws
    assert bootstrap_interval(values, groups=groups) == (0.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_bootstrap_stays_among_the_values_and_single_groups_change_nothing(values, seed):
    tensor = torch.tensor(values)
    low, high = bootstrap_interval(tensor, resamples=100, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert bootstrap_interval(tensor, resamples=100, seed=seed, groups=torch.arange(len(values))) == (low, high)


def test_constant_values_have_an_interval_of_no_width():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    assert bootstrap_interval(torch.full((7,), 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(torch.full((7,), 0.25), groups=groups) == (0.25, 0.25)


def test_bootstrap_in_small_blocks_is_the_same(monkeypatch):
    values = torch.rand(37, generator=torch.Generator().manual_seed(0))
    expected = bootstrap_interval(values, resamples=101)
    monkeypatch.setattr(metrics, "_DRAWS", 5 * 37)
    assert bootstrap_interval(values, resamples=101) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(metrics, "_DRAWS", 1)
    assert bootstrap_interval(values, resamples=101) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(0), {}, r"values \[n\] of numbers, not empty, got \[0\]"),
        (torch.zeros(2, 2), {}, r"got \[2, 2\]"),
        (torch.tensor([1.0, NAN]), {}, "finite"),
        (torch.zeros(3), {"confidence": 1.0}, r"confidence in \(0, 1\), got 1.0"),
        (torch.zeros(3), {"confidence": "95 %"}, r"confidence in \(0, 1\), got '95 %'"),
        (torch.zeros(3), {"resamples": 0}, "resamples of at least 1, got 0"),
        (torch.zeros(3), {"resamples": 2000.0}, r"resamples to be an integer, got 2000\.0"),
        (torch.zeros(3), {"seed": "0"}, "seed to be an integer, got '0'"),
        (torch.zeros(3), {"seed": 1 << 64}, "seed of at most"),
        (torch.zeros(3), {"groups": torch.arange(2)}, r"groups \[3\] of integers, got \[2\]"),
        (torch.zeros(3), {"groups": torch.zeros(3)}, "of integers, got .* of float32"),
    ],
)
def test_bootstrap_refuses(values, options, message):
    with pytest.raises(InputError, match=message):
        bootstrap_interval(values, **options)


def hits(only_a: int, only_b: int, a_and_b: int = 1, neither: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two runs with the given number of queries in each cell of the table."""
    a = torch.tensor([True] * only_a + [False] * only_b + [True] * a_and_b + [False] * neither)
    b = torch.tensor([False] * only_a + [True] * only_b + [True] * a_and_b + [False] * neither)
    return a, b


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (3, 0, 2 / 8),
        (4, 1, 2 * (1 + 5) / 32),
        (6, 2, 2 * (1 + 8 + 28) / 256),
        (2, 2, 1.0),  # 2 * 11/16, capped at 1
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert mcnemar(*hits(only_a, only_b)) == pytest.approx(p, rel=1e-12)
    assert mcnemar(*hits(only_b, only_a, a_and_b=9, neither=0)) == pytest.approx(p, rel=1e-12)


@settings(deadline=None)
@given(only_a=st.integers(0, 400), only_b=st.integers(0, 400))
def test_mcnemar_is_the_sum_in_whole_numbers_either_way_round(only_a, only_b):
    a, b = hits(only_a, only_b)
    n = only_a + only_b
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n)
    assert mcnemar(a, b) == pytest.approx(exact, rel=1e-10)
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize(("deviations", "p"), [(0, 1.0), (1.96, 0.05), (3.29, 0.001)])
def test_mcnemar_of_a_million_queries_is_the_normal_tail(deviations, p):
    excess = round(deviations * math.sqrt(1e6) / 2)
    assert mcnemar(*hits(500_000 + excess, 500_000 - excess)) == pytest.approx(p, rel=0.01)


def test_mcnemar_of_a_million_queries_on_one_side_is_none_at_all():
    assert mcnemar(*hits(1_000_000, 0)) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (bools("10"), bools("100"), "same queries, got 2 and 3"),
        (torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool), r"a \[n\] of bools, not empty"),
        (bools("10"), torch.zeros(2), r"b \[n\] of bools, not empty, got \[2\] of float32"),
        (bools("10")[None], bools("10")[None], r"a \[n\] of bools, not empty, got \[1, 2\]"),
    ],
)
def test_mcnemar_refuses(a, b, message):
    with pytest.raises(InputError, match=message):
        mcnemar(a, b)
