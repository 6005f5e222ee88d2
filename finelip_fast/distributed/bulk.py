"""Bulk indexing: several workers read, encode and write segments, and the driver takes them over into the index.

Embeddings go from a worker straight into a file of the index, so the folder must be on storage that all workers see: one
machine, or a shared filesystem. Only names, checksums and reasons come back. A worker that dies is started again by Ray, and
its files are encoded again; what it had written belongs to nobody until the driver takes it over.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import cached_property
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast import errors as _errors
from finelip_fast._files import read_bytes, write_error
from finelip_fast.collection import item_id, list_folder, plan, prepare_root, relabel
from finelip_fast.distributed.cluster import cluster, told
from finelip_fast.engines import Engine, EngineName, open_engine
from finelip_fast.errors import EngineError, ImageError, InputError, StoreError
from finelip_fast.index import Index, StoredDtype, Written
from finelip_fast.index.arrays import locked
from finelip_fast.index.segments import encode, write_segment
from finelip_fast.index.upkeep import JOB
from finelip_fast.ingest import as_images, progress_bar, read_ahead, read_picture
from finelip_fast.picture_files import describe
from finelip_fast.reports import FolderReport
from finelip_fast.retriever import Retriever
from finelip_fast.runtimes.manifest import Precision

# Files of a task, which makes one segment; fewer where there would be less than so many tasks for each worker.
_FILES_PER_TASK, _TASKS_PER_WORKER = 1024, 4
# Finished tasks are taken over so often; what a stopped job loses.
_KEPT_SECONDS = 30.0
# Of workers at one task, before the job ends.
_MOST_DEATHS = 16
_MOST_JOURNAL = 1 << 24  # bytes


def index_images(
    files: Iterable[str | PathLike[str]] | str | PathLike[str],
    index: str | PathLike[str],
    *,
    checkpoint: str | PathLike[str] | None = None,
    engine: EngineName = "auto",
    precision: Precision | None = None,
    workers: int = 2,
    cpus: float = 1,
    gpus: float = 0,
    batch_size: int = 64,
    part: int = 100_000,
    dtype: StoredDtype | None = None,
    metadata: Callable[[str], dict[str, Any]] | None = None,
    progress: bool | tqdm[Any] = True,
) -> FolderReport:
    """Embed pictures by several workers and add them to an index; one that cannot be read is skipped and reported.

    Files whose ids are in the index are left out, so a job that was stopped goes on when it is started again: half a minute
    of work is lost. A folder is treated as :meth:`finelip_fast.Retriever.add_folder` does: ids are paths below the index's
    root, metadata is what the files say, what has changed is embedded again and what was moved keeps its embedding. The items
    come in the order of the files, whichever worker encodes them. Many small segments are left behind; ``finelip index
    maintain`` makes few of them.

    Ray is used as this process is connected to it, or by ``RAY_ADDRESS``, or else started on this machine for the job.

    Args:
        files: A folder, or any iterable of files, read as it goes. Workers open them by the same paths.
        index: Folder of the index, made if missing; on storage that all workers see.
        checkpoint, engine, precision: As for :class:`finelip_fast.Retriever`; opened here, and by each worker what was chosen
            here.
        workers: Processes that encode, each with the model.
        cpus, gpus: What each takes of the cluster. With ``gpus=0`` they encode on the CPU; 0.5 lets two share a GPU.
        batch_size: Pictures at once.
        part: Files of which the driver knows at once. The workers start anew for each part.
        dtype: How a new index keeps embeddings; None: as the index that is there, or float16.
        metadata: Function that makes an item's dictionary of JSON values from its id; None: none is added.
        progress: Show a progress bar; or one of tqdm's to move.

    Returns:
        How many were added, and what was skipped, with reasons. A file on which workers die is among these.

    Raises:
        InputError: A number below 1, or metadata that JSON cannot hold.
        EngineError: Ray is not installed or cannot be reached, or the workers die again and again.
        CheckpointError, StoreError: As for :class:`finelip_fast.Retriever`; what was taken over before stays.
    """
    for name, value in (("workers", workers), ("batch_size", batch_size), ("part", part)):
        if value < 1:
            raise InputError(f"expected {name} of at least 1, got {value}")
    report = FolderReport()
    is_folder = isinstance(files, (str, PathLike)) and os.path.isdir(files)
    with cluster(workers * cpus) as ray:
        device = None if gpus else "cpu"
        retriever = Retriever(checkpoint, engine=engine, precision=precision, device=device, index=index, dtype=dtype)
        target, job = retriever.index, _Job(retriever, "cuda" if gpus else "cpu", batch_size, describes=is_folder)
        del retriever  # and its model
        pool = _Pool(ray, job, workers, cpus, gpus)
        with closing(target), job.running():
            pictures, changed = _folder(target, files, report) if is_folder else (_files(files, target), set())
            total = len(pictures) if isinstance(pictures, list) else None
            entries = iter(pictures)
            with progress_bar(progress, total, "image") as bar:
                while chunk := list(islice(entries, part)):
                    new = {picture.id: picture for picture in chunk}
                    for item in target.present(list(new)) - changed:
                        del new[item]
                    bar.update(len(chunk) - len(new))
                    try:
                        if new:
                            _add(list(new.values()), target, pool, metadata or (lambda _: {}), report, bar)
                    finally:
                        job.clean_up()
            report.separate_changed([picture.path for picture in pictures if picture.id in changed], target.folder)
    return report


class _Picture(NamedTuple):
    """A file to encode."""

    id: str
    path: str
    fields: dict[str, Any]


def _files(files: Iterable[str | PathLike[str]] | str | PathLike[str], index: Index) -> Iterator[_Picture]:
    root = index.root
    for file in as_images(files):
        yield _Picture(str(file) if root is None else item_id(file, root), str(file), {})


def _folder(index: Index, folder: Any, report: FolderReport) -> tuple[list[_Picture], set[str]]:
    """The pictures of a folder that are to be encoded, and the ids of those that are in the index with other content."""
    root = prepare_root(index, [folder])
    listing = list_folder(folder, root, index=index.folder)
    changes = plan(index, listing, root)
    relabel(index, changes.relabelled)
    report.skipped += listing.skipped
    report.moved, report.gone = changes.moved, len(changes.gone)
    fields = {**changes.changed, **changes.new}
    return [_Picture(item, str(listing.paths[item]), fields[item]) for item in fields], set(changes.changed)


def _add(
    pictures: list[_Picture],
    index: Index,
    pool: _Pool,
    metadata: Callable[[str], dict[str, Any]],
    report: FolderReport,
    bar: tqdm[Any],
) -> None:
    """Encode files; finished tasks are taken over in the order of the files."""
    size = pool.files_per_task(len(pictures))
    tasks = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    finished: dict[int, dict[str, Any]] = {}
    position = 0

    def take() -> None:
        nonlocal position
        encoded = []
        while position in finished:
            part, task = finished.pop(position), tasks[position]
            position += 1
            report.skipped += [(task[row].path, reason) for row, reason in part["skipped"]]
            if part["name"]:
                rows = [task[row] for row in part["rows"]]
                fields = [
                    {**described, **picture.fields, **metadata(picture.id)}
                    for picture, described in zip(rows, part["described"], strict=True)
                ]
                encoded.append(Written(part["name"], [picture.id for picture in rows], part["crcs"], fields))
        if encoded:
            index.adopt(encoded, existing="replace")
            report.added += sum(len(part.ids) for part in encoded)

    since = time.monotonic()
    try:
        for result in pool.run([[picture.path for picture in task] for task in tasks]):
            finished[result["task"]] = result
            bar.update(len(tasks[result["task"]]))
            if time.monotonic() - since >= _KEPT_SECONDS:
                take()
                since = time.monotonic()
    finally:
        take()


class _Job:
    """What all workers are told; sent to them.

    Their files begin with the job's name, so that what dead ones have left can be removed: here, or by upkeep once nobody
    holds the job's lock.
    """

    def __init__(self, retriever: Retriever, device: str, batch_size: int, *, describes: bool) -> None:
        engine, spec = retriever.engine, retriever.index.spec
        # The runtime that was chosen here, so that all embeddings are made alike.
        self.opening = {**engine.settings, "device": device}
        self.spec, self.batch_size, self.describes = spec, batch_size, describes
        self.name = JOB + uuid.uuid4().hex[:12]
        self.folder = retriever.index.incoming.absolute()

    def journal(self, task: str) -> _Journal:
        return _Journal(self.folder / f"{self.name}-{task}.txt")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the job's lock.

        Raises:
            StoreError: The disk refuses.
        """
        path = self.folder / f"{self.name}.lock"
        with ExitStack() as resources:
            try:
                resources.enter_context(locked(path))
            except OSError as error:
                raise StoreError(str(write_error(path, error))) from None
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def clean_up(self) -> None:
        for path in self.folder.glob(f"{self.name}-*"):
            path.unlink(missing_ok=True)


