"""Synchronisation of a folder's pictures with an index: one item per file, none embedded twice."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast import FolderReport, InputError, Retriever, collection, ingest, picture_files
from finelip_fast.cli import main
from finelip_fast.index import Index, stored_index
from finelip_fast.ingest import Ingest


@pytest.fixture(scope="module")
def checkpoint(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "checkpoint"
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture
def retriever(checkpoint: Path, tmp_path: Path) -> Iterator[Retriever]:
    with Retriever(checkpoint, engine="torch", device="cpu", index=tmp_path / "index") as opened:
        yield opened


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures, in the folder and in two subfolders."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("a.jpg", "b.png", "2023/c.jpg", "2023/d.jpg", "2024/e.jpg", "2024/f.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(folder / name, number)
    return folder


def draw(path: Path, number: int) -> None:
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(colours).resize((40, 40)).save(path)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the items encoded so far."""
    names: list[str] = []
    add = Ingest.add

    def note(self: Ingest, ids: list[str], *arguments: Any) -> None:
        names.extend(ids)
        add(self, ids, *arguments)

    monkeypatch.setattr(Ingest, "add", note)
    return names


def counts(report: FolderReport) -> dict[str, int]:
    values = {name: getattr(report, name) for name in ("added", "changed", "moved", "removed", "gone")}
    return {name: value for name, value in values.items() if value}


def best(retriever: Retriever, path: Path) -> str:
    return retriever.search(image=path, k=1)[0].id


ALL = ["2023/c.jpg", "2023/d.jpg", "2024/e.jpg", "2024/f.jpg", "a.jpg", "b.png"]


def test_a_picture_is_one_item_however_its_path_was_typed(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    monkeypatch.chdir(photos)
    (photos.parent / "link").symlink_to(photos)
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 6}
    for spelling in (".", "../photos", "../link", str(photos), "2023/..", photos / "2023", photos / "2024" / ""):
        assert counts(retriever.add_folder(spelling, progress=False)) == {}
    assert retriever.add_images(["a.jpg", photos / "b.png"], existing="skip", progress=False).added == []
    assert sorted(retriever.index.ids) == sorted(encoded) == ALL
    assert retriever.index.root == photos.resolve()


def test_picture_files_are_followed_like_those_of_a_folder(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    monkeypatch.chdir(photos)
    (photos / "a.jpg.json").write_text('{"title": "A"}')
    assert counts(retriever.add_files(["a.jpg", photos / "2023" / "c.jpg", "./2023/../a.jpg"], progress=False)) == {
        "added": 2
    }
    assert retriever.index.root == photos.resolve()
    assert sorted(retriever.index.ids) == ["2023/c.jpg", "a.jpg"]
    assert [hit.id for hit in retriever.search("a house", where="title = 'A'")] == ["a.jpg"]
    assert counts(retriever.add_files(["a.jpg"], progress=False)) == {}
    draw(photos / "a.jpg", 10)
    assert counts(retriever.add_files(["a.jpg", "2023/c.jpg"], progress=False)) == {"changed": 1}
    ((path, _),) = retriever.add_files(["lost.jpg"], progress=False).skipped
    assert Path(path) == photos.resolve() / "lost.jpg"
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 4}
    for files, message in (("a.jpg", "expected files to be a list"), ([], "got none"), ([1], "expected a file to be")):
        with pytest.raises(InputError, match=message):
            retriever.add_files(files, progress=False)  # type: ignore[arg-type]


def test_a_folder_beside_the_root_has_ids_of_its_own(retriever: Retriever, photos: Path) -> None:
    retriever.add_folder(photos / "2023", progress=False)
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 4}
    assert sorted(retriever.index.ids) == ["../2024/e.jpg", "../2024/f.jpg", "../a.jpg", "../b.png", "c.jpg", "d.jpg"]
    (photos / "2024" / "e.jpg").unlink()
    assert counts(retriever.add_folder(photos / "2023", sync=True, progress=False)) == {}
    assert counts(retriever.add_folder(photos / "2024", sync=True, progress=False)) == {"removed": 1}


