"""Thumbnails: upright, small, created once, and only of pictures."""

from __future__ import annotations

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from finelip_fast.errors import ImageError, InputError
from finelip_fast.serve import thumbnails as module
from finelip_fast.serve.thumbnails import SIDES, Thumbnails


def picture(width: int = 900, height: int = 600) -> Image.Image:
    """Return a picture that is red above and blue below."""
    values = np.zeros((height, width, 3), np.uint8)
    values[: height // 2, :, 0] = values[height // 2 :, :, 2] = 255
    return Image.fromarray(values)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    picture().save(tmp_path / "a.jpg", quality=95)
    return tmp_path / "a.jpg"


@pytest.mark.parametrize("side", SIDES)
def test_a_thumbnail_is_small_and_never_enlarged(path: Path, side: int) -> None:
    thumbnails = Thumbnails()
    image = opened(thumbnails.get(path, side))
    assert image.size == ((side, round(side * 2 / 3)) if side < 900 else (900, 600))
    assert thumbnails.media_type == f"image/{image.format.lower()}"
    red, _, blue = image.convert("RGB").getpixel((image.width // 2, image.height // 4))
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize(("orientation", "corner"), [(1, "red"), (3, "blue"), (6, "blue"), (8, "red")])
def test_a_thumbnail_is_upright(tmp_path: Path, orientation: int, corner: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(1200, 600).save(tmp_path / "a.jpg", exif=exif)
    image = opened(Thumbnails().get(tmp_path / "a.jpg", 160)).convert("RGB")
    assert image.size == ((160, 80) if orientation < 5 else (80, 160))
    red, _, blue = image.getpixel((3, 3))
    assert (red > blue) == (corner == "red")
    assert not image.getexif()


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "bmp", "tif", "ppm", "jp2", "avif", "heic"])
def test_every_format_that_is_read_is_shown(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    try:
        picture().save(path)
    except (ValueError, KeyError, OSError):
        pytest.skip(f"Pillow cannot write {suffix} here")
    assert opened(Thumbnails().get(path, 160)).size == (160, 107)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert opened(Thumbnails().get(tmp_path / "a.png", 160)).convert("RGB").getpixel((9, 9)) >= (250, 250, 250)


def test_an_overwritten_picture_is_shown_anew(path: Path) -> None:
    thumbnails = Thumbnails()
    before = thumbnails.get(path, 160)
    assert thumbnails.get(path, 160) is before
    status = path.stat()
    Image.new("RGB", (900, 600), "green").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = thumbnails.get(path, 160)
    assert opened(after).convert("RGB").getpixel((5, 5))[1] > 100
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        thumbnails.get(path, 160)


def test_what_is_no_picture_is_never_returned(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("root:x:0:0:secret")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name in ("a.jpg", "folder.jpg", "pipe.jpg", "a.svg", "nothing", "\0", "/dev/zero"):
        with pytest.raises(ImageError):
            Thumbnails().get(tmp_path / name, 160)


@pytest.mark.parametrize("side", [0, -1, 161, 100000, None, "160"])
def test_other_sides_are_refused(path: Path, side: object) -> None:
    with pytest.raises(InputError, match="expected side to be one of 160, 320, 640, 1280, 2048"):
        Thumbnails().get(path, side)


def test_the_latest_are_kept_within_the_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded_names: list[str] = []

    def encoded(self: Thumbnails, key: module._Key) -> bytes:
        encoded_names.append(Path(key.path).name)
        return b"x" * (40 if key.side == 160 else 101)

    monkeypatch.setattr(Thumbnails, "_encoded", encoded)
    thumbnails = Thumbnails(capacity=100)
    for name in "abcd":
        (tmp_path / name).touch()
    for name in "ababcbac":
        thumbnails.get(tmp_path / name, 160)
    assert encoded_names == [*"abc", "a", "c"]
    for _ in range(2):
        assert len(thumbnails.get(tmp_path / "d", 320)) == 101  # larger than the whole cache, whose content stays
    thumbnails.get(tmp_path / "c", 160)
    assert encoded_names == [*"abc", "a", "c", "d", "d"]


def test_a_picture_is_decoded_once_and_a_slow_one_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow.png", "fast.png"):
        picture().save(tmp_path / name)
    started, go_on, opening = threading.Event(), threading.Event(), module.open_thumbnail
    opened_paths: list[str] = []

    def slowly(path: str, side: int) -> Image.Image:
        opened_paths.append(Path(path).name)
        if "slow" in path:
            started.set()
            assert go_on.wait(30)
        return opening(path, side)

    monkeypatch.setattr(module, "open_thumbnail", slowly)
    thumbnails = Thumbnails()
    with ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(thumbnails.get, tmp_path / "slow.png", 160) for _ in range(3)]
        try:
            assert started.wait(30)
            assert opened(thumbnails.get(tmp_path / "fast.png", 160)).size == (160, 107)
            assert not any(future.done() for future in slow)
        finally:
            go_on.set()
        assert len({future.result() for future in slow}) == 1
    assert sorted(opened_paths) == ["fast.png", "slow.png"]


def test_a_picture_that_failed_is_tried_again(path: Path) -> None:
    thumbnails, content = Thumbnails(), path.read_bytes()
    status = path.stat()
    path.write_bytes(b"\0" * len(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ImageError):
        thumbnails.get(path, 160)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert opened(thumbnails.get(path, 160)).size == (160, 107)
