"""Bulk indexing: several workers read, encode and write segments, and the driver adds these to the index.

Workers write embeddings directly into files in the index folder, so it must be on storage that all workers see: one
machine, or a shared filesystem. Only names, checksums and reasons are sent back. Ray restarts a worker that dies, and its
files are encoded again; what it had written is not part of the index until the driver adds it.
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
from finelip_fast._arguments import folder_path, whole_number
from finelip_fast._files import read_bytes, write_error
from finelip_fast.collection import item_id, list_folder, plan, prepare_root, relabel
from finelip_fast.distributed.cluster import check_resources, cluster, reason_of
from finelip_fast.engines import Engine, EngineName, open_engine
from finelip_fast.errors import EngineError, ImageError, InputError, StoreError
from finelip_fast.folders import refuse_missing
from finelip_fast.index import Index, StoredDtype, Written
from finelip_fast.index.arrays import locked
from finelip_fast.index.checks import as_json
from finelip_fast.index.segments import encode, write_segment
from finelip_fast.index.upkeep import JOB
from finelip_fast.ingest import as_images, progress_bar, read_ahead, read_picture
from finelip_fast.picture_files import combine
from finelip_fast.reports import FolderReport
from finelip_fast.retriever import Retriever
from finelip_fast.runtimes.manifest import Precision

# Files per task, which makes one segment; fewer if needed to give every worker at least this many tasks.
_FILES_PER_TASK, _TASKS_PER_WORKER = 1024, 4
# Interval at which finished tasks are added to the index; a stopped job loses about this much work.
_KEPT_SECONDS = 30.0
# Number of workers that may die on one task before the job ends.
_MOST_DEATHS = 16
_MOST_JOURNAL = 1 << 24  # bytes

_Read = tuple[Tensor | ImageError, dict[str, Any]]  # a file's pixels or the error, and its metadata


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
    chunk_size: int = 100_000,
    dtype: StoredDtype | None = None,
    metadata: Callable[[str], dict[str, Any]] | None = None,
    progress: bool | tqdm[Any] = True,
) -> FolderReport:
    """Embed pictures with several workers and add them to an index; unreadable pictures are skipped and reported.

    Files whose ids are already in the index are left out, so a stopped job continues when it is started again, with the
    loss of half a minute of work. A folder is treated as by :meth:`finelip_fast.Retriever.add_folder`: ids are paths below
    the index's root, metadata comes from the files, changed files are embedded again and moved files keep their embeddings.
    Items are added in the order of the files, whichever worker encodes them. The job leaves many small segments; ``finelip
    index maintain`` merges them.

    The job uses the Ray cluster that this process is connected to, or the one at ``RAY_ADDRESS``, or else starts one on this
    machine.

    Args:
        files: A folder, or any iterable of files, consumed lazily. Workers open the files by the same paths.
        index: Folder of the index, created if missing; on storage that all workers see.
        checkpoint, engine, precision: The same as for :class:`finelip_fast.Retriever`; opened here, and each worker opens
            what was chosen here.
        workers: Number of encoding processes, each with its own model.
        cpus, gpus: Resources of the cluster for each worker. With ``gpus=0`` they encode on the CPU; 0.5 lets two share a GPU.
        batch_size: Pictures per batch.
        chunk_size: Number of files that the driver handles at a time. The workers are restarted for each chunk.
        dtype: Storage type of embeddings in a new index; None: the type of the existing index, or float16.
        metadata: Function that makes an item's dictionary of JSON values from its id; None: none is added.
        progress: Whether to show a progress bar, or a tqdm bar to update.

    Returns:
        The number of added pictures, and the skipped files with reasons, including files on which workers died.

    Raises:
        InputError: A number is out of range, there is nothing at the path, or JSON cannot hold the metadata; raised before
            anything of the chunk is encoded.
        EngineError: Ray is not installed, does not start or cannot be reached, the workers die repeatedly, or one of them
            opens another checkpoint.
        CheckpointError, StoreError: Same as for :class:`finelip_fast.Retriever`; pictures added before the error stay.
    """
    workers, batch_size = whole_number("workers", workers), whole_number("batch_size", batch_size)
    chunk_size = whole_number("chunk_size", chunk_size)
    cpus, gpus = check_resources(cpus, gpus)
    if metadata is not None and not callable(metadata):
        raise InputError(f"expected metadata to be a function from an id to a dict, got {metadata!r:.80}")
    if isinstance(files, (bytes, dict)) or not isinstance(files, (str, PathLike, Iterable)):
        raise InputError(f"expected files to be a folder or paths of pictures, got {files!r:.80}")
    refuse_missing(files)
    report = FolderReport()
    is_folder = isinstance(files, (str, PathLike)) and os.path.isdir(files)
    with cluster(workers * cpus) as ray:
        device = None if gpus else "cpu"
        retriever = Retriever(checkpoint, engine=engine, precision=precision, device=device, index=index, dtype=dtype)
        target, job = retriever.index, _Job(retriever, "cuda" if gpus else "cpu", batch_size)
        del retriever  # and its model
        pool = _Pool(ray, job, workers, cpus, gpus)
        with closing(target), job.running():
            pictures, changed = _folder(target, files, report) if is_folder else (_files(files, target), set())
            total = len(pictures) if isinstance(pictures, list) else None
            entries = iter(pictures)
            with progress_bar(progress, total, "image") as bar:
                while chunk := list(islice(entries, chunk_size)):
                    new = {picture.id: picture for picture in chunk}
                    for item in target.present(list(new)) - changed:
                        del new[item]
                    bar.update(len(chunk) - len(new))
                    try:
                        if new:
                            _add(_with_metadata(new.values(), metadata), target, pool, report, bar)
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
        folder_path("a file", file)
        yield _Picture(str(file) if root is None else item_id(file, root), str(file), {})


def _folder(index: Index, folder: Any, report: FolderReport) -> tuple[list[_Picture], set[str]]:
    """List a folder's pictures that need encoding, and the ids of those that are in the index with other content."""
    root = prepare_root(index, [folder])
    listing = list_folder(folder, root, index=index.folder)
    changes = plan(index, listing, root)
    relabel(index, changes.relabelled)
    report.skipped += [*listing.skipped, *changes.skipped]
    report.moved, report.gone = changes.moved, len(changes.gone)
    fields = {**changes.changed, **changes.new}
    return [_Picture(item, str(listing.paths[item]), fields[item]) for item in fields], set(changes.changed)


