"""Bulk indexing: the result equals that of one process, however tasks are distributed and whichever worker dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast import Retriever
from finelip_fast.cli import main
from finelip_fast.distributed import bulk, index_images
from finelip_fast.errors import EngineError, FineLIPError, InputError
from finelip_fast.index import Index, stored_index

COUNT = 26


@pytest.fixture(scope="module")
def checkpoint(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of pictures, with one damaged file and one that is not a picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(COUNT):
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).resize((40, 40)).save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes(b"damaged")
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace Ray by one worker in this process that finishes the last task first; return the tasks at which it raises."""
    fails: list[int] = []

    def run(self: bulk._Pool, tasks: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        worker = bulk.Worker(self._job)
        for task, files in reversed(list(enumerate(tasks))):
            if task in fails:
                raise EngineError("the workers cannot continue")
            joined = b"\0".join(map(os.fsencode, files))
            yield json.loads(worker({"task": np.array([task]), "files": np.array([joined], object)})["report"][0])

    monkeypatch.setattr(bulk, "cluster", nullcontext)
    monkeypatch.setattr(bulk._Pool, "run", run)
    return fails


def add(photos: Any, index: Path, checkpoint: Path, **options: Any) -> bulk.FolderReport:
    settings = {"engine": "torch", "batch_size": 2, "progress": False} | options
    return index_images(photos, index, checkpoint=checkpoint, **settings)


def assert_as_by_one_process(index: Path, photos: Path, checkpoint: Path, *, left_out: Sequence[str] = ()) -> None:
    retriever = Retriever(checkpoint, engine="torch", device="cpu")
    files = [path for path in sorted(photos.glob("*.png")) if path.name not in left_out]
    retriever.add_images(files, progress=False)
    with closing(stored_index(index)) as bulk_index:
        assert [Path(item).name for item in bulk_index.ids] == [Path(item).name for item in retriever.index.ids]
        assert (bulk_index.embeddings.float() - retriever.index.embeddings.float()).abs().max() < 1e-3
        assert bulk_index.check() == {}
    assert not list((index / "incoming").iterdir())


def reasons(report: bulk.FolderReport) -> dict[str, str]:
    return {Path(item).name: reason for item, reason in report.skipped}


@pytest.mark.usefixtures("ray")
def test_two_workers_make_what_one_process_makes(
    photos: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "index"
    report = add(photos, index, checkpoint)
    assert report.added == COUNT - 1
    assert reasons(report).keys() == {"07.png", "notes.txt"}
    assert "not an image" in reasons(report)["07.png"]
    assert_as_by_one_process(index, photos, checkpoint)

    (photos / "07.png").unlink()
    capsys.readouterr()
    assert main(["index", "bulk", str(photos), "--index", str(index), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        **dict.fromkeys(("added", "changed", "moved", "removed", "gone"), 0),
        "skipped": [[str(photos / "notes.txt"), "not a picture by its name"]],
    }


@pytest.mark.usefixtures("without_ray")
def test_a_picture_that_cannot_be_read_any_more_keeps_its_item(photos: Path, tmp_path: Path, checkpoint: Path) -> None:
    add(photos, tmp_path / "index", checkpoint)
    (photos / "03.png").write_bytes(b"damaged")
    (photos / "07.png").write_bytes(b"damaged otherwise")  # damaged differently; it never was in the index
    report = add(photos, tmp_path / "index", checkpoint)
    assert (report.added, report.changed) == (0, 0)
    assert "; its item stays, with the embedding of its earlier content" in reasons(report)["03.png"]
    assert "its item" not in reasons(report)["07.png"]
    with closing(stored_index(tmp_path / "index")) as index:
        assert "03.png" in index


class Dying(bulk.Worker):
    """A worker that is killed by a file of that name, once or always."""

    def read(self, file: str) -> Any:
        if "always" in file or ("once" in file and not os.path.exists(f"{file}.met")):
            Path(f"{file}.met").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(file)


def test_workers_that_die_lose_and_double_nothing(
    ray: Any, photos: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(bulk._Pool, "worker", Dying)
    for number, name in ((3, "03-once"), (17, "17-always")):
        (photos / f"{number:02}.png").rename(photos / f"{name}.png")
    try:
        report = add(photos, tmp_path / "index", checkpoint)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert report.added == COUNT - 2
    assert reasons(report)["17-always.png"] == "the worker died on this file"
    assert reasons(report).keys() == {"17-always.png", "07.png", "notes.txt"}
    assert_as_by_one_process(tmp_path / "index", photos, checkpoint, left_out=["17-always.png"])


@pytest.mark.usefixtures("ray")
def test_what_a_worker_raises_comes_back(photos: Path, tmp_path: Path, checkpoint: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)

    def then_without_checkpoint() -> Iterator[Path]:
        shutil.rmtree(moved)  # opened by the driver, but not yet by the workers
        yield photos / "00.png"

    with pytest.raises(FineLIPError, match=re.escape(str(moved))):
        add(then_without_checkpoint(), tmp_path / "index", moved)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_order_is_that_of_the_files(photos: Path, tmp_path: Path, checkpoint: Path, dtype: str) -> None:
    files = [photos / f"{number:02}.png" for number in (5, 0, 20, 7, 3, 0, 11)]
    report = add(files, tmp_path / "index", checkpoint, dtype=dtype, metadata=lambda item: {"name": Path(item).stem})
    assert report.added == 5
    index = stored_index(tmp_path / "index")
    assert index.spec.dtype == dtype
    assert index.ids == [str(file) for file in (*files[:3], files[4], files[6])]
    assert [item_metadata["name"] for item_metadata in index.metadata] == ["05", "00", "20", "03", "11"]
    assert index.check() == {}


def test_a_job_that_was_stopped_goes_on(
    photos: Path, tmp_path: Path, checkpoint: Path, without_ray: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    files = sorted(photos.glob("*.png"))
    without_ray.append(0)
    with pytest.raises(EngineError, match="cannot continue"):
        add(files, index, checkpoint, chunk_size=8)
    assert len(stored_index(index)) == 0  # a chunk is adopted in order, from its first task
    assert not list((index / "incoming").iterdir())

    without_ray.clear()
    adopted: list[int] = []
    adopt = Index.adopt

    def fail_later(self: Index, segments: Any, **options: Any) -> None:
        adopt(self, segments, **options)
        adopted.append(len(segments))
        if len(adopted) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Index, "adopt", fail_later)
        with pytest.raises(KeyboardInterrupt):
            add(files, index, checkpoint, chunk_size=8)
    assert len(stored_index(index)) == 15
    assert add(files, index, checkpoint, chunk_size=8).added == COUNT - 16
    assert_as_by_one_process(index, photos, checkpoint)


@pytest.fixture
def worker(checkpoint: Path, tmp_path: Path) -> bulk.Worker:
    retriever = Retriever(checkpoint, engine="torch", device="cpu", index=tmp_path / "index")
    return bulk.Worker(bulk._Job(retriever, "cpu", 4))


def test_a_file_on_which_a_worker_died_is_left_out(worker: bulk.Worker, photos: Path) -> None:
    files = [str(photos / f"{number:02}.png") for number in range(7)]
    journal = worker.job.journal("task")
    journal.begin()  # died in a batch, then at row 4, then at the earlier row 1
    for line in ("0", "1", "2", "3", "4", "begin", "0", "1"):
        journal.write(line)
    report = worker.encode(files, journal)
    assert report["rows"] == [0, 2, 3, 5, 6]
    assert report["skipped"] == [(row, "the worker died on this file") for row in (1, 4)]
    assert journal.begin() == []


def test_a_death_after_all_files_is_no_files_fault(worker: bulk.Worker, photos: Path) -> None:
    journal = worker.job.journal("task")
    for line in ("begin", "begin", "0", "1", "through"):
        journal.write(line)
    assert worker.encode([str(photos / "00.png"), str(photos / "01.png")], journal)["rows"] == [0, 1]


def test_a_batch_does_not_kill_workers_for_ever(worker: bulk.Worker, photos: Path) -> None:
    journal = worker.job.journal("task")
    for _ in range(16):
        journal.write("begin")
    with pytest.raises(EngineError, match="died 16 times on the same 1 files, probably for lack of memory"):
        worker.encode([str(photos / "00.png")], journal)


def test_files_on_which_workers_die_can_be_taken_out(worker: bulk.Worker, photos: Path) -> None:
    files = [str(photos / f"{number:02}.png") for number in range(4)]
    journal = worker.job.journal("task")
    for _ in range(16):
        for line in ("begin", "2"):
            journal.write(line)
    with pytest.raises(EngineError, match="died 16 times on the same 4 files; remove ") as caught:
        worker.encode(files, journal)
    files.remove(str(caught.value).rpartition("remove ")[2])  # as the message advises
    assert worker.encode(files, worker.job.journal("another task"))["rows"] == [0, 1, 2]


def test_workers_refuse_another_checkpoint_until_they_see_the_same(
    worker: bulk.Worker, photos: Path, checkpoint: Path, tmp_path: Path, make_model: Any
) -> None:
    finelip_fast.save(make_model(seed=1, context_length=40, vision_layers=1, text_width=32), tmp_path / "other")
    worker.job.opening["checkpoint"] = str(tmp_path / "other")
    with pytest.raises(
        EngineError, match=r"to be the same for all workers, .*; put it in a folder that all workers can read"
    ):
        worker.encode([str(photos / "00.png")], worker.job.journal("task"))
    shutil.copytree(checkpoint, tmp_path / "other", dirs_exist_ok=True)
    assert worker.encode([str(photos / "00.png")], worker.job.journal("task"))["rows"] == [0]


@pytest.mark.parametrize("option", ["workers", "batch_size", "chunk_size"])
def test_numbers_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"expected {option} of at least 1, got 0"):
        index_images([], tmp_path, **{option: 0})


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("photos", {"cpus": "x"}, "expected cpus to be 0 or a number of at least 0.0001, got 'x'"),
        ("photos", {"gpus": -1}, "expected gpus to be 0 or a number of at least 0.0001, got -1"),
        ("photos", {"metadata": {}}, "expected metadata to be a function from an id to a dict, got {}"),
        ("nothing", {}, "expected a folder or a picture, got nothing there"),
        (5, {}, "expected files to be a folder or paths of pictures, got 5"),
    ],
)
def test_wrong_arguments_make_no_index(
    photos: Path, monkeypatch: pytest.MonkeyPatch, files: Any, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    with pytest.raises(InputError) as caught:
        index_images(files, "index", **options)
    assert message in str(caught.value)
    assert not Path("index").exists()


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("values", [None, {"n": float("nan")}])
def test_metadata_is_checked_before_anything_is_encoded(
    photos: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, values: Any
) -> None:
    def encode(*_: object) -> None:
        pytest.fail("a picture was encoded")

    monkeypatch.setattr(bulk.Worker, "encode", encode)
    with pytest.raises(InputError, match=r"expected metadata .*03\.png"):
        add(photos, tmp_path / "index", checkpoint, metadata=lambda item: values if item == "03.png" else {"n": 1})


def test_a_task_is_whole_batches_and_enough_for_all(worker: bulk.Worker) -> None:
    pool = bulk._Pool(None, worker.job, 2, 1, 0)  # batches of 4
    assert [pool.files_per_task(count) for count in (1, 32, 33, 64, 10**6)] == [4, 4, 8, 8, 1024]