class Worker:
    """One of the pool: opens the engine once, then makes a segment of each list of files.

    A list on which a worker has died is gone through file by file, each named in the journal before it is touched; so the
    next worker knows which one it was, and leaves it out.
    """

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.readers = ThreadPoolExecutor()

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[str]]:
        """One task, as ``{"report": [JSON]}``: what :meth:`encode` returns, or its error, which Ray would bury."""
        (task,), (files,) = batch["task"], batch["files"]
        report: dict[str, Any] = {"task": int(task)}
        try:
            report |= self.encode([os.fsdecode(file) for file in files.split(b"\0")], self.job.journal(str(task)))
        except Exception as error:
            report["error"] = [type(error).__name__, str(error)]
        return {"report": [json.dumps(report)]}

    @cached_property
    def engine(self) -> Engine:
        """Opened when it is first needed, so that its errors are a task's."""
        opening, expected = self.job.opening, self.job.spec.checkpoint
        engine = open_engine(**opening)
        if engine.fingerprint != expected:
            raise EngineError(
                f"expected checkpoint {opening['checkpoint']!r} to be the same for all workers, {expected}, got "
                f"{engine.fingerprint}: put it where all see it"
            )
        return engine

    def encode(self, files: Sequence[str], journal: _Journal) -> dict[str, Any]:
        """Write the segment of some files.

        Returns:
            The segment's ``name`` (None: no file could be read), the ``rows`` of ``files`` in it and their checksums ``crcs``,
            what these files say of themselves (``described``), and which were ``skipped``.

        Raises:
            EngineError: Workers have died on too many of them, or on the way to the first.
            StoreError: The disk refuses.
        """
        before = journal.begin()
        fatal = [row for row in dict.fromkeys(journal.named_last(before)) if row < len(files)]
        if before.count("begin") >= _MOST_DEATHS:
            names = ", ".join(files[row] for row in fatal)
            raise EngineError(
                f"workers have died {_MOST_DEATHS} times at the same {len(files)} files: "
                + (f"take out {names}" if fatal else "is there memory for so many workers?")
            )
        engine = self.engine  # opened before the readers ask for it, all at once
        skipped = dict.fromkeys(fatal, "the worker died on this file")
        rows: list[int] = []
        described: list[dict[str, Any]] = []
        embeddings: list[Tensor] = []
        for rows_of_pixels in self._one_by_one(files, fatal, journal) if before else self._in_batches(files):
            readable = {row: pixels for row, pixels in rows_of_pixels if isinstance(pixels, Tensor)}
            skipped |= {row: str(reason) for row, reason in rows_of_pixels if row not in readable}
            if readable:
                embeddings.append(engine.encode_image(torch.stack(list(readable.values()))).to("cpu", torch.float16))
                rows += readable
                described += [self.describe(files[row]) for row in readable]
        name: str | None = None
        crcs: list[int] = []
        if rows:
            arrays = encode(self.job.spec.filled(torch.cat(embeddings)), self.job.spec.dtype)
            name, crcs = write_segment(self.job.folder, arrays, prefix=f"{self.job.name}-")
        journal.end()
        return {
            "name": name,
            "rows": rows,
            "crcs": crcs,
            "described": described,
            "skipped": sorted(skipped.items()),
        }

    def _in_batches(self, files: Sequence[str]) -> Iterator[list[tuple[int, Tensor | ImageError]]]:
        rows, size = range(len(files)), self.job.batch_size
        batches = (list(rows[start : start + size]) for start in rows[::size])
        return read_ahead(batches, lambda row: self.read(files[row]), self.readers)

    def _one_by_one(
        self, files: Sequence[str], left_out: Iterable[int], journal: _Journal
    ) -> Iterator[list[tuple[int, Tensor | ImageError]]]:
        for row in sorted(set(range(len(files))) - set(left_out)):
            journal.write(str(row))
            yield [(row, self.read(files[row]))]
        journal.write("through")

    def read(self, file: str) -> Tensor | ImageError:
        """Pixels, or why there are none."""
        return read_picture(self.engine.preprocess, file)

    def describe(self, file: str) -> dict[str, Any]:
        """What a file says of itself; nothing where nobody asks for it."""
        try:
            return describe(file) if self.job.describes else {}
        except OSError:
            return {}


