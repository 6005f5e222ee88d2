"""Captions to ids: CLIP's own tokens, no silent truncation, windows that lose nothing."""

from __future__ import annotations

import gzip
import pickle
import re
import signal
import sys
import warnings
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast import vocabulary
from finelip_fast.config import EOT_TOKEN, START_TOKEN
from finelip_fast.errors import CheckpointError, InputError
from finelip_fast.tokenizer import (
    CLIP_BPE,
    MAX_CHARACTERS,
    FileTokenizer,
    TruncationWarning,
    encode_batch,
    expected_truncation,
    token_spans,
    tokenize,
)

CAPTIONS = {
    "empty": "",
    "blank": " \t\n\u3000 ",
    "plain": "A photo of a cat, sitting on the mat.",
    "case and white space": "  The   QUICK\nbrown\tfox ",
    "html": "fish &amp;amp; chips &lt;hot&gt;",
    "mojibake": "cafÃ© au lait",
    "accents": "Ünïcödé naïve façade Ångström",
    "chinese": "一只猫坐在垫子上",
    "arabic": "قطة تجلس على السجادة",
    "hindi": "चटाई पर बैठी बिल्ली",
    "emoji": "👩‍👩‍👧‍👦 on a 🏖️ with 🐕‍🦺",
    "control characters": "a\x00b\x07c\x1b[31m\u200b\ufeff\u202e",
    "lone surrogate": "a \ud800 b",
    "digits and marks": "3.14 × 10^-5 !!! it's they'll",
}


@pytest.mark.parametrize("text", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_equals_clip_where_the_text_fits(text: str) -> None:
    ids = tokenize(text, 77, overflow="error")
    assert ids.dtype == torch.int64
    torch.testing.assert_close(ids, open_clip.tokenize([text]), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["", "   ", "\x00\x01"])
def test_empty_text_is_start_and_eot(text: str) -> None:
    batch = encode_batch(text, 5)
    assert batch.ids.tolist() == [[START_TOKEN, EOT_TOKEN, 0, 0, 0]]
    assert batch.lengths.tolist() == [2]


@pytest.mark.filterwarnings("ignore::finelip_fast.tokenizer.TruncationWarning")
@given(text=st.text(max_size=200), context_length=st.integers(3, 40))
def test_any_text_gives_one_start_one_eot_then_padding(text: str, context_length: int) -> None:
    batch = encode_batch(text, context_length)
    (row,), (length,) = batch.ids.tolist(), batch.lengths.tolist()
    assert len(row) == context_length
    assert 2 <= length <= context_length
    assert row[0] == START_TOKEN
    assert row[length - 1] == EOT_TOKEN
    assert not {START_TOKEN, EOT_TOKEN} & set(row[1 : length - 1])
    assert not any(row[length:])


@pytest.mark.parametrize("name", ["<end_of_text>", "<start_of_text>", "<END_OF_TEXT>", "&lt;end_of_text&gt;"])
def test_a_special_token_spelled_out_is_plain_text(name: str) -> None:
    plain = name.lower().replace("&lt;", "<").replace("&gt;", ">").replace("<", "< ")
    assert torch.equal(tokenize(f"a {name} b", 20), tokenize(f"a {plain} b", 20))


@pytest.mark.parametrize(
    "texts",
    [("a cat", "a dog"), (text for text in ["a cat", "a dog"]), np.array(["a cat", "a dog"]), {"a cat": 1, "a dog": 2}],
    ids=["tuple", "generator", "numpy", "keys"],
)
def test_any_iterable_of_captions(texts: object) -> None:
    assert torch.equal(tokenize(texts, 8), tokenize(["a cat", "a dog"], 8))


def test_no_captions_give_no_rows() -> None:
    batch = encode_batch([], 7, overflow="window")
    assert batch.ids.shape == (0, 7)
    assert batch.ids.dtype == torch.int64
    assert batch.lengths.shape == batch.owner.shape == batch.tokens_cut.shape == (0,)


def test_truncation_keeps_the_eot_and_counts() -> None:
    with pytest.warns(TruncationWarning):
        batch = encode_batch(["cat " * 10, "cat", "cat " * 4], 5)
    cat = batch.ids[0, 1].item()
    assert batch.ids.tolist() == [
        [START_TOKEN, cat, cat, cat, EOT_TOKEN],
        [START_TOKEN, cat, EOT_TOKEN, 0, 0],
        [START_TOKEN, cat, cat, cat, EOT_TOKEN],
    ]
    assert batch.lengths.tolist() == [5, 3, 5]
    assert batch.owner.tolist() == [0, 1, 2]
    assert batch.tokens_cut.tolist() == [7, 0, 1]
    assert batch.n_cut == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([10, 1, 4], "2 of 3 texts exceeded 5 tokens and were cut; the longest lost 7 tokens."),
        ([4, 1], "1 of 2 texts exceeded 5 tokens and was cut; the longest lost 1 token."),
    ],
    ids=["many", "one"],
)
@pytest.mark.parametrize("function", [tokenize, encode_batch])
def test_warns_once_a_call_where_it_was_called(function, words: list[int], message: str) -> None:
    with pytest.warns(TruncationWarning) as caught:
        function(["cat " * n for n in words], 5)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(message)
    assert caught[0].filename == __file__


