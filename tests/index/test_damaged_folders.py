"""Folders with any file except the catalogue damaged: every operation gives a right answer or our error."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import EngineError, FineLIPError
from finelip_fast.index import Index, IndexSpec, stored_index

EXAMPLES = settings.get_profile("fuzz").max_examples // 4  # each searches, checks, copies and repairs a folder
MODES = ("exact", "exact-int8", "two-stage")
ITEMS = 24


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


QUERIES = embeddings(3, seed=99)


@dataclass(repr=False)
class Whole:
    """A folder with all derived files: its answers by mode, every item's score for each query, and embeddings."""

    folder: Path
    answers: dict[str, list[tuple[str, float]]]
    scores: list[dict[str, float]]
    embeddings: dict[str, Tensor]

    def __repr__(self) -> str:
        return f"Whole({self.folder})"


@pytest.fixture(scope="module", params=["float16", "int8"])
def sound_index(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Whole:
    folder = tmp_path_factory.mktemp("folders") / "whole"
    with closing(Index(IndexSpec("abc", 3, 8, dtype=request.param), folder)) as index:
        for first in range(0, ITEMS, 8):
            ids = [str(number) for number in range(first, first + 8)]
            index.add(ids, embeddings(8, first), [{"n": int(item)} for item in ids])
        with suppress(EngineError):  # faiss is not installed
            index.build_candidates(lists=2, progress=False)
        answers = {mode: answer(index, mode) for mode in MODES}
        results = index.search(QUERIES, ITEMS, mode="exact")
        scores = [
            {item.id: score for item, score in zip(items, row, strict=True)}
            for items, row in zip(results.items, results.scores.tolist(), strict=True)
        ]
        return Whole(folder, answers, scores, dict(zip(index.ids, index.embeddings, strict=True)))


def answer(index: Index, mode: str) -> list[tuple[str, float]]:
    results = index.search(QUERIES, 5, mode=mode, candidates=12 if mode == "two-stage" else None)
    return [
        (item.id, round(score, 5))
        for items, scores in zip(results.items, results.scores.tolist(), strict=True)
        for item, score in zip(items, scores, strict=True)
    ]


def damage(folder: Path, choose: random.Random) -> Path:
    """Damage one file of an index in a random way."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("catalogue")]
    path = choose.choice(files)
    content = bytearray(path.read_bytes())
    at = choose.choice([choose.randrange(len(content)), choose.randrange(min(len(content), 400))])
    kind = choose.choice(["flip", "flip", "flip", "cut", "append", "zeros", "remove", "text", "other"])
    if kind == "flip":
        content[at] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "append":
        content += bytes(choose.randrange(1, 100))
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "text":  # a number in the header
        digit = next((place for place in range(at, len(content)) if 48 <= content[place] < 58), at)
        content[digit : digit + 1] = choose.choice(
            [b"-1", b"1e9", b"99999999999999999999", b"null", b"[]", b"{}", b'""']
        )
    elif kind == "other":
        content[:] = choose.choice(files).read_bytes()
    path.unlink()
    if kind != "remove":
        path.write_bytes(content)
    return path


def tried(run: Callable[[], object]) -> object:
    """Return the result, or None if one of our errors is raised."""
    try:
        return run() or "done"
    except FineLIPError:
        return None


@settings(settings.get_profile("fuzz"), max_examples=EXAMPLES)
@given(seed=st.integers(0, 2**32))
def test_a_right_answer_or_our_error(sound_index: Whole, seed: int) -> None:
    """Run ``FINELIP_FUZZ=2000 pytest tests/index/test_damaged_folders.py`` for more examples."""
    folder = sound_index.folder.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name("copy"), ignore_errors=True)
    shutil.copytree(sound_index.folder, folder)
    path = damage(folder, random.Random(seed))
    is_derived = path.parent.name == "cache"

    def search(mode: str, **options: bool) -> list[tuple[str, float]]:
        with closing(stored_index(folder, **options)) as index:
            return answer(index, mode)

    for mode in MODES:
        hits = tried(lambda mode=mode: search(mode, verify=True))
        assert hits in (None, sound_index.answers[mode]), f"{mode}, verified, {path.name}"
        assert hits is not None or not is_derived, f"a search failed on {path.name}"
        # Unverified hits may not be the best, but their scores must be right.
        for number, (item, score) in enumerate(tried(lambda mode=mode: search(mode)) or ()):
            assert sound_index.scores[number // 5][item] == pytest.approx(score, abs=2e-5)
    with closing(stored_index(folder, skip_damaged=True)) as index:
        damaged = index.check()
        assert not (is_derived and damaged)
        if not damaged:
            assert {mode: answer(index, mode) for mode in MODES} == sound_index.answers
        for number, run in enumerate((index.maintain, lambda: index.snapshot(folder.with_name("copy")))):
            assert (tried(run) is None) == bool(damaged), (number, damaged)
        assert index.repair() == damaged
        assert index.check() == index.repair() == {}
    with closing(stored_index(folder, verify=True)) as index:
        assert set(index.ids) == set(sound_index.embeddings) - set(damaged)
        for item, row in zip(index.ids, index.embeddings, strict=True):
            assert torch.equal(row, sound_index.embeddings[item])
        assert all(tried(lambda mode=mode: answer(index, mode)) is not None for mode in MODES)
