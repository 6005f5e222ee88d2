"""Pictures to pixels: odd files are read correctly or refused by name, and normal ones give CLIP's own pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import ExifTags, Image

from finelip_fast.errors import ImageError, InputError
from finelip_fast.preprocess import Preprocess, open_image

RED, GREEN, BLUE, YELLOW, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255,) * 3, (0,) * 3
CORNERS = [[RED, GREEN], [BLUE, YELLOW]]  # all different, so that any rotation or flip shows


def corners(side: int = 16) -> Image.Image:
    """Return four squares in the colours of CORNERS."""
    return Image.fromarray(np.kron(np.array(CORNERS, np.uint8), np.ones((side, side, 1), np.uint8)))


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    return image.convert(mode)


def read_corners(image: Image.Image) -> list[list[tuple[int, ...]]]:
    """Return the centres of the four quarters, each channel rounded to 0 or 255."""
    x, y = image.width // 4, image.height // 4
    at = [[image.getpixel((c * x, r * y)) for c in (1, 3)] for r in (1, 3)]
    return [[tuple(255 * (value > 127) for value in pixel) for pixel in row] for row in at]


def near(image: Image.Image, colour: tuple[int, ...], tolerance: int = 0) -> bool:
    """Whether every pixel has this colour."""
    assert image.mode == "RGB"
    return np.abs(np.asarray(image, int) - colour).max() <= tolerance


# Orientation ----------------------------------------------------------------------------------------------------------

# How a camera that reports `orientation` must store a picture for it to appear upright: the inverse of the rotation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_is_applied_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = corners().resize((64, 32), Image.Resampling.NEAREST)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"turned.{suffix}"
    stored.save(path, exif=exif)

    image = open_image(path)
    assert image.size == (64, 32)
    assert read_corners(image) == CORNERS
    again = open_image(image)
    assert again.size == (64, 32)
    assert read_corners(again) == CORNERS
    with Image.open(path) as lazy:
        assert read_corners(open_image(lazy)) == CORNERS


def test_broken_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "broken exif.jpg"
    corners().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_corners(open_image(path)) == CORNERS


# Modes ----------------------------------------------------------------------------------------------------------------


def grey16(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint16))


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *BLUE])
    image.info["transparency"] = 1
    return image


FILES: dict[str, tuple[str, Callable[[], Image.Image], tuple[int, ...]]] = {
    "cmyk jpeg": ("jpg", lambda: Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
    "cmyk tiff": ("tif", lambda: Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
    "grey": ("png", lambda: Image.new("L", (8, 8), 77), (77, 77, 77)),
    "one bit": ("png", lambda: Image.new("1", (8, 8), 1), WHITE),
    "palette": ("png", lambda: Image.new("RGB", (8, 8), BLUE).convert("P"), BLUE),
    "transparent palette": ("png", palette_with_hole, WHITE),
    "transparent gif": ("gif", palette_with_hole, WHITE),
    "transparent": ("png", lambda: Image.new("RGBA", (8, 8), (*BLUE, 0)), WHITE),
    "half transparent": ("png", lambda: Image.new("RGBA", (8, 8), (*BLACK, 51)), (204, 204, 204)),
    "opaque rgba": ("webp", lambda: Image.new("RGBA", (8, 8), (*BLACK, 255)), BLACK),
    "grey with alpha": ("png", lambda: Image.new("LA", (8, 8), (0, 0)), WHITE),
    "16-bit png": ("png", lambda: grey16([[200 * 257] * 8] * 8), (200,) * 3),
    "16-bit tiff": ("tif", lambda: grey16([[3 * 257] * 8] * 8), (3,) * 3),
    "16-bit pgm": ("pgm", lambda: grey16([[129 * 257] * 8] * 8), (129,) * 3),
    "32-bit tiff of 16-bit values": ("tif", lambda: Image.new("I", (8, 8), 65535), WHITE),
    "float tiff": ("tif", lambda: Image.new("F", (8, 8), 0.2), (51,) * 3),
    "ycbcr jpeg": ("jpg", lambda: Image.new("YCbCr", (8, 8), (255, 128, 128)), WHITE),
}


@pytest.mark.parametrize(("suffix", "make", "colour"), FILES.values(), ids=FILES.keys())
def test_every_mode_has_its_colour(tmp_path: Path, suffix: str, make: Callable, colour: tuple[int, ...]) -> None:
    path = tmp_path / f"picture.{suffix}"
    make().save(path)
    assert near(open_image(path), colour, tolerance=2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    values = np.array([[0, 128, 129, 255, 256, 32768, 65407, 65535]], ">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes(mode, (8, 1), values.tobytes())
    assert np.asarray(open_image(image))[0, :, 0].tolist() == [0, 0, 1, 1, 1, 128, 255, 255]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animation_gives_its_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))
    assert near(open_image(path), RED)


def test_the_source_is_neither_changed_nor_shared() -> None:
    source = corners()
    source.getexif()[ExifTags.Base.Orientation] = 6
    before = source.tobytes()
    open_image(source).paste(WHITE, (0, 0, 32, 32))
    assert source.tobytes() == before
    assert source.getexif()[ExifTags.Base.Orientation] == 6


# Kinds of source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.png", "a space.png", "ünï 猫 😀.png", "%41#?.png", "no suffix", "wrong.txt"])
@pytest.mark.parametrize(
    "kind",
    [str, Path, os.fsencode, "bytes", "bytearray", "memoryview"],
    ids=["str", "Path", "encoded", "bytes", "bytearray", "memoryview"],
)
def test_paths_and_bytes(tmp_path: Path, name: str, kind: object) -> None:
    path = tmp_path / name
    corners().save(path, format="png")
    if isinstance(kind, str):
        source = {"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[kind](path.read_bytes())
    else:
        source = Path(os.fsdecode(kind(path)))
    assert read_corners(open_image(source)) == CORNERS


RGB8 = np.asarray(corners())
ALPHA = np.dstack([RGB8, np.full(RGB8.shape[:2], 255, np.uint8)])
ARRAYS = {
    "uint8": RGB8,
    "uint8 with alpha": ALPHA,
    "uint16": RGB8.astype(np.uint16) * 257,
    "uint16 big endian": (RGB8.astype(np.uint16) * 257).astype(">u2"),
    "bool": RGB8 > 0,
    "float16": (RGB8 / 255).astype(np.float16),
    "float32": (RGB8 / 255).astype(np.float32),
    "float64 a hair over": RGB8 / 255 * 1.001,
    "non-contiguous": np.ascontiguousarray(RGB8[::-1, :, ::-1])[::-1, :, ::-1],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_arrays(array: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(array)), RGB8)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)], ids=str)
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    image = open_image(np.full(shape, 0.6, np.float32))
    assert image.size == (6, 4)
    assert near(image, (153,) * 3)


def test_transparent_array_lies_over_white() -> None:
    assert near(open_image(np.zeros((2, 2, 4), np.uint8)), WHITE)


CHW = torch.from_numpy(RGB8.copy()).permute(2, 0, 1)
TENSORS = {
    "uint8": CHW,
    "float32 with gradient": (CHW / 255).requires_grad_(),
    "bfloat16": (CHW / 255).bfloat16(),
    "float64": CHW.double() / 255,
    "contiguous": CHW.contiguous(),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS.keys())
def test_tensors(tensor: torch.Tensor) -> None:
    np.testing.assert_array_equal(np.asarray(open_image(tensor)), RGB8)


def test_grey_tensor() -> None:
    assert near(open_image(torch.full((1, 4, 6), 0.6)), (153,) * 3)


# Refusals -------------------------------------------------------------------------------------------------------------


def png(image: Image.Image, path: Path) -> bytes:
    image.save(path, format="png")
    return path.read_bytes()


BROKEN: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": ("empty.jpg", lambda p: b"", "empty.jpg' is empty"),
    "text": ("text.jpg", lambda p: b"this is no picture", "not an image"),
    "web page": ("page.png", lambda p: b"<!doctype html><html></html>", "not an image"),
    "truncated": ("truncated.png", lambda p: png(noise(64, 64), p)[:5000], "truncated"),
    "header alone": ("head.png", lambda p: png(noise(64, 64), p)[:33], r"cannot read .*: \w"),
    "damaged": ("damaged.png", lambda p: png(noise(64, 64), p)[:200] + bytes(9000), r"cannot read .*: \w"),
    "16-bit file beyond 16 bits": (
        "deep.tif",
        lambda p: tiff("I", 70000, p),
        "got int32 in mode I; convert them to uint8",
    ),
    "float file beyond 1": ("float.tif", lambda p: tiff("F", 255.0, p), r"in \[0, 1\], got 255 to 255 in mode F"),
    "postscript": ("figure.eps", lambda p: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got EPS; conv"),
}


def tiff(mode: str, value: float, path: Path) -> bytes:
    Image.new(mode, (4, 4), value).save(path, format="tiff")
    return path.read_bytes()


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: Callable, reason: str) -> None:
    path = tmp_path / f"ünï {name}"
    path.write_bytes(content(path))
    with pytest.raises(ImageError, match=reason) as error:
        open_image(path)
    assert str(path) in str(error.value)
    size = path.stat().st_size
    with pytest.raises(ImageError, match=f"{size} bytes" if size else "the bytes are empty"):
        open_image(path.read_bytes())


REFUSED: dict[str, tuple[object, str]] = {
    "web address": ("https://example.com/cat.jpg", "got the URL 'https://example.com/cat.jpg'; download it first"),
    "web address in capitals": ("HTTP://example.com/cat.jpg", "got the URL"),
    "web address as path": (Path("https://example.com/cat.jpg"), "got the URL"),
    "file address": ("file:///tmp/cat.jpg", "got the URL"),
    "data address": ("data:image/png;base64," + "A" * 9999, r"got the URL 'data:image/png;base64,A+\.\.\.'"),
    "missing": ("no such.jpg", "no such file: 'no such.jpg'"),
    "no name": ("", "no such file: ''"),
    "nul in name": ("nul\0.jpg", "no such file"),
    "endless name": ("x" * 5000, "no such file"),
    "folder": (".", r"got the folder '.'; finelip_fast.folders.list_images\('.'\)"),
    "None": (None, "got NoneType"),
    "number": (7, "got int"),
    "empty array": (np.zeros((0, 5, 3), np.uint8), r"at least one pixel, got array of shape \(0, 5, 3\)"),
    "empty image": (Image.new("RGB", (0, 5)), "at least one pixel, got 0 x 5"),
    "1-d array": (np.zeros(5, np.uint8), r"C of 1, 3 or 4, got array of shape \(5,\)$"),
    "colours first": (
        np.zeros((3, 8, 9), np.uint8),
        r"with C of 1, 3 or 4, got array of shape \(3, 8, 9\); move the colour axis last",
    ),
    "batch as array": (np.zeros((2, 8, 9, 3), np.uint8), "pass pictures one by one"),
    "NaN": (np.full((4, 4), np.nan), "got NaN in"),
    "infinite": (np.full((4, 4), np.inf), "got inf to inf"),
    "0..255 floats": (np.full((4, 4), 255.0), r"in \[0, 1\], got 255 to 255 .*; divide them by their maximum"),
    "negative floats": (np.full((4, 4), -1.0), "got -1 to -1"),
    "int64": (
        np.full((4, 4), 9, np.int64),
        r"bool or float values, got int64 in array of shape .*; convert them to uint8",
    ),
    "int32": (np.full((4, 4), 9, np.int32), "got int32"),
    "text array": (np.full((4, 4), "a"), "got <U1"),
    "complex": (np.full((4, 4), 1j), "got complex128"),
    "objects": (np.full((4, 4), None), "got object"),
    "colours last tensor": (
        torch.zeros(8, 9, 3),
        r"got tensor of shape \(8, 9, 3\); move the colour axis first: x.permute\(2, 0, 1\)",
    ),
    "batch as tensor": (torch.zeros(2, 3, 8, 9), "pass pictures one by one"),
    "NaN tensor": (torch.full((3, 4, 4), float("nan")), "got NaN in"),
    "empty tensor": (torch.zeros(3, 0, 4), "at least one pixel"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_errors_say_expected_got_and_remedy(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_image(source)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "pipe.jpg")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    intact, bad = tmp_path / "good.gif", tmp_path / "bad.png"
    noise(8, 8).save(intact, save_all=True, append_images=[noise(8, 8, seed=1)])
    bad.write_bytes(png(noise(64, 64), bad)[:5000])
    open_image(intact)
    before = os.listdir("/proc/self/fd")
    open_image(intact)
    with pytest.raises(ImageError):
        open_image(bad)
    assert os.listdir("/proc/self/fd") == before


# Preprocess -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (333, 501), (224, 224), (100, 75), (1001, 301), (57, 400)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clip(size: tuple[int, int], mode: str, resize_mode: str, interpolation: str) -> None:
    image = noise(*size, mode)
    expected = image_transform(224, is_train=False, resize_mode=resize_mode, interpolation=interpolation)
    actual = Preprocess(224, resize_mode=resize_mode, interpolation=interpolation)(image)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    # open_clip resizes before it converts to RGB, so the results agree in every mode only after conversion.
    torch.testing.assert_close(actual, expected(image.convert("RGB")), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 100), (10, 101), (901, 100)], ids=str)
def test_strips_cut_first_equal_open_clip(size: tuple[int, int]) -> None:
    """Past 8:1 the ends are cut before resizing. Smooth pictures are used, as the rounding of the longer side may differ."""
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 3, size[1]))
    image = Image.fromarray(((np.stack([np.sin(x), np.sin(y), np.cos(x * y)], -1) + 1) * 127).astype(np.uint8))
    expected = image_transform(224, is_train=False)(image)
    assert (Preprocess()(image) - expected).abs().max() < 0.05


@settings(max_examples=25, deadline=None)
@given(
    short=st.integers(1, 40),
    long=st.integers(1, 2000),
    upright=st.booleans(),
    image_size=st.sampled_from([1, 7, 32]),
    resize_mode=st.sampled_from(["shortest", "squash"]),
)
def test_any_size_gives_a_square(short: int, long: int, upright: bool, image_size: int, resize_mode: str) -> None:
    image = Image.new("RGB", (short, long) if upright else (long, short), RED)
    pixels = Preprocess(image_size, resize_mode=resize_mode)(image)
    red = Preprocess(image_size)(Image.new("RGB", (5, 5), RED))
    torch.testing.assert_close(pixels, red, rtol=0, atol=0)  # no padding: red everywhere


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)], ids=str)
def test_a_thread_keeps_its_middle(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    middle = tuple(side // 2 - (side > 1) * 4 for side in size)
    image.paste(BLUE, (*middle, middle[0] + 8, middle[1] + 8))
    torch.testing.assert_close(Preprocess()(image), Preprocess()(Image.new("RGB", (8, 8), BLUE)), rtol=0, atol=0)


def test_batch_mixes_kinds_and_keeps_order(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    corners().save(path)
    transform = Preprocess(32)
    pixels = transform.batch(source for source in [path, np.full((9, 7), 0.5), path.read_bytes(), noise(50, 40), CHW])
    assert pixels.shape == (5, 3, 32, 32)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[0], pixels[4])
    assert torch.equal(pixels[3], transform(noise(50, 40)))
    assert transform.batch([]).shape == (0, 3, 32, 32)
    assert torch.equal(transform.batch(torch.stack([CHW, CHW]))[1], pixels[0])


def test_config_read_from_json_is_hashable() -> None:
    assert hash(Preprocess(mean=[0, 0, 0], std=[1, 1, 1])) == hash(Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Preprocess(0), "expected image_size of at least 1, got 0"),
        (lambda: Preprocess(224.0), "expected image_size to be an integer, got 224.0"),
        (lambda: Preprocess(interpolation="nearest"), "one of bicubic, bilinear, got 'nearest'"),
        (
            lambda: Preprocess(resize_mode="longest"),
            "expected resize_mode to be one of shortest, squash, got 'longest'",
        ),
        (lambda: Preprocess(mean=(0.5,)), r"expected mean to be 3 numbers, got \(0.5,\)"),
        (lambda: Preprocess(std=(1, 1, 0)), r"expected std to be 3 numbers above 0, got \(1, 1, 0\)"),
        (lambda: Preprocess().batch("cat.jpg"), "got a single str; wrap it in a list"),
        (lambda: Preprocess().batch(corners()), "got a single Image; wrap it in a list"),
        (lambda: Preprocess().batch([noise(5, 5), "cat.jpg"]), "no such file: 'cat.jpg'"),
    ],
    ids=["size", "float size", "interpolation", "resize mode", "mean", "std", "one path", "one image", "missing file"],
)
def test_options_are_checked(call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