def test_what_changed_is_embedded_again_and_what_was_moved_is_not(
    retriever: Retriever, photos: Path, encoded: list[str]
) -> None:
    retriever.add_folder(photos, progress=False)
    encoded.clear()
    draw(photos / "a.jpg", 10)
    (photos / "b.png").unlink()
    (photos / "new").mkdir()
    (photos / "2023" / "c.jpg").rename(photos / "new" / "moved.jpg")
    shutil.copy(photos / "2023" / "d.jpg", photos / "copy.jpg")
    os.utime(photos / "2024" / "e.jpg")  # touched but unchanged
    report = retriever.add_folder(photos, progress=False)
    assert counts(report) == {"added": 1, "changed": 1, "moved": 1, "gone": 1}
    assert "1 gone, which --sync removes" in str(report)
    assert sorted(encoded) == ["a.jpg", "copy.jpg"]
    assert best(retriever, photos / "a.jpg") == "a.jpg"
    assert best(retriever, photos / "new" / "moved.jpg") == "new/moved.jpg"
    assert counts(retriever.add_folder(photos, progress=False)) == {"gone": 1}, "what was touched is known now"
    assert counts(retriever.add_folder(photos, sync=True, progress=False)) == {"removed": 1}
    assert sorted(retriever.index.ids) == [
        "2023/d.jpg",
        "2024/e.jpg",
        "2024/f.jpg",
        "a.jpg",
        "copy.jpg",
        "new/moved.jpg",
    ]
    assert len(encoded) == 2
    assert not retriever.index.check()


def overwrite(path: Path) -> None:
    path.write_bytes(b"no picture")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def close(path: Path) -> None:
    draw(path, 11)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")


@pytest.mark.parametrize("spoil", [overwrite, cut, close])
def test_a_picture_that_cannot_be_read_any_more_keeps_its_item_and_is_reported(
    retriever: Retriever, photos: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    retriever.add_folder(photos, progress=False)
    shutil.copy(photos / "a.jpg", tmp_path / "before.jpg")
    spoil(photos / "a.jpg")
    for _ in range(2):  # repeatedly, until it is readable or its item is removed
        report = retriever.add_folder(photos, sync=True, progress=False)
        assert counts(report) == {}
        ((path, reason),) = report.skipped
        assert path == str(photos / "a.jpg")
        assert "; its item stays, with the embedding of its earlier content, unless finelip remove " in reason
    assert best(retriever, tmp_path / "before.jpg") == "a.jpg"
    assert main(shlex.split(reason.partition("unless finelip ")[2])[:4]) == 0
    ((_, reason),) = retriever.add_folder(photos, progress=False).skipped
    assert "its item" not in reason
    assert sorted(retriever.index.ids) == [name for name in ALL if name != "a.jpg"]
    (photos / "a.jpg").chmod(0o644)
    draw(photos / "a.jpg", 12)
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 1}


def test_a_folder_that_lost_all_its_pictures_is_not_emptied(retriever: Retriever, photos: Path) -> None:
    retriever.add_folder(photos, progress=False)
    retriever.add_texts(["a text"], progress=False)
    shutil.rmtree(photos)
    photos.mkdir()
    with pytest.raises(InputError, match="got none, but the index has 6 from it; nothing was removed") as caught:
        retriever.add_folder(photos, sync=True, progress=False)
    (photos / "2023").mkdir()
    with pytest.raises(InputError, match="got none, but the index has 2 from it") as caught_below:
        retriever.add_folder(photos / "2023", sync=True, progress=False)
    assert len(retriever) == 7
    for error, left in ((caught_below, 5), (caught, 1)):  # following the advice works
        assert main(shlex.split(str(error.value).partition("remove them anyway: finelip ")[2])) == 0
        assert len(retriever) == left


def test_the_advice_on_an_emptied_folder_is_python_for_an_index_in_memory(checkpoint: Path, photos: Path) -> None:
    with Retriever(checkpoint, engine="torch", device="cpu") as retriever:
        retriever.add_folder(photos, progress=False)
        shutil.rmtree(photos)
        photos.mkdir()
        with pytest.raises(InputError, match="its disk is mounted") as caught:
            retriever.add_folder(photos, sync=True, progress=False)
        exec(str(caught.value).partition("remove them anyway: ")[2], {"index": retriever.index})
        assert len(retriever) == 0