def test_a_caption_that_just_fits_is_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = encode_batch("cat cat cat", 5)
    assert batch.lengths.tolist() == [5]
    assert batch.n_cut == 0


@given(
    captions=st.lists(
        st.lists(st.sampled_from(["red", "cat", "on.", "mat! ", "zyzzyva", "3.5", "sö", "Ã¶", "?"]), max_size=60),
        max_size=4,
    ),
    context_length=st.integers(3, 24),
)
def test_windows_hold_every_token_in_order(captions: list[list[str]], context_length: int) -> None:
    texts = [" ".join(words) for words in captions]
    batch = encode_batch(texts, context_length, overflow="window")
    assert sorted(batch.owner.tolist()) == batch.owner.tolist()
    assert sorted(set(batch.owner.tolist())) == list(range(len(texts)))
    assert batch.n_cut == 0
    assert batch.tokens_cut.shape == (len(texts),)
    for caption, text in enumerate(texts):
        unsplit = encode_batch(text, 1000)
        mine = batch.owner == caption
        windows = [row[:n].tolist() for row, n in zip(batch.ids[mine], batch.lengths[mine], strict=True)]
        assert all(row[0] == START_TOKEN and row[-1] == EOT_TOKEN for row in windows)
        assert not any(row[n:].any() for row, n in zip(batch.ids[mine], batch.lengths[mine], strict=True))
        assert [token for row in windows for token in row[1:-1]] == unsplit.ids[0, 1 : unsplit.lengths[0] - 1].tolist()
        assert len(windows) == 1 or all(len(row) > 2 for row in windows)


@pytest.mark.parametrize(
    ("caption", "windows"),
    [
        ("a b c d e. f g. h i.", ["a b c d e.", "f g. h i."]),
        ("a b. c d. e f. g h.", ["a b. c d.", "e f. g h."]),
        ("a b c d e f g h i j k l m n", ["a b c d e f g", "h i j k l m n"]),
        ("a. b c d e f g h i j k l m n. o p.", ["a.", "b c d e f g h", "i j k l m n.", "o p."]),
        ("a b c d e f g at 3.5 h. i", ["a b c d e f", "g at 3.5 h. i"]),
        ("a b c d e f g h.", ["a b c d", "e f g h."]),
    ],
)
def test_windows_end_with_sentences_and_are_even(caption: str, windows: list[str]) -> None:
    rows = encode_batch(caption, 10, overflow="window").ids
    assert rows.equal(encode_batch(windows, 10).ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tokenize(["cat", "cat " * 9], 5, overflow="error"),
            r"at most 5 tokens, got 11 at position 1; shorten",
        ),
        (lambda: tokenize("cat", overflow="window"), r"got 'window'.*use encode_batch"),
        (lambda: tokenize("cat", overflow="drop"), "one of truncate, error, window, got 'drop'"),
        (lambda: tokenize("cat", 2), r"an int from 3 .*got 2; pass the model's own"),
        (lambda: tokenize("cat", 77.0), r"to be an int from 3 .*got 77.0"),
        (lambda: tokenize(["cat", None]), r"to be a str, got NoneType at position 1; convert"),
        (lambda: tokenize(b"cat"), r"expected a str or a list of them, got bytes; convert"),
        (lambda: tokenize(3), r"expected a str or a list of them, got int"),
    ],
    ids=[
        "too long",
        "tokenize windows",
        "unknown overflow",
        "short context",
        "float context",
        "None caption",
        "bytes",
        "number",
    ],
)
def test_errors_say_expected_got_and_remedy(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# Spans of a caption --------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["a", "manservant's", "fire-hydrant", "3-storey", "red,", "house.", "naïve", "<end_of_text>", "!", "42nd;"]
)


