"""Reading only regular files, writing atomically, and accepting only plain names."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from finelip_fast._files import (
    cache_folder,
    file_hash,
    plain_name,
    read_bytes,
    remove_unfinished,
    write_text_whole,
    write_whole,
)
from finelip_fast.errors import InputError, StoreError, WriteError


@pytest.mark.parametrize("name", ["a", "model.safetensors", "ä ö.bin", "..a", "-rf", "a" * 255])
def test_plain_names_stay(name: str) -> None:
    assert plain_name(name, "catalogue", error=StoreError) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "..\\x",
        "C:x",
        "a\nb",
        "a\0b",
        "a\x1b[2J",
        "\ud800",
        "a" * 256,
        7,
        None,
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: object) -> None:
    with pytest.raises(StoreError, match="catalogue: expected a file name without a folder, found"):
        plain_name(name, "catalogue", error=StoreError)


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 1])
def test_a_hash_is_the_contents_sha_256(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"^[^ ]*pipe: expected a regular file, got a pipe$"):
        read_bytes(tmp_path / "pipe", error=InputError, max_bytes=10)


def test_what_is_no_file_or_too_large_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"12345678901")
    with pytest.raises(InputError, match="large: expected at most 10 bytes, found 11"):
        read_bytes(tmp_path / "large", error=InputError, max_bytes=10)
    with pytest.raises(InputError, match="expected a regular file, got a folder"):
        read_bytes(tmp_path, error=InputError, max_bytes=10)
    with pytest.raises(InputError, match=r"cannot read .*absent: No such file"):
        read_bytes(tmp_path / "absent", error=InputError, max_bytes=10)
    with pytest.raises(InputError, match="cannot read 'a"):
        read_bytes("a\0b", error=InputError, max_bytes=10)
    with pytest.raises(InputError, match="/dev/zero: expected a regular file, got a device"):
        read_bytes("/dev/zero", error=InputError, max_bytes=10)


def test_a_file_is_written_whole_with_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    write_whole(tmp_path / "file", lambda path: path.write_text("new"))
    assert (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_disk_that_refuses_leaves_the_old_file_and_says_what_is_missing(tmp_path: Path, fault: Exception) -> None:
    (tmp_path / "file").write_text("old")

    def write(path: Path) -> None:
        path.write_text("ha")
        raise fault

    with pytest.raises(WriteError, match=r"cannot write .*file: (No space left|write failed)") as caught:
        write_whole(tmp_path / "file", write)
    assert caught.value.errno == getattr(fault, "errno", None)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_many_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each writer uses its own temporary file, so the one renamed last is complete."""
    barrier, faults = threading.Barrier(8), []

    def write(content: bytes) -> None:
        try:
            for _ in range(20):
                barrier.wait()
                write_whole(tmp_path / "file", lambda path: path.write_bytes(content))
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=write, args=[bytes([48 + n]) * 100_000]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    content = (tmp_path / "file").read_bytes()
    assert content == content[:1] * 100_000
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to(os.devnull)
    for name in ("pipe", "folder", "device"):
        with pytest.raises(WriteError, match=f"cannot write .*{name}: expected a regular file, got a {name}"):
            write_whole(tmp_path / name, lambda path: path.write_text("new"))
    assert (tmp_path / "device").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_text_is_written_in_utf_8_and_what_was_not_finished_goes(tmp_path: Path) -> None:
    write_text_whole(tmp_path / "file", "größer\n")
    assert (tmp_path / "file").read_bytes() == "größer\n".encode()
    for name in (f".{'0' * 32}.tmp", ".of a person.tmp", f".{'z' * 32}.tmp"):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".of a person.tmp", f".{'z' * 32}.tmp", "file"]


def test_the_variable_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other places")
def test_the_cache_is_where_it_was_on_linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINELIP_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "finelip_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "finelip_fast"
    assert os.listdir(tmp_path) == []


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FINELIP_CACHE")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(NotADirectoryError):
        cache_folder().mkdir(parents=True)
