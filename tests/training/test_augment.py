"""Augmented captions: what each change preserves, phrases that keep their places, and reproducible draws."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.base import Example, Region
from finelip_fast.errors import ConfigError
from finelip_fast.preprocess import Preprocess
from finelip_fast.training.augment import CHANGES, Augmentation, Draft
from finelip_fast.training.data import TrainingData
from finelip_fast.training.pairs import Encoded

CAPTION = "A red house stands left. Two men wait beside it! Is a tree behind? Yes, a tall one."
STRANGER = "A boat lies there. Nobody is in it."

captions = st.lists(
    st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=9), min_size=1, max_size=30
).map(" ".join)


def changed(name: str, caption: str = CAPTION, seed: int = 0) -> Draft:
    draft = Draft(caption)
    CHANGES[name](draft, Random(seed), lambda: STRANGER)
    return draft


def sentences(caption: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", caption)


def test_sentences_are_left_out_up_to_half_of_them_and_the_others_stay() -> None:
    left = [sentences(changed("sentences", seed=seed).text) for seed in range(50)]
    assert {len(remaining) for remaining in left} == {2, 3}
    assert all(
        remaining == [sentence for sentence in sentences(CAPTION) if sentence in remaining] for remaining in left
    )
    assert changed("sentences", "A single one.").text == "A single one."


def test_words_are_left_out_in_their_order_and_one_stays() -> None:
    counts = set()
    for seed in range(50):
        words = changed("words", seed=seed).text.split()
        remaining = iter(CAPTION.split())
        assert all(word in remaining for word in words)
        counts.add(len(words))
    assert min(counts) < 0.7 * len(CAPTION.split()) <= max(counts)
    assert all(changed("words", "one", seed=seed).text == "one" for seed in range(20))


def test_typos_exchange_letters_of_long_words_and_not_the_first() -> None:
    texts = [changed("typos", seed=seed).text for seed in range(50)]
    assert len(set(texts)) > 10
    for text in texts:
        for word, original in zip(text.split(), CAPTION.split(), strict=True):
            assert (sorted(word), word[0]) == (sorted(original), original[0])
            assert len(original) > 3 or word == original


def test_sentences_of_others_come_between_those_of_the_caption() -> None:
    counts = set()
    for seed in range(50):
        parts = sentences(changed("foreign", seed=seed).text)
        assert [part for part in parts if part not in sentences(STRANGER)] == sentences(CAPTION)
        counts.add(len(parts) - len(sentences(CAPTION)))
    assert counts == {1, 2, 3, 4}


@given(caption=captions, seed=st.integers(0, 99), names=st.lists(st.sampled_from(sorted(CHANGES)), max_size=4))
def test_each_character_is_known_by_its_origin(caption: str, seed: int, names: list[str]) -> None:
    draft = Draft(caption)
    for name in names:
        CHANGES[name](draft, Random(seed), lambda: STRANGER)
    assert len(draft.origins) == len(draft.text)
    letters = [(origin, letter) for origin, letter in zip(draft.origins, draft.text, strict=True) if origin >= 0]
    assert all(caption[origin] == letter for origin, letter in letters)
    assert len({origin for origin, _ in letters}) == len(letters)


@given(seed=st.integers(0, 999))
def test_a_phrase_keeps_its_place_as_long_as_its_words_stand_as_they_did(seed: int) -> None:
    phrases = ["A red house", "Two men", "a tree", "a tall one"]
    regions = [
        Region(CAPTION.index(words), CAPTION.index(words) + len(words), (0.0, 0.0, 1.0, 1.0), words)
        for words in phrases
    ]
    draft = Draft(CAPTION)
    for name in CHANGES:
        CHANGES[name](draft, Random(seed), lambda: "A red house. Two men.")
    moved = draft.regions(regions)
    assert all(draft.text[region.start : region.end] == region.label for region in moved)
    assert Draft(CAPTION).regions(regions) == tuple(regions)


def test_chances_say_how_often() -> None:
    augmentation = Augmentation.parse(["typos:0.25", "foreign:1"])
    examples = [augmentation(Example(None, CAPTION, "x"), Random(seed), lambda: STRANGER) for seed in range(300)]
    words = set(CAPTION.split()) | set(STRANGER.split())
    mistyped = sum(not words.issuperset(example.caption.split()) for example in examples)
    assert 20 < mistyped < 100
    assert all(example.caption != CAPTION for example in examples)
    assert Augmentation.parse([])(Example(None, CAPTION, "x"), Random(0), lambda: STRANGER).caption == CAPTION


@pytest.mark.parametrize(
    "terms", [["letters:0.5"], ["typos"], ["typos:0"], ["typos:1.5"], ["typos:nan"], ["typos:0.1", "typos:0.2"]]
)
def test_terms_that_mean_nothing_are_refused(terms: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected terms CHANGE:CHANCE, each of sentences, words, foreign, typos"):
        Augmentation.parse(terms)


# In training ----------------------------------------------------------------------------------------------------------

ALL = Augmentation.parse([f"{name}:0.5" for name in CHANGES])


def batches(count: int, *, workers: int = 0, skip: int = 0, **options: object) -> list[torch.Tensor]:
    data = TrainingData(
        open_dataset("scenes:train:16", image_size=32),
        Preprocess(32),
        64,
        batch_size=8,
        workers=workers,
        augmentation=ALL,
        **options,
    )
    data.skip(skip)
    return [batch.ids for batch, _ in zip(data, range(count), strict=False)]


def are_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(
        first.shape == second.shape and torch.equal(first, second) for first, second in zip(left, right, strict=True)
    )


def test_a_run_meets_the_same_captions_again_whatever_its_workers() -> None:
    """This includes restarts; the second epoch has other captions than the first."""
    expected = batches(4)
    assert are_equal(expected, batches(4, workers=2))
    assert are_equal(expected[3:], batches(1, skip=3))
    first, second = ({tuple(ids.tolist()) for batch in half for ids in batch} for half in (expected[:2], expected[2:]))
    assert len(first & second) < len(first) / 2
    assert not are_equal(expected, batches(4, seed=1))


def test_strangers_are_of_other_pictures() -> None:
    scenes = open_dataset("scenes:val:2", image_size=32)
    data = Encoded(scenes, Preprocess(32), 256, augmentation=ALL)
    assert {data._other_caption(scenes[0].image_id, Random(seed)) for seed in range(9)} == {scenes[1].caption}
    alone = Encoded(open_dataset("scenes:val:1", image_size=32), Preprocess(32), 256, augmentation=ALL)
    assert alone._other_caption(scenes[0].image_id, Random(0)) == scenes[0].caption
