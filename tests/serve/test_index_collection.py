"""The served collection: found as by the library, changed safely, and no files served except those of items."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast import Retriever
from finelip_fast.collection import item_id
from finelip_fast.errors import InputError, StoreError, WriteError
from finelip_fast.serve import index_collection as collections
from finelip_fast.serve.collection import Added, Upload
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.opening import Opening
from finelip_fast.serve.uploads import Uploads


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, kind)
    return file.getvalue()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="session")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture(scope="session")
def engine_options(checkpoint: Path) -> dict[str, Any]:
    return {"checkpoint": checkpoint, "engine": "torch", "device": "cpu"}


@pytest.fixture
def retriever(engine_options: dict[str, Any], tmp_path: Path) -> Iterator[Retriever]:
    with Retriever(**engine_options, index=tmp_path / "index") as retriever:
        yield retriever


@pytest.fixture
def photos(retriever: Retriever, tmp_path: Path) -> Path:
    """Five pictures in a folder, which is added to the index."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(5):
        picture(seed).save(folder / f"{seed}.png")
    retriever.add_folder(folder, progress=False)
    return folder


@pytest.fixture
def served(retriever: Retriever, tmp_path: Path) -> IndexCollection:
    return IndexCollection(retriever, tmp_path / "index" / "uploads")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Reading --------------------------------------------------------------------------------------------------------------


def test_a_search_is_the_retrievers(photos: Path, retriever: Retriever, served: IndexCollection) -> None:
    queries = retriever.encode_texts(["a red house", "night"])
    result = served.search(queries, 3, where="bytes > 0", alpha=0.5)
    assert result.hits == retriever.search(["a red house", "night"], k=3, where="bytes > 0", alpha=0.5)
    assert (result.covered, result.missing, {hit.shard for hit in result.hits[0]}) == (1, {}, {None})
    assert served.search(queries, 1).hits == retriever.search(["a red house", "night"], k=1)
    assert (len(served), served.version(), served.alpha) == (5, retriever.index.version, 0.8)
    stored = served.embeddings_of(["3.png"])["3.png"]
    assert served.search(stored[None], 1).hits[0][0].id == "3.png"
    items, after = served.items(limit=3)
    assert [item.id for item in items + served.items(after=after)[0]] == retriever.index.ids
    assert [field.name for field in served.fields()] == []
    explanation = served.explain(photos / "1.png", "a red house")
    assert explanation.score == pytest.approx(served.explain((photos / "1.png").read_bytes(), "a red house").score)


def test_a_picture_is_the_file_of_an_item_and_no_other(
    photos: Path, retriever: Retriever, served: IndexCollection
) -> None:
    retriever.add_texts(["a text"], ids=["a text"], progress=False)
    picture(9).save(photos / "not added.png")
    assert served.picture("1.png") == photos / "1.png"
    for wrong in ("not added.png", "a text", "", "..", "../photos/1.png", str(photos / "1.png"), "1.png\0", "\ud800"):
        assert served.picture(wrong) is None
    (photos / "1.png").unlink()
    assert served.picture("1.png") is None
    os.mkfifo(photos / "1.png")
    assert served.picture("1.png") is None


@pytest.mark.parametrize("has_root", [False, True])
def test_pictures_that_were_added_by_their_paths_are_there(
    retriever: Retriever, served: IndexCollection, tmp_path: Path, has_root: bool
) -> None:
    picture(1).save(tmp_path / "one.png")
    if has_root:
        retriever.index.root = tmp_path
    (name,) = retriever.add_images([tmp_path / "one.png"], progress=False).added
    assert served.picture(name) == tmp_path / "one.png"
    (hits,) = served.search(retriever.encode_texts(["night"]), 1).hits
    assert (hits[0].id, hits[0].path) == (name, str(tmp_path / "one.png"))


def test_what_another_process_changes_is_seen(
    photos: Path, engine_options: dict[str, Any], served: IndexCollection, tmp_path: Path
) -> None:
    script = (
        "import sys, torch; from finelip_fast.index import stored_index\n"
        "index = stored_index(sys.argv[1]); stored = index.embeddings_of(['1.png'])['1.png']\n"
        "index.add(['new'], torch.nn.functional.normalize(-stored, dim=-1)[None], [{'colour': 'red'}])\n"
        "index.delete(['0.png']); index.maintain()"
    )
    stored, before = served.embeddings_of(["1.png"])["1.png"], served.version()
    assert served.search(-stored[None], 1).hits[0][0].id != "new"
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "index")]
    subprocess.run(command, check=True, timeout=300)
    assert served.version() > before
    assert served.search(-stored[None], 1).hits[0][0].id == "new"
    assert [field.name for field in served.fields()] == ["colour"]
    assert [item.id for item in served.items()[0]] == ["1.png", "2.png", "3.png", "4.png", "new"]
    assert served.picture("0.png") is None


