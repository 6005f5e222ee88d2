"""Caption files in JSON: what is read, and which line or record an error names."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.datasets.json_files import read_json_lines, read_sharegpt4v
from finelip_fast.errors import InputError


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(image="a.jpg", caption="a cat", **fields):
    return json.dumps({"image": image, "caption": caption, **fields}, ensure_ascii=False)


# --- JSON lines --------------------------------------------------------------------------------------------------


def test_lines_are_read_in_order(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", line("b/2.jpg", "two", id=4), "", "   ", line("1.jpg", "one"), line("/abs.png")
    )
    assert read_json_lines(path) == [
        (tmp_path / "b" / "2.jpg", "two"),
        (tmp_path / "1.jpg", "one"),
        (Path("/abs.png"), "a cat"),
    ]
    assert read_json_lines(path, root=Path("pictures"))[0] == (Path("pictures/b/2.jpg"), "two")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_separators_inside_a_caption_do_not_end_the_line(tmp_path, separator):
    caption = f"first{separator}second"
    path = write_lines(tmp_path / "a.jsonl", line(caption=caption), line(caption="next"))
    assert [text for _, text in read_json_lines(path)] == [caption, "next"]


def test_windows_line_ends_and_a_last_line_without_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f"{line(caption='one')}\r\n{line(caption='two')}".encode())
    assert [text for _, text in read_json_lines(path)] == ["one", "two"]


def test_an_empty_file_has_no_pairs(tmp_path):
    assert read_json_lines(write_lines(tmp_path / "a.jsonl", "")) == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "expected a JSON object with 'image' and 'caption': Expecting property name .* line 1, column 2"),
        ('{"image": "a.jpg"}', r"expected an object with 'image' and 'caption', got the keys \['image'\]"),
        ("[1, 2]", "expected a JSON object"),
        ("7", "expected a JSON object"),
        (line(caption=3), "expected text for picture and caption, got 'a.jpg' and 3"),
        (line(image=None), "expected text for picture and caption, got None"),
        (line(image=""), "expected the path of a picture, got ''"),
        (line(image="a\0.jpg"), r"expected the path of a picture, got 'a\\x00\.jpg'"),
        (line(image="a" * 5000), "expected the path of a picture, got 'aaa"),
        (
            line(image="https://a.b/c.jpg"),
            "expected a picture that is a file, got 'https://a.b/c.jpg'; download it first",
        ),
        (r'{"image": "a.jpg", "caption": "a \ud800"}', "half of a surrogate pair"),
        (r'{"image": "\ud800.jpg", "caption": "a"}', r"expected the path of a picture, got '\\ud800\.jpg'"),
        ('{"image": "a.jpg", "caption": ' + "[" * 100_000, "nesting deeper than 64"),
        ('{"image": "a.jpg", "caption": ' + "9" * 5000 + "}", "an integer beyond 64 bits"),
    ],
)
def test_an_error_names_file_and_line(tmp_path, bad, reason):
    path = write_lines(tmp_path / "a.jsonl", line(), "", bad, line())
    with pytest.raises(InputError, match=reason) as caught:
        read_json_lines(path)
    assert f"{path}, line 3: " in str(caught.value)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes")
def test_names_that_are_no_utf8_are_read_as_python_writes_them(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": name, "caption": "a cat"}) + "\n")
    ((picture, _),) = read_json_lines(path)
    assert os.fsencode(picture.name) == b"caf\xe9.jpg"


BOM = "\ufeff"


def test_byte_order_marks_before_each_of_several_files_joined_are_passed_over(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", BOM + line(caption="one"), BOM + line(caption=f"{BOM}two"))
    assert [caption for _, caption in read_json_lines(path)] == ["one", f"{BOM}two"]
    path.write_text(BOM + json.dumps([{"image": "a.jpg", "conversations": [{"from": "gpt", "value": "one"}]}]))
    assert [caption for _, caption in read_sharegpt4v(path)] == ["one"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"images": [], "annotations": [], "info": {}}, "COCO's layout, whose folder is opened as coco:ROOT"),
        ({"split": "test", "image_file": "a.jpg", "description": "b"}, "DOCCI's layout, .* opened as docci:ROOT:SPLIT"),
        ({"image": "a.jpg", "short_caption": "b", "extra_caption": "c"}, "DCI's layout, .* dci:ROOT:SPLIT"),
        ({"images": [], "dataset": "flickr30k"}, "Flickr30k's layout, .* flickr30k:ROOT:SPLIT"),
        ({"image": "a.jpg", "conversations": []}, "a record of ShareGPT4V's, .* sharegpt4v:FILE"),
    ],
)
def test_a_file_of_another_data_set_is_told_how_to_be_opened(tmp_path, content, kind):
    path = write_lines(tmp_path / "a.jsonl", json.dumps(content))
    with pytest.raises(InputError, match=f"; it is of {kind}$"):
        read_json_lines(path)
    with pytest.raises(InputError, match=f"expected ShareGPT4V's JSON.*; it is of {kind}$"):
        read_sharegpt4v(path)


@pytest.mark.parametrize(("encoding", "reason"), [("utf-16", "UTF-16"), ("latin-1", "can't decode byte 0xe9")])
def test_text_of_another_encoding_is_refused_with_what_to_do(tmp_path, encoding, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(line(caption="café"), encoding=encoding)
    with pytest.raises(InputError, match=rf"a\.jsonl: expected UTF-8 text: .*{reason}.*; save it as UTF-8"):
        read_json_lines(path)


# --- ShareGPT4V --------------------------------------------------------------------------------------------------


def record(image="coco/train2017/000000000009.jpg", answer="The image shows food.", **changes):
    turns = [
        {"from": "human", "value": "<image>\nWhat do you see happening in this image?"},
        {"from": "gpt", "value": answer},
        {"from": "human", "value": "And where?"},
        {"from": "gpt", "value": "On a tray."},
    ]
    return {"id": "000000000009", "image": image, "conversations": turns} | changes


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_sharegpt4v_gives_the_first_answer_of_each_picture(tmp_path):
    text_only = record()
    del text_only["image"]
    path = write_json(tmp_path / "s.json", [record(), text_only, record("sam/images/sa_1.jpg", "A street.")])
    assert read_sharegpt4v(path) == [
        (tmp_path / "coco/train2017/000000000009.jpg", "The image shows food."),
        (tmp_path / "sam/images/sa_1.jpg", "A street."),
    ]
    assert read_sharegpt4v(path, root=Path("data"))[1][0] == Path("data/sam/images/sa_1.jpg")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image": "a.jpg"}, "record 1: expected an object with 'image' and 'conversations'"),
        ("text", "record 1: expected an object"),
        (record(conversations=[{"from": "human", "value": "?"}]), "record 1: expected a turn from 'gpt'"),
        (record(conversations=["gpt: a cat"]), "record 1: expected a turn from 'gpt'"),
        (record(conversations=[{"from": "gpt"}]), "record 1: expected text for picture and caption, got .* and None"),
        (record(image=3), "record 1: expected text for picture and caption, got 3"),
    ],
)
def test_sharegpt4v_error_names_the_record(tmp_path, bad, reason):
    with pytest.raises(InputError, match=reason):
        read_sharegpt4v(write_json(tmp_path / "s.json", [record(), bad]))


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"a": 1}', "a list of records, got the keys \\['a'\\]"), ("[{", "list of records: ")],
)
def test_sharegpt4v_refuses_another_layout(tmp_path, content, reason):
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError, match=reason):
        read_sharegpt4v(path)


# --- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [read_json_lines, read_sharegpt4v])
def test_a_file_that_cannot_be_read_is_named(tmp_path, reader):
    with pytest.raises(InputError, match=r"cannot read .*missing\.json: No such file"):
        reader(tmp_path / "missing.json")
    with pytest.raises(InputError, match="expected a regular file, got a folder"):
        reader(tmp_path)
    latin = tmp_path / "latin.json"
    latin.write_bytes('{"image": "a.jpg", "caption": "café"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.json: expected UTF-8 text"):
        reader(latin)


@pytest.mark.parametrize("reader", [read_json_lines, read_sharegpt4v])
def test_a_pipe_is_not_waited_for(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="expected a regular file, got a pipe"):
        reader(tmp_path / "pipe")


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_a_damaged_file_is_refused_or_right(tmp_path, damage_json, data):
    lines = [line("b/2.jpg", "two", id=4), line("1.jpg", "one", boxes=[[0.5, 1]])]
    number = data.draw(st.integers(0, 1))
    damaged = [text.encode() for text in lines]
    damaged[number] = damage_json(data, json.loads(lines[number]))
    records = [record(), record("sam/images/sa_1.jpg", "A street.")]
    (tmp_path / "lines").write_bytes(b"\n".join(damaged))
    (tmp_path / "records").write_bytes(damage_json(data, records))
    for reader, path in ((read_json_lines, tmp_path / "lines"), (read_sharegpt4v, tmp_path / "records")):
        try:
            pairs = reader(path)
        except InputError as error:
            message = str(error)
        else:
            assert len(pairs) <= 2 + 3  # each of up to three changes may duplicate one
            for picture, caption in pairs:
                os.path.exists(picture)
                f"{picture} {caption}".encode()
            continue
        assert message.startswith(str(path))
        assert len(message) < 1000
