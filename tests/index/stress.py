"""Run processes and threads that change, search and maintain one index, each checked against a dictionary of its own items.

``python tests/index/stress.py --seconds 600 --processes 3 --threads 2 --seed 0`` works on a folder, while one more process is
killed repeatedly; ``--memory`` has threads that switch as often as possible work on one index in memory. It prints what was
done and what went wrong as JSON, and exits with code 1 if anything went wrong.

Every thread keeps a journal of the changes that it begins, their acknowledgements, and what it sees. Its items carry its name,
and no other thread changes them; the index must therefore match the journal for these items at every moment.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch
import torch.nn.functional as F

from finelip_fast.errors import FineLIPError, StoreError
from finelip_fast.index import Index, IndexSpec, upkeep
from finelip_fast.kernels import clim_scores

upkeep._MANY = 3  # limit of recent segments, low so that compaction is frequent

TOKENS, WIDTH = 4, 16
MODES = ["exact", "exact-int8", "two-stage", "auto"]
# Not a fault: a writer may have to wait for others longer than its timeout.
BUSY = "locked"
# Raised when reading item by item, if another process has compacted the rest meanwhile.
COMPACTED = "read it again"
# A process that has not answered this many seconds after the end hangs.
PATIENCE = 600.0

Model = dict[str, int]  # id to the number in its metadata, from which its embedding is made


def embedding(item: str, value: int) -> torch.Tensor:
    """Return ``[L, D]``, rounded to float16."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{item} {value}".encode()))
    return F.normalize(torch.randn(TOKENS, WIDTH, generator=generator), dim=-1).half().float()


def after(model: Model, change: list[Any]) -> Model:
    kind, ids, value = change
    left = {item: old_value for item, old_value in model.items() if item not in ids}
    return left if kind == "delete" else left | dict.fromkeys(ids, value)


class Journal:
    """A thread's log of its actions, which outlives its process."""

    def __init__(self, path: Path) -> None:
        self.model: Model = {}
        self.pending: list[Any] | None = None  # begun, and neither acknowledged nor refused
        self.lines: list[list[Any]] = []
        self._path = path
        path.touch()
        complete_text, _, cut = path.read_text().rpartition("\n")
        if cut:
            path.write_text(complete_text + "\n")
        for line in complete_text.splitlines():
            self._take(json.loads(line))

    def __call__(self, *line: Any) -> None:
        self._take(list(line))
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: list[Any]) -> None:
        self.lines.append(line)
        if line[0] == "begin":
            self.pending = line[1:]
        elif line[0] == "done" and self.pending is not None:
            self.model, self.pending = after(self.model, self.pending), None
        elif line[0] == "refused":
            self.pending = None


