"""Shards: which names are accepted, that none starts a program, and the cost of a hostile archive."""

from __future__ import annotations

import bz2
import gzip
import http.server
import io
import json
import lzma
import os
import random
import re
import subprocess
import tarfile
import threading
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finelip_fast.errors import ConfigError, TrainingError
from finelip_fast.preprocess import Preprocess
from finelip_fast.training import shards as module
from finelip_fast.training.batch import Batch
from finelip_fast.training.config import TrainConfig, configure, load_recipe
from finelip_fast.training.shard_batches import ShardBatches
from finelip_fast.training.shards import shard_names, shard_samples

pytest.importorskip("webdataset")
pytest.importorskip("braceexpand")


def archive(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


@cache
def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def pair(key: str, caption: bytes = b"red") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture()), (f"{key}.txt", caption)]


def keys(path: Path) -> list[str]:
    return [sample["__key__"] for sample in shard_samples(str(path))]


def batches(pattern: str) -> list[Batch]:
    return list(ShardBatches(pattern, Preprocess(8), 12, batch_size=1, seed=0))


def train(pattern: str, **options: object) -> TrainConfig:
    return TrainConfig(out="out", train=f"webdataset:{pattern}", validation="scenes:val", epoch_batches=1, **options)


# Names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        *("a.tar", "a-{0..3}.tar", "a-{00..12}.tar", "a-{8..11}.tar", "a-{3..1}.tar", "{a,b}/{0..1}.tar", "{x}.tar"),
        *("{a,}.tar", "~/a.tar", "-rf.tar", "|x.tar", "a b.tar", "{0..1}{0..1}.tar", "a-{098..101}.tar", ""),
    ],
)  # fmt: skip
def test_patterns_stand_for_what_webdataset_takes_them_for(pattern: str) -> None:
    import braceexpand

    assert shard_names(pattern) == list(braceexpand.braceexpand(pattern))


def test_patterns_may_be_joined() -> None:
    assert shard_names("a-{0..1}.tar::b.tar") == ["a-0.tar", "a-1.tar", "b.tar"]


REFUSED = {
    "shell": ("pipe:touch pwned", "got 'pipe:touch pwned'; a file whose name has a colon is written ./NAME"),
    "shell in capitals": ("PIPE:touch pwned", "expected shards as files, or addresses of http"),
    "shell among files": ("a.tar::pipe:touch pwned", "expected shards as files, or addresses of http"),
    "shell in braces": ("{a.tar,pipe:touch pwned}", "expected shards as files, or addresses of http"),
    "shell by parts": ("{p,q}ipe:touch pwned", "expected shards as files, or addresses of http"),
    "copy by ssh": ("scp://host/a.tar", "expected shards as files, or addresses of http"),
    "files in archives": ("zip://a.tar::http://host/b.zip", "got 'zip://a.tar'"),
    "ftp": ("ftp://host/a.tar", "got 'ftp://host/a.tar'"),
    "python": ("memory://a.tar", "got 'memory://a.tar'"),
    "web": ("https://host/a-{0..9}.tar", "got the address 'https://host/a-0.tar'; --remote-data on the command line"),
    "web with a quote": ("http://x/'; touch pwned; '", "got the address"),
    "store": ("s3://bucket/a.tar", "got the address"),
    "hub": ("hf://datasets/x/a.tar", "got the address"),
    "countless": ("{000000..999999999999}.tar", "expected at most 100000 shards"),
    "endless": ("{0.." + "9" * 18 + "}", "expected at most 100000 shards"),
    "countless by parts": ("{0..999}{0..999}.tar", "expected at most 100000 shards"),
    "countless joined": ("{0..99999}.tar::b.tar", "expected at most 100000 shards"),
    "nested": ("{{0..9999}{0..9999},b}.tar", "none within others"),
    "open": ("{0..9.tar", "braces that are closed"),
    "newline": ("a.tar\npipe:x", "printable characters"),
    "nul": ("a\0.tar", "printable characters|characters without NUL"),
    "surrogate": ("a\udcff.tar", "printable characters"),
    "long": ("a" * 5000, "at most 4096"),
}


@pytest.mark.parametrize(("pattern", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_names_are_refused_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for make in (shard_names, train, batches):
        with pytest.raises(ConfigError, match=message):
            make(pattern)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [pattern for pattern, _ in REFUSED.values() if ":" in pattern and "{" not in pattern])
def test_no_name_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("a program was started"))
    with pytest.raises((ConfigError, TrainingError)):
        list(shard_samples(name))
    assert not list(tmp_path.iterdir())


