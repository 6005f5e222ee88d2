"""Datasets of picture-caption pairs, and how to open one by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from finelip_fast._arguments import whole_number
from finelip_fast._files import expand_home
from finelip_fast.datasets.json_files import read_json_lines, read_sharegpt4v
from finelip_fast.datasets.published import (
    read_coco,
    read_dci,
    read_docci,
    read_flickr30k,
    read_long_dci,
    read_urban1k,
)
from finelip_fast.datasets.scenes import Scene, Scenes
from finelip_fast.errors import InputError

_WHOLE = {"urban1k": read_urban1k, "coco": read_coco, "long-dci": read_long_dci}
_IN_SPLITS = {"docci": read_docci, "dci": read_dci, "flickr30k": read_flickr30k}


class Region(NamedTuple):
    """A stretch of a caption and the part of the picture that it describes.

    Attributes:
        start, end: ``caption[start:end]``, whole words.
        box: ``(x0, y0, x1, y1)`` as fractions of the picture as the model sees it, y downwards.
        label: Description of the content; regions with equal labels may look alike.
    """

    start: int
    end: int
    box: tuple[float, float, float, float]
    label: str


class Example(NamedTuple):
    """One pair of picture and caption.

    Attributes:
        image: Any input that :func:`finelip_fast.preprocess.open_image` accepts; a path if the picture is a file.
        caption: The description.
        image_id: Id of the picture, shared by all of its pairs.
        regions: Known locations of the caption's phrases in the picture.
    """

    image: Any
    caption: str
    image_id: str
    regions: tuple[Region, ...] = ()


class PairDataset(Protocol):
    """A map-style dataset of pairs.

    A dataset whose pictures are expensive to make may also offer ``without_image(index)``, which returns the pair with None
    as its picture.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Example: ...


class SceneExamples:
    """:class:`Scenes` as pairs, drawn on demand."""

    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes

    def __repr__(self) -> str:
        return f"SceneExamples({self.scenes!r})"

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int, /) -> Example:
        scene = self.scenes[index]
        return Example(scene.draw(), scene.caption, scene.id, tuple(self._regions(scene)))

    def without_image(self, index: int, /) -> Example:
        """Return the pair with None as its picture; nothing is drawn."""
        scene = self.scenes[index]
        return Example(None, scene.caption, scene.id, tuple(self._regions(scene)))

    def _regions(self, scene: Scene) -> Iterator[Region]:
        if self.scenes.variant == "clean":  # phrases are located by their position in the clean caption
            yield from (Region(part.start, part.end, part.box, repr(part.object)) for part in scene.parts)


class FileExamples:
    """Pairs whose pictures are files, given as ``(path, caption)``."""

    def __init__(self, pairs: Sequence[tuple[Path, str]]) -> None:
        self.pairs = pairs

    def __repr__(self) -> str:
        first = f", the first {str(self.pairs[0][0])!r:.80}" if self.pairs else ""
        return f"<FileExamples: {len(self)} pairs{first}>"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int, /) -> Example:
        path, caption = self.pairs[whole_number("index", index, least=None)]
        return Example(path, caption, str(path))


def open_dataset(spec: str, *, image_size: int = 224, root: str | Path | None = None) -> PairDataset:
    """Open a dataset by name.

    Args:
        spec: ``"scenes:SPLIT"`` or ``"scenes:SPLIT:SIZE"`` or ``"scenes:SPLIT:SIZE:VARIANT"``, ``"jsonl:FILE"`` (one object
            per line with ``image`` and ``caption``), ``"sharegpt4v:FILE"`` (the published JSON), or a folder as published:
            ``"urban1k:ROOT"``, ``"docci:ROOT"`` or ``"docci:ROOT:SPLIT"`` (default: test), ``"dci:ROOT"`` (all)
            or ``"dci:ROOT:SPLIT"``, ``"long-dci:ROOT"``, ``"coco:ROOT"`` (val2017), ``"flickr30k:ROOT"`` or
            ``"flickr30k:ROOT:SPLIT"`` (default: test). A path may start with ``~``, the user's folder.
        image_size: Side of drawn scenes, in pixels.
        root: Folder that relative picture paths start from; None: the file's own folder. For a published folder, ROOT if
            the name leaves it empty, as in ``"urban1k"`` and ``"docci::train"``.

    Returns:
        A map-style dataset of :class:`Example`.

    Raises:
        InputError: An unknown name, a missing file, or a file with another layout.
    """
    if not isinstance(spec, str):
        raise InputError(f"expected the name of a dataset as a text, got {spec!r:.80}")
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        split, size, variant, *surplus = [*rest.split(":"), "", ""]
        if any(surplus) or (size and not size.isdecimal()):
            raise InputError(f"expected scenes:SPLIT:SIZE:VARIANT with SIZE a number, got {spec!r:.80}")
        try:
            count = int(size) if size else None
            return SceneExamples(Scenes(split or "train", count, image_size=image_size, variant=variant or "clean"))
        except ValueError as error:
            raise InputError(f"{spec!r:.80}: {error}") from None
    if kind in ("jsonl", "sharegpt4v") and rest:
        read_pairs = read_json_lines if kind == "jsonl" else read_sharegpt4v
        return FileExamples(read_pairs(expand_home(rest), root=expand_home(root) if root else None))
    if kind in _WHOLE and (place := rest or root):
        return FileExamples(_WHOLE[kind](expand_home(place)))
    if kind in _IN_SPLITS:
        folder, colon, split = rest.rpartition(":")
        if not colon or "/" in split or "\\" in split:  # the colon, if any, is a drive's
            folder, split = rest, ""
        if place := folder or root:
            return FileExamples(_IN_SPLITS[kind](expand_home(place), split or None))
    raise InputError(
        "expected scenes:SPLIT, jsonl:FILE or sharegpt4v:FILE, or a published folder as urban1k:ROOT, coco:ROOT, "
        f"docci:ROOT:SPLIT, dci:ROOT:SPLIT, long-dci:ROOT or flickr30k:ROOT:SPLIT, got {spec!r:.80}"
    )
