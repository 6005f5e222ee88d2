"""Folders created by other programs: every entry is judged individually."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from finelip_fast.errors import InputError
from finelip_fast.folders import list_images, scan_folder, walk_folder


def test_scan_folder_sorts_images_from_others(tmp_path: Path) -> None:
    images = ["B.JPG", "a.png", "ü 猫.webp", "sub/deep/c.tiff", "sub/d.jfif"]
    other_files = ["notes.txt", "movie.mpg", "no suffix", "sub/data.h5", "figure.eps"]
    hidden = [".hidden.jpg", ".cache/e.png", "sub/.thumbs/f.png"]
    for name in images + other_files + hidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "broken link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "itself.png").symlink_to(tmp_path / "itself.png")

    scan = scan_folder(tmp_path)
    assert scan.images == sorted(tmp_path / name for name in images)
    assert scan.other_files == sorted(tmp_path / name for name in [*other_files, "broken link.png", "itself.png"])
    assert list_images(str(tmp_path)) == scan.images
    assert list_images(tmp_path, recursive=False) == sorted(tmp_path / name for name in images if "/" not in name)


def test_a_hidden_folder_asked_for_by_name_is_read(tmp_path: Path) -> None:
    (tmp_path / ".mine").mkdir()
    (tmp_path / ".mine" / "a.png").touch()
    assert list_images(tmp_path / ".mine") == [tmp_path / ".mine" / "a.png"]


def test_an_empty_folder_has_no_images(tmp_path: Path) -> None:
    assert list_images(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"), [("gone", "no such folder"), ("file.png", "expected a folder, got the file")]
)
def test_scan_folder_needs_a_folder(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.png").touch()
    with pytest.raises(InputError, match=f"{message}:? '.*{name}'"):
        list_images(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*.jpg"}, r"expected exclude to be a list, got the str '\*\.jpg'; pass \['\*\.jpg'\]"),
        ({"include": "@eaDir"}, "expected include to be a list, got the str '@eaDir'"),
        ({"include": 3}, "expected include to be a list, got 3"),
        ({"exclude": [3]}, "expected exclude of type str, got 3"),
    ],
)
def test_patterns_are_lists_of_texts(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        walk_folder(tmp_path, **options)


@pytest.mark.parametrize(("folder", "message"), [(None, "got None"), ("", "got ''; the working folder is '.'")])
def test_a_folder_is_a_path(folder: object, message: str) -> None:
    with pytest.raises(InputError, match=f"expected folder to be a path, {message}"):
        walk_folder(folder)


def test_a_folder_is_walked_in_the_order_of_its_sorted_paths(tmp_path: Path) -> None:
    names = ["b.png", "a/z.png", "a/b/c.png", "a.png", "a b/x.png", "c/notes.txt", "a/a.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    walked = list(walk_folder(tmp_path))
    assert [path for path, _ in walked] == sorted(tmp_path / name for name in names)
    assert {path.suffix for path, kind in walked if kind == "image"} == {".png"}
    assert {path.suffix for path, kind in walked if kind == "other"} == {".txt"}


def test_a_folder_that_cannot_be_listed_is_told_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def refused(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    assert list(walk_folder(tmp_path)) == [
        (tmp_path / "a/1.png", "image"),
        (tmp_path / "b", "unreadable"),
        (tmp_path / "c/3.png", "image"),
    ]
    with pytest.raises(InputError, match=r"cannot list the folder '.*b'; check its permissions"):
        scan_folder(tmp_path)


def test_a_link_to_itself_hides_nothing(tmp_path: Path) -> None:
    for name in ("2023/a.png", "2023/below/b.png", "2024/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "2023" / "loop").symlink_to(tmp_path / "2023" / "loop")
    (tmp_path / "2023" / "round").symlink_to(tmp_path / "2023" / "trip")
    (tmp_path / "2023" / "trip").symlink_to(tmp_path / "2023" / "round")
    names = {path.relative_to(tmp_path).as_posix(): kind for path, kind in walk_folder(tmp_path)}
    assert [name for name, kind in names.items() if kind == "image"] == ["2023/a.png", "2023/below/b.png", "2024/c.png"]
    assert [name for name, kind in names.items() if kind == "other"] == ["2023/loop", "2023/round", "2023/trip"]


def test_folders_may_be_nested_deeper_than_pythons_stack(tmp_path: Path) -> None:
    depth = 1_100
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):  # step by step, because the whole path is longer than the system allows
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("deep.png", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    (tmp_path / "z.png").touch()
    assert [path.name for path in list_images(tmp_path)] == ["deep.png", "z.png"]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil.rmtree fails, and would later fail for pytest


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    photos, disk = tmp_path / "photos", tmp_path / "disk"
    for path in (photos / "own" / "a.png", disk / "b.png", disk / "deep" / "c.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (photos / "disk").symlink_to(disk)
    (photos / "disk again").symlink_to(disk)
    (photos / "ours").symlink_to(photos / "own")  # listed under its own name
    (photos / "up").symlink_to(tmp_path)
    (disk / "back").symlink_to(photos)
    (disk / "deep" / "round").symlink_to(disk)
    images = [path.relative_to(photos).as_posix() for path in list_images(photos)]
    assert images == ["disk/b.png", "disk/deep/c.png", "own/a.png"]


def test_links_to_folders_that_are_not_listed_themselves_are_followed(tmp_path: Path) -> None:
    for name in (".versions/3/a.png", "2019/scans/b.png", "@eaDir/previews/c.png", "2020/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name, target in (
        ("now", ".versions/3"),
        ("best", "2019/scans"),
        ("small", "@eaDir/previews"),
        ("last", "2020"),
    ):
        (tmp_path / name).symlink_to(target)

    def images(**patterns: list[str]) -> list[str]:
        walked = walk_folder(tmp_path, **patterns)
        return [path.relative_to(tmp_path).as_posix() for path, kind in walked if kind == "image"]

    assert images(exclude=["2019"]) == ["2020/d.png", "best/b.png", "now/a.png", "small/c.png"]
    assert images(include=[".versions"]) == [".versions/3/a.png", "2019/scans/b.png", "2020/d.png", "small/c.png"]
    assert images(exclude=["2019", "best"]) == ["2020/d.png", "now/a.png", "small/c.png"]


def test_what_other_programs_leave_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    pictures = ["2023/a.jpg", "@eaDirectory/b.jpg"]
    previews = ["@eaDir/a.jpg", "#recycle/a.jpg", "2023/$Recycle.Bin/a.jpg", "Catalog Previews.lrdata/1/a.jpg"]
    hidden = [".thumbnails/a.jpg", "2023/._a.jpg", ".Trash-1000/files/a.jpg"]
    for name in [*pictures, *previews, *hidden]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def images(**patterns: list[str]) -> set[str]:
        walked = walk_folder(tmp_path, **patterns)
        return {path.relative_to(tmp_path).as_posix() for path, kind in walked if kind == "image"}

    assert images() == set(pictures)
    left_out = [path.name for path, kind in walk_folder(tmp_path) if kind == "left out"]
    assert sorted(left_out) == ["#recycle", "$Recycle.Bin", "@eaDir", "Catalog Previews.lrdata"]
    assert images(include=["@eadir", ".thumbnails"]) == {*pictures, "@eaDir/a.jpg", ".thumbnails/a.jpg"}
    assert images(exclude=["2023/"]) == {"@eaDirectory/b.jpg"}
    assert images(exclude=["2023/a.*"]) == {"@eaDirectory/b.jpg"}
    assert images(exclude=["*.JPG"]) == set()


def test_a_bracket_in_a_pattern_is_part_of_the_name(tmp_path: Path) -> None:
    for name in ("scan [1].png", "scan 1.png", "Catalog [2].lrdata/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    walked = walk_folder(tmp_path, exclude=["scan [1].png"], include=["Catalog [2].lrdata"])
    assert [path.name for path, _ in walked] == ["a.png", "scan 1.png"]
