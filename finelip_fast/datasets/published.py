"""Readers for published caption datasets, each from its folder as published: nothing is moved, renamed or converted.

Pictures and captions are matched by name, never by directory order. Each reader returns ``(picture, caption)`` pairs, with
several captions of one picture in a row, in the published order if there is one, otherwise by picture name. White space
around captions is stripped. Every reader raises InputError if something is missing, and says where to get it. Names given
in a file must stay within the published folder; links in that folder are followed wherever they lead.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from finelip_fast._decode import image_suffixes
from finelip_fast._json import parse_json
from finelip_fast._terminal import printable
from finelip_fast.datasets.json_files import picture_name, read_text
from finelip_fast.errors import InputError

_logger = logging.getLogger(__name__)

Pairs = list[tuple[Path, str]]
Key = TypeVar("Key", bound=Hashable)
Kind = TypeVar("Kind")

URBAN1K = "Urban1k is published at https://huggingface.co/datasets/BeichenZhang/Urban1k"
DOCCI = "DOCCI is published at https://google.github.io/docci/"
DCI = "DCI is published at https://github.com/facebookresearch/DCI"
LONG_DCI = (
    "Long-DCI's dci_long.csv is published at https://huggingface.co/datasets/mderakhshani/Long-DCI, "
    "its pictures are DCI's, https://github.com/facebookresearch/DCI"
)
COCO = "COCO is published at https://cocodataset.org/#download"
FLICKR30K = (
    "Flickr30k's pictures are published at https://shannon.cs.illinois.edu/DenotationGraph/, "
    "dataset_flickr30k.json at https://cs.stanford.edu/people/karpathy/deepimagesent/"
)


def read_urban1k(root: Path) -> Pairs:
    """Read Long-CLIP's Urban1k: ``image/NAME.jpg`` (or another format) and ``caption/NAME.txt``, one caption per picture.

    Args:
        root: The folder that contains ``image`` and ``caption``, or the one that contains ``Urban1k``.

    Raises:
        InputError: A missing folder, a picture without a caption, a caption without a picture, or two pictures with one name.
    """
    root = _inner(root, "Urban1k", "image")
    pictures: dict[str, Path] = {}
    for path in _list(root / "image", image_suffixes(), URBAN1K):
        if (twin := pictures.setdefault(path.stem, path)) != path:
            raise InputError(f"{root / 'image'}: expected a single picture per name, got {twin.name} and {path.name}")
    captions = {path.stem: [read_text(path)] for path in _list(root / "caption", {".txt"}, URBAN1K)}
    return _match(pictures, captions, root, URBAN1K)


def read_docci(root: Path, split: str | None = None) -> Pairs:
    """Read DOCCI: ``docci_descriptions.jsonlines`` and ``images``, one description per picture.

    Args:
        root: The folder that contains both.
        split: "test" (None), "train", "qual_dev" or "qual_test".

    Raises:
        InputError: A missing file, folder or picture, a line with another layout, or an unknown split.
    """
    path = root / "docci_descriptions.jsonlines"
    images = _folder(root / "images", DOCCI)
    splits: dict[str, Pairs] = {}
    for number, line in enumerate(_text(path, DOCCI).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse(line, where)
        pair = (
            _inside(images, _field(record, "image_file", str, where), where),
            _field(record, "description", str, where).strip(),
        )
        splits.setdefault(_field(record, "split", str, where), []).append(pair)
    return _present(_choose(splits, split or "test", path), DOCCI)


def read_dci(root: Path, split: str | None = None) -> Pairs:
    """Read Densely Captioned Images: ``annotations/*.json`` and ``photos``, one caption per picture.

    The caption is ``short_caption`` and ``extra_caption`` joined by a space; captions of masks are left out.

    Args:
        root: The folder that contains both, or the one that contains ``densely_captioned_images``.
        split: "train", "valid" or "test" from ``splits.json``; None: every annotation, by picture name.

    Raises:
        InputError: A missing file, folder or picture, an annotation with another layout, or an unknown split.
    """
    root = _inner(root, "densely_captioned_images", "annotations")
    annotations, photos = _folder(root / "annotations", DCI), _folder(root / "photos", DCI)
    if split is None:
        paths = _list(annotations, {".json"}, DCI)
    else:
        where = root / "splits.json"
        splits = _parse(_text(where, DCI), where)
        if not isinstance(splits, dict):
            raise InputError(f"{where}: expected an object of splits, got {splits!r:.80}")
        names = _field({split: _choose(splits, split, where)}, split, list, where)
        paths = [_inside(annotations, name, where) for name in names]
    pairs = []
    for path in paths:
        record = _parse(_text(path, DCI), path)
        short, extra = (_field(record, name, str, path).strip() for name in ("short_caption", "extra_caption"))
        pairs.append((_inside(photos, _field(record, "image", str, path), path), f"{short} {extra}".strip()))
    return _present(sorted(pairs) if split is None else pairs, DCI)


def read_long_dci(root: Path) -> Pairs:
    """Read Long-DCI from TULIP (arXiv 2410.10034): ``dci_long.csv``, one caption per picture, with DCI's pictures.

    The file has the columns ``filepath``, a picture's name, and ``title``, its caption (DCI's ``extra_caption``), separated
    by tabs or commas. Pictures are in ``photos``, as in DCI, in ``images``, or beside the file.

    Args:
        root: The folder that contains the file.

    Raises:
        InputError: A missing file or picture, a file without these columns, or a row that lacks one.
    """
    path = root / "dci_long.csv"
    text = _text(path, LONG_DCI)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in text.partition("\n")[0] else ",")
    folder = next((candidate for candidate in (root / "photos", root / "images") if os.path.isdir(candidate)), root)
    pairs: Pairs = []
    try:
        columns = rows.fieldnames or []
        if not {"filepath", "title"} <= set(columns):
            raise InputError(
                f"{path}: expected the columns 'filepath' and 'title', found {', '.join(columns)[:80] or 'none'}. {LONG_DCI}"
            )
        for row in rows:
            if not row["filepath"] or row["title"] is None:
                raise InputError(
                    f"{path}, line {rows.line_num}: expected a picture's name and a caption, got {row!r:.80}"
                )
            pairs.append((_inside(folder, row["filepath"], f"{path}, line {rows.line_num}"), row["title"].strip()))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {rows.line_num}: expected rows of a picture's name and a caption: {error}"
        ) from None
    return _present(pairs, LONG_DCI)


def read_coco(root: Path) -> Pairs:
    """Read COCO's 5,000 validation pictures of 2017: ``annotations/captions_val2017.json`` and ``val2017``.

    Each picture has five captions, the first five in the file's order: a few pictures have more, and the usual protocol
    leaves the rest out.

    Args:
        root: The folder that contains ``annotations`` and ``val2017``.

    Raises:
        InputError: A missing file, folder or picture, a file with another layout, or a picture or caption without the other.
    """
    path = root / "annotations" / "captions_val2017.json"
    content = _parse(_text(path, COCO), path)
    folder = _folder(root / "val2017", COCO)
    images = _field(content, "images", list, path)
    pictures = {
        _field(image, "id", int, path): _inside(folder, _field(image, "file_name", str, path), path) for image in images
    }
    if len(pictures) < len(images):
        raise InputError(f"{path}: expected a unique id for each of {len(images)} images, found {len(pictures)}")
    captions: dict[int, list[str]] = {}
    for annotation in _field(content, "annotations", list, path):
        captions_of_image = captions.setdefault(_field(annotation, "image_id", int, path), [])
        captions_of_image.append(_field(annotation, "caption", str, path))
    first = {image: captions_of_image[:5] for image, captions_of_image in captions.items()}
    return _present(_match(pictures, first, path, COCO), COCO)


def read_flickr30k(root: Path, split: str | None = None) -> Pairs:
    """Read Flickr30k, five captions per picture: Karpathy's ``dataset_flickr30k.json``, or else ``results_20130124.token``.

    Pictures are in ``flickr30k-images`` or in ``images``.

    Args:
        root: The folder that contains the captions and the folder of pictures.
        split: "test" (None), "train" or "val" of Karpathy's splits; the token file has no splits and yields every picture.

    Raises:
        InputError: A missing file, folder or picture, a file with another layout, or an unknown split.
    """
    path, token = root / "dataset_flickr30k.json", root / "results_20130124.token"
    folder = root / "flickr30k-images"
    folder = folder if os.path.isdir(folder) else _folder(root / "images", FLICKR30K)
    if os.path.exists(path) or not os.path.exists(token):
        splits: dict[str, Pairs] = {}
        content = _parse(_text(path, FLICKR30K), path)
        for image in _field(content, "images", list, path):
            picture = _inside(folder, _field(image, "filename", str, path), path)
            captions = [
                _field(sentence, "raw", str, path).strip() for sentence in _field(image, "sentences", list, path)
            ]
            pairs = splits.setdefault(_field(image, "split", str, path), [])
            pairs += [(picture, caption) for caption in captions]
        return _present(_choose(splits, split or "test", path), FLICKR30K)
    if split is not None:
        raise InputError(f"{token} has no splits, got {split!r}; add {path.name}, or omit the split. {FLICKR30K}")
    by_picture: dict[Path, list[str]] = {}
    for number, line in enumerate(_text(token, FLICKR30K).split("\n"), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        name, mark, _ = name.rpartition("#")
        if not (tab and mark):
            raise InputError(f"{token}, line {number}: expected NAME#NUMBER, a tab and a caption, got {line[:80]!r}")
        by_picture.setdefault(_inside(folder, name, f"{token}, line {number}"), []).append(caption.strip())
    return _present([(picture, caption) for picture, captions in by_picture.items() for caption in captions], FLICKR30K)


# --- Files and folders -------------------------------------------------------------------------------------------


def _inner(root: Path, name: str, needed: str) -> Path:
    """Return ``root / name``, which the published archive unpacks to, unless ``root`` is already that folder."""
    return root / name if os.path.isdir(root / name) and not os.path.exists(root / needed) else root


def _folder(path: Path, published: str) -> Path:
    if not os.path.isdir(path):
        raise InputError(f"expected a folder {path}, found none. {published}")
    return path


def _list(folder: Path, suffixes: Collection[str], published: str) -> list[Path]:
    """List the files of a folder with some suffixes, ignoring case; files left out are logged."""
    try:
        paths = sorted(_folder(folder, published).iterdir())
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None
    listed = [path for path in paths if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if left_out := sorted(set(paths) - set(listed)):
        _logger.warning(
            "%s: left out %d files, first %s", printable(folder), len(left_out), printable(left_out[0].name)
        )
    return listed


def _text(path: Path, published: str) -> str:
    try:
        return read_text(path)
    except InputError as error:
        raise InputError(f"{error}. {published}") from None


def _present(pairs: Pairs, published: str) -> Pairs:
    """Return the pairs after checking that every picture exists as a file: better now than an hour into an evaluation."""
    pictures = dict.fromkeys(path for path, _ in pairs)
    missing = [path for path in pictures if not os.path.isfile(path)]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(pictures)} pictures are missing, first {missing[0]}{_beside(missing[0])}. {published}"
        )
    return pairs


def _beside(picture: Path) -> str:
    """Name the picture that has the same name with another suffix, for an error message."""
    with suppress(OSError):
        for name in sorted(os.listdir(picture.parent)):
            if os.path.splitext(name)[0] == picture.stem and os.path.splitext(name)[1].lower() in image_suffixes():
                return f" (there is {name}; rename it to match the captions)"
    return ""


# --- File contents -----------------------------------------------------------------------------------------------


def _inside(folder: Path, name: object, where: Path | str) -> Path:
    """Return the path of a named file within a folder."""
    name = picture_name(name, str(where))
    if name[0] in "/\\" or ":" in name[1:2] or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{where}: expected a name within {folder}, got {name!r:.80}")
    return folder / name


def _parse(text: str, where: Path | str) -> Any:
    return parse_json(text, where, error=InputError)


def _field(record: Any, name: str, kind: type[Kind], where: Path | str) -> Kind:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where}: expected an object with {name!r} of type {kind.__name__}, got {record!r:.80}")
    return value


def _choose(splits: Mapping[str, Kind], split: str, where: Path) -> Kind:
    if split not in splits:
        raise InputError(
            f"{where}: expected split to be one of {', '.join(sorted(splits))[:200] or '(none)'}; got {split!r:.80}"
        )
    return splits[split]


def _match(pictures: Mapping[Key, Path], captions: Mapping[Key, Iterable[str]], where: Path, published: str) -> Pairs:
    """Make pairs in the order of ``pictures``; a key on one side only is an error."""
    for kind, counterpart, lone in (
        ("picture", "caption", [key for key in pictures if key not in captions]),
        ("caption", "picture", [key for key in captions if key not in pictures]),
    ):
        if lone:
            names = ", ".join(str(key)[:80] for key in lone[:3]) + (", ..." if len(lone) > 3 else "")
            raise InputError(
                f"{where}: expected a {counterpart} for each {kind}, but {len(lone)} have none: {names}. {published}"
            )
    return [(path, caption.strip()) for key, path in pictures.items() for caption in captions[key]]