def test_two_processes_may_follow_a_folder_at_the_same_time(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever.add_folder(photos, progress=False)
    present = Index.present
    with closing(stored_index(retriever.index.folder)) as neighbour:

        def late(index: Index, ids: Sequence[str]) -> set[str]:
            """Another process removes two items just after they were found."""
            existing = present(index, ids)
            if index is retriever.index and (removed := existing & {"a.jpg", "2023/c.jpg"}):
                neighbour.delete(list(removed))
            return existing

        (photos / "a.jpg").unlink()
        (photos / "b.png").unlink()
        for name in ("c", "d"):
            (photos / "2023" / f"{name}.jpg").rename(photos / f"{name}.jpg")
        monkeypatch.setattr(Index, "present", late)
        assert retriever.add_folder(photos, sync=True, progress=False).removed == 1
    assert sorted(retriever.index.ids) == ["2024/e.jpg", "2024/f.jpg", "d.jpg"]
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 1}


def test_patterns_are_checked_before_the_index_is_changed(retriever: Retriever, photos: Path) -> None:
    with pytest.raises(InputError, match=r"expected exclude to be a list, got the str '\*\.jpg'; pass \['\*\.jpg'\]"):
        retriever.add_folder(photos, exclude="*.jpg", progress=False)
    assert retriever.index.root is None


def test_texts_and_pictures_elsewhere_are_not_gone(retriever: Retriever, photos: Path) -> None:
    retriever.add_texts(["a text"], progress=False)
    retriever.add_images([Image.new("RGB", (8, 8))], progress=False)
    retriever.add_folder(photos, progress=False)
    assert counts(retriever.add_folder(photos, sync=True, progress=False)) == {}
    assert len(retriever) == 8


def test_metadata_comes_by_itself_and_more_is_added(retriever: Retriever, photos: Path) -> None:
    image = Image.new("RGB", (30, 20), "blue")
    exif = image.getexif()
    exif[271], exif[272] = "Canon", "EOS R5"
    exif.get_ifd(0x8769)[0x9003] = "2024:06:01 12:00:00"
    image.save(photos / "camera.jpg", exif=exif)
    (photos / "a.jpg.json").write_text('{"title": "A", "people": ["Ann"]}')
    (photos / "2023" / "c.json").write_text("[]")
    (photos / "other.json").write_text("{}")
    table = photos.parent / "more.jsonl"
    table.write_text('\ufeff{"image": "a.jpg", "rating": 5}\n{"image": "none.jpg", "rating": 1}\n')
    report = retriever.add_folder(photos, metadata=table, progress=False)
    assert counts(report) == {"added": 7}
    reasons = {Path(path).name: reason for path, reason in report.skipped}
    assert "expected an object of fields: found a list" in reasons["c.json"]
    assert "nor beside one" in reasons["other.json"]
    assert "is no picture of the folder" in reasons["none.jpg"]
    hits = retriever.search("a house", where="taken >= '2024-06-01' and camera like 'Canon%' and width = 30")
    assert [hit.id for hit in hits] == ["camera.jpg"]
    assert [hit.id for hit in retriever.search("a house", where="title = 'A' and rating = 5")] == ["a.jpg"]


def test_what_was_given_with_a_picture_survives_its_changes(
    retriever: Retriever, photos: Path, encoded: list[str]
) -> None:
    table = photos.parent / "more.csv"
    table.write_text("file,title\na.jpg,dog\nb.png,\n")
    retriever.add_folder(photos, progress=False)
    encoded.clear()
    assert counts(retriever.add_folder(photos, metadata=table, progress=False)) == {}
    draw(photos / "a.jpg", 11)
    (photos / "a.jpg").rename(photos / "renamed.jpg")
    draw(photos / "renamed.jpg", 0)
    retriever.add_folder(photos, progress=False)
    (metadata,) = retriever.index.get(["renamed.jpg"]).values()
    assert metadata.metadata["title"] == "dog"
    draw(photos / "renamed.jpg", 12)
    retriever.add_folder(photos, progress=False)
    (metadata,) = retriever.index.get(["renamed.jpg"]).values()
    assert metadata.metadata["title"] == "dog"
    assert metadata.metadata["bytes"] == (photos / "renamed.jpg").stat().st_size
    assert encoded == ["renamed.jpg"]


