"""The advice in the operations' errors is followed, and works."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.errors import FineLIPError
from finelip_fast.kernels import (
    QuantizedItems,
    atrm,
    clim_scores,
    clim_topk,
    clim_topk_int8,
    cosine_candidates,
    dispatch,
    quantize,
    quantize_items,
)
from finelip_fast.kernels import settings as launch_settings

QUERIES, ITEMS = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((3, 4, 8), (5, 6, 8)))
VALUES, SCALES = quantize(ITEMS)
QUANTIZED = quantize_items(ITEMS)
MASK = torch.tensor([True, False, True, True, False])


def search(items: Any = ITEMS, *, queries: Tensor = QUERIES, among: Any = None) -> Tensor:
    return clim_topk(queries, items, 2, among=among)[0]


def search_int8(quantized: Any, items: Any = ITEMS) -> Tensor:
    return clim_topk_int8(QUERIES, items, quantized, 2)[0]


def candidates(values: Tensor, scales: Tensor) -> Tensor:
    return cosine_candidates(QUERIES[:, 0], values, scales, 2)


def aggregate(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    parameters = (torch.ones(8), torch.zeros(8), torch.ones(5, 8), torch.zeros(5), torch.ones(4, 5), torch.zeros(4))
    return atrm(x, *parameters, torch.ones(1), lengths=lengths, anchor=ITEMS[:, 0])


class Case(NamedTuple):
    """A refused call, the advice in its error, and the call that follows the advice."""

    refused: Callable[[], Tensor]
    advice: str
    mended: Callable[[], Tensor]


INTEGERS, COMPLEX, FLOATS = (10 * ITEMS).int(), ITEMS + 0j, torch.tensor([3.0, 6, 0, 2, 1])
WRITTEN = ITEMS.numpy().astype(">f4")
SUMS = torch.func.grad(lambda queries: search(queries=queries).sum())
COSINES = torch.func.grad(lambda queries: cosine_candidates(queries, VALUES[:, 0], SCALES[:, 0], 2).float().sum())
FOUND = ITEMS[clim_topk(QUERIES, ITEMS, 2)[1][0]]
SCORES_OF_FOUND = torch.func.grad(lambda queries: clim_scores(queries, FOUND).sum())
COSINES_OF_FOUND = torch.func.grad(lambda queries: (queries @ FOUND[:, 0].T).sum())

CASES = {
    "integers": Case(lambda: clim_scores(QUERIES, INTEGERS), "convert it (.float())",
                     lambda: clim_scores(QUERIES, INTEGERS.float())),
    "imaginary": Case(lambda: clim_scores(QUERIES, COMPLEX), "convert its real part (.real.float())",
                      lambda: clim_scores(QUERIES, COMPLEX.real.float())),
    "lengths": Case(lambda: aggregate(ITEMS, FLOATS), "convert it (.long())", lambda: aggregate(ITEMS, FLOATS.long())),
    "imaginary lengths": Case(lambda: aggregate(ITEMS, FLOATS + 0j), "convert its real part (.real.long())",
                              lambda: aggregate(ITEMS, (FLOATS + 0j).real.long())),
    "searched integers": Case(lambda: search(ITEMS.int()), "convert them", lambda: search(ITEMS.int().float())),
    "byte order": Case(lambda: search(WRITTEN), "convert them (.astype)", lambda: search(WRITTEN.astype("f4"))),
    "no piece": Case(lambda: search([]), "pass an empty tensor of the items' shape", lambda: search(torch.empty(0, 6, 8))),
    "pieces": Case(lambda: search([ITEMS, ITEMS.half()]), "convert them first",
                   lambda: search([ITEMS, ITEMS.half().float()])),
    "long rows": Case(lambda: search(2 * ITEMS), "normalise them (torch.nn.functional.normalize)",
                      lambda: search(torch.nn.functional.normalize(2 * ITEMS, dim=-1))),
    "numbers": Case(lambda: search(among=[1, 2]), "make it a tensor (torch.as_tensor)",
                    lambda: search(among=torch.as_tensor([1, 2]))),
    "mask": Case(lambda: search(among=MASK), "for a mask: mask.nonzero()[:, 0]",
                 lambda: search(among=MASK.nonzero()[:, 0])),
    "twice": Case(lambda: search(among=torch.tensor([2, 1, 2])), "sort them (among.unique())",
                  lambda: search(among=torch.tensor([2, 1, 2]).unique())),
    "one side": Case(lambda: clim_scores(QUERIES, VALUES, item_scales=SCALES), "see quantize",
                     lambda: clim_scores(quantize(QUERIES)[0], VALUES, query_scales=quantize(QUERIES)[1], item_scales=SCALES)),
    "candidates": Case(lambda: candidates(ITEMS[:, 0], SCALES[:, 0]), "in int8, got torch.float32; see quantize",
                       lambda: candidates(*quantize(ITEMS[:, 0]))),
    "their scales": Case(lambda: candidates(VALUES[:, 0], SCALES), "in torch.float32; see quantize",
                         lambda: candidates(*quantize(ITEMS[:, 0]))),
    "tuple": Case(lambda: search_int8(tuple(QUANTIZED)), "see quantize_items", lambda: search_int8(quantize_items(ITEMS))),
    "other items": Case(lambda: search_int8(QUANTIZED, ITEMS[:3]), "quantize these items",
                        lambda: search_int8(quantize_items(ITEMS[:3]), ITEMS[:3])),
    "other dtypes": Case(lambda: search_int8(QuantizedItems(*(field.double() for field in QUANTIZED))), "quantize these items",
                         lambda: search_int8(quantize_items(ITEMS))),
    "search in a transformation": Case(lambda: SUMS(QUERIES), "search outside of it, and take clim_scores of the items found",
                                       lambda: SCORES_OF_FOUND(QUERIES)),
    "candidates in a transformation": Case(lambda: COSINES(QUERIES[:, 0]),
                                           "search outside of it, and take the cosines of the items found",
                                           lambda: COSINES_OF_FOUND(QUERIES[:, 0])),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_that_is_mended_as_advised_returns_numbers(case: Case) -> None:
    with pytest.raises(FineLIPError, match=re.escape(case.advice)):
        case.refused()
    assert case.mended().isfinite().all()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """This machine's launch settings, replaced by an empty table."""
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))
    launch_settings._tables.cache_clear()
    yield launch_settings.cache_file()
    launch_settings._tables.cache_clear()