class Worker:
    """One thread of the test."""

    def __init__(self, index: Index, name: str, journal: Journal, seed: int) -> None:
        self.index, self.name, self.journal = index, name, journal
        self.choose = random.Random(f"{seed} {name} {len(journal.lines)}")
        self.value = max([line[3] for line in journal.lines if line[0] == "begin"], default=0)
        self.removed: Model = {}
        kinds: dict[Callable[[], None], int] = {self.add: 12, self.upsert: 8, self.delete: 8, self.search: 30}
        kinds |= {
            self.search_removed: 8,
            self.search_where: 8,
            self.read: 4,
            self.contains: 8,
            self.maintain: 1,
            self.compact_recent: 2,
        }
        if index.folder is not None:
            kinds |= {self.check: 1, self.snapshot: 1, self.reopen: 2}
        self.kinds, self.weights = list(kinds), list(kinds.values())

    def run(self, until: float) -> None:
        self.settle()
        while time.time() < until:
            (kind,) = self.choose.choices(self.kinds, self.weights)
            begun = time.monotonic()
            try:
                kind()
                self.journal("did", kind.__name__, round(time.monotonic() - begun, 4))
            except Exception as error:
                self.journal("error", *describe(error, kind.__name__))
                if self.journal.pending is not None:
                    self.journal("refused")
                    self.read()  # it must not have had any effect

    def fault(self, kind: str, text: str) -> None:
        self.journal("fault", kind, text[:500])

    def settle(self) -> None:
        """Check that a change interrupted by a kill has happened completely or not at all."""
        if self.journal.pending is not None:
            self.journal("did", "settle", 0.0)
            happened = own_items(self.index, f"{self.name}/") == after(self.journal.model, self.journal.pending)
            self.journal("done" if happened else "refused")
        self.read()

    # Changes

    def add(self) -> None:
        self.value += 1
        n_items = self.choose.randint(1, 6) if len(self.journal.model) < 60 else 1
        self.change("add", [f"{self.name}/{self.value}-{number}" for number in range(n_items)])

    def upsert(self) -> None:
        self.value += 1
        self.change("upsert", [*self.some(4), f"{self.name}/{self.value}"])

    def delete(self) -> None:
        self.change("delete", self.some(6 if len(self.journal.model) < 60 else 20))

    def some(self, most: int) -> list[str]:
        return self.choose.sample(
            sorted(self.journal.model), min(len(self.journal.model), self.choose.randint(0, most))
        )

    def change(self, kind: str, ids: list[str]) -> None:
        replaced = {item: self.journal.model[item] for item in ids if item in self.journal.model}
        self.journal("begin", kind, ids, self.value)
        if kind == "delete":
            self.index.delete(ids)
        else:
            rows = torch.stack([embedding(item, self.value) for item in ids])
            metadata = [{"value": self.value, "owner": self.name} for _ in ids]
            (self.index.add if kind == "add" else self.index.upsert)(ids, rows, metadata)
        self.journal("done")
        if kind == "delete":
            self.removed = dict(list((self.removed | replaced).items())[-20:])

    # Searches

    def search(self, where: str | None = None) -> None:
        if not self.journal.model:
            return
        item = self.choose.choice(sorted(self.journal.model))
        mode, value = self.choose.choice(MODES), self.journal.model[item]
        results = self.index.search(embedding(item, value)[None], 3, mode=mode, where=where)
        hits = results.items[0]
        itself = 0.8 + 0.2 * 2
        if not hits or (hits[0].id, hits[0].metadata.get("value")) != (item, value):
            self.fault(
                "lost", f"{mode} search where {where} for {item} of {value}: {[(hit.id, hit.metadata) for hit in hits]}"
            )
        elif abs(results.scores[0, 0].item() - itself) > (0.05 if self.index.spec.dtype == "int8" else 0.01):
            self.fault("wrong", f"{mode} search for {item}: score {results.scores[0, 0].item()}")
        elif where and any(hit.metadata["owner"] != self.name for hit in hits):
            self.fault("wrong", f"search where {where}: {[hit.metadata for hit in hits]}")

    def search_where(self) -> None:
        self.search(where=f"owner = '{self.name}'")

    def search_removed(self) -> None:
        for item, value in self.choose.sample(sorted(self.removed.items()), min(1, len(self.removed))):
            results = self.index.search(embedding(item, value)[None], 3, mode=self.choose.choice(MODES))
            if item in {hit.id for hit in results.items[0]}:
                self.fault("wrong", f"{item} was deleted and is found")

    # Reading and looking after

    def read(self, index: Index | None = None) -> None:
        index = index or self.index
        for kind, text in differences(own_items(index, f"{self.name}/"), self.journal.model):
            self.fault(kind, f"items: {text}")
        if len(index) < len(self.journal.model):
            self.fault("lost", f"length {len(index)} with {len(self.journal.model)} items of {self.name}")

    def contains(self) -> None:
        for item in self.some(2):
            if item not in self.index:
                self.fault("lost", f"{item} is not in the index")
        for item in self.removed:
            if item in self.index:
                self.fault("wrong", f"{item} was deleted and is in the index")

    def maintain(self) -> None:
        self.index.maintain()

    def compact_recent(self) -> None:
        self.index.compact_recent()

    def check(self) -> None:
        for item, text in self.index.check().items():
            self.fault("wrong", f"check: {item}: {text}")

    def snapshot(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.index.snapshot(Path(folder, "copy"))
            with closing(Index(self.index.spec, Path(folder, "copy"))) as copy:
                self.read(copy)
                for item, text in copy.check().items():
                    self.fault("wrong", f"snapshot: {item}: {text}")

    def reopen(self) -> None:
        assert self.index.folder is not None
        with closing(Index(self.index.spec, self.index.folder)) as again:
            self.read(again)


def own_items(index: Index, prefix: str) -> Model:
    while True:
        try:
            return {item.id: item.metadata.get("value") for item in index.items() if item.id.startswith(prefix)}
        except StoreError as error:
            if COMPACTED not in str(error):
                raise


def differences(actual: Model, expected: Model) -> list[tuple[str, str]]:
    lost = [("lost", f"{item} of {expected[item]}") for item in sorted(expected.keys() - actual.keys())]
    risen = [("wrong", f"{item} of {actual[item]} should be gone") for item in sorted(actual.keys() - expected.keys())]
    common_items = sorted(actual.keys() & expected.keys())
    mismatches = [(item, actual[item], expected[item]) for item in common_items if actual[item] != expected[item]]
    return [
        *lost,
        *risen,
        *(("wrong", f"{item} is {value}, expected {expected_value}") for item, value, expected_value in mismatches),
    ]


def describe(error: Exception, kind: str) -> tuple[str, str, str, str]:
    """Return whether it is a fault, its type and words without file names, its message, and its traceback."""
    words = [word for word in str(error).split() if "/" not in word and not any(map(str.isdigit, word))]
    text = f"{type(error).__name__} from {kind}: {' '.join(words)[:160]}"
    documented = isinstance(error, FineLIPError) and any(text in str(error) for text in (BUSY, COMPACTED))
    return (
        "" if documented else "fault",
        text,
        str(error)[:300],
        "".join(traceback.format_exception(error)[-12:])[-3000:],
    )


def run_threads(
    spec: IndexSpec, folder: Path | None, journals: Path, options: argparse.Namespace, *, process: int, until: float
) -> None:
    with closing(Index(spec, folder)) as index:
        running = []
        for number in range(options.threads):
            name = f"process-{process}-thread-{number}"
            worker = Worker(index, name, Journal(journals / name), options.seed)
            running.append(threading.Thread(target=worker.run, args=(until,)))
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if folder is None:
            compare(index, journals)


def run_process(spec: IndexSpec, options: argparse.Namespace) -> None:
    """Report that everything is imported, read the end time, and work until then."""
    print("ready", flush=True)
    until = float(input())
    faulthandler.dump_traceback_later(max(0.0, until - time.time()) + PATIENCE / 2)
    run_threads(spec, options.folder, options.journals, options, process=options.process, until=until)


def run_processes(spec: IndexSpec, folder: Path, journals: Path, options: argparse.Namespace) -> int:
    """Return the number of times that the last process was killed."""

    def start(number: int) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--process", str(number), "--folder", str(folder)]
        command += ["--journals", str(journals), "--threads", str(options.threads), "--seed", str(options.seed)]
        return subprocess.Popen([*command, "--dtype", options.dtype], stdin=PIPE, stdout=PIPE, text=True)

    def wait_for(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        process.stdout.readline()

    Index(spec, folder).close()
    choose, kills, journal = random.Random(options.seed), 0, Journal(journals / "parent")
    running = [start(number) for number in range(options.processes + 1)]
    try:
        for process in running:
            wait_for(process)
        until = time.time() + options.seconds
        for process in running:
            print(until, file=process.stdin, flush=True)
        while True:
            time.sleep(choose.uniform(0.1, 1.5))
            if time.time() > until:
                break
            running[-1].kill()
            running[-1].wait()
            kills += 1
            running[-1] = start(options.processes)
            wait_for(running[-1])
            print(until, file=running[-1].stdin, flush=True)
        for number, process in enumerate(running):
            if code := process.wait(max(0.0, until - time.time()) + PATIENCE):
                journal("fault", "ended", f"process {number} ended with {code}")
    except subprocess.TimeoutExpired as error:
        journal("fault", "hang", f"{error}")
    finally:
        for process in running:
            process.kill()
            process.communicate()
    with closing(Index(spec, folder)) as index:
        compare(index, journals)
        index.maintain()
        compare(index, journals)
        for item, text in index.check().items():
            journal("fault", "wrong", f"check at the end: {item}: {text}")
    return kills


def compare(index: Index, journals: Path) -> None:
    """Check that the index holds the union of all dictionaries, and finds every item."""
    expected: Model = {}
    for path in sorted(journals.glob("process-*")):
        expected |= Journal(path).model
    journal = Journal(journals / "parent")
    actual = own_items(index, "process")
    for kind, text in differences(actual, expected):
        journal("fault", kind, f"at the end: {text}")
    for item in sorted(actual.keys() & expected.keys()):
        hits = index.search(embedding(item, expected[item])[None], 1).items[0]
        if [hit.id for hit in hits] != [item]:
            journal("fault", "lost", f"at the end: a search for {item} finds {[hit.id for hit in hits]}")


def summary(journals: Path, kills: int, options: argparse.Namespace) -> dict[str, Any]:
    lines = [line for path in sorted(journals.iterdir()) for line in Journal(path).lines]
    operations, longest = Counter(line[1] for line in lines if line[0] == "did"), Counter[str]()
    for line in lines:
        if line[0] == "did":
            longest[line[1]] = max(longest[line[1]], line[2])
    faults = [line[1:] for line in lines if line[0] == "fault"]
    errors = [line for line in lines if line[0] == "error"]
    first = {line[2]: line[3:] for line in reversed(errors) if line[1]}
    return {
        **{name: getattr(options, name) for name in ("seconds", "processes", "threads", "seed", "memory", "dtype")},
        "operations": dict(operations),
        "searches": sum(count for kind, count in operations.items() if kind.startswith("search")),
        "acknowledged": sum(line[0] == "done" for line in lines),
        "kills": kills,
        "longest": dict(longest),
        "faults": dict(Counter(kind for kind, *_ in faults)),
        "faults_first": faults[:20],
        "busy": dict(Counter(line[2] for line in errors if not line[1])),
        "errors": dict(Counter(line[2] for line in errors if line[1])),
        "errors_first": first,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=3, help="beside the one that is killed")
    parser.add_argument("--threads", type=int, default=2, help="in each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float16", "int8"], default="float16", help="how embeddings are kept")
    parser.add_argument("--memory", action="store_true", help="threads of one process on an index in memory")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--journals", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    spec = IndexSpec("abc", TOKENS, WIDTH, dtype=options.dtype)
    torch.set_num_threads(1)
    first = embedding("", 0)[None]
    clim_scores(first, first)  # the first operation imports for seconds, which must not count as search time
    if options.process is not None:
        run_process(spec, options)
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="finelip-stress-"))
    try:
        journals = scratch / "journals"
        journals.mkdir()
        kills = 0
        if options.memory:
            interval = sys.getswitchinterval()
            sys.setswitchinterval(1e-6)
            run_threads(spec, None, journals, options, process=0, until=time.time() + options.seconds)
            sys.setswitchinterval(interval)
        else:
            kills = run_processes(spec, options.folder or scratch / "index", journals, options)
        result = summary(journals, kills, options)
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result, indent=1))
    return int(bool(result["faults"] or result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