# Adding ---------------------------------------------------------------------------------------------------------------


def test_an_upload_is_a_file_and_an_item(served: IndexCollection, retriever: Retriever, tmp_path: Path) -> None:
    uploads = [
        Upload(encoded(1), "beach.png", {"trip": "Łódź", "sha256": "forged", "camera": "X100"}),
        Upload(encoded(2, "JPEG"), "../../etc/a b<script>.txt"),
        Upload(encoded(3, "WEBP")),
    ]
    added = served.add(uploads)
    assert [(item.name, item.reason, item.existing) for item in added] == [
        (upload.name, None, False) for upload in uploads
    ]
    ids = [item.id for item in added]
    for name, upload, ending in zip(ids, uploads, ("-beach.png", "-a-b-script.jpg", ".webp"), strict=True):
        path = served.picture(name)
        assert path.read_bytes() == upload.content
        assert path.name.endswith(ending)
        assert path.is_relative_to(tmp_path / "index" / "uploads")
        assert item_id(path, retriever.index.root) == name
        (hits,) = served.search(retriever.encode_images([upload.content]), 1).hits
        assert (hits[0].id, hits[0].path) == (name, str(path))
    metadata = retriever.index.get(ids)[ids[0]].metadata
    assert metadata["trip"] == "Łódź"
    assert metadata["camera"] == "X100"
    assert (metadata["width"], metadata["height"]) == (48, 40)
    assert metadata["sha256"] != "forged"
    # Uploads are already in sync with their folder.
    report = retriever.add_folder(tmp_path / "index" / "uploads", progress=False)
    assert (report.added, report.changed, report.moved, report.gone) == (0, 0, 0, 0)


def test_the_root_of_an_index_stays(photos: Path, served: IndexCollection, retriever: Retriever) -> None:
    (added,) = served.add([Upload(encoded(7), "x.png")])
    assert retriever.index.root == photos
    assert added.id.startswith("../index/uploads/")
    assert served.picture(added.id).read_bytes() == encoded(7)


def test_an_upload_is_found_wherever_the_root_is_moved(
    photos: Path, served: IndexCollection, retriever: Retriever, tmp_path: Path
) -> None:
    (added,) = served.add([Upload(encoded(7), "x.png")])
    retriever.index.root = tmp_path / "far" / "away" / "photos"
    path = served.picture(added.id)
    assert path.read_bytes() == encoded(7)
    served.delete([added.id])
    assert not path.exists()


def test_a_moved_index_keeps_its_uploads(
    photos: Path, served: IndexCollection, retriever: Retriever, engine_options: dict[str, Any], tmp_path: Path
) -> None:
    """Ids are relative to the photos, which stay: the same picture is still one item, with the file that moved along."""
    first, second = served.add([Upload(encoded(7), "x.png"), Upload(encoded(8), "y.png")])
    retriever.close()
    (tmp_path / "index").rename(tmp_path / "moved")
    with Retriever(**engine_options, index=tmp_path / "moved") as retriever:
        served = IndexCollection(retriever, tmp_path / "moved" / "uploads")
        (again,) = served.add([Upload(encoded(7), "x.png")])
        assert (again.id, again.existing, len(served)) == (first.id, True, 7)
        (hits,) = served.search(retriever.encode_images([encoded(7)]), 1).hits
        path = served.picture(first.id)
        assert path.is_relative_to(tmp_path / "moved" / "uploads")
        assert (hits[0].id, hits[0].path) == (first.id, str(path))
        served.delete([second.id])
        assert files_of(tmp_path / "moved" / "uploads") == [path]

        # An item that was added twice before and after a move
        stored = served.embeddings_of([first.id])[first.id]
        twice = item_id(path, retriever.index.root)
        retriever.index.add([twice], stored[None], [{"sha256": digest(encoded(7))}])
        served.delete([twice])
        assert served.picture(first.id).read_bytes() == encoded(7)
        served.delete([first.id])
        assert not path.exists()


def test_the_same_picture_is_one_item(served: IndexCollection, tmp_path: Path) -> None:
    first, again, second = served.add(
        [Upload(encoded(1), "a.png", {"n": 1}), Upload(encoded(1), "b.png", {"n": 2}), Upload(encoded(2), "b.png")]
    )
    assert (first.existing, again.existing, second.existing) == (False, True, False)
    assert first.id == again.id != second.id
    (later,) = served.add([Upload(encoded(1), "c.png")])
    assert later == Added(first.id, "c.png", existing=True)
    assert len(served) == len(files_of(tmp_path / "index" / "uploads")) == 2
    assert served.items()[0][0].metadata["n"] == 1


