"""Every loader promptly reports a clear error of the library, whatever is there instead of the expected file."""

from __future__ import annotations

import os
import resource
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from finelip_fast import FineLIP, FineLIPError, Retriever, load, open_image, save
from finelip_fast.checkpoint import convert, fingerprint
from finelip_fast.datasets.base import open_dataset
from finelip_fast.evaluation.compare import compare
from finelip_fast.evaluation.result import read_evaluation
from finelip_fast.index import stored_index
from finelip_fast.runtimes import manifest
from finelip_fast.training.config import load_recipe

SECONDS = 10
# Memory that a loader may use on top of the process's own, where it can be measured.
MEMORY = 2 << 30
NOBODY = 65534


class Loader(NamedTuple):
    """``file`` is the path that a loader reads, in a folder of its own; ``open`` receives that path."""

    file: str
    open: Callable[[Path], object]


LOADERS = {
    "load a .pt": Loader("model.pt", load),
    "load a .safetensors": Loader("model.safetensors", load),
    "load a folder's config": Loader("config.json", lambda path: load(path.parent)),
    "load a folder's weights": Loader("checkpoint/model.safetensors", lambda path: load(path.parent)),
    "convert": Loader("model.bin", lambda path: convert(path, path.parent / "converted")),
    "fingerprint": Loader("model.pt", fingerprint),
    "stored_index": Loader("catalogue.sqlite", lambda path: stored_index(path.parent)),
    "stored_index of a file": Loader("index", stored_index),
    "Retriever's index": Loader("catalogue.sqlite", lambda path: Retriever(engine="torch", index=path.parent)),
    "dataset of lines": Loader("pairs.jsonl", lambda path: open_dataset(f"jsonl:{path}")),
    "published data set": Loader("pairs.json", lambda path: open_dataset(f"sharegpt4v:{path}")),
    "published folder": Loader("root", lambda path: open_dataset(f"urban1k:{path}")),
    "result": Loader("result.json", read_evaluation),
    "results": Loader("result.json", lambda path: compare([path, path])),
    "training configuration": Loader("recipe.json", lambda path: load_recipe(str(path))),
    "manifest": Loader(manifest.MANIFEST, lambda path: manifest.read(path.parent)),
    "exports": Loader(
        f"model.pt.exports/onnx-x/{manifest.MANIFEST}",
        lambda path: manifest.find(path.parents[2] / "model.pt", "onnx"),
    ),
    "picture": Loader("picture.png", open_image),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        working_folder = Path.cwd()
        os.chdir(path.parent)  # socket paths are limited to about a hundred characters
        try:
            listener.bind(path.name)
        finally:
            os.chdir(working_folder)


HOSTILE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": Path.touch,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "socket": _socket,
    "endless zeros": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "a megabyte of zeros": lambda path: path.write_bytes(bytes(1 << 20)),
    "deep JSON": lambda path: path.write_text("[" * 100_000),
    "deep objects": lambda path: path.write_text('{"a":' * 100_000),
    "a long number": lambda path: path.write_text("1" * 100_000),
    "a number past floats": lambda path: path.write_text('{"format": 1e999, "a": Infinity}'),
    "a lone surrogate": lambda path: path.write_text('{"format": "\\ud800", "\\udfff": 1}'),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
    "a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf{}"),
    "an empty archive": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "the start of a database": lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(84)),
    "a header without end": lambda path: path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
}
NAMES = {
    "a NUL": "a\0b",
    "a newline": "a\nb",
    "a surrogate": "a\udc80b",
    "escape codes": "\x1b[2Ja",
    "4096 characters": "a" * 4096,
    "a deep path": "a/" * 3000,
    "nothing": "",
    "dots": "../..",
    "a user's folder": "~nobody-of-this-name/x",
}


@contextmanager
def bounded() -> Iterator[None]:
    """Limit time by an alarm, and limit memory."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError(f"hangs for {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


def opens(loader: Loader, path: Path) -> None:
    """Check that the loader succeeds or raises an error of the library of readable length."""
    with bounded(), warnings.catch_warnings(action="ignore"):
        try:
            loader.open(path)
        except FineLIPError as error:
            text = str(error)
        else:
            return
    assert len(text) < 10_000 + 3 * len(str(path))


pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's pipes, devices and limits")


@pytest.fixture(scope="module")
def model(make_model: Callable[..., FineLIP]) -> FineLIP:
    return make_model()


@pytest.fixture
def at(tmp_path: Path, model: FineLIP) -> Callable[[Loader], Path]:
    def prepare(loader: Loader) -> Path:
        path = tmp_path / loader.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if loader is LOADERS["exports"]:
            (tmp_path / "model.pt").touch()
        if path.parent.name == "checkpoint":
            save(model, path.parent)
            path.unlink()
        return path

    return prepare


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", LOADERS)
def test_what_lies_where_a_file_is_expected(name: str, hostile: str, at: Callable[[Loader], Path]) -> None:
    path = at(LOADERS[name])
    HOSTILE[hostile](path)
    opens(LOADERS[name], path)


@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("name", [name for name, loader in LOADERS.items() if "/" not in loader.file])
def test_names_that_are_none(
    name: str, file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: Callable[[Loader], Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    suffix = Path(LOADERS[name].file).suffix
    opens(LOADERS[name], Path(NAMES[file] + suffix))


@pytest.mark.parametrize("name", LOADERS)
def test_files_that_may_not_be_read(name: str, at: Callable[[Loader], Path]) -> None:
    path = at(LOADERS[name])
    path.write_text("{}")
    path.chmod(0)
    if os.geteuid() != 0:
        opens(LOADERS[name], path)
        return
    os.seteuid(NOBODY)
    try:
        opens(LOADERS[name], path)
    finally:
        os.seteuid(0)
