"""Command-line options for keeping an index in sync with a folder."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finelip_fast import _decode
from finelip_fast.cli import main
from finelip_fast.cli.add import _sort, _watched
from finelip_fast.engines import choice
from finelip_fast.index import stored_index


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a.png", "photos/b.png", "more/c.png"):
        draw(Path(name))
    return Path("photos")


def draw(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(sum(map(ord, path.name)))
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 40)).save(path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*words: str) -> Any:
        assert main([*words, "--json", "--quiet"]) == 0
        return json.loads(capsys.readouterr().out)

    return command


def test_folders_and_tables_are_added_together(photos: Path, run: Any) -> None:
    Path("table.csv").write_text("image,title\na.png,first\n")
    report = run("add", "photos", "more", "table.csv", "--root", "photos", "--exclude", "b.*")
    assert (report["added"], report["skipped"]) == (2, [])
    items = {item["id"]: item for item in run("list")}
    assert items.keys() == {"photos/a.png", "more/c.png"}, "below what the folders have in common"
    assert items["photos/a.png"]["metadata"]["title"] == "first"
    assert run("remove", "photos/a.png") == {"removed": 1, "items": 1}
    assert run("remove", "./more/../more/c.png") == {"removed": 1, "items": 0}


def test_pictures_are_added_beside_folders(photos: Path, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/a.png.json").write_text('{"title": "first"}')
    assert run("add", "photos/a.png", "more", "--dry-run")["added"] == ["more/c.png", "photos/a.png"]
    assert run("add", "photos/a.png", "more")["added"] == 2
    items = {item["id"]: item["metadata"].get("title") for item in run("list")}
    assert items == {"more/c.png": None, "photos/a.png": "first"}, "below what they have in common"
    assert run("add", "photos/a.png", "photos/b.png")["added"] == 1
    assert main(["add", "photos/a.png", "--sync", "--exclude", "b*"]) == 2
    assert "expected --sync, --exclude with a folder, got none: 'photos/a.png'" in capsys.readouterr().err
    assert main(["add", "photos", "--root", "photos"]) == 2
    assert "expected --root with a table, got none: 'photos'" in capsys.readouterr().err


def test_add_says_how_it_would_be_much_faster(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_int8_advice", lambda *_: "int8 is faster: finelip export onnx")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["add", str(photos)]) == 0
    assert [str(warning.message) for warning in caught].count("int8 is faster: finelip export onnx") == 1


def test_duplicates_are_listed(photos: Path, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(photos / "a.png", photos / "copy.png")
    run("add", "photos")
    assert run("list", "--duplicates") == [["a.png", "copy.png"]]
    assert run("list", "--duplicates", "--paths") == [[str(photos.resolve() / name) for name in ("a.png", "copy.png")]]
    assert run("list", "--duplicates", "--similarity", "0") == [["a.png", "b.png", "copy.png"]]
    assert main(["list", "--duplicates"]) == 0
    assert capsys.readouterr().out == "a.png\ncopy.png\n\n"
    (photos / "copy.png").unlink()
    run("add", "photos", "--sync")
    assert main(["list", "--duplicates"]) == 0
    assert capsys.readouterr() == ("", "none of the 2 items is there twice\n")


def test_a_dry_run_changes_nothing(photos: Path, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("add", "photos", "--dry-run")["added"] == ["a.png", "b.png"]
    assert not Path("finelip-index").exists()
    run("add", "photos")
    (photos / "a.png").unlink()
    draw(photos / "new.png")
    changes = {"added": ["new.png"], "changed": [], "moved": []}
    assert run("add", "photos", "--dry-run") == changes
    assert run("add", "photos", "--dry-run", "--sync") == {**changes, "removed": ["a.png"]}
    assert run("remove", "--where", "width > 1", "--dry-run") == {"removed": ["a.png", "b.png"]}
    assert main(["remove", "b.png", "--dry-run"]) == 0
    assert capsys.readouterr().out == "removed  b.png\ndry run: 1 removed; the index is unchanged\n"
    assert main(["remove", "c.png", "--dry-run"]) == 2
    assert "not in the index: 'c.png'; finelip list" in capsys.readouterr().err
    assert [item["id"] for item in run("list")] == ["a.png", "b.png"]
    for picture in photos.glob("*.png"):
        picture.unlink()
    assert main(["add", "photos", "--sync", "--dry-run"]) == 2  # as without --dry-run
    assert "got none, but the index has 2 from it; nothing was removed" in capsys.readouterr().err


def test_a_dry_run_names_each_picture_once_and_fails_as_the_command_does(
    photos: Path, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("add", "photos", "photos/a.png", "--dry-run")["added"] == ["a.png", "b.png"]
    for options in ([], ["--dry-run"]):
        assert main(["add", "photos", "--metadata", "lost.csv", "--quiet", *options]) == 2
        assert "cannot read lost.csv" in capsys.readouterr().err
    run("add", "photos")
    photos.rename("gone")
    for options in ([], ["--dry-run"]):
        assert main(["add", "more", "--quiet", *options]) == 2
        assert "photos' no longer exists; if it was moved, run" in capsys.readouterr().err


def test_a_table_with_an_error_is_refused_before_the_work(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("table.csv").write_text("title\na\n")
    assert main(["add", "photos", "table.csv", "--quiet"]) == 2
    assert "table.csv, line 2: found no path of a picture" in capsys.readouterr().err
    with closing(stored_index("finelip-index")) as index:
        assert (len(index), index.root) == (0, None)


def test_the_environment_names_the_index(photos: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_INDEX", "chosen")
    run("add", "photos")
    assert Path("chosen").is_dir()
    assert len(run("list", "--index", "chosen")) == len(run("list")) == 2


@pytest.mark.filterwarnings("ignore:the bundled model knows drawn street scenes only")
def test_bars_are_for_terminals(photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main(["add", "photos"]) == 0
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["add", "more"]) == 0
    assert "%|" in capsys.readouterr().err


def test_the_memory_of_decoding_is_a_flag(photos: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", "1000")
    monkeypatch.setattr(_decode, "_MIN_BYTES_PER_PIXEL", 1 << 11)  # for 1,600 pixels
    report = run("add", "photos", "--decode-memory", "1")
    assert report["added"] == 0
    assert "a picture may use 1;" in report["skipped"][0][1]
    assert "or allow more MiB with --decode-memory" in report["skipped"][0][1]
    assert os.environ["FINELIP_PICTURE_MEMORY"] == "1000"
    assert run("add", "photos", "--decode-memory", "8")["added"] == 2


def test_the_bundled_model_says_what_it_knows(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"knows drawn street scenes only; .* finelip convert BeichenZhang/LongCLIP-B"):
        assert main(["add", "photos"]) == 0


@pytest.mark.slow
def test_a_watched_folder_is_followed(photos: Path) -> None:
    pytest.importorskip("watchfiles")
    program = "import sys; from finelip_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-P",
        "-c",
        program,
        *["add", "photos", "--watch", "--sync", "--quiet", "--index", "photos/index"],
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "2 added, 0 skipped\n"
            draw(photos.with_name("new.png"))
            photos.with_name("new.png").rename(photos / "new.png")  # complete at once
            assert process.stdout.readline() == "1 added, 0 skipped\n"
            (photos / "new.png").unlink()
            assert process.stdout.readline() == "0 added, 1 removed, 0 skipped\n"
        finally:
            process.kill()


def in_time(work: Callable[[], Any]) -> Any:
    """Return the result of some work that would otherwise wait forever for a change."""
    results: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: results.put(work()), daemon=True).start()
    return results.get(timeout=300)


def test_what_changes_during_the_first_run_is_followed(photos: Path) -> None:
    pytest.importorskip("watchfiles")
    runs = [lambda: draw(photos / "late.png"), lambda: "followed"]
    followed = _watched(lambda: runs.pop(0)(), _sort(["photos"]), "index")
    next(followed)
    assert in_time(lambda: next(followed)) == "followed"


@pytest.mark.parametrize("name", ["photos/a.png", "table.csv"])
def test_a_file_is_followed_however_it_is_saved(photos: Path, name: str) -> None:
    """Many programs write a new file and rename it, which ends what the system reports of the old one."""
    pytest.importorskip("watchfiles")
    Path("table.csv").write_text("image\nphotos/a.png\n")
    runs = iter(range(100))
    followed = _watched(lambda: next(runs), _sort([name]), "index")
    assert next(followed) == 0
    for number in range(1, 4):
        shutil.copy(name, "new")
        os.replace("new", name)
        assert in_time(lambda: next(followed)) == number


def test_what_comes_one_by_one_is_kept_in_few_segments(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchfiles = pytest.importorskip("watchfiles")
    monkeypatch.setattr("finelip_fast.index.upkeep._MANY", 4)

    def pictures_come(*_: Any, **__: Any) -> Iterator[set[tuple[str, str]]]:
        yield set()
        for number in range(10):
            path = photos / f"new-{number}.png"
            draw(path)
            yield {("added", str(path))}

    monkeypatch.setattr(watchfiles, "watch", pictures_come)
    assert main(["add", "photos", "--watch", "--quiet", "--index", "index"]) == 0
    with closing(stored_index("index")) as index:
        assert len(index) == 12
    assert len(list(Path("index/segments").glob("*.safetensors"))) < 6
