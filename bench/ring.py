"""Race search indexes on the same embeddings, descriptions and threads, and measure who finds the exact ten best.

``python bench/ring.py --items 20000 --out bench/results/MACHINE/ring.json`` races the contenders of ``ring_contenders.py``
on that many pictures of Scenes, as embedded by the bundled model. Each index is built in one process and opened in another,
within time limits; contenders that are not installed, fail or take too long are left out, and the record gives the reason.
Contenders with a knob are tuned, on descriptions that are not raced, until 99 % of their ten are right or the knob no longer
helps. Then all take turns of ten descriptions.

The ten best are defined *both ways*, by the score of the method, or *one way*, by MaxSim, which is all that most peers
support; these are judged by both. ``--python fast-plaid=PATH`` sets the interpreter of a package that cannot be installed
beside ours.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
from apart import Apart, Failure
from contest import Result
from ring_contenders import BOTH_WAYS, CONTENDERS, ONE_WAY
from ring_inputs import Inputs, agreement, scenes

BEST, TURN, FEWEST = 10, 10, 20
ENOUGH, NEARLY = 0.99, 0.005
BASELINE = "plain torch, float32"
_PAUSE = 0.05  # seconds; threads keep spinning for a while after their work

Start = Callable[[str, float], Apart]  # starts a contender's process, given its name and time limit in seconds


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds for building a contender, and for all of its searches."""

    build: float
    search: float


@dataclass
class Entry:
    """A contender that is ready to search.

    Args:
        process: Process that has the index open.
        result: Outcome of the contender.
        effort: Setting of its knob.
        hits: Item numbers for each query so far.
        stopped: Reason why it takes no more turns.
    """

    process: Apart
    result: Result
    effort: int = 0
    hits: list[list[int]] = field(default_factory=list)
    stopped: str = ""

    def search(self, query: np.ndarray) -> tuple[list[int], float]:
        answer = self.process.ask("search", query, BEST, self.effort)
        return answer.value, answer.seconds

    def turn(self, queries: np.ndarray) -> None:
        """Search for more queries unless the contender is stopped; the first query also warms up."""
        if self.stopped:
            return
        time.sleep(_PAUSE)
        try:
            self.search(queries[0])
            for query in queries:
                hits, seconds = self.search(query)
                self.hits.append(hits)
                self.result.seconds.append(seconds)
            self.result.info["memory_mib"] = self.process.memory() - self.result.info["memory_before_mib"]
        except Failure as failure:
            self.stopped = str(failure)

    def conclude(self, exact: dict[str, Any]) -> None:
        """Add quantiles and agreement to the result, or the reason why there are none."""
        result = self.result
        if self.stopped and len(self.hits) < FEWEST:
            result.refusal = f"{self.stopped}, with {len(self.hits)} searches timed"
            return
        quantiles = np.quantile(result.seconds, [0.2, 0.5, 0.8, 0.95]).tolist()
        result.info |= dict(zip(("p20", "p50", "p80", "p95"), quantiles, strict=True)) | {"queries": len(self.hits)}
        result.info["agreement"] = agreement(self.hits, exact[BOTH_WAYS], BEST)
        if result.info["answers"] == ONE_WAY:
            result.info["agreement_one_way"] = agreement(self.hits, exact[ONE_WAY], BEST)


def race(start: Start, names: Sequence[str], inputs: Inputs, folder: Path, limits: Limits) -> dict[str, Result]:
    """Race the contenders; return results by name, with a refusal for those left out."""
    results = {name: Result() for name in names}
    entries: list[Entry] = []
    try:
        for number, (name, result) in enumerate(results.items()):
            place = folder / str(number)
            place.mkdir()
            try:
                built(partial(start, name), inputs, place, result, limits.build)
                entries.append(opened(partial(start, name), inputs, place, result, limits.search))
            except Failure as failure:
                result.refusal = str(failure)
            print(f"{name}: {result.refusal or result.info}", flush=True)
        for first in range(0, len(inputs.queries), TURN):
            for entry in entries:
                entry.turn(inputs.queries[first : first + TURN])
        for entry in entries:
            entry.conclude(inputs.exact)
    finally:
        for entry in entries:
            entry.process.end()
    return results


