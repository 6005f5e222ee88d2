"""An explanation adds up to the score, and shows where and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finelip_fast
from finelip_fast import tokenize
from finelip_fast.config import FineLIPConfig
from finelip_fast.datasets import Scenes
from finelip_fast.errors import InputError
from finelip_fast.explain import Explanation, explain
from finelip_fast.explain.explanation import Word, explain_pairs
from finelip_fast.model import FineLIP

SCENE = Scenes("val", image_size=128)[0]

# For sums of thousands of float32 products.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> FineLIP:
    return finelip_fast.load()


@pytest.fixture(scope="module")
def explanation(model: FineLIP) -> Explanation:
    return explain(model, SCENE.draw(), SCENE.caption)


@torch.no_grad()
def test_it_explains_the_models_score(model: FineLIP, explanation: Explanation) -> None:
    images = model.encode_image(model.preprocess(SCENE.draw())[None])
    texts = model.encode_text(tokenize([SCENE.caption]))
    for alpha, value in ((None, explanation.score), (1.0, explanation.global_score), (0.0, explanation.fine_score)):
        assert value == pytest.approx(float(model.score(images, texts, alpha=alpha)), abs=TOLERANCE)
    expected = explanation.alpha * explanation.global_score + (1 - explanation.alpha) * explanation.fine_score
    assert explanation.score == pytest.approx(expected, abs=TOLERANCE)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    alpha=st.floats(0, 1),
    caption=st.text(st.sampled_from("ab cd, ef. "), max_size=60),
    opposed=st.booleans(),
)
def test_the_parts_add_up_to_the_score(seed: int, alpha: float, caption: str, opposed: bool) -> None:
    """Random weights give cosines of both signs."""
    torch.manual_seed(seed)
    sizes = {"embed_dim": 16, "image_size": 32, "patch_size": 8, "vision_width": 64, "text_width": 64}
    layers = {"vision_layers": 1, "vision_heads": 1, "text_layers": 1, "text_heads": 1}
    model = FineLIP(FineLIPConfig(**sizes, **layers)).eval()
    if opposed:
        with torch.no_grad():
            model.text.text_projection.neg_()
    image = Image.new("RGB", (40, 32), (200, 30, 60))
    explanation = explain(model, image, caption, alpha=alpha)
    with torch.no_grad():
        images, texts = model.encode_image(model.preprocess(image)[None]), model.encode_text(tokenize([caption]))
        score = float(model.score(images, texts, alpha=alpha))
    assert explanation.score == pytest.approx(score, abs=TOLERANCE)
    assert float(explanation.contributions.sum()) == pytest.approx(score, abs=TOLERANCE)
    for weights in (explanation.text_weights, explanation.image_weights):
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))


def test_matches_are_those_of_late_interaction(explanation: Explanation) -> None:
    similarity = explanation.similarity
    rows = torch.arange(len(similarity))
    leaky = torch.nn.functional.leaky_relu(similarity, 0.1)
    fine = leaky[rows, explanation.text_matches].mean() + leaky[explanation.image_matches, rows].mean()
    assert explanation.fine_score == pytest.approx(float(fine), abs=TOLERANCE)


def test_a_phrase_is_found_where_it_is_true(explanation: Explanation) -> None:
    """Most phrases of a scene peak inside their box, and the top words of a box include those that describe it."""
    hits = []
    for part in SCENE.parts:
        heat = explanation.heatmap(part.text)
        assert heat.shape == (8, 8)
        row, column = divmod(int(heat.argmax()), 8)
        x0, y0, x1, y1 = part.box
        hits.append(x0 <= (column + 0.5) / 8 < x1 and y0 <= (row + 0.5) / 8 < y1)
    assert sum(hits) > len(hits) / 2
    part = max(SCENE.parts, key=lambda part: (part.box[2] - part.box[0]) * (part.box[3] - part.box[1]))
    best = [word for word, _ in explanation.words_at(part.box)[:10]]
    assert any(part.start <= word.start < part.end for word in best)


def test_matches_come_in_the_order_of_what_they_add(explanation: Explanation) -> None:
    matches = explanation.matches(1000)
    assert sum(match.adds for match in matches) == pytest.approx(
        (1 - explanation.alpha) * explanation.fine_score, abs=TOLERANCE
    )
    assert [match.adds for match in matches] == sorted((match.adds for match in matches), key=abs, reverse=True)
    assert explanation.matches(3) == matches[:3]
    for match in matches:
        assert match.image_row == explanation.text_matches[match.text_row] or (
            match.text_row == explanation.image_matches[match.image_row]
        )
        assert bool(match.words) == (match.text_row > 0)
        assert bool(match.patches) == (match.image_row > 0)
        for place, weight in match.patches:
            assert weight == pytest.approx(float(explanation.image_weights[match.image_row, 1 + place]))


def test_aggregated_maps_are_shares_of_what_words_add(explanation: Explanation) -> None:
    """If all contributions have one sign, the maps of all words and of the start token leave no remainder."""
    edges = [(0, 1), *((word.first, word.last) for word in explanation.words)]
    maps = torch.stack([explanation.map_of_tokens(*edge, tokens="aggregated") for edge in edges])
    added = explanation.contributions[:-1, 1:]
    torch.testing.assert_close(maps.sum(dim=0), added.sum(dim=0) / added.abs().sum(dim=0))
    strongest = maps.sum(dim=0).argmax()
    assert (maps[:, strongest] * added.sum(dim=0)[strongest]).sum() > 0
    first = explanation.words[0]
    heat = explanation.heatmap((first.start, first.end), tokens="aggregated")
    assert torch.equal(heat.flatten(), maps[1])


def test_words_that_nothing_met_are_those_that_add_nothing(explanation: Explanation) -> None:
    adds = {(word["start"], word["end"]): word["adds"] for word in explanation.to_dict()["words"]}
    unmet = [(word.start, word.end) for word in explanation.unmet]
    assert unmet == [span for span, added in adds.items() if added <= 0]
    assert 0 < len(unmet) < len(adds) / 2  # the caption describes this picture


def test_without_the_fine_score_only_the_ends_count(model: FineLIP) -> None:
    explanation = explain(model, SCENE.draw(), SCENE.caption, alpha=1)
    assert float(explanation.contributions[-1, 0]) == pytest.approx(explanation.score, abs=TOLERANCE)
    assert not explanation.heatmap(SCENE.parts[0].text, tokens="aggregated").any()
    assert explanation.matches() == []


def test_a_batch_explains_each_pair_as_alone(model: FineLIP) -> None:
    scenes = Scenes("val", image_size=128)
    batch = [scenes[at] for at in range(3)]
    together = explain_pairs(model, [scene.draw() for scene in batch], [scene.caption for scene in batch])
    for scene, explanation in zip(batch, together, strict=True):
        alone = explain(model, scene.draw(), scene.caption)
        assert explanation.words == alone.words
        torch.testing.assert_close(explanation.contributions, alone.contributions, atol=1e-6, rtol=1e-3)


def test_words_are_the_captions(explanation: Explanation) -> None:
    assert [word.text for word in explanation.words] == SCENE.caption.split()
    assert all(SCENE.caption[word.start : word.end] == word.text for word in explanation.words)
    assert explanation.words[-1].last == len(explanation.contributions) - 1
    first, last = explanation.tokens_of(explanation.words[3].text.upper())
    assert explanation.words[0].first == 1
    assert first < last


@pytest.mark.parametrize(
    ("text", "bare"), [("dog.", "dog"), ("(two-storey)", "two-storey"), ("¿Qué?", "Qué"), ("—", "—"), ("$5,", "$5")]
)
def test_words_are_named_without_the_punctuation_around_them(text: str, bare: str) -> None:
    assert Word(text, 0, len(text), 0, 1).bare == bare


def test_words_beyond_the_context_are_left_out(model: FineLIP) -> None:
    long = explain(model, SCENE.draw(), "red " * 300 + "dog")
    assert len(long.words) == 254
    with pytest.raises(finelip_fast.FineLIPError, match="beyond the tokens"):
        long.heatmap("dog")


def test_bad_requests_say_what_is_wrong(model: FineLIP, explanation: Explanation) -> None:
    with pytest.raises(ValueError, match="expected words of the caption, got 'giraffe'"):
        explanation.heatmap("giraffe")
    for place in ((5, 5), (-1, 3), (0, 10_000)):
        with pytest.raises(ValueError, match="expected \\(start, end\\) around words"):
            explanation.heatmap(place)
    for phrase in (None, 3, (1, 2, 3), (0.0, 5.0), ("a", "b")):
        with pytest.raises(InputError, match="expected words of the caption, or their \\(start, end\\) in characters"):
            explanation.tokens_of(phrase)
    for box in (None, 1, (0, 0, 1), ("left", "top", "right", "bottom"), (0, 0, float("nan"), 1)):
        with pytest.raises(InputError, match="around a patch's centre, got"):
            explanation.words_at(box)
    for options, message in (({"parts": -1}, "parts of at least 0, got -1"), ({"k": 2.5}, "k to be an integer")):
        with pytest.raises(InputError, match=message):
            explanation.matches(**options)
    with pytest.raises(ValueError, match="expected tokens to be one of"):
        explanation.heatmap(explanation.words[0].text, tokens="fine")
    with pytest.raises(ValueError, match="around a patch's centre"):
        explanation.words_at((0.0, 0.0, 0.01, 0.01))
    with pytest.raises(ValueError, match="alpha in"):
        explain(model, SCENE.draw(), SCENE.caption, alpha=2)


def test_an_empty_caption_has_no_words(model: FineLIP) -> None:
    empty = explain(model, SCENE.draw(), "")
    assert empty.words == ()
    assert float(empty.contributions.sum()) == pytest.approx(empty.score, abs=TOLERANCE)
    assert "0" in str(empty)


def test_a_phrase_is_grown_to_whole_words(explanation: Explanation) -> None:
    word = max(explanation.words, key=lambda word: len(word.text))
    assert explanation.tokens_of((word.start + 1, word.end - 1)) == (word.first, word.last)
    assert explanation.tokens_of(word.text[1:-1].upper()) == explanation.tokens_of(word.text[1:-1])


def test_a_phrase_is_found_across_line_breaks(model: FineLIP) -> None:
    explanation = explain(model, SCENE.draw(), "a red  house\nnear\ta tree")
    first, second = (explanation.words[at] for at in (1, 3))
    for phrase in ("red house near", "red  house\nnear", " Red\nhouse  near "):
        assert explanation.tokens_of(phrase) == (first.first, second.last)


def test_the_retriever_explains_what_it_finds(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    SCENE.draw().save(path)
    retriever = finelip_fast.Retriever(engine="torch")
    retriever.add_images([path], progress=False)
    hit = retriever.search(SCENE.caption, k=1)[0]
    assert retriever.explain(hit, SCENE.caption).score == pytest.approx(hit.score, abs=2e-3)  # the index stores float16
    with pytest.raises(ValueError, match="expected a hit with a picture file, got 'image-0'"):
        retriever.explain(replace(hit, id="image-0"), SCENE.caption)


def test_it_says_what_it_is(explanation: Explanation) -> None:
    text = repr(explanation)
    assert text.startswith(f"<Explanation of {explanation.caption!r:.80}: score {explanation.score:.4f} (global ")
    assert f"{len(explanation.words)} words" in text
    assert "tensor" not in text


@torch.no_grad()
def test_without_trained_aggregators_words_are_compared_and_add_nothing(make_model, tmp_path: Path) -> None:
    """The score is one cosine; words and patches are marked as not contributing to it."""
    model = make_model(trained_aggregators=False)
    picture = Image.effect_mandelbrot((32, 32), (-3, -2.5, 2, 2.5), 20).convert("RGB")
    explanation = explain(model, picture, "a red house")
    images, texts = model.encode_image(model.preprocess(picture)[None]), model.encode_text(tokenize(["a red house"]))
    assert explanation.score == pytest.approx(float(model.score(images, texts)), abs=TOLERANCE)
    assert (explanation.fine_score, explanation.alpha, explanation.maps) == (None, 1.0, ("raw",))
    assert float(explanation.contributions.sum()) == pytest.approx(explanation.score, abs=TOLERANCE)
    patches = torch.nn.functional.normalize(model.visual(model.preprocess(picture)[None])[0, 1:], dim=-1)
    cosines = patches @ texts[0, 0]
    values = explanation.to_dict()
    assert values["caption"]["cosine"] == pytest.approx(float(cosines.max()), abs=TOLERANCE)
    assert values["caption"]["row"] * explanation.side + values["caption"]["column"] == int(cosines.argmax())
    assert [word["adds"] for word in values["words"]] == [0.0] * 3
    assert all(word["cosine"] == float(explanation.heatmap(word["text"]).max()) for word in values["words"])
    assert "no word adds to it" in str(explanation)
    assert "(the whole caption)" in str(explanation)
    page = explanation.to_html(tmp_path / "why.html")
    assert "no part of the score" in page
    assert 'data-adds="' not in page
    assert "aggregated" not in page.partition("<script")[0]
    with pytest.raises(InputError, match="no trained aggregators"):
        explanation.heatmap("red", tokens="aggregated")
    with pytest.raises(InputError, match="expected alpha=1"):
        explain(model, picture, "a red house", alpha=0.5)