@pytest.mark.parametrize(
    ("content", "advice"),
    [("{", r"; delete it to go back"), ('{"a case": {"other": 3}}', r"; tune again, or delete ")],
    ids=["damaged", "of another version"],
)
@pytest.mark.parametrize("again", [False, True], ids=["deleted", "tuned"])
def test_launch_settings_that_are_deleted_or_tuned_again_work_in_the_same_process(table, content, advice, again):
    class Settings(NamedTuple):
        block: int

    table.write_text(content)
    with pytest.raises(FineLIPError, match=advice) as caught:
        launch_settings.tuned("a case", Settings)
    assert str(table) in str(caught.value)
    if again and "tune" in advice:
        launch_settings.save({"a case": {"block": 16}})
    else:
        table.unlink()
    assert launch_settings.tuned("a case", Settings) == (Settings(16) if table.exists() else None)


@pytest.mark.parametrize("forced", ["fast", "triton"])
def test_kernels_that_are_not_forced_run(monkeypatch, forced):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    with pytest.raises(FineLIPError, match=f"{dispatch.VARIABLE}.*; unset it to choose automatically"):
        clim_scores(QUERIES, ITEMS)
    monkeypatch.delenv(dispatch.VARIABLE)
    assert clim_scores(QUERIES, ITEMS).isfinite().all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="of the kernels that are compiled")
def test_what_the_kernels_do_not_take_the_public_functions_do() -> None:
    kernel = pytest.importorskip("finelip_fast.kernels.clim.triton")
    parts = pytest.importorskip("finelip_fast.kernels.atrm.parts_triton")
    for queries in (QUERIES, torch.ones(1, 300, 8)):
        with pytest.raises(FineLIPError, match=r": use finelip_fast\.kernels\.clim_scores$"):
            kernel.scores(queries, ITEMS, alpha=0.8)
        assert clim_scores(queries, ITEMS).isfinite().all()
    with pytest.raises(FineLIPError, match=r": use finelip_fast\.kernels\.atrm$"):
        parts.capability_of(torch.device("cpu"))
    assert aggregate(ITEMS).isfinite().all()
