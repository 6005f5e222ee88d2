"""Cached embeddings: missing and damaged ones are encoded again, and those that no longer match are not used."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from finelip_fast.config import FineLIPConfig
from finelip_fast.datasets import Example
from finelip_fast.engines import Engine
from finelip_fast.errors import WriteError
from finelip_fast.evaluation import Evaluation, cache, evaluate
from finelip_fast.evaluation.cache import PartFolder, StoredRows

CONFIG = FineLIPConfig.preset("scenes", context_length=64)
COUNT = 11


class Counting(Engine):
    """An engine that embeds deterministically at random, counts the items, and can break down after a given number."""

    name, config, alpha, source, fingerprint = "counting", CONFIG, 0.8, "", "weights"
    precision, preprocess, device = "fp32", None, torch.device("cpu")

    def __init__(self, breaks_after: int | None = None) -> None:
        self.images, self.texts, self.left = 0, 0, breaks_after

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    encode_text = encode_image

    def embed_images(self, images: Sequence[Any], *, batch_size: int = 64) -> Tensor:
        self._spend(len(images))
        self.images += len(images)
        return self._rows([Path(str(image)).stem for image in images], noise=0.3)

    def embed_texts(self, texts: Sequence[str], *, context_length: int | None = None, **_: Any) -> Tensor:
        self._spend(len(texts))
        self.texts += len(texts)
        return self._rows([text.split()[-1] for text in texts])

    def _spend(self, count: int) -> None:
        if self.left is not None:
            self.left -= count
            if self.left < 0:
                raise RuntimeError("killed")

    def _rows(self, names: list[str], noise: float = 0.0) -> Tensor:
        rows = []
        for name in names:
            generator = torch.Generator().manual_seed(int(name))
            row = torch.randn(3, 8, generator=generator)
            rows.append(row + noise * torch.randn(3, 8, generator=generator))
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 4)


def pairs() -> list[Example]:
    """Eleven pictures, of which the first has two captions."""
    return [*(Example(n, f"caption {n}", f"picture {n}") for n in range(COUNT)), Example(0, "again 0", "picture 0")]


def run(engine: Engine, examples: list[Example] | None = None, **options: Any) -> Evaluation:
    return evaluate(engine, examples or pairs(), batch_size=2, progress=False, **options)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["cache", "caf\udce9"], ids=ascii)
def test_the_cache_changes_nothing_and_saves_everything(tmp_path: Path, name: str) -> None:
    expected = run(Counting()).rows
    first, second = Counting(), Counting()
    assert run(first, cache=tmp_path / name).rows == expected
    assert run(second, cache=tmp_path / name).rows == expected
    assert (first.images, first.texts, second.images, second.texts) == (COUNT, COUNT + 1, 0, 0)
    assert len(files(tmp_path)) == 6  # three parts each for pictures and captions
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(files(tmp_path))  # no other files


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Counting())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("breaks_after", "images", "texts"),
    [
        (3, 11, 12),  # in the first part, which is lost entirely
        (5, 7, 12),  # in the second
        (10, 3, 12),
        (15, 0, 8),  # all pictures, and the first part of the captions
        (22, 0, 4),
    ],
)
def test_a_run_that_was_killed_goes_on(tmp_path: Path, breaks_after: int, images: int, texts: int) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run(Counting(breaks_after), cache=tmp_path)
    again = Counting()
    assert run(again, cache=tmp_path).rows == run(Counting()).rows
    assert (again.images, again.texts) == (images, texts)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)


def lost(path: Path) -> None:
    path.unlink()


def another(path: Path) -> None:
    """Replace the part with a valid one of another set."""
    other_part = next(part for part in files(path.parent.parent) if part.parent != path.parent)
    path.write_bytes(other_part.read_bytes())


@pytest.mark.parametrize("damage", [truncated, empty, flipped, lost, another])
def test_damaged_parts_are_encoded_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    expected = run(Counting(), cache=tmp_path).rows
    damage(files(tmp_path)[0])
    again = Counting()
    assert run(again, cache=tmp_path).rows == expected
    assert again.images + again.texts == 4
    mended = Counting()
    run(mended, cache=tmp_path)
    assert mended.images + mended.texts == 0


def test_a_part_of_another_length_is_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(Counting(), cache=tmp_path).rows
    monkeypatch.setattr(cache, "PART", 5)
    again = Counting()
    assert run(again, cache=tmp_path).rows == expected
    assert (again.images, again.texts) == (COUNT, COUNT + 1)


def renamed(examples: list[Example]) -> list[Example]:
    return [example._replace(image_id=f"new {example.image_id}") for example in examples]


def retold(examples: list[Example]) -> list[Example]:
    return [examples[0]._replace(caption="told anew 0"), *examples[1:]]


@pytest.mark.parametrize(("change", "images", "texts"), [(renamed, COUNT, 0), (retold, 0, COUNT + 1)])
def test_other_data_is_not_mistaken(tmp_path: Path, change: Callable, images: int, texts: int) -> None:
    run(Counting(), cache=tmp_path)
    again = Counting()
    run(again, change(pairs()), cache=tmp_path)
    assert (again.images, again.texts) == (images, texts)


@pytest.mark.parametrize("change", [{"fingerprint": "x"}, {"name": "x"}, {"precision": "fp16"}, {"preprocess": "x"}])
def test_other_encoders_are_not_mistaken(tmp_path: Path, change: dict[str, Any]) -> None:
    run(Counting(), cache=tmp_path)
    again = Counting()
    vars(again).update(change)
    run(again, cache=tmp_path)
    assert again.images == COUNT
    assert again.texts == (0 if "preprocess" in change else COUNT + 1)


def test_each_context_has_its_own_captions_and_all_share_the_pictures(tmp_path: Path) -> None:
    engine = Counting()
    run(engine, context_lengths=[20], cache=tmp_path)
    run(engine, context_lengths=[20, 64], cache=tmp_path)
    assert (engine.images, engine.texts) == (COUNT, 2 * (COUNT + 1))


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for picture in pictures:
        picture.write_bytes(b"one")
    examples = [Example(picture, picture.stem, str(picture)) for picture in pictures]
    engine = Counting()
    for count in (3, 3):
        run(engine, examples, cache=tmp_path / "cache")
        assert engine.images == count
    pictures[1].write_bytes(b"other")
    run(engine, examples, cache=tmp_path / "cache")
    assert (engine.images, engine.texts) == (6, 3)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file.*: Not a directory"):
        run(Counting(), cache=tmp_path / "file")


def test_rows_come_alike_from_memory_and_from_files(tmp_path: Path) -> None:
    run(Counting(), cache=tmp_path)
    folder = max({path.parent for path in files(tmp_path)}, key=lambda parent: len(files(parent)))
    paths = files(folder)
    tensors = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors.append(file.get_tensor("rows"))
    full_rows = torch.cat(tensors)
    for rows in (StoredRows(list(paths), len(full_rows), 4), StoredRows(list(tensors), len(full_rows), 4)):
        assert len(rows) == len(full_rows)
        for selection in (slice(0, 3), slice(3, 9), slice(4, 8), slice(8, 99), torch.tensor([9, 0, 5, 5])):
            assert torch.equal(rows[selection], full_rows[selection])


# Position in the file, and the replacement there; mostly in the header, which says how to read the values.
DAMAGE = st.tuples(st.integers(0, 400) | st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 3))


@settings(settings.get_profile("fuzz"))
@cases(st.lists(DAMAGE, min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_damaged_part_is_not_taken_for_the_part(
    tmp_path: Path, damage: list[tuple[int, bytes, int]], dtype: Any
) -> None:
    folder, rows = PartFolder(tmp_path, {"of": str(dtype)}), torch.arange(96.0).reshape(4, 3, 8).to(dtype)
    path = folder.write(0, rows)
    content = path.read_bytes()
    for at, piece, removed_bytes in damage:
        content = content[:at] + piece + content[at + removed_bytes :]
    path.write_bytes(content)
    if folder.holds(0, 4):
        stored_rows = StoredRows([path], 4, 4)[:]
        assert stored_rows.dtype == dtype
        assert torch.equal(stored_rows, rows)


@pytest.mark.parametrize("old", ["F16", "BF16"])
def test_values_are_not_read_as_another_type(tmp_path: Path, old: str) -> None:
    folder, dtype = PartFolder(tmp_path, {}), {"F16": torch.float16, "BF16": torch.bfloat16}[old]
    path = folder.write(0, torch.ones(4, 3, 8, dtype=dtype))
    new = {"F16": b'"I16"', "BF16": b'"U16" '}[old]
    path.write_bytes(path.read_bytes().replace(f'"{old}"'.encode(), new))
    assert not folder.holds(0, 4)


def test_a_pipe_in_the_place_of_a_part_is_not_waited_for(tmp_path: Path) -> None:
    folder = PartFolder(tmp_path, {})
    os.mkfifo(folder.path(0))
    assert not folder.holds(0, 4)


def test_parts_before_a_full_disk_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, paths = cache.save_file, []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if len(paths) == 2:
            raise OSError(28, "No space left on device")
        paths.append(path)
        save(tensors, path, metadata)

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(WriteError, match=r"cannot write .*00002\.safetensors: No space left on device"):
        run(Counting(), cache=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(cache, "PART", 4)
    engine = Counting()
    assert run(engine, cache=tmp_path).rows == run(Counting()).rows
    assert engine.images == COUNT - 8