@given(words=st.lists(WORDS, min_size=1, max_size=12), data=st.data())
def test_spans_of_words_hold_the_tokens_of_those_words(words, data):
    starts = [sum(len(word) + 1 for word in words[:index]) for index in range(len(words))]
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, len(words) - 1))
    caption, start, end = " ".join(words), starts[first], starts[last] + len(words[last])
    ((begin, stop),) = token_spans(caption, [(start, end)])
    row, part = (tokenize(text, 128)[0].tolist() for text in (caption, caption[start:end]))
    assert row[begin:stop] == part[1 : part.index(EOT_TOKEN)]


@pytest.mark.parametrize("blank", [" ", "\N{NO-BREAK SPACE} "])
def test_spans_after_mojibake_with_a_blank_in_it(blank: str) -> None:
    """The second half of a broken "à" is a space, at which words are split."""
    caption = f"voilÃ{blank}une maison Ã{blank}vendre, rouge"
    row = tokenize(caption)[0].tolist()
    assert (
        row[1 : row.index(EOT_TOKEN)]
        == tokenize("voilà une maison à vendre, rouge")[0].tolist()[1 : row.index(EOT_TOKEN)]
    )
    words = [match.span() for match in re.finditer(r"\S+", caption)]
    spans = dict(zip((caption[slice(*word)] for word in words), token_spans(caption, words), strict=True))
    for word in ("une", "maison", "vendre,", "rouge"):
        part = tokenize(word)[0].tolist()
        first, last = spans[word]
        assert row[first:last] == part[1 : part.index(EOT_TOKEN)]
    assert row[slice(*spans["voilÃ"])] == tokenize("voilà")[0, 1:4].tolist()


# --- Untrusted captions ------------------------------------------------------------------------------------------

REFERENCE = open_clip.tokenizer.SimpleTokenizer()
PIECES = st.sampled_from(
    [
        *"abc éÃ©漢İ 123!?'s\n\t\xa0Ａ\x00\x1b\ud800\u0345\u200d\ufeff&;#<",
        "&amp;",
        "amp;",
        "&#39;",
        "&#x26;",
        "â€™",
        "<|endoftext|>",
        "&#" + "9" * 5000,
    ]
)


@settings(settings.get_profile("fuzz"))
@given(st.lists(PIECES, max_size=60).map("".join) | st.text(st.characters(exclude_categories=[]), max_size=60))
def test_any_text_has_clips_tokens(text: str) -> None:
    try:
        expected = REFERENCE.encode(text)
    except ValueError:  # an entity with more digits than Python parses
        assert "&#" in text
        tokenize(text, 10_000)
    else:
        assert CLIP_BPE.tokens(text) == expected


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "a",
            "1",
            " ",
            "\n",
            "é\n",
            "'s",
            "👩\u200d",
            "\u0345",
            "e\u0301",
            "&",
            "&amp;",
            "&#",
            "Ã©",
            "â€™",
            "\ud800",
            "\0",
            "!",
        ),
        *(
            "\x80",
            "Ã ",
            "İ",
            "漢",
            "ﬁ",
            "Ａ",
            "<|endoftext|>",
            "\x1b[",
            "&#x27;",
            "amp;",
            "&#97;mp;",
            "\0amp;",
            "#38;",
            "ampamp",
        ),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("start", ["", "&", "ï¼†", "&#"], ids=ascii)