def test_what_overrides_the_camera_survives_a_touch_and_a_move(retriever: Retriever, photos: Path) -> None:
    table = photos.parent / "more.csv"
    table.write_text("file,camera,latitude\na.jpg,Holga,50.5\n")
    retriever.add_folder(photos, metadata=table, progress=False)
    os.utime(photos / "a.jpg", (1e9, 1e9))
    retriever.add_folder(photos, progress=False)
    (photos / "a.jpg").rename(photos / "renamed.jpg")
    assert counts(retriever.add_folder(photos, progress=False)) == {"moved": 1}
    metadata = retriever.index.get(["renamed.jpg"])["renamed.jpg"].metadata
    assert (metadata["camera"], metadata["latitude"], metadata["width"]) == ("Holga", 50.5, 40)
    assert metadata["modified"].startswith("2001-09-09")
    assert counts(retriever.add_folder(photos, progress=False)) == {}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "rows.jsonl",
            '{"image": "2023/c.jpg", "text": "a dog", "n": 1}\n\n{"image": "a.jpg", "text": "a cat", "n": 2}\n',
        ),
        ("rows.csv", 'text,path,n\n"a, dog",2023/c.jpg,1\na cat,./a.jpg,2\n'),
        ("rows.TSV", "\ufeffpath\ttext\n2023/c.jpg\ta dog\na.jpg\ta cat\n"),
    ],
)
def test_a_table_is_indexed_in_one_call(retriever: Retriever, photos: Path, name: str, content: str) -> None:
    (photos / name).write_text(content, encoding="utf-8")
    assert counts(retriever.add_table(photos / name, progress=False)) == {"added": 2}
    assert sorted(retriever.index.ids) == ["2023/c.jpg", "a.jpg"]
    assert [hit.id for hit in retriever.search("x", where="text = 'a cat'")] == ["a.jpg"]
    assert counts(retriever.add_table(photos / name, progress=False)) == {}
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 4}


def test_rows_of_one_picture_are_gathered(retriever: Retriever, photos: Path) -> None:
    rows = [("a.jpg", "a dog", 1), ("a.jpg", "a brown dog", 1), ("./a.jpg", "a dog", 1), ("b.png", "a cat", 2)]
    (photos / "captions.csv").write_text(
        "image,caption,n\n" + "".join(f"{path},{text},{n}\n" for path, text, n in rows)
    )
    assert counts(retriever.add_table(photos / "captions.csv", progress=False)) == {"added": 2}
    fields = {item.id: item.metadata for item in retriever.index.items()}
    assert (fields["a.jpg"]["caption"], fields["a.jpg"]["n"]) == (["a dog", "a brown dog"], 1)
    assert fields["b.png"]["caption"] == "a cat"
    assert counts(retriever.add_table(photos / "captions.csv", progress=False)) == {}


def test_no_field_hides_what_a_file_is(retriever: Retriever, photos: Path, encoded: list[str]) -> None:
    (photos / "a.json").write_text('{"bytes": 1, "modified": "never", "sha256": "x", "width": 3, "title": "A"}')
    retriever.add_folder(photos, progress=False)
    metadata = retriever.index.get(["a.jpg"])["a.jpg"].metadata
    assert (metadata["bytes"], metadata["title"], metadata["width"]) == ((photos / "a.jpg").stat().st_size, "A", 3)
    encoded.clear()
    assert counts(retriever.add_folder(photos, progress=False)) == {}
    (photos / "a.jpg").rename(photos / "z.jpg")
    (photos / "a.json").rename(photos / "z.json")
    assert counts(retriever.add_folder(photos, progress=False)) == {"moved": 1}
    assert encoded == []


