"""Use an index for some seconds, and print a JSON report: one of the processes of ``test_upkeep_races.py``.

``python race_an_index.py ROLE FOLDER SECONDS SEED``
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import torch

from finelip_fast.errors import StoreError
from finelip_fast.index import Index, IndexSpec, upkeep
from finelip_fast.index.segments import encode, write_segment
from finelip_fast.index.store import Written

SPEC = IndexSpec("abc", 3, 8)
upkeep._MANY = 3  # limit of recent segments, low so that compaction is frequent


def embeddings(seed: int) -> torch.Tensor:
    values = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def main(role: str, folder: str, seconds: float, seed: int) -> None:
    index = Index(SPEC, folder)
    added: list[str] = []
    errors: Counter[str] = Counter()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end or not count:
        count += 1
        item = f"{role} {seed} {count}"
        try:
            if role == "add":
                index.add([item], embeddings(count), [{}])
                added.append(item)
            elif role == "adopt":
                name, crcs = write_segment(index.incoming, encode(embeddings(count), SPEC.dtype))
                time.sleep(0.01)
                index.adopt([Written(name, [item], crcs, [{}])])
                added.append(item)
            elif role == "maintain":
                (index.maintain if count % 2 else index.compact_recent)()
            elif role == "check":
                assert index.check() == {}
            elif role == "snapshot":
                index.snapshot(f"{folder}-{seed}-{count}")
            else:
                index.search(embeddings(0), 3, mode=role)
        except StoreError as error:
            # The only permitted error, raised after waiting for half a minute.
            if "another process is writing" not in str(error):
                errors[f"StoreError: {error}"] += 1
        except Exception as error:
            errors[f"{type(error).__name__}: {error}"] += 1
    print(json.dumps({"role": role, "count": count, "added": added, "errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
