"""Searching: equal results in every exact mode and layout, reported losses of two-stage searches, filters."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, faiss
from finelip_fast.index.arrays import array_checksums, map_arrays, read_contents, write_arrays
from finelip_fast.index.plan import Rates, measure, plan
from finelip_fast.index.search import Tuning
from finelip_fast.index.tune import sample_queries, tune
from finelip_fast.kernels import clim_scores, clim_topk, cpu

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=16)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def fill(index: Index, count: int, parts: int = 1, seed: int = 0) -> None:
    """Add items ``0`` to ``count - 1``, identical for any number of parts."""
    rows = embeddings(count, seed)
    for part in torch.arange(count).tensor_split(parts):
        numbers = part.tolist()
        index.add([str(n) for n in numbers], rows[numbers], [{"n": n, "odd": bool(n % 2)} for n in numbers])


def ids(index: Index, queries: Tensor, k: int, **options: object) -> list[list[str]]:
    return [[item.id for item in items] for items in index.search(queries, k, **options).items]


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(1, 9),
    deletions=st.sets(st.integers(0, 39), max_size=20),
    dtype=st.sampled_from(["float16", "int8"]),
    maintained=st.booleans(),
    low=st.one_of(st.none(), st.integers(0, 40)),
    k=st.integers(1, 12),
    seed=st.integers(0, 2),
)
def test_the_layout_changes_nothing(
    parts: int, deletions: set[int], dtype: str, maintained: bool, low: int | None, k: int, seed: int
) -> None:
    """Results do not depend on segments, gaps, compaction, reopening, copying, exact mode, or batching of queries."""
    spec = replace(SPEC, dtype=dtype)
    queries = embeddings(3, seed=100 + seed)
    where = None if low is None else f"n >= {low}"
    memory_index = Index(spec)
    fill(memory_index, 40, seed=seed)
    memory_index.delete([str(n) for n in deletions])
    expected = memory_index.search(queries, k, mode="exact", where=where)
    with tempfile.TemporaryDirectory() as folder:
        with closing(Index(spec, Path(folder) / "index")) as index:
            fill(index, 40, parts, seed)
            index.delete([str(n) for n in deletions])
            if maintained:
                index.maintain()
            index.snapshot(Path(folder) / "copy")
        for name in ("index", "copy"):
            with closing(Index(spec, Path(folder) / name)) as index:
                for mode in ("exact", "exact-int8"):
                    results = index.search(queries, k, mode=mode, where=where)
                    assert [[item[1:2] for item in row] for row in results.items] == [
                        [item[1:2] for item in row] for row in expected.items
                    ]
                    assert torch.equal(results.scores, expected.scores)
                    assert torch.equal(results.numbers, expected.numbers)
                two = index.search(queries, k, mode="two-stage", candidates=k, where=where)
                alone = [
                    index.search(query, k, mode="two-stage", candidates=k, where=where) for query in queries.split(1)
                ]
                assert torch.equal(two.numbers, torch.cat([results.numbers for results in alone]))
                in_memory = memory_index.search(queries, k, mode="two-stage", candidates=k, where=where)
                assert torch.equal(two.numbers, in_memory.numbers)


@settings(max_examples=25, deadline=None)
@given(
    parts=st.integers(1, 5),
    dtype=st.sampled_from(["float16", "int8"]),
    low=st.one_of(st.none(), st.integers(0, 40)),
    k=st.integers(1, 45),
    deletions=st.sets(st.integers(0, 39), max_size=10),
)
def test_the_global_cosine_alone_ranks_as_among_all_rows(
    parts: int, dtype: str, low: int | None, k: int, deletions: set[int]
) -> None:
    """Hits, order and scores with ``alpha=1`` equal those of whole embeddings, with ties in order of insertion."""
    index = Index(replace(SPEC, dtype=dtype))
    rows = embeddings(20).repeat(2, 1, 1)  # each row twice
    for part in torch.arange(40).tensor_split(parts):
        numbers = part.tolist()
        index.add([str(n) for n in numbers], rows[numbers], [{"n": n} for n in numbers])
    index.delete([str(n) for n in deletions])
    queries = embeddings(3, seed=7).half().float()
    among = [at for at, item in enumerate(index.items()) if low is None or item.metadata["n"] >= low]
    scores, at = clim_topk(queries, index.embeddings.float()[among], k, alpha=1.0)
    for mode in ("exact", "exact-int8", "two-stage", "auto"):
        results = index.search(
            queries, k, alpha=1.0, mode=mode, candidates=40, where=None if low is None else f"n >= {low}"
        )
        assert torch.equal(results.scores, scores)
        assert results.numbers.tolist() == [[among[place] for place in places] for places in at.tolist()]
        torch.testing.assert_close(results.global_scores, scores)
        for query, numbers, fine in zip(queries, results.numbers, results.fine_scores, strict=True):
            expected = clim_scores(query[None], index.embeddings[numbers].float(), alpha=0.0)[0]
            torch.testing.assert_close(fine, expected, atol=1e-3, rtol=0)


def test_of_the_global_cosine_no_copies_are_made(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 30)
        assert index.search(embeddings(1, seed=9), 5, alpha=1.0, mode="exact-int8").mode == "exact-int8"
        assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_global_rows_alone_are_kept_and_searched(tmp_path: Path, dtype: str) -> None:
    spec = replace(SPEC, tokens=1, alpha=1.0, dtype=dtype)
    rows, queries = embeddings(60)[:, :1], embeddings(3, seed=9)[:, :1]
    with closing(Index(spec, tmp_path)) as index:
        index.add([str(n) for n in range(60)], rows, [{}] * 60)
    with closing(Index(spec, tmp_path)) as index:
        index.maintain()
        assert index.check() == {}
        tuning, _ = tune(index, queries, k=5, candidates=[20], progress=False)
        assert tuning.alpha == 1
        expected = (queries[:, 0] @ rows[:, 0].T).argsort(dim=1, descending=True)[:, :5]
        for mode in ("exact", "exact-int8", "two-stage", "auto"):
            results = index.search(queries, 5, mode=mode, candidates=50)
            assert results.numbers.tolist() == expected.tolist()
            assert results.fine_scores is None


def test_a_folder_of_untrained_rows_goes_on_with_their_number(tmp_path: Path) -> None:
    """New items of an untrained checkpoint have one row and old ones have all; only the first row counts."""
    old = replace(SPEC, alpha=1.0)
    spec = replace(old, tokens=1)
    rows = embeddings(40)
    with closing(Index(old, tmp_path)) as index:
        index.add([str(n) for n in range(20)], rows[:20], [{}] * 20)
    assert spec.as_stored(tmp_path) == old
    with closing(Index(spec.as_stored(tmp_path), tmp_path)) as index:
        index.add([str(n) for n in range(20, 40)], rows[20:, :1], [{}] * 20)
        index.maintain()
        assert index.check() == {}
        results = index.search(rows[:, :1], 1)
    assert results.numbers.flatten().tolist() == list(range(40))
    assert results.fine_scores is None
    trained = replace(SPEC, checkpoint="trained")
    assert trained.as_stored(tmp_path) == trained
    with pytest.raises(
        StoreError, match=r"had no trained aggregators.* or index the pictures again into another folder"
    ):
        Index(trained, tmp_path)
    other_spec = replace(spec, checkpoint="other")
    assert other_spec.as_stored(tmp_path) == other_spec
    with closing(Index(SPEC)) as index, pytest.raises(InputError, match=r"expected embeddings"):
        index.add(["a"], rows[:1, :1], [{}])


def test_int8_is_searched_by_what_is_kept(method: ModuleType) -> None:
    index = Index(replace(SPEC, dtype="int8"))
    fill(index, 50, 3)
    queries = embeddings(4, seed=9)
    items = index.embeddings
    assert (items - embeddings(50)).abs().max() < 0.01
    expected = method.score_matrix(queries.double().numpy(), items.double().numpy(), 0.8)
    results = index.search(queries, 5)
    assert results.mode == "exact-int8"
    assert results.numbers.tolist() == np.argsort(-expected, axis=1, kind="stable")[:, :5].tolist()
    np.testing.assert_allclose(results.scores.numpy(), np.sort(expected)[:, ::-1][:, :5], atol=1e-5)


def test_two_stages_score_the_candidates_and_no_others(method: ModuleType) -> None:
    """The candidates are the items with the highest global cosine."""
    index = Index(SPEC)
    fill(index, 60, 4)
    query = embeddings(1, seed=9)
    rows = embeddings(60).double().numpy()
    cosines = method.score_matrix(query.double().numpy(), rows, 1.0)[0]
    chosen = np.argsort(-cosines)[:8]
    scores = method.score_matrix(query.double().numpy(), rows, 0.0)[0]
    expected = chosen[np.argsort(-scores[chosen])][:3]
    results = index.search(query, 3, alpha=0.0, mode="two-stage", candidates=8)
    assert results.mode == "two-stage"
    assert results.numbers[0].tolist() == expected.tolist()
    everything = index.search(query, 3, alpha=0.0, mode="two-stage", candidates=60)
    assert everything.numbers[0].tolist() == np.argsort(-scores)[:3].tolist()
    assert everything.mode == "two-stage"


@pytest.mark.parametrize("mode", ["exact", "exact-int8", "two-stage"])
@pytest.mark.parametrize("where", ["n < 0", "n = 17", "odd = true", "n in (3, 5, 41) or odd = false", "not n > 12"])
def test_a_filter_is_exact(mode: str, where: str) -> None:
    index = Index(SPEC)
    fill(index, 50, 7)
    index.delete(["17", "3"])
    lets_through: Callable[[int], bool] = {
        "n < 0": lambda n: False,
        "n = 17": lambda n: n == 17,
        "odd = true": lambda n: n % 2 == 1,
        "n in (3, 5, 41) or odd = false": lambda n: n in (3, 5, 41) or n % 2 == 0,
        "not n > 12": lambda n: n <= 12,
    }[where]
    queries = embeddings(2, seed=9)
    everything = ids(index, queries, 50)
    expected = [[item for item in row if lets_through(int(item))][:6] for row in everything]
    assert ids(index, queries, 6, mode=mode, where=where, candidates=50) == expected
    assert ids(index, queries, 6, mode=mode, where=where)[0] == expected[0]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_both_parts_of_a_score_are_exact_in_any_batch(dtype: str) -> None:
    index, queries = Index(replace(SPEC, dtype=dtype)), embeddings(3, seed=9)
    fill(index, 60, 4)
    results = index.search(queries, 5)
    rows = index._searcher.store.view().read(torch.arange(60))
    similarity = torch.einsum("qld,nmd->qnlm", queries.to(rows.dtype).double(), rows.double())
    leaky = torch.nn.functional.leaky_relu
    fine = leaky(similarity.amax(3), 0.1).mean(2) + leaky(similarity.amax(2), 0.1).mean(2)
    assert torch.equal(results.fine_scores, fine.gather(1, results.numbers).float())
    assert torch.equal(results.global_scores, similarity[..., 0, 0].gather(1, results.numbers).float())
    for number, query in enumerate(queries.split(1)):
        alone = index.search(query, 5)
        assert torch.equal(alone.fine_scores[0], results.fine_scores[number])
        assert torch.equal(alone.global_scores[0], results.global_scores[number])


@pytest.mark.parametrize("where", [["n = 1"], {}, 5])
def test_a_filter_that_is_no_text_is_refused(where: object) -> None:
    index = Index(SPEC)
    fill(index, 3)
    with pytest.raises(InputError, match="expected"):
        index.search(embeddings(1), 1, where=where)  # type: ignore[arg-type]


def test_a_filter_is_evaluated_once_for_each_state_of_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = Index(SPEC), embeddings(1, seed=9)
    fill(index, 50)
    catalogue, evaluated = index._searcher.store.catalogue, []
    matching = catalogue.matching
    monkeypatch.setattr(
        catalogue, "matching", lambda where, version: evaluated.append(where) or matching(where, version)
    )
    for _ in range(3):
        before = ids(index, queries, 60, where="n < 20")[0]
    assert len(before) == 20
    assert evaluated == ["n < 20"]
    index.delete([before[0]])
    assert ids(index, queries, 60, where="n < 20")[0] == before[1:]
    for low in range(10):
        ids(index, queries, 1, where=f"n >= {low}")
    assert len(index._searcher.store.view().filtered) < 10


def test_auto_takes_two_stages_where_it_was_measured_to_lose_little() -> None:
    index = Index(SPEC)
    fill(index, 60)
    query = embeddings(1, seed=9)
    measured = Tuning(20, 0.995, 0.99, 10, 0.8, 60, None, {"exact": 1.0, "two-stage": 0.1})
    assert index.search(query, 5).mode == "exact"
    for tuning, options, mode in [
        (measured, {}, "two-stage"),
        (measured, {"k": 11}, "exact"),
        (measured, {"alpha": 0.5}, "exact"),
        (measured, {"where": "n < 20"}, "exact"),
        (measured, {"where": "n < 21"}, "two-stage"),
        (replace(measured, agreement=0.98), {}, "exact"),
        (replace(measured, items=31), {}, "two-stage"),
        (replace(measured, items=30), {}, "exact"),  # doubled in size since
        (replace(measured, seconds={"exact": 1.0, "two-stage": 1.1}), {}, "exact"),
    ]:
        index.tuning = tuning
        assert index.tuning == tuning
        assert index.search(query, **({"k": 5} | options)).mode == mode, (tuning, options)
    index.tuning = None


@pytest.mark.parametrize(
    ("dtype", "vnni", "mode"),
    [("float16", True, "exact-int8"), ("float16", False, "exact"), ("int8", False, "exact-int8")],
)
def test_auto_uses_int8_copies_where_they_are_faster(
    dtype: str, vnni: bool, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has = cpu.has
    monkeypatch.setattr(cpu, "has", lambda feature: vnni if feature == "vnni" else has(feature))
    index = Index(replace(SPEC, dtype=dtype))
    fill(index, 60)
    query = embeddings(1, seed=9)
    index.search(query, 5, mode="exact-int8")  # makes the copies
    assert index.search(query, 5).mode == mode


def test_tuning_finds_how_many_candidates_are_enough(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 300, 3)
        queries = embeddings(40, seed=9)
        tuning, trials = tune(index, queries, agreement=0.99, k=5, candidates=[5, 300, 20, 250, 3], progress=False)
        assert [trial.candidates for trial in trials] == [5, 20, 250][: len(trials)]
        exact = ids(index, queries, 5, mode="exact")
        for trial in trials:
            hits = ids(index, queries, 5, mode="two-stage", candidates=trial.candidates)
            shares = [len(set(a) & set(b)) / 5 for a, b in zip(hits, exact, strict=True)]
            assert trial.agreement == pytest.approx(np.mean(shares))
        assert tuning.candidates == trials[-1].candidates
        assert tuning.agreement >= 0.99 > trials[-2].agreement
        answers = [row[0] for row in exact]
        by_answer, trials = tune(index, queries, answers=answers, agreement=0.99, k=5, candidates=[5], progress=False)
        first = [row[0] for row in ids(index, queries, 5, mode="two-stage", candidates=5)]
        assert by_answer.recall_change == pytest.approx(
            np.mean([a == b for a, b in zip(first, answers, strict=True)]) - 1
        )
        assert by_answer.agreement < 0.99
        assert index.search(queries, 5).mode == "exact"
    with closing(Index(SPEC, tmp_path)) as index:
        assert index.tuning == by_answer
        for arguments, message in [
            ({"queries": queries[:0]}, "expected queries"),
            ({"queries": queries, "answers": ["1"]}, r"got \d+ queries and 1 answers"),
            ({"queries": queries[:1], "answers": ["x"]}, "not in the index: 'x'"),
            ({"queries": queries, "candidates": [400]}, "expected more items than candidates"),
            ({"queries": queries * torch.nan}, r"expected finite queries, got NaN \(query 0, row 0\)"),
            ({"queries": queries * 5}, "expected rows of length 1, got 5"),
            ({"queries": queries[0]}, r"expected queries \[Q, L, 16\]"),
            ({"queries": queries, "answers": "1" * len(queries)}, "expected answers to be a list"),
            ({"queries": queries, "agreement": 2}, r"expected agreement in \[0, 1\], got 2"),
            ({"queries": queries, "alpha": 5}, r"expected alpha in \[0, 1\], got 5"),
            ({"queries": queries, "k": "x"}, "expected k to be an integer, got 'x'"),
            ({"queries": queries, "candidates": 50}, "expected candidates to be a list, got 50"),
            ({"queries": queries, "candidates": [50.5]}, "expected candidates to be an integer, got 50.5"),
            ({"queries": queries, "modes": "sketch"}, r"expected modes to be a list.*pass \['sketch'\]"),
            ({"queries": queries, "modes": []}, "leave modes out to try all"),
        ]:
            with pytest.raises(InputError, match=message):
                tune(index, **arguments, progress=False)
        assert index.tuning == by_answer
        assert tune(index, queries.numpy(), k=5, candidates=[20], progress=False)[0].candidates == 20
        version = index.version
        index.delete(["0"])
    with closing(Index(SPEC, tmp_path, version=version)) as index, pytest.raises(StoreError, match="read-only"):
        tune(index, queries, k=5, candidates=[20], progress=False)


def test_two_stage_search_takes_as_many_candidates_as_were_measured_for_such_a_search() -> None:
    index, queries = Index(SPEC), embeddings(20, seed=9)
    fill(index, 600)
    tune(index, queries, agreement=0.01, k=5, candidates=[5], progress=False)
    tuned = ids(index, queries, 5, mode="two-stage", candidates=5)
    assert ids(index, queries, 5, mode="two-stage") == tuned
    for k, alpha, default in ((20, 0.8, 320), (5, 0.1, 256)):
        hits = ids(index, queries, k, alpha=alpha, mode="two-stage")
        assert hits == ids(index, queries, k, alpha=alpha, mode="two-stage", candidates=default)
    index.add([f"new {n}" for n in range(600)], embeddings(600, seed=4), [{}] * 600)
    assert ids(index, queries, 5, mode="two-stage") == ids(index, queries, 5, mode="two-stage", candidates=256)


def test_queries_are_sampled_from_what_is_there() -> None:
    index = Index(SPEC)
    with pytest.raises(InputError, match="expected an index with items to tune"):
        sample_queries(index)
    fill(index, 30, 3)
    with pytest.raises(InputError, match="expected count of at least 1, got -1"):
        sample_queries(index, -1)
    with pytest.raises(InputError, match="expected seed to be an integer"):
        sample_queries(index, seed="x")  # type: ignore[arg-type]
    index.delete([str(n) for n in range(0, 30, 2)])
    sampled = sample_queries(index, 10)
    assert len(sampled) == 10
    assert {row[0] for row in ids(index, sampled, 1)} <= {str(n) for n in range(1, 30, 2)}
    assert len(sample_queries(index, 100)) == 15


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**10), st.integers(1, 60), st.integers(1, 1024), st.sampled_from(["float16", "int8"]))
def test_a_plan_grows_with_the_items(items: int, tokens: int, width: int, dtype: str) -> None:
    rates = Rates(encode=10.0, exact=1e5, exact_int8=2e5, globals=1e8, candidates=1e5, sketch=1e7)
    base_plan, tenfold_plan = (plan(n, tokens, width, rates, dtype=dtype) for n in (items, 10 * items))
    assert tenfold_plan.disk == 10 * base_plan.disk
    assert tenfold_plan.memory == {mode: 10 * size for mode, size in base_plan.memory.items()}
    assert tenfold_plan.encode_seconds == pytest.approx(10 * base_plan.encode_seconds)
    assert base_plan.memory["two-stage"] < base_plan.memory["exact"] or tokens * width < 8
    assert str(base_plan).startswith(f"{items:,} items\n")
    assert base_plan.mode == ("exact-int8" if items <= 2e4 else "two-stage")


def test_a_plan_tells_what_is_written(tmp_path: Path) -> None:
    rates = measure(SPEC.tokens, SPEC.width, alpha=0.8, encode_batch=lambda: 16)
    assert min(vars(rates).values()) > 0
    for dtype in ("float16", "int8"):
        with closing(Index(replace(SPEC, dtype=dtype), tmp_path / dtype)) as index:
            fill(index, 500)
            index.search(embeddings(1), 5, mode="exact-int8")
            index.build_sketches(bits=2)
        sizes = {
            name: sum(path.stat().st_size for path in (tmp_path / dtype).glob(name))
            for name in ("segments/*.safetensors", "cache/*[0-9a-f].safetensors", "cache/*.sketch.safetensors")
        }
        planned = plan(500, SPEC.tokens, SPEC.width, rates, dtype=dtype, bits=2)
        assert sizes["segments/*.safetensors"] == pytest.approx(planned.disk - 500 * 450, rel=0.05)
        sketches, copies = sizes["cache/*.sketch.safetensors"], sizes["cache/*[0-9a-f].safetensors"]
        assert sketches == pytest.approx(planned.sketches, rel=0.05)
        assert copies == pytest.approx(planned.int8_copies, rel=0.05)
        assert planned.memory["sketch"] == planned.memory["two-stage"] + planned.sketches
    with pytest.raises(InputError, match="expected items of at least 1, got 0"):
        plan(0, 3, 16, rates)
    with pytest.raises(InputError, match="expected dtype to be one of float16, int8, got 'int4'"):
        plan(1, 3, 16, rates, dtype="int4")


def test_many_threads_search_while_one_writes(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with closing(Index(SPEC, tmp_path)) as index, ThreadPoolExecutor(3) as pool:
        fill(index, 20)
        query = embeddings(1)
        stop_flags: list[bool] = []

        def search() -> None:
            while not stop_flags:
                assert ids(index, query, 1) == [["0"]]

        searches = [pool.submit(search) for _ in range(2)]
        choose = random.Random(0)
        for number in range(30):
            index.add([f"new {number}"], embeddings(1, seed=50 + number), [{}])
            if choose.random() < 0.3:
                index.delete([f"new {number}"])
            if choose.random() < 0.2:
                index.maintain()
        stop_flags.append(True)
        for future in searches:
            future.result()


def test_what_another_process_builds_with_faiss_is_used_without_reopening(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    query = embeddings(1, seed=9)
    with closing(Index(SPEC, tmp_path)) as index, closing(Index(SPEC, tmp_path)) as builder:
        fill(index, 400)
        index.search(query, 5, mode="two-stage", candidates=40)
        stages = []
        for lists in (4, 8):
            builder.build_candidates(lists=lists, progress=False)
            stages.append(index._searcher.first_stage(index._store.view(), "two-stage", 0.5))
            assert stages[-1] is index._searcher.first_stage(index._store.view(), "two-stage", 0.5)
        assert stages[0] is not stages[1]
        version = index.version
        index.delete(["0"])
        with closing(Index(SPEC, tmp_path, version=version)) as old, pytest.raises(StoreError, match="read-only"):
            old.build_candidates(progress=False)
        assert all(isinstance(stage, faiss.FaissSource) for stage in stages)


def test_faiss_gives_candidates_until_the_index_begins_with_others(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    queries = embeddings(5, seed=9)
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 400, 3)
        index.delete([str(n) for n in range(0, 400, 3)])
        options = {"mode": "two-stage", "candidates": 40}
        exact = ids(index, queries, 5, mode="exact")
        assert index._searcher.first_stage(index._store.view(), "two-stage", 0.5) is None
        index.build_candidates(lists=8, progress=False)
        source = index._searcher.first_stage(index._store.view(), "two-stage", 0.5)
        assert source is not None
        source.probes = 8
        assert ids(index, queries, 5, mode="two-stage", candidates=200) == exact  # with all lists, it is exact
        for where in ("n < 20", "n >= 200", "n > 1000", "odd = true"):
            expected = ids(index, queries, 5, mode="exact", where=where)
            assert ids(index, queries, 5, mode="two-stage", candidates=200, where=where) == expected
        source.probes = 1  # one list has too few items, so all are searched
        assert [len(row) for row in ids(index, queries, 300, mode="two-stage", candidates=399)] == [266] * 5
        new = torch.nn.functional.normalize(queries[:1] + 0.01, dim=-1)
        index.add(["new"], new, [{"n": 0}])
        assert index._searcher.first_stage(index._store.view(), "two-stage", 0.5) is not source
        assert ids(index, queries[:1], 1, **options) == [["new"]]
        assert ids(index, queries[:1], 1, **options, where="n = 0") == [["new"]]
    with closing(Index(SPEC, tmp_path)) as index:
        assert index._searcher.first_stage(index._store.view(), "two-stage", 0.5) is not None
        assert tune(index, queries, agreement=0.5, k=5, candidates=[20], progress=False)[0].agreement > 0.5
        index.maintain()
        assert index._searcher.first_stage(index._store.view(), "two-stage", 0.5) is None
        assert ids(index, queries[:1], 1, **options) == [["new"]]
        with pytest.raises(InputError, match="expected at least as many items as lists, got 267 for 1000"):
            index.build_candidates(lists=1000, progress=False)
    with pytest.raises(InputError, match="expected an index in a writable folder"):
        Index(SPEC).build_candidates()


@pytest.mark.parametrize("count", [1, 2, 10, 15])
def test_faiss_takes_as_many_lists_as_a_small_index_has_items(tmp_path: Path, count: int) -> None:
    pytest.importorskip("faiss")
    query = embeddings(1, seed=9)
    with closing(Index(SPEC, tmp_path)) as index:
        with pytest.raises(InputError, match=r"expected an index with items .*; add items first"):
            index.build_candidates(progress=False)
        fill(index, count)
        index.build_candidates(progress=False)
        assert index._searcher.first_stage(index._store.view(), "two-stage", 0.5) is not None
        exact = ids(index, query, 1, mode="exact")
        assert ids(index, query, 1, mode="two-stage", candidates=max(1, count - 1)) == exact


def test_a_file_of_faiss_that_is_not_what_was_written_is_not_used(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    queries = embeddings(3, seed=9)
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 60, 2)
        index.build_candidates(lists=3, progress=False)
        expected = ids(index, queries, 5, mode="exact")
        view, cache = index._store.view(), tmp_path / "cache"
        path = cache / faiss.FILE
        content = path.read_bytes()
        contents = read_contents(path)
        for at in range(0, len(content), 41):
            path.unlink()
            path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
            assert faiss.find(view, cache) is None or at < contents.places["centres"].start  # a space in the header
            assert ids(index, queries, 5, mode="two-stage", candidates=30) == expected
        # Untrusted, but with valid checksums.
        path.write_bytes(content)
        arrays = {name: values.clone() for name, values in map_arrays(path, contents).items()}
        for name, change in {
            "sizes": lambda values: values.fill_(1 << 40),
            "lists": lambda values: values.fill_(255),  # all rows become -1
            "centres": lambda values: values.resize_(1, SPEC.width),
        }.items():
            hostile = {**arrays, name: change(arrays[name].clone())}
            write_arrays(path, hostile, {"segments": contents.notes["segments"], **array_checksums(hostile)})
            assert faiss.find(view, cache) is None
        path.write_bytes(content)
        source = faiss.find(view, cache)
        assert source is not None
        path.write_bytes(content[:400])  # truncated while it is mapped
        assert torch.equal(source(queries, 60, None, alpha=0.5).sort().values, torch.arange(60).expand(3, -1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.7, 0.0], ids=["kept on the GPU", "streamed to it"])
def test_a_gpu_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr("finelip_fast.index.residence._SHARE", share)
    queries = embeddings(5, seed=9)
    with closing(Index(SPEC, tmp_path)) as index, closing(Index(SPEC, tmp_path, device="cuda")) as on_gpu:
        fill(index, 300, 40)
        index.delete([str(n) for n in range(0, 300, 7)])
        for mode in ("exact", "exact-int8", "two-stage"):
            for where in (None, "n < 50"):
                options = {"mode": mode, "where": where, "candidates": 50}
                results, expected = (target.search(queries, 5, **options) for target in (on_gpu, index))
                assert results.items == expected.items
                assert torch.equal(results.scores, expected.scores)
        index.add(["new"], queries[:1], [{}])
        assert ids(on_gpu, queries[:1], 1) == [["new"]]