def _with_metadata(pictures: Iterable[_Picture], metadata: Callable[[str], dict[str, Any]] | None) -> list[_Picture]:
    """Pictures with the metadata that they are given, which is checked before they are encoded.

    Raises:
        InputError: JSON cannot hold the metadata.
    """
    if metadata is None:
        return list(pictures)
    result = []
    for picture in pictures:
        fields = metadata(picture.id)
        as_json(fields, picture.id)
        result.append(picture._replace(fields={**picture.fields, **fields}))
    return result


def _add(
    pictures: list[_Picture],
    index: Index,
    pool: _Pool,
    report: FolderReport,
    bar: tqdm[Any],
) -> None:
    """Encode files; finished tasks are added to the index in the order of the files."""
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
                    combine(described, picture.fields)
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
    """The settings that are sent to all workers.

    The names of their files begin with the job's name, so that the files of dead workers can be removed: here, or by upkeep
    once nobody holds the job's lock.
    """

    def __init__(self, retriever: Retriever, device: str, batch_size: int) -> None:
        engine, spec = retriever.engine, retriever.index.spec
        # The runtime that was chosen here, so that all embeddings are made the same way.
        self.opening = {**engine.settings, "device": device}
        self.spec, self.batch_size = spec, batch_size
        self.name = JOB + uuid.uuid4().hex[:12]
        self.folder = retriever.index.incoming.absolute()

    def journal(self, task: str) -> _Journal:
        return _Journal(self.folder / f"{self.name}-{task}.txt")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the job's lock.

        Raises:
            StoreError: The lock file cannot be written.
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
    """A worker of the pool, which opens the engine once and then makes a segment of each list of files.

    A list on which a worker has died is processed file by file, and each file is recorded in the journal before it is
    opened, so that the next worker knows which file was fatal and leaves it out.
    """

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.readers = ThreadPoolExecutor()

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[str]]:
        """Run one task; return ``{"report": [JSON]}`` with what :meth:`encode` returns, or its error, which Ray would hide."""
        (task,), (files,) = batch["task"], batch["files"]
        report: dict[str, Any] = {"task": int(task)}
        try:
            report |= self.encode([os.fsdecode(file) for file in files.split(b"\0")], self.job.journal(str(task)))
        except Exception as error:
            report["error"] = [type(error).__name__, str(error)]
        return {"report": [json.dumps(report)]}

    @cached_property
    def engine(self) -> Engine:
        """The engine, opened on first use, so that its errors are reported as a task's."""
        opening, expected = self.job.opening, self.job.spec.checkpoint
        engine = open_engine(**opening)
        if engine.fingerprint != expected:
            raise EngineError(
                f"expected checkpoint {opening['checkpoint']!r} to be the same for all workers, {expected}, got "
                f"{engine.fingerprint}; put it in a folder that all workers can read"
            )
        return engine

    def encode(self, files: Sequence[str], journal: _Journal) -> dict[str, Any]:
        """Write the segment of some files.

        Returns:
            The segment's ``name`` (None if no file could be read), the ``rows`` of ``files`` in it and their checksums
            ``crcs``, the metadata of these files (``described``), and the ``skipped`` files with reasons.

        Raises:
            EngineError: Workers have died too often on these files, or before the first one.
            StoreError: The segment or the journal cannot be written.
        """
        before = journal.begin()
        fatal = [row for row in dict.fromkeys(journal.named_last(before)) if row < len(files)]
        if before.count("begin") >= _MOST_DEATHS:
            names = ", ".join(files[row] for row in fatal)
            raise EngineError(
                f"workers died {_MOST_DEATHS} times on the same {len(files)} files"
                + (f"; remove {names}" if fatal else ", probably for lack of memory; use fewer workers")
            )
        engine = self.engine  # opened before the readers all ask for it at once
        skipped = dict.fromkeys(fatal, "the worker died on this file")
        rows: list[int] = []
        described: list[dict[str, Any]] = []
        embeddings: list[Tensor] = []
        for batch in self._one_by_one(files, fatal, journal) if before else self._in_batches(files):
            readable = {row: pixels for row, (pixels, _) in batch if isinstance(pixels, Tensor)}
            skipped |= {row: str(reason) for row, (reason, _) in batch if row not in readable}
            if readable:
                embeddings.append(engine.encode_image(torch.stack(list(readable.values()))).to("cpu", torch.float16))
                rows += readable
                described += [metadata for row, (_, metadata) in batch if row in readable]
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

    def _in_batches(self, files: Sequence[str]) -> Iterator[list[tuple[int, _Read]]]:
        rows, size = range(len(files)), self.job.batch_size
        batches = (list(rows[start : start + size]) for start in rows[::size])
        return read_ahead(batches, lambda row: self.read(files[row]), self.readers)

    def _one_by_one(
        self, files: Sequence[str], left_out: Iterable[int], journal: _Journal
    ) -> Iterator[list[tuple[int, _Read]]]:
        for row in sorted(set(range(len(files))) - set(left_out)):
            journal.write(str(row))
            yield [(row, self.read(files[row]))]
        journal.write("through")

    def read(self, file: str) -> _Read:
        """Read a file's pixels, or the error that prevents it, and its metadata."""
        return read_picture(self.engine.preprocess, file, describes=True)


