"""Damage copies of a store, one after another, and say what opening each came to: run by test_lance.py.

``python damage_a_store.py FOLDER FIRST STOP`` prints a line for each number: ``right``, ``error`` (one of ours), or what is
wrong. In a process of its own, since Lance ends the process on some damage.
"""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from finelip_fast import FineLIPError
from finelip_fast.index import IndexSpec
from finelip_fast.index.remote.lance import LanceStore, open_store

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)
ITEMS = 40
Content = dict[str, tuple[dict[str, Any], list[Any]]]
Scores = list[dict[str, float]]


def queries() -> torch.Tensor:
    values = torch.randn(2, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(9))
    return torch.nn.functional.normalize(values, dim=-1).half()


def read(uri: Path) -> Content:
    return {
        item: (metadata, row.tolist())
        for ids, rows, of, _ in open_store(uri).batches()
        for item, row, metadata in zip(ids, rows, of, strict=True)
    }


def search(uri: Path, k: int, where: str | None = None) -> Scores:
    results = open_store(uri).search(queries(), k, where=where)
    return [
        {item.id: score for item, score in zip(items, row, strict=True)}
        for items, row in zip(results.items, results.scores.tolist(), strict=True)
    ]


def damage(folder: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    raw = bytearray(path.read_bytes())
    at, kind = draw.randrange(len(raw)), draw.choice(["flip", "flip", "flip", "zeros", "cut", "empty"])
    if kind == "flip":
        raw[at] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        raw[at : at + 16] = bytes(len(raw[at : at + 16]))
    else:
        del raw[at if kind == "cut" else 0 :]
    path.write_bytes(raw)
    return f"{kind} at {at} of {path.relative_to(folder)}"


def outcome(copy: Path, content: Content, scores: Scores) -> str:
    def hits_are_right(where: str | None) -> bool:
        """Damage can hide an item; what is found is as it was."""
        return all(
            hits.items() <= item_scores.items()
            for hits, item_scores in zip(search(copy, 5, where), scores, strict=True)
        )

    verdicts = set()
    for is_right in (
        lambda: read(copy) == content,
        lambda: hits_are_right(None),
        lambda: hits_are_right("number < 20"),
    ):
        try:
            verdicts.add("right" if is_right() else "wrong")
        except FineLIPError:
            verdicts.add("error")
        except BaseException as error:
            verdicts.add(f"raw {type(error).__name__}: {error!s:.200}")
    return max(verdicts, key=lambda verdict: (verdict not in ("right", "error"), verdict != "right"))


def make(store: Path) -> None:
    """Two fragments and a deletion."""
    rows = torch.randn(ITEMS, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(rows, dim=-1).half()
    target = LanceStore(SPEC, store, source="somewhere")
    for numbers in (range(25), range(25, ITEMS)):
        ids = [f"photos/{number}.jpg" for number in numbers]
        target.add(ids, rows[numbers], [{"number": number} for number in numbers])
    target.delete(["photos/3.jpg"])


def main(folder: str, first: str, stop: str) -> None:
    store, copy = Path(folder, "store"), Path(folder, "copy")
    if not store.exists():
        make(store)
    content, scores = read(store), search(store, ITEMS)
    for number in range(int(first), int(stop)):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store, copy)
        description = damage(copy, random.Random(number))
        print(f"{outcome(copy, content, scores)} ({number}: {description})", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
