"""Published datasets: a small version of each layout, the pairs read from it, and the error messages."""

from __future__ import annotations

import csv
import json
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finelip_fast.datasets import Example, open_dataset
from finelip_fast.datasets.published import (
    read_coco,
    read_dci,
    read_docci,
    read_flickr30k,
    read_long_dci,
    read_urban1k,
)
from finelip_fast.errors import InputError

NAMES = ("1", "10", "2", "a b", "é")  # in string order, which differs from numeric order


def write_pictures(folder, names, seed=0):
    """Write tiny pictures, in an order that differs from that of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(names)
    random.Random(seed).shuffle(names)
    for name in names:
        Image.new("RGB", (2, 2)).save(folder / name)
    return folder


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def names_and_captions(pairs):
    return [(path.name, caption) for path, caption in pairs]


# --- The layouts -------------------------------------------------------------------------------------------------


def make_urban1k(root, seed=0):
    write_pictures(root / "image", [f"{name}.jpg" for name in NAMES], seed)
    (root / "caption").mkdir()
    for name in random.Random(seed + 1).sample(NAMES, len(NAMES)):
        (root / "caption" / f"{name}.txt").write_text(f" caption of {name}\n", encoding="utf-8")
    return root


DOCCI = (("test", "test_1"), ("train", "train_0"), ("test", "test_0"), ("qual_dev", "dev_0"), ("qual_test", "qual_0"))


def make_docci(root):
    write_pictures(root / "images", [f"{name}.jpg" for _, name in DOCCI])
    lines = [
        json.dumps({"split": split, "image_file": f"{name}.jpg", "description": f"{name}. ", "example_id": name})
        for split, name in DOCCI
    ]
    (root / "docci_descriptions.jsonlines").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


def make_dci(root, splits=True):
    write_pictures(root / "photos", ["sa_1.jpg", "sa_2.jpg", "sa_3.jpg"])
    # Annotations are named in the opposite order of their pictures.
    for annotation, picture, extra in (("x.json", 3, "More."), ("y.json", 2, ""), ("z.json", 1, "Yet more. ")):
        write_json(
            root / "annotations" / annotation,
            {"image": f"sa_{picture}.jpg", "short_caption": f"Picture {picture}.", "extra_caption": extra},
        )
    if splits:
        write_json(root / "splits.json", {"train": ["z.json"], "valid": [], "test": ["x.json", "y.json"]})
    return root


def make_long_dci(root, folder="photos", delimiter="\t"):
    write_pictures(root / folder, ["sa_1.jpg", "sa_2.jpg"])
    with (root / "dci_long.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        rows.writerows([["filepath", "title"], ["sa_2.jpg", 'A "house",\ton\ntwo lines. '], ["sa_1.jpg", "A street."]])
    return root


def coco():
    captions = [(7, f"seven {number}") for number in range(6)] + [(3, f"three {number}\n") for number in range(5)]
    random.Random(0).shuffle(captions)
    return {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 3, "file_name": "000000000003.jpg"}],
        "annotations": [
            {"id": n, "image_id": image, "caption": caption} for n, (image, caption) in enumerate(captions)
        ],
    }


def make_coco(root, content=None):
    write_pictures(root / "val2017", ["000000000003.jpg", "000000000007.jpg"])
    write_json(root / "annotations" / "captions_val2017.json", coco() if content is None else content)
    return root


def make_flickr30k(root, folder="flickr30k-images"):
    write_pictures(root / folder, ["2.jpg", "1.jpg", "3.jpg"])
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": f"{name}{n}. "} for n in range(5)]}
        for name, split in ((2, "test"), (3, "train"), (1, "test"))
    ]
    write_json(root / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    return root


def make_token(root):
    write_pictures(root / "images", ["2.jpg", "1.jpg"])
    lines = ["2.jpg#0\ttwo 0 .", "1.jpg#0\tone\t0 .", "2.jpg#1\ttwo 1 .", "1.jpg#1\tone 1 .", ""]
    (root / "results_20130124.token").write_text("\n".join(lines), encoding="utf-8")
    return root


# --- What is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("inner", ["", "Urban1k"])
def test_urban1k_pairs_by_name(tmp_path, seed, inner):
    root = make_urban1k(tmp_path / inner if inner else tmp_path, seed)
    (root / "image" / "Thumbs.db").write_bytes(b"")
    expected = [(root / "image" / f"{name}.jpg", f"caption of {name}") for name in NAMES]
    assert read_urban1k(tmp_path) == expected


def test_urban1k_of_other_kinds_of_picture_and_with_hidden_files(tmp_path, caplog):
    root = make_urban1k(tmp_path)
    for old, new in (("1.jpg", "1.JPG"), ("10.jpg", "10.png"), ("2.jpg", "2.jpeg")):
        (root / "image" / old).rename(root / "image" / new)
    (root / "caption" / "1.txt").rename(root / "caption" / "1.TXT")
    for name in ("image/._1.jpg", "image/._10.png", "caption/._1.txt", "image/.DS_Store"):  # created by macOS
        (root / name).write_bytes(b"\0\5\x16\7")
    assert [path.name for path, _ in read_urban1k(root)] == ["1.JPG", "10.png", "2.jpeg", "a b.jpg", "é.jpg"]
    assert caplog.messages == [
        f"{root / 'image'}: left out 3 files, first .DS_Store",
        f"{root / 'caption'}: left out 1 files, first ._1.txt",
    ]
    Image.new("RGB", (2, 2)).save(root / "image" / "1.png")
    with pytest.raises(InputError, match=r"image: expected a single picture per name, got 1\.JPG and 1\.png"):
        read_urban1k(root)


def test_dci_passes_over_hidden_annotations(tmp_path, caplog):
    root = make_dci(tmp_path)
    (root / "annotations" / "._x.json").write_bytes(b"\0\5\x16\7")
    assert len(read_dci(root)) == 3
    assert caplog.messages == [f"{root / 'annotations'}: left out 1 files, first ._x.json"]


@pytest.mark.parametrize("name", ["test_0.JPG", "test_0.png"])
def test_a_picture_of_another_suffix_is_named_where_one_is_missing(tmp_path, name):
    images = make_docci(tmp_path) / "images"
    (images / "test_0.jpg").rename(images / name)
    expected = rf"1 of 2 pictures are missing, first .*test_0\.jpg \(there is {name}; rename it to match the captions"
    with pytest.raises(InputError, match=expected):
        read_docci(tmp_path)
    (images / name).rename(images / "test_0.jpg")
    assert len(read_docci(tmp_path)) == 2


MARKED = {
    "docci": (make_docci, "docci_descriptions.jsonlines", read_docci),
    "dci": (make_dci, "annotations/x.json", read_dci),
    "coco": (make_coco, "annotations/captions_val2017.json", read_coco),
    "flickr30k": (make_flickr30k, "dataset_flickr30k.json", read_flickr30k),
    "token": (make_token, "results_20130124.token", read_flickr30k),
    "long-dci": (make_long_dci, "dci_long.csv", read_long_dci),
    "urban1k": (make_urban1k, "caption/1.txt", read_urban1k),
}


@pytest.mark.parametrize("layout", MARKED)
def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path, layout):
    make, name, reader = MARKED[layout]
    expected = reader(make(tmp_path))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert reader(tmp_path) == expected


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (None, ["test_1", "test_0"]),
        ("test", ["test_1", "test_0"]),
        ("train", ["train_0"]),
        ("qual_dev", ["dev_0"]),
        ("qual_test", ["qual_0"]),
    ],
)
def test_docci_in_the_order_of_the_file(tmp_path, split, names):
    root = make_docci(tmp_path)
    assert read_docci(root, split) == [(root / "images" / f"{name}.jpg", f"{name}.") for name in names]


@pytest.mark.parametrize("inner", ["", "densely_captioned_images"])
def test_dci_joins_both_captions(tmp_path, inner):
    root = make_dci(tmp_path / inner)
    first, second, third = ((root / "photos" / f"sa_{number}.jpg") for number in (1, 2, 3))
    everything = [(first, "Picture 1. Yet more."), (second, "Picture 2."), (third, "Picture 3. More.")]
    assert read_dci(tmp_path) == everything
    assert read_dci(tmp_path, "test") == [everything[2], everything[1]]
    assert read_dci(tmp_path, "train") == everything[:1]
    assert read_dci(tmp_path, "valid") == []


def test_dci_without_splits_gives_everything(tmp_path):
    assert len(read_dci(make_dci(tmp_path, splits=False))) == 3


@pytest.mark.parametrize("folder", ["photos", "images", ""])
@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_long_dci_in_the_order_of_the_file(tmp_path, folder, delimiter):
    root = make_long_dci(tmp_path, folder, delimiter)
    assert read_long_dci(root) == [
        (root / folder / "sa_2.jpg", 'A "house",\ton\ntwo lines.'),
        (root / folder / "sa_1.jpg", "A street."),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("image,caption\na.jpg,A.\n", r"expected the columns 'filepath' and 'title', found image, caption. Long-DCI"),
        ("", "found none"),
        ("filepath,title\nsa_1.jpg,A.\nsa_2.jpg\n", "line 3: expected a picture's name and a caption"),
        (f"filepath,title\nsa_1.jpg,{'A' * 200_000}\n", "line 1: expected rows of .*limit"),
    ],
)
def test_long_dci_of_another_layout(tmp_path, content, reason):
    (make_long_dci(tmp_path) / "dci_long.csv").write_text(content)
    with pytest.raises(InputError, match=rf"dci_long\.csv.*{reason}"):
        read_long_dci(tmp_path)


def test_coco_gives_the_first_five_captions_of_each_picture(tmp_path):
    pairs = read_coco(make_coco(tmp_path))
    captions = {key: [a["caption"].strip() for a in coco()["annotations"] if a["image_id"] == key] for key in (7, 3)}
    assert (len(captions[7]), len(captions[3])) == (6, 5)
    assert pairs == [
        (tmp_path / "val2017" / f"{key:012d}.jpg", caption) for key in (7, 3) for caption in captions[key][:5]
    ]


@pytest.mark.parametrize("folder", ["flickr30k-images", "images"])
def test_flickr30k_in_karpathys_splits(tmp_path, folder):
    root = make_flickr30k(tmp_path, folder)
    (root / "results_20130124.token").write_text("1.jpg#0\tleft alone\n")
    expected = [(root / folder / f"{name}.jpg", f"{name}{n}.") for name in (2, 1) for n in range(5)]
    assert read_flickr30k(root) == read_flickr30k(root, "test") == expected
    assert names_and_captions(read_flickr30k(root, "train")) == [("3.jpg", f"3{n}.") for n in range(5)]


def test_flickr30k_of_the_token_file_brings_a_pictures_captions_together(tmp_path):
    assert names_and_captions(read_flickr30k(make_token(tmp_path))) == [
        ("2.jpg", "two 0 ."),
        ("2.jpg", "two 1 ."),
        ("1.jpg", "one\t0 ."),
        ("1.jpg", "one 1 ."),
    ]


# --- What is missing ---------------------------------------------------------------------------------------------

HOMES = {
    read_urban1k: "https://huggingface.co/datasets/BeichenZhang/Urban1k",
    read_docci: "https://google.github.io/docci/",
    read_dci: "https://github.com/facebookresearch/DCI",
    read_long_dci: "https://huggingface.co/datasets/mderakhshani/Long-DCI",
    read_coco: "https://cocodataset.org/#download",
    read_flickr30k: "https://shannon.cs.illinois.edu/DenotationGraph/",
}


@pytest.mark.parametrize(
    ("reader", "make", "lost", "reason"),
    [
        (read_urban1k, make_urban1k, "image", "expected a folder {}, found none"),
        (read_urban1k, make_urban1k, "caption", "expected a folder {}, found none"),
        (read_docci, make_docci, "images", "expected a folder {}, found none"),
        (read_docci, make_docci, "docci_descriptions.jsonlines", "cannot read {}: No such file"),
        (read_docci, make_docci, "images/test_0.jpg", "1 of 2 pictures are missing, first {}"),
        (read_dci, make_dci, "annotations", "expected a folder {}, found none"),
        (read_dci, make_dci, "photos", "expected a folder {}, found none"),
        (read_dci, make_dci, "photos/sa_2.jpg", "1 of 3 pictures are missing, first {}"),
        (read_long_dci, make_long_dci, "dci_long.csv", "cannot read {}: No such file"),
        (read_long_dci, make_long_dci, "photos/sa_1.jpg", "1 of 2 pictures are missing, first {}"),
        (read_coco, make_coco, "val2017", "expected a folder {}, found none"),
        (read_coco, make_coco, "annotations/captions_val2017.json", "cannot read {}: No such file"),
        (read_coco, make_coco, "val2017/000000000003.jpg", "1 of 2 pictures are missing, first {}"),
        (read_flickr30k, make_token, "images", "expected a folder {}, found none"),
        (read_flickr30k, make_flickr30k, "dataset_flickr30k.json", "cannot read {}: No such file"),
        (read_flickr30k, make_flickr30k, "flickr30k-images/1.jpg", "1 of 2 pictures are missing, first {}"),
        (read_flickr30k, make_token, "images/2.jpg", "1 of 2 pictures are missing, first {}"),
    ],
)
def test_what_is_missing_is_named_and_where_it_is_published(tmp_path, reader, make, lost, reason):
    path = make(tmp_path) / lost
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        reader(tmp_path)
    assert reason.format(path) in str(caught.value)
    assert HOMES[reader] in str(caught.value)


def test_dci_names_a_missing_annotation_or_file_of_splits(tmp_path):
    make_dci(tmp_path)
    (tmp_path / "annotations" / "y.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*y\.json: No such file.* published at https://github\.com"):
        read_dci(tmp_path, "test")
    (tmp_path / "splits.json").unlink()
    with pytest.raises(
        InputError, match=r"cannot read .*splits\.json: No such file.* published at https://github\.com"
    ):
        read_dci(tmp_path, "test")


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (["caption/10.txt"], "expected a caption for each picture, but 1 have none: 10. Urban1k is published at https"),
        (["image/10.jpg", "image/2.jpg"], "expected a picture for each caption, but 2 have none: 10, 2. Urban1k is"),
        (
            [f"image/{name}.jpg" for name in NAMES],
            "expected a picture for each caption, but 5 have none: 1, 10, 2, ...",
        ),
    ],
)
def test_urban1k_names_the_first_few_without_the_other(tmp_path, lost, reason):
    make_urban1k(tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    with pytest.raises(InputError) as caught:
        read_urban1k(tmp_path)
    assert f"{tmp_path}: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    ("reader", "make", "reason"),
    [
        (read_docci, make_docci, "expected split to be one of qual_dev, qual_test, test, train; got 'val'"),
        (read_dci, make_dci, "expected split to be one of test, train, valid; got 'val'"),
        (read_flickr30k, make_flickr30k, "expected split to be one of test, train; got 'val'"),
        (read_flickr30k, make_token, "has no splits, got 'val'; add dataset_flickr30k.json"),
    ],
)
def test_an_unknown_split_is_answered_with_those_there_are(tmp_path, reader, make, reason):
    with pytest.raises(InputError, match=reason):
        reader(make(tmp_path), "val")


def test_an_empty_file_has_no_splits(tmp_path):
    (make_docci(tmp_path) / "docci_descriptions.jsonlines").write_text("\n")
    with pytest.raises(InputError, match=r"expected split to be one of \(none\); got 'test'"):
        read_docci(tmp_path)


# --- Files of another layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "line 2: expected JSON: "),
        ("[]", "line 2: expected an object with 'image_file' of type str, got \\[\\]"),
        ('{"image_file": "a.jpg", "description": 3}', "line 2: expected an object with 'description' of type str"),
        ('{"image_file": "a.jpg", "description": ""}', "line 2: expected an object with 'split' of type str"),
    ],
)
def test_docci_names_the_line(tmp_path, bad, reason):
    path = make_docci(tmp_path) / "docci_descriptions.jsonlines"
    path.write_text(f"\n{bad}\n")
    with pytest.raises(InputError, match=reason):
        read_docci(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("annotations/x.json", {"image": "sa_3.jpg", "short_caption": "A."}, "'extra_caption' of type str"),
        ("annotations/x.json", [], "'short_caption' of type str"),
        ("splits.json", ["x.json"], "expected an object of splits, got "),
        ("splits.json", {"test": "x.json"}, "'test' of type list"),
    ],
)
def test_dci_names_the_file(tmp_path, name, content, reason):
    write_json(make_dci(tmp_path) / name, content)
    with pytest.raises(InputError, match=reason) as caught:
        read_dci(tmp_path, "test")
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": None}, "'images' of type list"),
        ({"images": [{"id": "7", "file_name": "7.jpg"}]}, "'id' of type int"),
        ({"annotations": [{"image_id": 7}]}, "'caption' of type str"),
        ({"annotations": [{"image_id": 7, "caption": "seven"}]}, "a caption for each picture, but 1 have none: 3"),
        ({"images": coco()["images"][:1]}, "a picture for each caption, but 1 have none: 3"),
    ],
)
def test_coco_of_another_layout(tmp_path, change, reason):
    make_coco(tmp_path, coco() | change)
    with pytest.raises(InputError, match=rf"captions_val2017\.json: expected .*{reason}"):
        read_coco(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "'images' of type list"),
        ({"images": [{"filename": "1.jpg", "split": "test"}]}, "'sentences' of type list"),
        ({"images": [{"filename": "1.jpg", "split": "test", "sentences": ["one"]}]}, "'raw' of type str, got 'one'"),
    ],
)
def test_flickr30k_of_another_layout(tmp_path, content, reason):
    write_json(make_flickr30k(tmp_path) / "dataset_flickr30k.json", content)
    with pytest.raises(InputError, match=rf"dataset_flickr30k\.json: expected an object with {reason}"):
        read_flickr30k(tmp_path)


@pytest.mark.parametrize("bad", ["1.jpg#0 no tab", "1.jpg\tno number"])
def test_flickr30k_names_the_line_of_the_token_file(tmp_path, bad):
    (make_token(tmp_path) / "results_20130124.token").write_text(f"2.jpg#0\ttwo\n{bad}\n")
    with pytest.raises(InputError, match=r"token, line 2: expected NAME#NUMBER, a tab and a caption, got '1\.jpg"):
        read_flickr30k(tmp_path)


# --- By name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make", "split", "expected"),
    [
        ("urban1k", make_urban1k, "", read_urban1k),
        ("coco", make_coco, "", read_coco),
        ("long-dci", make_long_dci, "", read_long_dci),
        ("docci", make_docci, "", read_docci),
        ("docci", make_docci, ":train", lambda root: read_docci(root, "train")),
        ("dci", make_dci, "", read_dci),
        ("dci", make_dci, ":test", lambda root: read_dci(root, "test")),
        ("flickr30k", make_flickr30k, "", read_flickr30k),
        ("flickr30k", make_flickr30k, ":train", lambda root: read_flickr30k(root, "train")),
    ],
)
def test_opened_by_name(tmp_path, kind, make, split, expected):
    root = make(tmp_path / "drive:c")  # a colon before a separator belongs to the folder
    pairs = expected(root / "")
    examples = [Example(path, caption, str(path)) for path, caption in pairs]
    assert examples
    specs = [(f"{kind}:{root}/{split}", None), (f"{kind}:{root}/{split}", "unused"), (f"{kind}:{split}", root)]
    if not split:
        specs += [(kind, str(root))]
    for spec, folder in specs:
        opened = open_dataset(spec, root=folder)
        assert [opened[index] for index in range(len(opened))] == examples


@pytest.mark.parametrize("spec", ["urban1k", "coco:", "docci", "docci::train", "dci:", "flickr30k::test"])
def test_a_name_without_a_folder_says_what_is_expected(spec):
    with pytest.raises(InputError, match=rf"urban1k:ROOT, coco:ROOT, docci:ROOT:SPLIT, .*, got '{spec}'"):
        open_dataset(spec)


# --- Files of strangers ------------------------------------------------------------------------------------------

OUTSIDE = [
    "../outside.jpg",
    "/etc/passwd",
    "a/../../outside.jpg",
    "..\\outside.jpg",
    "C:\\outside.jpg",
    "\\outside.jpg",
    "..",
    "",
    "a\0",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
@pytest.mark.parametrize("layout", ["docci", "dci", "dci-splits", "long-dci", "coco", "flickr30k", "token"])
def test_a_name_stays_within_the_published_folder(tmp_path, layout, name):
    root = tmp_path / "root"
    (tmp_path / "outside.jpg").write_bytes(b"")
    if layout == "docci":
        make_docci(root)
        line = {"split": "test", "image_file": name, "description": "a cat"}
        (root / "docci_descriptions.jsonlines").write_text(json.dumps(line))
        reader = read_docci
    elif layout == "dci":
        write_json(
            make_dci(root) / "annotations" / "x.json", {"image": name, "short_caption": "a", "extra_caption": "b"}
        )
        reader = read_dci
    elif layout == "dci-splits":
        write_json(make_dci(root) / "splits.json", {"test": [name]})
        reader = lambda root: read_dci(root, "test")  # noqa: E731
    elif layout == "long-dci":
        (make_long_dci(root) / "dci_long.csv").write_text(f"filepath,title\n{name},a cat\n", encoding="utf-8")
        reader = read_long_dci
    elif layout == "coco":
        content = coco()
        content["images"][0]["file_name"] = name
        make_coco(root, content)
        reader = read_coco
    elif layout == "flickr30k":
        image = {"filename": name, "sentences": [{"raw": "a cat"}], "split": "test"}
        write_json(make_flickr30k(root) / "dataset_flickr30k.json", {"images": [image]})
        reader = read_flickr30k
    else:
        (make_token(root) / "results_20130124.token").write_text(f"{name}#0\ta cat\n", encoding="utf-8")
        reader = read_flickr30k
    expected = "a picture's name|the path of a picture|a name within|NAME#NUMBER|line contains NUL"
    with pytest.raises(InputError, match=expected):
        reader(root)


def test_coco_gives_each_picture_an_id_of_its_own(tmp_path):
    content = coco()
    content["images"].append({**content["images"][0], "file_name": "other.jpg"})
    with pytest.raises(InputError, match="expected a unique id for each of"):
        read_coco(make_coco(tmp_path, content))


@pytest.mark.parametrize(
    "content", ["filepath" + "x" * 200_000 + "\n", "filepath,title\na.jpg," + "x" * 200_000, "filepath,title\0\n"]
)
def test_long_dci_with_fields_beyond_csvs_limits(tmp_path, content):
    (make_long_dci(tmp_path) / "dci_long.csv").write_text(content)
    with pytest.raises(InputError, match=r"dci_long\.csv.*expected") as caught:
        read_long_dci(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_picture_that_is_a_pipe_is_missing(tmp_path):
    make_docci(tmp_path)
    (tmp_path / "images" / "test_0.jpg").unlink()
    os.mkfifo(tmp_path / "images" / "test_0.jpg")
    with pytest.raises(InputError, match=r"1 of 2 pictures are missing, first .*test_0\.jpg"):
        read_docci(tmp_path)


MAKERS = {
    "docci": (read_docci, make_docci),
    "dci": (read_dci, make_dci),
    "dci-test": (lambda root: read_dci(root, "test"), make_dci),
    "long-dci": (read_long_dci, make_long_dci),
    "coco": (read_coco, make_coco),
    "flickr30k": (read_flickr30k, make_flickr30k),
    "token": (read_flickr30k, make_token),
    "urban1k": (read_urban1k, make_urban1k),
}


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_a_damaged_folder_is_refused_or_right(tmp_path_factory, damage_json, data):
    layout = data.draw(st.sampled_from(sorted(MAKERS)))
    reader, make = MAKERS[layout]
    root = make(tmp_path_factory.mktemp("root"))
    path = data.draw(
        st.sampled_from(sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".jpg"))
    )
    content = path.read_bytes()
    if path.suffix == ".json":
        content = damage_json(data, json.loads(content))
    elif path.suffix == ".jsonlines":
        lines = content.splitlines()
        lines[0] = damage_json(data, json.loads(lines[0]))
        content = b"\n".join(lines)
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(content)))
            piece = st.binary(max_size=3) | st.sampled_from(
                [b"\0", b'"', b"\t", b",", b"\r", b"../", b"\xff", b"x" * 140_000, b"\n" * 9]
            )
            content = content[:at] + data.draw(piece) + content[at + data.draw(st.integers(0, 3)) :]
    path.write_bytes(content)
    try:
        pairs = reader(root)
    except InputError as error:
        message = str(error)
    else:
        for picture, caption in pairs:
            assert picture.resolve().is_relative_to(root.resolve())
            assert picture.is_file()
            caption.encode()
        return
    assert str(root) in message
    assert len(message) < 1500