def test_a_bad_upload_is_reported_alone(served: IndexCollection, tmp_path: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"x": deep}
    wrong = [
        *(b"", b"no picture", encoded(1)[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ]
    uploads = [Upload(content, f"{at}.png") for at, content in enumerate(wrong)]
    uploads += [Upload(encoded(3), "deep.png", deep), Upload(encoded(4), "nan.png", {"x": float("nan")})]
    results = served.add([*uploads[:3], Upload(encoded(1), "good.png"), *uploads[3:]])
    success = results.pop(3)
    assert success.reason is None
    assert all(result.id is None and result.reason for result in results)
    assert [item.id for item in served.items()[0]] == [success.id]
    assert len(files_of(tmp_path / "index" / "uploads")) == 1
    assert served.add([]) == []


def test_a_file_without_an_item_is_taken_over(served: IndexCollection, tmp_path: Path) -> None:
    """A crash between the two steps leaves such a file."""
    uploads = Uploads(tmp_path / "index" / "uploads")
    path = uploads.path_for(digest(encoded(1)), "first.png", ".png")
    assert uploads.keep(path, encoded(1))
    (added,) = served.add([Upload(encoded(1), "second.png")])
    assert (added.existing, served.picture(added.id)) == (False, path)
    torn = uploads.path_for(digest(encoded(2)), "x.png", ".png")
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(encoded(2)[:50])
    (added,) = served.add([Upload(encoded(2), "x.png")])
    assert served.picture(added.id).read_bytes() == encoded(2)
    served.picture(added.id).unlink()
    (added,) = served.add([Upload(encoded(2), "x.png")])
    assert added.existing
    assert served.picture(added.id).read_bytes() == encoded(2)


def test_an_index_that_cannot_be_written_leaves_no_file(
    served: IndexCollection, retriever: Retriever, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served.add([Upload(encoded(1), "a.png")])

    def refuse(*_: object, **__: object) -> None:
        raise WriteError(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(retriever.index, "add", refuse)
        with pytest.raises(WriteError, match="no room"):
            served.add([Upload(encoded(1), "a.png"), Upload(encoded(2), "b.png")])
    assert len(served) == len(files_of(tmp_path / "index" / "uploads")) == 1
    assert served.add([Upload(encoded(2), "b.png")])[0].reason is None


def test_a_disk_that_fills_while_files_are_written_leaves_none(
    served: IndexCollection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep = Uploads.keep

    def refuse_second(uploads: Uploads, path: Path, content: bytes) -> bool:
        if files_of(uploads.folder):
            raise WriteError(28, "no room")
        return keep(uploads, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "keep", refuse_second)
        with pytest.raises(WriteError, match="no room"):
            served.add([Upload(encoded(1), "a.png"), Upload(encoded(2), "b.png")])
    assert files_of(tmp_path / "index" / "uploads") == []


def test_more_uploads_than_a_batch(served: IndexCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collections, "_AT_ONCE", 3)
    added = served.add([Upload(encoded(seed % 7), f"{seed}.png") for seed in range(10)])
    assert [item.existing for item in added] == [False] * 7 + [True] * 3
    assert len(served) == 7


def test_uploads_one_by_one_leave_few_segments(served: IndexCollection, tmp_path: Path) -> None:
    for seed in range(70):
        (added,) = served.add([Upload(encoded(seed), "a.png")])
        assert added.id in served.embeddings_of([added.id])
    assert len(served) == 70
    assert len(list((tmp_path / "index" / "segments").glob("*.safetensors"))) < 20


def test_the_same_pictures_at_once_are_added_once(served: IndexCollection, tmp_path: Path) -> None:
    def send(number: int) -> list[Added]:
        return served.add([Upload(encoded(seed), f"{number}.png") for seed in range(4)])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    assert sum(not item.existing for added in answers for item in added) == 4
    assert {tuple(item.id for item in added) for added in answers} == {tuple(item.id for item in answers[0])}
    assert len(served) == len(files_of(tmp_path / "index" / "uploads")) == 4


def test_adding_and_deleting_at_once_leaves_every_item_its_file(served: IndexCollection, tmp_path: Path) -> None:
    """Several threads add and delete the same picture; at the end, every remaining item has its file."""

    def change(number: int) -> None:
        for _ in range(6):
            (added,) = served.add([Upload(encoded(0), f"{number}.png")])
            if number % 2:
                with suppress(InputError):  # another thread was faster
                    served.delete([added.id])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    files = files_of(tmp_path / "index" / "uploads")
    assert [served.picture(item.id) for item in served.items()[0]] == files


# Deleting -------------------------------------------------------------------------------------------------------------


def test_deleting_removes_uploaded_files_and_no_others(photos: Path, served: IndexCollection) -> None:
    (added,) = served.add([Upload(encoded(7), "x.png")])
    path = served.picture(added.id)
    with pytest.raises(InputError, match="not in the index: 'nothing'"):
        served.delete([added.id, "nothing"])
    assert path.exists()
    served.delete([added.id, "1.png"])
    assert not path.exists()
    assert (photos / "1.png").exists()
    assert len(served) == 4
    assert served.picture(added.id) is None
    (again,) = served.add([Upload(encoded(7), "y.png")])
    assert not again.existing
    assert served.picture(again.id).read_bytes() == encoded(7)


def test_a_strangers_items_lead_to_no_file_that_is_removed(
    photos: Path, served: IndexCollection, retriever: Retriever, tmp_path: Path
) -> None:
    """An index may name any file: deleting an item leaves foreign files, even in the uploads folder."""
    notes = tmp_path / "index" / "uploads" / "notes.txt"
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("mine")
    ids = [item_id(path, retriever.index.root) for path in (notes, tmp_path / "index" / "catalogue.sqlite")]
    stored = served.embeddings_of(["1.png"])["1.png"]
    retriever.index.add(ids, torch.stack([stored, stored]), [{"sha256": "0" * 64}] * 2)
    served.delete(ids)
    assert notes.read_text() == "mine"
    assert (tmp_path / "index" / "catalogue.sqlite").exists()


def test_without_a_folder_for_uploads_nothing_can_be_changed(photos: Path, retriever: Retriever) -> None:
    served = IndexCollection(retriever)
    assert not served.writable
    for change in (lambda: served.add([Upload(encoded(1))]), lambda: served.delete(["1.png"])):
        with pytest.raises(InputError, match="read-only; serve it with --writable"):
            change()
    assert len(served) == 5


def test_what_was_opened_to_be_served_is_closed_with_it(
    engine_options: dict[str, Any], retriever: Retriever, tmp_path: Path
) -> None:
    options = {**engine_options, "checkpoint": str(engine_options["checkpoint"]), "index": str(tmp_path / "index")}
    Retriever(**options).close()
    served = Opening(**options).open()
    assert len(served) == 0
    served.close()
    with pytest.raises(StoreError, match="closed"):
        len(served)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError):
        Opening(**options, uploads=str(tmp_path / "file" / "uploads")).open()


# Killing --------------------------------------------------------------------------------------------------------------

_ADDING = """
import sys
from pathlib import Path
from finelip_fast import Retriever
from finelip_fast.serve.collection import Upload
from finelip_fast.serve.index_collection import IndexCollection
index, checkpoint, *pictures = sys.argv[1:]
with Retriever(checkpoint, engine="torch", device="cpu", index=index) as retriever:
    served = IndexCollection(retriever, Path(index) / "uploads")
    for path in pictures:
        (added,) = served.add([Upload(Path(path).read_bytes(), "x.png")])
        print(Path(path).name, added.id, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(
    engine_options: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    paths = []
    for seed in range(60):
        paths.append(tmp_path / f"{seed}.png")
        picture(seed).save(paths[-1])
    command = [sys.executable, "-P", "-c", _ADDING, str(tmp_path / "index"), str(checkpoint), *map(str, paths)]
    acknowledged = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                acknowledged.append(line.split())
                if len(acknowledged) == 9:
                    process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
    assert len(acknowledged) >= 9
    with Retriever(**engine_options, index=tmp_path / "index") as retriever:
        served = IndexCollection(retriever, tmp_path / "index" / "uploads")
        for name, item in acknowledged:
            content = (tmp_path / name).read_bytes()
            assert served.picture(item).read_bytes() == content
            (hits,) = served.search(retriever.encode_images([content]), 1).hits
            assert hits[0].id == item
            assert served.add([Upload(content, "again.png")])[0].existing
        assert retriever.index.check() == {}


def test_names_of_uploads_are_harmless(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    content = encoded(1)
    for name in (
        "",
        ".",
        "..",
        "/",
        "a/../../b.png",
        "C:\\x\\y.png",
        "\0\n",
        "\ud800",
        "ü" * 500,
        "x" * 5000,
        ".htaccess",
        "a.php",
    ):
        path = uploads.path_for(digest(content), name, ".png")
        assert path.parent.parent == uploads.folder
        assert path.suffix == ".png"
        assert len(path.name.encode()) < 150
        assert uploads.holds(path)
        assert uploads.keep(path, content)
        assert uploads.find(f"../{path.name}") == path
        uploads.remove(path)
    for other_path in (
        uploads.folder,
        uploads.folder / "x.png",
        uploads.folder / "ab" / "cd.png",
        tmp_path / path.name,
    ):
        assert not uploads.holds(other_path)


def test_an_index_that_is_gone_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no index at"):
        Opening(str(tmp_path / "gone"), engine="torch", device="cpu").open()
    assert not (tmp_path / "gone").exists()