def test_a_recipe_cannot_consent_to_the_network(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    values = {"out": "out", "train": "webdataset:http://host/a.tar", "validation": "scenes:val", "epoch_batches": 1}
    recipe.write_text(json.dumps({**values, "remote_data": True}))
    with pytest.raises(
        ConfigError, match="asks for remote_data; give --remote-data on the command line if you trust it"
    ):
        load_recipe(str(recipe))
    assert configure(str(recipe), {"remote_data": True}).remote_data  # following the advice
    recipe.write_text(json.dumps({**values, "remote_data": False}))
    with pytest.raises(ConfigError, match=r"got the address 'http://host/a\.tar'; --remote-data"):
        configure(str(recipe), {})
    assert configure(str(recipe), {"remote_data": True}).remote_data


class _Served(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_shards_come_from_the_web_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.tar").write_bytes(archive(*pair("0"), *pair("1")))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Served, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert [sample["__key__"] for sample in shard_samples(f"{address}/a.tar", remote=True)] == ["0", "1"]
            for name in ("none.tar", "'; touch pwned; '", "a b.tar"):
                with pytest.raises(TrainingError, match="cannot read a webdataset shard: http://127"):
                    list(shard_samples(f"{address}/{name}", remote=True))
        finally:
            server.shutdown()
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


# Archives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a b.tar", "-a.tar", "|a.tar", "ünï.tar"])
def test_files_of_any_name_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_bytes(archive(*pair("0"), *pair("1")))
    for given_name in (name, f"~/{name}", f"file:{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        (shard,) = shard_names(given_name)
        samples = list(shard_samples(shard))
        assert [sample["__key__"] for sample in samples] == ["0", "1"]
        assert samples[0]["png"] == picture()
        assert samples[0]["__url__"] == given_name


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
def test_compressed_shards_are_read(tmp_path: Path, pack: object) -> None:
    (tmp_path / "a.tar.gz").write_bytes(pack(archive(*pair("0"), *pair("1"))))
    assert keys(tmp_path / "a.tar.gz") == ["0", "1"]


def test_samples_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    import webdataset as wds

    members = [
        *[("a/0.PNG", picture()), ("a/0.txt", b"x"), ("a/0.cls.json", b"{}"), ("__meta__", b"m"), ("none", b"n")],
        *[("b/0.png", picture()), ("b/0.txt", b"y"), (".hidden", b"h"), ("c/1.x.png", picture()), ("c/1.txt", b"")],
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(archive(*members))
    with path.open("rb") as stream:
        files = wds.tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        expected = list(wds.tariterators.group_by_keys(files))
    samples = list(shard_samples(str(path)))
    assert [sorted(sample) for sample in samples] == [sorted(sample) for sample in expected]
    for sample, reference in zip(samples, expected, strict=True):
        assert all(sample[name] == reference[name] for name in sample if name in ("png", "txt", "__key__", "__url__"))


def test_shards_as_other_programs_write_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """macOS adds hidden files between the others; there are also suffixes in capitals and byte-order marks."""
    path = tmp_path / "a.tar"
    members = [("0.PNG", picture()), ("0.TXT", b"\xef\xbb\xbfred"), ("1.png", picture()), ("1.json", BOM_JSON)]
    hidden = [[(f"a/._{name}", b"\0\5\x16\7"), (f"a/{name}", content)] for name, content in members]
    path.write_bytes(archive(*(member for pair in hidden for member in pair)))
    first, second = batches(str(path))
    assert first.broken == second.broken == []
    assert torch.equal(first.ids, second.ids)
    assert caplog.messages == [f"{path}: left out hidden files, first a/._0.PNG"]


BOM_JSON = b'\xef\xbb\xbf{"caption": "red"}'


def special(kind: bytes, name: str = "0.jpg", **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in values.items():
        setattr(info, field, value)
    return info


def test_links_and_devices_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        archive(
            special(tarfile.SYMTYPE, linkname="/etc/passwd"),
            special(tarfile.LNKTYPE, linkname="../../secret"),
            special(tarfile.CHRTYPE, devmajor=1, devminor=5),
            special(tarfile.FIFOTYPE),
            *pair("../../1"),
        )
    )
    assert keys(tmp_path / "a.tar") == ["../../1"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def sparse() -> bytes:
    """Return a sparse member of one GiB without any content."""
    content = bytearray(archive(special(tarfile.GNUTYPE_SPARSE, size=0), format=tarfile.GNU_FORMAT))
    content[386:410] = b"00000000000\0" + b"00000000000\0"
    content[483:495] = b"10000000000\0"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def headed(kind: bytes, size: int) -> bytes:
    """Return a header that declares ``size`` bytes, followed by zeros."""
    return special(kind, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)


HOSTILE = {
    "member": (lambda: headed(tarfile.REGTYPE, 1 << 29), "expected at most 268435456 bytes, found 536870912"),
    "member of tebibytes": (lambda: headed(tarfile.REGTYPE, 1 << 40), "expected at most 268435456 bytes"),
    "negative": (lambda: headed(tarfile.REGTYPE, -5), "expected plain files"),
    "caption": (lambda: archive(("0.txt", bytes(2 << 20))), "expected at most 1048576 bytes, found 2097152"),
    "sparse": (sparse, r"expected plain files of short names, found '0\.jpg'"),
    "name": (lambda: archive(("a/" * 9000 + "0.jpg", b"")), "expected plain files of short names"),
    "members of a sample": (lambda: archive(*((f"0.{at}", b"") for at in range(200))), "at most 100 members"),
    "twice": (lambda: archive(("0.txt", b"a"), ("0.txt", b"b")), "duplicate file name"),
    "zeros": (lambda: gzip.compress(archive(("0.avi", bytes(1 << 28)))), "it unpacks to more than 100 times its size"),
    "zeros in bzip2": (lambda: bz2.compress(archive(("0.avi", bytes(1 << 27)))), "it unpacks to more than 100 times"),
    "countless members": (lambda: gzip.compress(archive((".x", b""))[:512] * 300_000), "100 times its size"),
    "xz": (lambda: lzma.compress(archive(*pair("0"))), "header"),
}


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_unpacks_to_too_much_is_refused_by_name(tmp_path: Path, make: object, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(make())
    with pytest.raises(TrainingError, match=rf"cannot read a webdataset shard: .*a\.tar: .*{message}"):
        for _ in shard_samples(str(tmp_path / "a.tar")):
            pass


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_what_stands_between_members_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: bytes) -> None:
    monkeypatch.setattr(module, "_MAX_BETWEEN", 1 << 22)
    (tmp_path / "a.tar").write_bytes(special(kind, "0.avi", size=1 << 23).tobuf() + b"a" * (1 << 23))
    with pytest.raises(TrainingError, match=r"a\.tar: expected members of at most 4 MiB"):
        list(shard_samples(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "missing"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    with pytest.raises(TrainingError, match=f"cannot read a webdataset shard: {path}: "):
        list(shard_samples(str(path)))


CAPTIONS = {
    "surrogate": ({"json": b'{"caption": "\\ud800"}'}, "half of a surrogate pair"),
    "deep": ({"json": b'{"caption": ' + b"[" * 100_000}, "nesting deeper than 64"),
    "infinite": ({"json": b'{"caption": "a", "n": 1e999}'}, "not finite"),
    "latin": ({"txt": b"caf\xe9"}, "can't decode byte 0xe9"),
}


@pytest.mark.parametrize(("files", "reason"), CAPTIONS.values(), ids=CAPTIONS.keys())
def test_captions_that_are_none_are_named(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(
        archive(("0\x1b[2J.png", picture()), *((f"0\x1b[2J.{name}", text) for name, text in files.items()))
    )
    (report,) = batches(str(path))
    assert len(report) == 0
    assert re.search(rf"a\.tar:0\\x1b\[2J: expected a picture .* found .*{reason}", report.broken[0])


def test_names_that_are_no_utf8_are_names(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive(*pair("\udcff"), format=tarfile.GNU_FORMAT))
    (batch,) = batches(str(path))
    assert batch.pixels.shape == (1, 3, 8, 8)


@cache
def sound() -> list[bytes]:
    tars = [archive(*pair("0"), *pair("a/1", b"blue"), format=format) for format in (0, 1, 2)]
    tars.append(archive(("0.jpg", picture()), ("0.json", b'{"caption": "red", "n": [1, 2.5]}')))
    return [*tars, gzip.compress(tars[0], mtime=0), bz2.compress(tars[0])]


@settings(settings.get_profile("fuzz"))
@given(seed=st.integers(0, 2**32 - 1))
def test_damaged_shards_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray(chance.choice(sound()))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(content)) if chance.random() < 0.5 else chance.randrange(min(len(content), 600))
        match chance.randrange(4):
            case 0:
                content[at] = chance.choice([0, 255, content[at] ^ 1 << chance.randrange(8), ord("7"), ord("x")])
            case 1:
                del content[at : at + chance.randrange(1, 600)]
                content = content or bytearray(b"\0")
            case 2:
                content[at:at] = content[: chance.randrange(1, 1024)]
            case 3:
                content[124:136] = b"%011o\0" % chance.getrandbits(33)
        if len(content) >= 512 and chance.random() < 0.7:  # a valid checksum lets more damage through
            content[148:156] = b" " * 8
            content[148:156] = b"%06o\0 " % sum(content[:512])
    path = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}.tar"
    path.write_bytes(content)
    for batch in batches(str(path)):
        assert batch.broken or len(batch)
        assert not len(batch) or batch.pixels.shape == (1, 3, 8, 8)
        assert batch.pixels.isfinite().all()