def test_the_time_of_a_long_caption_is_bounded(start: str, unit: str) -> None:
    text = start + unit * (MAX_CHARACTERS // 8 // len(unit))
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)  # most take 0.1 s; quadratic time would take minutes
    try:
        with expected_truncation():
            assert tokenize(text).shape == (1, 256)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_a_word_that_no_one_writes_is_bounded_too() -> None:
    test_the_time_of_a_long_caption_is_bounded(
        "", "".join(chr(0x4E00 + (31 * at * at + at) % 20_000) for at in range(MAX_CHARACTERS // 32))
    )


def test_a_long_caption_of_words_has_clips_tokens() -> None:
    text = "A café with naÃ¯ve façades &amp; a house, " * 1000
    assert CLIP_BPE.tokens(text) == REFERENCE.encode(text)


def test_a_file_given_as_a_caption_is_refused() -> None:
    with pytest.raises(
        InputError, match="expected texts of at most 262144 characters, got 262145 at position 1; shorten it"
    ):
        tokenize(["a cat", "a" * (MAX_CHARACTERS + 1)])


# Tokenizers from files ------------------------------------------------------------------------------------------------


@pytest.fixture
def siglip_tokenizer(open_clip_siglip):
    content = (open_clip_siglip.folder / "tokenizer.json").read_bytes()
    return FileTokenizer(content, end=1, vocab_size=200)


def test_a_file_s_tokens_are_of_text_as_siglip_cleaned_it(siglip_tokenizer):
    plain = siglip_tokenizer.tokens("a red house trees and cars")
    assert siglip_tokenizer.tokens("A red_house:\n TREES &amp; and cars!") == plain
    assert siglip_tokenizer.tokens("") == siglip_tokenizer.tokens(" ?! ") == []
    batch = encode_batch(["", "a red house"], 16, tokenizer=siglip_tokenizer)
    assert batch.ids[0].tolist() == [1] + [0] * 15
    assert batch.ids[1, : batch.lengths[1]].tolist() == [*siglip_tokenizer.tokens("a red house"), 1]


def test_nothing_in_a_text_is_its_end(siglip_tokenizer):
    for text in ("</s>", "<eos>", "a ＜/s＞ red ＜eos＞ house"):
        assert 1 not in siglip_tokenizer.tokens(text)


def test_windows_of_a_file_s_tokens_hold_all_of_them(siglip_tokenizer):
    text = "the red car drives left of two large trees " * 4
    tokens = siglip_tokenizer.tokens(text)
    batch = encode_batch(text, 10, overflow="window", tokenizer=siglip_tokenizer)
    rows = [row[: length - 1].tolist() for row, length in zip(batch.ids, batch.lengths.tolist(), strict=True)]
    assert all(row[length - 1] == 1 for row, length in zip(batch.ids, batch.lengths.tolist(), strict=True))
    assert len(rows) > 1
    assert list(chain(*rows)) == tokens
    with pytest.warns(TruncationWarning, match=f"the longest lost {len(tokens) + 1 - 10} tokens"):
        assert tokenize(text, 10, tokenizer=siglip_tokenizer)[0].tolist() == [*tokens[:9], 1]


def test_words_are_found_among_a_file_s_tokens(siglip_tokenizer):
    caption = "The red_car, drives LEFT; of the tree."
    words = [match.span() for match in re.finditer(r"\S+", caption)]
    tokens = siglip_tokenizer.tokens(caption)
    spans = token_spans(caption, words, siglip_tokenizer)
    assert (spans[0][0], spans[-1][1]) == (0, len(tokens))
    assert all(first < last for first, last in spans)
    for (start, end), (first, last) in zip(words, spans, strict=True):
        expected = re.sub(r"[^\w\s]", "", caption[start:end]).replace("_", " ").lower()
        assert siglip_tokenizer.parsed.decode(tokens[first:last]).strip() == expected


def test_tokenizers_go_to_other_processes(siglip_tokenizer):
    assert pickle.loads(pickle.dumps(CLIP_BPE)) is CLIP_BPE
    again = pickle.loads(pickle.dumps(siglip_tokenizer))
    assert again.tokens("a red house") == siglip_tokenizer.tokens("a red house")


def test_the_package_that_reads_them_is_named_where_it_is_missing(siglip_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"needs the package tokenizers: pip install 'finelip-fast\[siglip\]'"):
        siglip_tokenizer.tokens("a red house")


@pytest.mark.parametrize(
    "content",
    [b"", b"not gzip", gzip.compress(b"a b\n" * 9), gzip.compress(b"a b\n" * 60_000)[:-20]],
    ids=["empty", "another format", "short", "truncated"],
)
def test_a_damaged_vocabulary_says_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    (tmp_path / vocabulary._FILE).write_bytes(content)
    monkeypatch.setattr(
        "finelip_fast.vocabulary.find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "open_clip"))
    )
    with pytest.raises(CheckpointError, match=r"CLIP's vocabulary, .* pip install --force-reinstall open_clip_torch"):
        vocabulary._bpe.__wrapped__()


def test_a_missing_vocabulary_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finelip_fast.vocabulary.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"CLIP's vocabulary, .* pip install --force-reinstall open_clip_torch"):
        vocabulary._bpe.__wrapped__()