def test_columns_of_numbers_are_numbers(retriever: Retriever, photos: Path) -> None:
    content = "image,rating,zip,share\na.jpg,5,01234,0.25\nb.png,-3,12345,\n2023/c.jpg,12,99999,1\n"
    (photos / "t.csv").write_text(content)
    retriever.add_table(photos / "t.csv", progress=False)
    assert [hit.id for hit in retriever.search("x", where="rating > 4 and share < 1")] == ["a.jpg"]
    assert [hit.id for hit in retriever.search("x", where="zip = '01234'")] == ["a.jpg"]


def test_what_another_process_took_out_meanwhile_is_passed_over(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever.add_folder(photos, progress=False)
    (photos / "a.jpg").rename(photos / "moved.jpg")
    (photos / "b.png").unlink()
    plan = ingest.plan

    def plan_then_lose(*arguments: Any) -> Any:
        changes = plan(*arguments)
        retriever.index.delete(["a.jpg", "b.png"])
        return changes

    monkeypatch.setattr(ingest, "plan", plan_then_lose)
    retriever.add_folder(photos, sync=True, progress=False)
    monkeypatch.undo()
    assert counts(retriever.add_folder(photos, sync=True, progress=False)) == {"added": 1}
    assert sorted(retriever.index.ids) == ["2023/c.jpg", "2023/d.jpg", "2024/e.jpg", "2024/f.jpg", "moved.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.jsonl",
            '{"picture": "a.jpg"}',
            "t.jsonl, line 1: found no path of a picture in a column 'image', only the columns picture; name it with",
        ),
        ("t.jsonl", '\n{"image": 3}', "t.jsonl, line 2: expected the path of a picture in the column 'image', got 3"),
        ("t.csv", "image,title\n,a\n", "t.csv, line 2: found no path of a picture in a column 'image', only"),
        ("t.jsonl", '{"image": "https://x.org/a.jpg"}', "t.jsonl, line 1: expected the path .* got the address"),
        ("t.jsonl", "{", "t.jsonl, line 1: expected an object of fields"),
        ("t.csv", "image,title\na.jpg\n", "t.csv, line 2: expected 2 values"),
        ("t.csv", "image,title\na.jpg,b,c\n", "t.csv, line 2: expected 2 values"),
        ("t.csv", b"image\n\xff.jpg\n", "t.csv: expected UTF-8"),
        (
            "t.jsonl",
            '{"image": "a\\u0000.jpg"}',
            "t.jsonl, line 1: expected the path of a picture in the column 'image'",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_named_by_its_line(
    retriever: Retriever, photos: Path, name: str, content: str | bytes, message: str
) -> None:
    (photos / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        retriever.add_table(photos / name, progress=False)


def test_an_index_and_its_pictures_can_be_moved(
    retriever: Retriever, photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever.add_folder(photos, progress=False)
    hit = retriever.search(image=photos / "a.jpg", k=1)[0]
    monkeypatch.chdir(tmp_path)
    assert hit.path == str(photos / "a.jpg")
    assert retriever.explain(hit, "a house").words
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"finelip index move-root"):
        retriever.explain(hit, "a house")
    with pytest.raises(InputError, match="no longer exists; if it was moved, run"):
        retriever.add_folder(tmp_path / "elsewhere", progress=False)
    retriever.index.root = tmp_path / "elsewhere"
    hit = retriever.search(image=tmp_path / "elsewhere" / "a.jpg", k=1)[0]
    assert (hit.id, hit.path) == ("a.jpg", str(tmp_path / "elsewhere" / "a.jpg"))
    assert counts(retriever.add_folder(tmp_path / "elsewhere", progress=False)) == {}


def test_an_index_of_paths_as_they_were_typed_is_taken_over(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    typed = ["photos/a.jpg", "photos/../photos/a.jpg", str(photos / "b.png"), "photos/2023/c.jpg"]
    retriever.add_images(typed, metadata=[{"n": n} for n in range(4)], progress=False)
    retriever.add_texts(["a text"], ids=["photos"], progress=False)
    encoded.clear()
    draw(photos / "b.png", 10)
    assert counts(retriever.add_folder("photos", progress=False)) == {"added": 3, "changed": 1}
    assert sorted(retriever.index.ids) == sorted([*ALL, "photos"])
    assert sorted(encoded) == ["2023/d.jpg", "2024/e.jpg", "2024/f.jpg", "b.png"]
    assert retriever.index.get(["a.jpg"])["a.jpg"].metadata["n"] == 0
    assert retriever.index.get(["a.jpg"])["a.jpg"].metadata["width"] == 40
    assert best(retriever, photos / "2023" / "c.jpg") == "2023/c.jpg"


def test_paths_typed_in_several_folders_are_taken_over(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, typed in ((photos, "a.jpg"), (photos.parent, "photos/a.jpg")):
        monkeypatch.chdir(folder)
        retriever.add_images([typed], progress=False)
    retriever.add_folder("photos", progress=False)
    assert sorted(retriever.index.ids) == ALL


@pytest.mark.parametrize("backwards", [False, True])
def test_a_typed_path_may_become_that_of_another_picture(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    monkeypatch.setattr(collection, "_AT_ONCE", 1)
    typed = ["a.jpg", "2023/a.jpg", "2023/2023/a.jpg"]
    folder = photos / "2023"
    for number, name in enumerate(typed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw(folder / name, number)
    monkeypatch.chdir(folder)
    retriever.add_images(typed[::-1] if backwards else typed, progress=False)
    collection.prepare_root(retriever.index, [photos])
    assert sorted(retriever.index.ids) == sorted(f"2023/{name}" for name in typed)
    assert all(best(retriever, folder / name) == f"2023/{name}" for name in typed)


@pytest.mark.parametrize("is_picture_known", [False, True])
def test_a_text_whose_id_is_the_path_of_a_picture_stays(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, is_picture_known: bool
) -> None:
    monkeypatch.chdir(photos)
    retriever.add_texts(["a caption"], ids=["a.jpg"], metadata=[{"kind": "note"}], progress=False)
    if is_picture_known:
        retriever.add_images(["../photos/a.jpg"], progress=False)
    before = retriever.search("a caption", where="kind = 'note'")[0]
    for _ in range(2):
        report = retriever.add_folder(photos, sync=True, progress=False)
        ((path, reason),) = report.skipped
        assert path == str(photos / "a.jpg")
        assert "its id 'a.jpg' belongs to an item that was not added as this file" in reason
        assert retriever.search("a caption", where="kind = 'note'")[0] == before
    assert sorted(retriever.index.ids) == sorted([*ALL, *["../photos/a.jpg"] * is_picture_known])
    assert main(shlex.split(reason.partition("add the file again: finelip ")[2])) == 0
    assert counts(retriever.add_folder(photos, progress=False)) == {"added": 1}
    assert best(retriever, photos / "a.jpg") in ("a.jpg", "../photos/a.jpg")


def test_a_picture_added_by_its_path_elsewhere_is_not_taken_for_a_missing_one(
    retriever: Retriever, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    draw(tmp_path / "elsewhere" / "z.jpg", 20)
    monkeypatch.chdir(tmp_path / "elsewhere")
    retriever.add_images(["z.jpg"], progress=False)
    monkeypatch.chdir(tmp_path)
    assert counts(retriever.add_folder(photos, sync=True, progress=False)) == {"added": 6}
    assert best(retriever, tmp_path / "elsewhere" / "z.jpg") == "z.jpg"


def test_a_picture_added_by_its_path_knows_its_file(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever.add_folder(photos, progress=False)
    draw(photos / "new.jpg", 20)
    draw(photos / "other.jpg", 21)
    monkeypatch.chdir(photos)
    retriever.add_images(["new.jpg"], metadata=[{"bytes": 1, "n": 2}], progress=False)
    retriever.add_images(["other.jpg"], ids=["mine"], progress=False)
    hit = retriever.search(image="new.jpg", k=1)[0]
    assert (hit.path, hit.metadata["n"]) == (str(photos / "new.jpg"), 2)
    assert hit.metadata["bytes"] == (photos / "new.jpg").stat().st_size
    assert retriever.search(image="other.jpg", k=1)[0].path is None
    retriever.add_images([hit.path], ids=[hit.id], existing="replace", progress=False)
    assert retriever.search(image="new.jpg", k=1)[0].path == hit.path
    (photos / "new.jpg").unlink()
    assert counts(retriever.add_folder(photos, sync=True, progress=False)) == {"added": 1, "removed": 1}
    assert "mine" in retriever.index


def test_a_json_file_belongs_to_every_picture_of_its_name(retriever: Retriever, photos: Path) -> None:
    draw(photos / "a.png", 7)
    (photos / "a.json").write_text('{"place": "Lima"}')
    report = retriever.add_folder(photos, progress=False)
    assert report.skipped == []
    assert {hit.id for hit in retriever.search("x", where="place = 'Lima'")} == {"a.jpg", "a.png"}


def test_a_folder_added_as_pictures_has_the_fields_of_json_files_too(retriever: Retriever, photos: Path) -> None:
    (photos / "a.json").write_text('{"place": "Lima", "title": "A", "sha256": "x"}')
    titles = [{"title": name} for name in ALL]
    with pytest.raises(InputError, match="expected as many metadata as images, got 5 for 6"):
        retriever.add_images(photos, metadata=titles[1:], progress=False)
    with pytest.raises(InputError, match="expected metadata to be a dict of JSON values, got None"):
        retriever.add_images(photos, metadata=[None] * 6, progress=False)  # type: ignore[list-item]
    assert retriever.add_images(photos, metadata=titles, progress=False).skipped == []
    fields = retriever.index.get(["a.jpg"])["a.jpg"].metadata
    assert (fields["place"], fields["title"], len(fields["sha256"])) == ("Lima", "a.jpg", 64)
    retriever.add_images(photos, existing="replace", progress=False)
    assert retriever.index.get(["a.jpg"])["a.jpg"].metadata["title"] == "A"


def test_a_line_ends_only_at_its_end(retriever: Retriever, photos: Path) -> None:
    """Unicode has more line separators than JSON Lines."""
    title = "one\u2028two\u0085three"
    (photos / "t.jsonl").write_text(f'{{"image": "a.jpg", "title": "{title}"}}\r\n\n{{"image": "b.png"}}\n', "utf-8")
    assert counts(retriever.add_table(photos / "t.jsonl", progress=False)) == {"added": 2}
    assert retriever.index.get(["a.jpg"])["a.jpg"].metadata["title"] == title


def test_digits_of_other_scripts_are_text(retriever: Retriever, photos: Path) -> None:
    (photos / "t.csv").write_text("image,room\na.jpg,1\uff12\n", "utf-8")
    retriever.add_table(photos / "t.csv", progress=False)
    assert retriever.index.get(["a.jpg"])["a.jpg"].metadata["room"] == "1\uff12"


@pytest.mark.parametrize("seconds", [3e11, -1e11])
def test_a_time_that_no_calendar_has_is_no_error(
    retriever: Retriever, photos: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Some file systems store any number."""
    real = os.stat

    class Status:
        def __init__(self, path: Any) -> None:
            self.st_size, self.st_mtime_ns = real(path).st_size, int(seconds * 1e9)

    monkeypatch.setattr(picture_files.os, "stat", lambda path: Status(path))
    stamp = picture_files.stamp(photos / "a.jpg")
    assert stamp["modified"].startswith("9999-12-31" if seconds > 0 else "0001-01-02")


def test_a_table_that_cannot_be_read_leaves_no_root(retriever: Retriever, photos: Path) -> None:
    for work in (
        lambda: retriever.add_folder(photos / "2023", metadata="typo.csv", progress=False),
        lambda: retriever.add_table(photos / "2023" / "typo.csv", progress=False),
    ):
        with pytest.raises(InputError, match=r"cannot read .*typo\.csv"):
            work()
        assert retriever.index.root is None
