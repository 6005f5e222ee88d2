"""Search and maintain an index with less and less memory, and print each outcome; run by test_failures.py.

``python starve_an_index.py FOLDER`` prints the operation, its additional MiB of memory, and ``right``, ``error`` (one of
ours), or the exception. It is a separate process so that its memory can be limited.
"""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from finelip_fast import FineLIPError
from finelip_fast.index import Index, IndexSpec

SPEC = IndexSpec("abc", 40, 512)
ITEMS = 1_000  # 41 MB
MODES = ("exact", "exact-int8", "two-stage")
ROOMS = (
    0,
    2,
    20,
    45,
    60,
    80,
    100,
    130,
    160,
    200,
    300,
    1_000,
)  # MiB, including mapped files and thread stacks


def look(folder: str, operation: str, query: torch.Tensor) -> bool:
    with closing(Index(SPEC, folder)) as index:
        if operation == "check":
            return index.check() == {}
        if operation == "maintain":
            index.maintain()
            return True
        return index.search(query, 5, mode=operation).items[0][0].id == "7"


def settled_pages() -> int:
    """Pages of the address space without what would become room later: freed memory, and stacks of threads that end."""
    ctypes.CDLL(None).malloc_trim(0)
    readings: list[int] = []
    while len(readings) < 5 or len(set(readings[-5:])) > 1:
        time.sleep(0.05)
        readings.append(int(Path("/proc/self/statm").read_text().split()[0]))
    return readings[-1]


def outcome(run: Callable[[], bool], room: int) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (settled_pages() * resource.getpagesize() + (room << 20), hard))
    try:
        return "right" if run() else "wrong"
    except FineLIPError:
        return "error"
    except BaseException as error:
        return f"raw {type(error).__name__}: {error!s:.200}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def main(folder: str) -> None:
    values = torch.randn(ITEMS, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(values, dim=-1).half()
    with closing(Index(SPEC, folder)) as index:
        index.add([str(number) for number in range(ITEMS)], rows, [{}] * ITEMS)
        index.search(rows[:1], 1, mode="exact-int8")
    query = rows[7:8].clone()
    del values, rows
    for room in ROOMS:
        for operation in (*MODES, "check", "maintain"):
            print(
                operation, room, outcome(lambda operation=operation: look(folder, operation, query), room), flush=True
            )


if __name__ == "__main__":
    main(sys.argv[1])
