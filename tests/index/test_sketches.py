"""Searches with sketches as the first stage: nothing is lost, whatever happens to the index and its files."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.arrays import read_contents
from finelip_fast.index.sketches import BASIS
from finelip_fast.index.tune import tune
from finelip_fast.kernels.clim.sketch import row_bytes

SPEC = IndexSpec(checkpoint="abc", tokens=4, width=32, alpha=0.25)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    """Return items like a model's: most of each row's norm is in a few directions."""
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    values[..., 12:] *= 0.1
    return torch.nn.functional.normalize(values, dim=-1)


def fill(index: Index, count: int, parts: int = 1, *, first: int = 0, seed: int = 0) -> None:
    rows = embeddings(count, seed)
    for part in torch.arange(count).tensor_split(parts):
        numbers = part.tolist()
        index.add([str(first + n) for n in numbers], rows[numbers], [{"n": first + n} for n in numbers])


def sketch_files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.sketch.safetensors"))


def bases_of(folder: Path) -> set[str]:
    return {read_contents(path).notes["basis"] for path in sketch_files(folder)}


@settings(max_examples=12, deadline=None)
@given(
    parts=st.integers(1, 6),
    deletions=st.sets(st.integers(0, 59), max_size=30),
    dtype=st.sampled_from(["float16", "int8"]),
    bits=st.sampled_from([None, 1, 2]),
    maintained=st.booleans(),
    low=st.one_of(st.none(), st.integers(0, 60)),
    k=st.integers(1, 12),
)
def test_with_all_as_candidates_nothing_is_lost(
    parts: int, deletions: set[int], dtype: str, bits: int | None, maintained: bool, low: int | None, k: int
) -> None:
    """This includes deletes, compaction, filters and reopening; with fewer candidates, hits still have exact scores."""
    queries = embeddings(3, seed=9)
    where = None if low is None else f"n >= {low}"
    with tempfile.TemporaryDirectory() as folder:
        for folder_or_memory in (folder, None):
            index = Index(replace(SPEC, dtype=dtype), folder_or_memory)
            if bits is not None:
                index.build_sketches(bits=bits)
            fill(index, 60, parts)
            index.delete([str(n) for n in deletions])
            if maintained:
                index.maintain()
            if folder_or_memory is not None:
                index.close()
                index = Index(replace(SPEC, dtype=dtype), folder)
            with closing(index):
                exact = index.search(queries, k, mode="exact", where=where)
                n_searched = exact.scores.shape[1] if exact.scores.shape[1] < k else 60
                results = index.search(queries, k, mode="sketch", candidates=max(k, n_searched - 1), where=where)
                assert results.scores.shape == exact.scores.shape
                everything = index.search(queries, k, mode="sketch", candidates=60, where=where)
                assert torch.equal(everything.numbers, exact.numbers)
                assert torch.equal(everything.scores, exact.scores)
                results_of_k_candidates = index.search(queries, k, mode="sketch", candidates=k, where=where)
                assert results_of_k_candidates.mode == "sketch"
                ranked = index.search(queries, 60, mode="exact", where=where)
                for numbers, scores, all_numbers, all_scores in zip(
                    results_of_k_candidates.numbers.tolist(),
                    results_of_k_candidates.scores,
                    ranked.numbers.tolist(),
                    ranked.scores,
                    strict=True,
                ):
                    assert torch.equal(scores, all_scores[[all_numbers.index(number) for number in numbers]])


def test_sketches_find_what_global_rows_miss() -> None:
    index = Index(SPEC)
    rows = embeddings(3000)
    rows[:, 0] = embeddings(1, seed=1)[0, 0]  # uninformative global rows
    index.add([str(n) for n in range(3000)], rows, [{}] * 3000)
    queries = torch.nn.functional.normalize(rows[:40] + 0.1 * torch.randn(40, 4, 32), dim=-1)
    exact = index.search(queries, 5, mode="exact").numbers
    shared = {}
    for mode in ("sketch", "two-stage"):
        numbers = index.search(queries, 5, mode=mode, candidates=60).numbers
        shared[mode] = (numbers[:, :, None] == exact[:, None]).any(dim=2).float().mean().item()
    assert shared["sketch"] > 0.98
    assert shared["two-stage"] < 0.5


def test_files_are_made_with_the_segments_and_go_with_them(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 300)
        assert index.sketch_bits is None
        assert index.build_sketches() == 300 * SPEC.tokens * row_bytes(SPEC.width, 1)
        assert index.sketch_bits == 1
        assert len(sketch_files(tmp_path)) == 1
        fill(index, 100, 2, first=300, seed=1)
        assert len(sketch_files(tmp_path)) == 3
        assert len(bases_of(tmp_path)) == 1
        modification_times = {path: path.stat().st_mtime_ns for path in sketch_files(tmp_path)}
        index.search(embeddings(1), 3, mode="sketch", candidates=10)
        assert {path: path.stat().st_mtime_ns for path in sketch_files(tmp_path)} == modification_times
        index.delete([str(n) for n in range(150)])
        index.maintain()
        (file,) = sketch_files(tmp_path)
        assert file.name.partition(".")[0] == index._store.view().segments[0].name.partition(".")[0]
        assert (tmp_path / "cache" / BASIS).exists()
        index.build_sketches(bits=2)
        assert sum(read_contents(file).places["codes"].shape) == 250 * SPEC.tokens * row_bytes(SPEC.width, 2)
    with closing(Index(SPEC, tmp_path)) as index:
        assert index.sketch_bits == 2
        index.relabel(["200"], ["new"], [{}])
        index.adopt([])
        assert index.search(embeddings(1), 3, mode="sketch", candidates=10).mode == "sketch"
        assert len(sketch_files(tmp_path)) == len(index._store.view().segments)


def test_an_older_index_gets_its_sketches_at_the_first_search(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 80, 2)
    assert not sketch_files(tmp_path)
    with closing(Index(SPEC, tmp_path)) as index:
        first = index.search(embeddings(2, seed=4), 3, mode="sketch", candidates=20)
        assert index.sketch_bits is None
    modification_times = {path: path.stat().st_mtime_ns for path in sketch_files(tmp_path)}
    assert len(modification_times) == 2
    with closing(Index(SPEC, tmp_path)) as index:
        again = index.search(embeddings(2, seed=4), 3, mode="sketch", candidates=20)
    assert torch.equal(again.numbers, first.numbers)
    assert {path: path.stat().st_mtime_ns for path in sketch_files(tmp_path)} == modification_times


def test_a_basis_of_few_items_is_made_anew(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        index.build_sketches()
        fill(index, 4)
        early = bases_of(tmp_path)
        fill(index, 400, first=4, seed=1)
        assert len(bases_of(tmp_path)) == 1
        assert bases_of(tmp_path) != early
        later = bases_of(tmp_path)
        fill(index, 40, first=500, seed=2)
        assert bases_of(tmp_path) == later


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "foreign", "a link", "cut basis", "changed basis"])
def test_damaged_files_are_made_again(tmp_path: Path, damage: str) -> None:
    folder, queries = tmp_path / "index", embeddings(3, seed=4)
    with closing(Index(SPEC, folder)) as index:
        fill(index, 200)
        index.build_sketches()
        expected = index.search(queries, 5, mode="sketch", candidates=40).numbers
    path = folder / "cache" / BASIS if damage.endswith("basis") else sketch_files(folder)[0]
    content = path.read_bytes()
    if damage.startswith("cut"):
        path.write_bytes(content[:-40])
    elif damage.startswith("changed"):
        path.write_bytes(content[:-40] + bytes(byte ^ 0x5A for byte in content[-40:]))
    elif damage == "foreign":
        path.write_bytes(b"no sketch")
    else:
        path.unlink()
        if damage == "a link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
    with closing(Index(SPEC, folder)) as index:
        assert torch.equal(index.search(queries, 5, mode="sketch", candidates=40).numbers, expected)
        assert index.check() == {}


def test_a_file_that_is_cut_while_it_is_mapped_is_not_read(tmp_path: Path) -> None:
    queries = embeddings(3, seed=4)
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 600)
        index.build_sketches()
        expected = index.search(queries, 5, mode="sketch", candidates=40).numbers
        (file,) = sketch_files(tmp_path)
        with file.open("r+b") as opened:
            opened.truncate(100)
        assert torch.equal(index.search(queries, 5, mode="sketch", candidates=40).numbers, expected)
        assert file.stat().st_size > 100


def test_sketches_of_damaged_embeddings_are_taken_away(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        fill(index, 50)
        index.build_sketches()
    (segment,) = (tmp_path / "segments").glob("*.safetensors")
    sound = segment.read_bytes()
    tokens = read_contents(segment).places["tokens"].start
    segment.write_bytes(sound[:tokens] + b"\0\0" + sound[tokens + 2 :])
    with closing(Index(SPEC, tmp_path)) as index:
        assert len(index.check()) == 1
        assert not sketch_files(tmp_path)
        index.search(
            embeddings(1, seed=4), 3, mode="sketch", candidates=10
        )  # built from the remaining rows, and not kept
        assert not sketch_files(tmp_path)
    segment.write_bytes(sound)
    with closing(Index(SPEC, tmp_path)) as index:
        assert index.check() == {}
        index.search(embeddings(1, seed=4), 3, mode="sketch", candidates=10)
        assert len(sketch_files(tmp_path)) == 1


def test_a_snapshot_and_a_read_only_folder_are_searched(tmp_path: Path) -> None:
    queries = embeddings(3, seed=4)
    with closing(Index(SPEC, tmp_path / "index")) as index:
        fill(index, 200)
        index.build_sketches(bits=2)
        expected = index.search(queries, 5, mode="sketch", candidates=40).numbers
        index.snapshot(tmp_path / "copy")
        assert len(Index(SPEC, tmp_path / "index", version=0)) == 0
        old = Index(SPEC, tmp_path / "index", version=1)
        with pytest.raises(StoreError, match="open at version 1, read-only"):
            old.build_sketches()
    with closing(Index(SPEC, tmp_path / "copy")) as copy:
        assert copy.sketch_bits == 2
        assert torch.equal(copy.search(queries, 5, mode="sketch", candidates=40).numbers, expected)


def add_and_search(folder: str, first: int) -> None:
    with closing(Index(SPEC, folder)) as index:
        for step in range(3):
            fill(index, 20, first=first + 20 * step, seed=first + step)
            index.search(embeddings(2, seed=4), 3, mode="sketch", candidates=10)


def test_two_processes_add_and_search(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        index.build_sketches()
        commands = [[sys.executable, "-P", __file__, str(tmp_path), first] for first in ("0", "1000")]
        processes = [subprocess.Popen(command) for command in commands]
        assert [process.wait() for process in processes] == [0, 0]
        assert len(index) == 120
        queries = embeddings(3, seed=5)
        exact = index.search(queries, 5, mode="exact")
        assert torch.equal(index.search(queries, 5, mode="sketch", candidates=119).numbers, exact.numbers)


def test_tuning_chooses_the_first_stage_by_measurement(tmp_path: Path) -> None:
    rows = embeddings(2000)
    rows[:, 0] = embeddings(1, seed=1)[0, 0]
    queries = torch.nn.functional.normalize(rows[:20] + 0.1 * torch.randn(20, 4, 32), dim=-1)
    with closing(Index(SPEC, tmp_path)) as index:
        index.add([str(n) for n in range(2000)], rows, [{}] * 2000)
        without, _ = tune(index, queries, k=5, candidates=[50, 200], progress=False)
        assert without.mode == "two-stage"
        index.build_sketches()
        tuning, trials = tune(index, queries, k=5, candidates=[50, 200], progress=False)
        assert {trial.mode for trial in trials} == {"two-stage", "sketch"}
        assert tuning.mode == "sketch"
        assert tuning.agreement >= 0.99 > without.agreement
        assert index.tuning == tuning
        index.tuning = replace(tuning, seconds={"exact": 1.0, "sketch": 0.1})
        assert index.search(queries, 5).mode == "sketch"
        with pytest.raises(InputError, match="expected mode to be one of two-stage, sketch"):
            tune(index, queries, modes=["exact"], progress=False)  # type: ignore[list-item]
        index._store.catalogue.keep("tuning", {**index._store.catalogue.note("tuning"), "mode": "exact"})
        with pytest.raises(StoreError, match="has invalid tuned settings"):
            index.search(queries, 5)


def test_what_has_no_tokens_or_bits_is_refused(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)) as index:
        for bits in (0, 3, True, "1", None):
            with pytest.raises(InputError, match="expected bits to be 1 or 2"):
                index.build_sketches(bits=bits)  # type: ignore[arg-type]
        assert index.build_sketches() == 0
        assert index.search(embeddings(1), 3, mode="sketch").scores.shape == (1, 0)
        index._store.catalogue.keep("sketch", "much")
        fill(index, 60)  # the stored note does not prevent additions
        with pytest.raises(StoreError, match="finelip index sketch --index"):
            index.search(embeddings(1), 3, mode="sketch", candidates=5)
        index.build_sketches()
        assert index.search(embeddings(1), 3, mode="sketch", candidates=5).mode == "sketch"
    single = Index(replace(SPEC, tokens=1, alpha=1.0))
    with pytest.raises(InputError, match="only global rows"):
        single.build_sketches()
    single.add(["a", "b"], embeddings(2)[:, :1], [{}, {}])
    assert single.search(embeddings(2)[:1, :1], 1, mode="sketch", candidates=1).items[0][0].id == "a"


if __name__ == "__main__":
    add_and_search(sys.argv[1], int(sys.argv[2]))
