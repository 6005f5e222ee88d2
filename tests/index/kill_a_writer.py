"""Change an index endlessly, and report each acknowledged change: the victim of ``test_killed_writer.py``.

``python kill_a_writer.py FOLDER SEED``
"""

from __future__ import annotations

import json
import math
import random
import sys

import torch

from finelip_fast.index import Index, IndexSpec, upkeep

SPEC = IndexSpec("abc", 3, 8)
upkeep._MANY = 3  # limit of recent segments, low so that compaction is frequent


def unit_row(value: int) -> list[float]:
    """Return a row of length 1 that encodes the value."""
    angle = value / 1000
    return [math.cos(angle), math.sin(angle), *[0.0] * 6]


def main(folder: str, seed: int) -> None:
    choose = random.Random(seed)
    index = Index(SPEC, folder)
    number = 0
    while True:
        kind = choose.choice(["add", "add", "upsert", "delete", "maintain", "compact_recent"])
        number += 1
        if kind in ("maintain", "compact_recent"):
            getattr(index, kind)()
            continue
        if kind == "add":
            ids = [f"{seed}-{number}-{position}" for position in range(choose.randint(1, 3))]
        else:
            ids = choose.sample(index.ids, min(len(index.ids), choose.randint(0, 3)))
        values = [choose.randrange(1000) for _ in ids]
        # Reported before and after each change; a change that has only begun may or may not have happened.
        print(json.dumps(["begin", kind, ids, values]), flush=True)
        if kind == "delete":
            index.delete(ids)
        else:
            embeddings = torch.tensor([unit_row(value) for value in values]).reshape(-1, 1, 8).expand(-1, 3, 8)
            (index.add if kind == "add" else index.upsert)(ids, embeddings, [{"value": value} for value in values])
        print(json.dumps(["done"]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
