"""Datasets opened by name."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.datasets import Example, Scenes, open_dataset
from finelip_fast.errors import InputError


@pytest.mark.parametrize(
    ("spec", "scenes"),
    [
        ("scenes:test", Scenes("test", image_size=32)),
        ("scenes", Scenes("train", image_size=32)),
        ("scenes:val:8", Scenes("val", 8, image_size=32)),
        ("scenes:val:8:typos", Scenes("val", 8, image_size=32, variant="typos")),
        ("scenes:val::plain", Scenes("val", image_size=32, variant="plain")),
    ],
)
def test_scenes_by_name(spec, scenes):
    pairs = open_dataset(spec, image_size=32)
    assert len(pairs) == len(scenes)
    example = pairs[3]
    assert isinstance(example, Example)
    assert (example.caption, example.image_id) == (scenes[3].caption, scenes[3].id)
    assert np.array_equal(np.asarray(example.image), np.asarray(scenes[3].draw()))
    assert np.asarray(example.image).shape[:2] == (32, 32)


def test_scenes_tell_where_their_phrases_are_while_the_caption_is_clean():
    clean, plain = (open_dataset(f"scenes:val:2:{variant}", image_size=32)[1] for variant in ("clean", "plain"))
    parts = Scenes("val", 2, image_size=32)[1].parts
    assert parts
    assert [region[:3] for region in clean.regions] == [(part.start, part.end, part.box) for part in parts]
    labels = {part.object: region.label for part, region in zip(parts, clean.regions, strict=True)}
    assert len(set(labels.values())) == len(labels)
    assert plain.regions == ()


def test_paths_at_home(tmp_path, monkeypatch):
    """A shell does not expand the ``~`` in the middle of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "1.jpg", "caption": "one"}) + "\n")
    assert open_dataset("jsonl:~/a.jsonl")[0].image == tmp_path / "1.jpg"
    assert open_dataset("jsonl:~/a.jsonl", root="~/pictures")[0].image == tmp_path / "pictures" / "1.jpg"
    for name in ("image", "caption"):
        (tmp_path / "urban" / name).mkdir(parents=True)
    (tmp_path / "urban" / "image" / "1.jpg").touch()
    (tmp_path / "urban" / "caption" / "1.txt").write_text("one")
    for spec, root in (("urban1k:~/urban", None), ("urban1k", "~/urban")):
        assert open_dataset(spec, root=root)[0].image == tmp_path / "urban" / "image" / "1.jpg"


@pytest.mark.parametrize("root", [None, "pictures"])
def test_files_by_name(tmp_path, root):
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"image": "1.jpg", "caption": "one"}) + "\n")
    shared = tmp_path / "s.json"
    shared.write_text(json.dumps([{"image": "1.jpg", "conversations": [{"from": "gpt", "value": "one"}]}]))
    folder = tmp_path if root is None else Path(root)
    expected = Example(folder / "1.jpg", "one", str(folder / "1.jpg"))
    for spec in (f"jsonl:{lines}", f"sharegpt4v:{shared}"):
        pairs = open_dataset(spec, root=root)
        assert len(pairs) == 1
        assert pairs[0] == expected


def test_pairs_of_one_picture_share_its_id(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text(
        "".join(json.dumps({"image": image, "caption": image}) + "\n" for image in ("1.jpg", "2.jpg", "1.jpg"))
    )
    pairs = open_dataset(f"jsonl:{lines}")
    assert pairs[0].image_id == pairs[2].image_id != pairs[1].image_id


def test_datasets_say_what_they_are(tmp_path):
    assert repr(open_dataset("scenes:test:3")) == (
        "SceneExamples(Scenes('test', 3, image_size=224, seed=0, variant='clean'))"
    )
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "a house"}\n')
    pairs = open_dataset(f"jsonl:{tmp_path / 'a.jsonl'}")
    assert repr(pairs) == f"<FileExamples: 1 pairs, the first {str(tmp_path / 'a.jpg')!r:.80}>"
    for dataset in (pairs, open_dataset("scenes:test:3")):
        with pytest.raises(InputError, match="expected index to be an integer, got slice"):
            dataset[0:2]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("imagenet:train", "expected scenes:SPLIT, jsonl:FILE or sharegpt4v:FILE, .* got 'imagenet:train'"),
        ("", "expected scenes:SPLIT"),
        ("scenes:trian", "expected split .*'trian'"),
        ("scenes:val:many", "with SIZE a number, got 'scenes:val:many'"),
        ("scenes:val:-3", "with SIZE a number"),
        ("scenes:val:²", "with SIZE a number"),
        ("scenes:val:3:typo", "expected variant .*'typo'"),
        ("scenes:val:3:typos:more", "expected scenes:SPLIT:SIZE:VARIANT"),
        ("jsonl:", "expected scenes:SPLIT, jsonl:FILE or sharegpt4v:FILE, .* got 'jsonl:'"),
        ("jsonl:nowhere.jsonl", "cannot read nowhere.jsonl"),
        ("sharegpt4v:nowhere.json", "cannot read nowhere.json"),
    ],
)
def test_refuses_what_it_cannot_open(spec, reason):
    with pytest.raises(InputError, match=reason):
        open_dataset(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "scenes:test:1000000000000",
            "scenes:test:" + "9" * 5000,
            "scenes:test:٣٤٥٦٧٨٩٠",
            "scenes:\ud800",
            "scenes:test:5:\n",
        ),
        *(
            "jsonl:a\0b",
            "jsonl:" + "a" * 5000,
            "jsonl:~",
            "jsonl:",
            "jsonl:\n",
            "jsonl:\ud800",
            "jsonl:/dev/zero",
            "jsonl:/dev/stdin",
        ),
        *(
            "coco:" + "a" * 300,
            "coco:a\0b",
            "docci:" + "a/" * 3000,
            "docci:x:" + "y" * 300,
            "flickr30k:\ud800",
            "urban1k:" + "a" * 300,
        ),
        *("", ":", "a" * 100_000, "http://a/b", "webdataset:pipe:id", None, 3, b"scenes:test"),
    ],
    ids=lambda spec: f"{spec!r:.40}",
)
def test_a_hostile_name_is_refused(spec):
    with pytest.raises(InputError) as caught:
        open_dataset(spec)
    assert len(str(caught.value)) < 11_000


@settings(settings.get_profile("fuzz"))
@given(
    st.text()
    | st.builds("{}:{}".format, st.sampled_from(["scenes", "jsonl", "docci", "coco", "dci", "urban1k"]), st.text())
)
def test_any_name_opens_a_dataset_or_is_refused(spec):
    with suppress(InputError):
        len(open_dataset(spec))