def built(start: Callable[[float], Apart], inputs: Inputs, place: Path, result: Result, limit: float) -> None:
    """Build a contender's index in ``place``, in a process that ends afterwards.

    Raises:
        Failure: The contender is not installed, fails, or takes too long.
    """
    process = start(limit)
    try:
        result.info |= process.ask("about").value
        result.info["build_seconds"] = process.ask("build", inputs.items, place, inputs.alpha).seconds
    finally:
        process.end()
    files = [path.stat() for path in place.rglob("*") if path.is_file()]
    # Allocated blocks, because files may be sparse.
    result.info["disk_mib"] = sum(512 * file.st_blocks for file in files) / 2**20


def opened(start: Callable[[float], Apart], inputs: Inputs, place: Path, result: Result, limit: float) -> Entry:
    """Open a contender's index, and tune its knob until it agrees well enough.

    Raises:
        Failure: The contender fails, or takes too long.
    """
    entry = Entry(start(limit), result)
    try:
        about = entry.process.ask("about").value
        result.info["memory_before_mib"] = entry.process.memory()
        entry.process.ask("open", place, inputs.alpha)
        entry.effort = turned(entry, about["efforts"], inputs.practice, inputs.practice_exact[about["answers"]])
    except Failure:
        entry.process.end()
        raise
    if about["knob"]:
        result.info["setting"] = f"{about['knob']} {entry.effort:,}"
    return entry


def turned(entry: Entry, efforts: Sequence[int], practice: np.ndarray, exact: Any) -> int:
    """Return the lowest effort that agrees well enough; if none does, the lowest that agrees nearly as well as any."""
    if len(efforts) == 1:
        return efforts[0]
    agreements: dict[int, float] = {}
    for entry.effort in efforts:
        agreements[entry.effort] = agreement([entry.search(query)[0] for query in practice], exact, BEST)
        if agreements[entry.effort] >= ENOUGH:
            return entry.effort
    best = max(agreements.values())
    return next(effort for effort, share in agreements.items() if share >= best - NEARLY)


def main() -> None:
    parser = argparse.ArgumentParser(description="Race indexes of rows of embeddings.")
    parser.add_argument("--items", type=int, default=20_000, help="number of items")
    parser.add_argument("--drawn", type=int, help="number of pictures that are drawn; more items are mixed from them")
    parser.add_argument("--queries", type=int, default=100, help="number of descriptions")
    parser.add_argument("--alpha", type=float, help="weight of the global cosine; default: the model's")
    parser.add_argument("--build-limit", type=float, default=600.0, help="seconds to build each index")
    parser.add_argument("--search-limit", type=float, default=180.0, help="seconds for all searches of each")
    parser.add_argument("--threads", type=int, default=2, help="threads and processors of each")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PACKAGE=PATH", help="interpreter of a package"
    )
    parser.add_argument("--only", default="", help="parts of the names of those that race, separated by ;")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "finelip-ring", help="embeddings")
    parser.add_argument("--out", type=Path, help="the record: a JSON file, to which a group is added")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # also ends the contenders' processes
    if options.out:
        record.opened(options.out)  # fails now rather than after the race

    pythons = dict(text.split("=", 1) for text in options.python)
    names = [name for name in CONTENDERS if any(part.strip() in name for part in options.only.split(";"))]

    def start(name: str, limit: float) -> Apart:
        python = pythons.get(CONTENDERS[name]().package, sys.executable)
        log = options.folder / "log.txt"
        return Apart("ring_contenders", name, seconds=limit, python=python, threads=options.threads, log=log)

    inputs = scenes(options.folder, options.items, options.queries, alpha=options.alpha, drawn=options.drawn)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = race(start, names, inputs, Path(folder), Limits(options.build_limit, options.search_limit))
    mixed = "" if options.drawn is None else f" ({min(options.drawn, options.items):,} drawn, the others mixed)"
    group = f"best {BEST} of {options.items:,} pictures{mixed} for 1 description, alpha {inputs.alpha:g}"
    for name, result in results.items():
        print(name, result.refusal or json.dumps(result.info), sep=": ")
    if options.out:
        record.add(options.out, group, results, baseline=BASELINE, threads=options.threads)


if __name__ == "__main__":
    main()