class _Pool:
    """Workers by Ray Data.

    Args:
        ray: The module, connected.
        job: What they are told.
        workers, cpus, gpus: How many, and what each takes.
    """

    worker = Worker

    def __init__(self, ray: Any, job: _Job, workers: int, cpus: float, gpus: float) -> None:
        self._ray, self._job, self._workers, self._cpus, self._gpus = ray, job, workers, cpus, gpus

    def files_per_task(self, files: int) -> int:
        """How many make a task, in whole batches, when there are so many."""
        size = self._job.batch_size
        fair = math.ceil(files / (_TASKS_PER_WORKER * self._workers * size))
        return size * max(1, min(_FILES_PER_TASK // size, fair))

    def run(self, tasks: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """What :class:`Worker` returns for each task, in any order.

        Raises:
            EngineError: The workers cannot go on.
            FineLIPError: What one of them has raised.
        """
        from ray.data import ActorPoolStrategy, from_items

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, too
        # Paths as bytes, since some are no text, and absolute, since a worker may start elsewhere.
        rows = [
            {"task": number, "files": b"\0".join(os.fsencode(os.path.abspath(file)) for file in files)}
            for number, files in enumerate(tasks)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Ray about itself
            # A block a task: so Ray repeats no more than what a dead worker was at.
            data = from_items(rows, override_num_blocks=len(rows)).map_batches(
                self.worker,
                batch_size=1,
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                compute=ActorPoolStrategy(size=min(self._workers, len(rows)), max_tasks_in_flight_per_actor=2),
                fn_constructor_args=(self._job,),
            )
            data.context.enable_progress_bars = data.context.print_on_execution_start = False
        reports = iter(data.iter_rows())
        while True:
            try:
                report = json.loads(next(reports)["report"])
            except StopIteration:
                return
            except self._ray.exceptions.RayError as error:
                raise EngineError(f"the workers cannot go on: {told(error)}") from None
            if "error" in report:
                kind, text = report["error"]
                known = getattr(_errors, kind, None)
                raise known(text) if known else EngineError(f"a worker has failed: {kind}: {text}")
            yield report


class _Journal:
    """A file that outlives its process: a line ``begin`` for each attempt, and rows as they are touched one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> list[str]:
        """Begin an attempt; the lines of those before, none of which came to its end."""
        before = []
        if self._path.exists():
            before = (
                read_bytes(self._path, error=StoreError, max_bytes=_MOST_JOURNAL).decode("ascii", "replace").split()
            )
        self.write("begin")
        return before

    def write(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="ascii") as file:
                file.write(f"{line}\n")
        except OSError as error:
            raise StoreError(str(write_error(self._path, error))) from None

    def end(self) -> None:
        self._path.unlink(missing_ok=True)

    @staticmethod
    def named_last(lines: Sequence[str]) -> list[int]:
        """The rows after which an attempt wrote nothing more."""
        following = [*lines, "begin"][1:]
        rows = [line for line, after in zip(lines, following, strict=True) if after == "begin"]
        return [int(row) for row in rows if row.isdigit() and len(row) < 10]