class _Pool:
    """Workers run by Ray Data.

    Args:
        ray: The module, connected.
        job: Settings for the workers.
        workers, cpus, gpus: Number of workers, and resources for each.
    """

    worker = Worker

    def __init__(self, ray: Any, job: _Job, workers: int, cpus: float, gpus: float) -> None:
        self._ray, self._job, self._workers, self._cpus, self._gpus = ray, job, workers, cpus, gpus

    def files_per_task(self, files: int) -> int:
        """Choose the number of files per task, in whole batches, for a total number of files."""
        size = self._job.batch_size
        fair = math.ceil(files / (_TASKS_PER_WORKER * self._workers * size))
        return size * max(1, min(_FILES_PER_TASK // size, fair))

    def run(self, tasks: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Yield the report of :class:`Worker` for each task, in any order.

        Raises:
            EngineError: The workers cannot continue.
            FineLIPError: An error raised by one of them.
        """
        from ray.data import ActorPoolStrategy, from_items

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are also raised
        # Paths are bytes, since some are not valid text, and absolute, since a worker may start in another folder.
        rows = [
            {"task": number, "files": b"\0".join(os.fsencode(os.path.abspath(file)) for file in files)}
            for number, files in enumerate(tasks)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Ray warns about itself
            # One block per task, so that Ray repeats only the tasks that a dead worker was working on.
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
                raise EngineError(f"the workers cannot continue: {reason_of(error)}") from None
            if "error" in report:
                kind, text = report["error"]
                known = getattr(_errors, kind, None)
                raise known(text) if known else EngineError(f"a worker failed: {kind}: {text}")
            yield report


class _Journal:
    """A file that outlives its process: a line ``begin`` for each attempt, and each row before it is processed singly."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> list[str]:
        """Begin an attempt; return the lines of previous attempts, none of which finished."""
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
        """List the rows after which an attempt wrote nothing more."""
        following = [*lines, "begin"][1:]
        rows = [line for line, after in zip(lines, following, strict=True) if after == "begin"]
        return [int(row) for row in rows if row.isdigit() and len(row) < 10]
