"""Windows of a second encoder: where they end, and that each token has the features from its window."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast.diffusion import extend, prompt_embeddings
from finelip_fast.errors import InputError
from finelip_fast.model import FineLIP

pytest.importorskip("transformers")
from finelip_fast.diffusion.text_models import window_spans  # needs transformers

# 22 tokens a sentence: three of them fit into a window of 75.
SENTENCE = "A man in a pink coat carries a yellow umbrella past the red door of a small grey house, today. "
SIZE = 77


@pytest.fixture(scope="module")
def pipeline(make_model: Callable[..., FineLIP], tiny_pipelines: ModuleType) -> Any:
    return extend(tiny_pipelines.xl(), make_model(text_layers=3), second="windows")


def read(pipeline: Any, text: str, length: int) -> Any:
    ids = pipeline.tokenizer_2([text], padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder_2(ids, output_hidden_states=True)


@given(
    tokens=st.lists(st.integers(0, 9), max_size=60),
    room=st.integers(1, 20),
    ends=st.lists(st.frozensets(st.integers(0, 9), max_size=2), max_size=2),
)
def test_windows_hold_each_token_once_in_order(tokens: list[int], room: int, ends: list[frozenset[int]]) -> None:
    spans = window_spans(tokens, room, ends)
    assert [at for span in spans for at in range(*span)] == list(range(len(tokens)))
    assert all(0 < stop - start <= room for start, stop in spans) or not tokens


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        (SENTENCE * 5, [(0, 66), (66, 110)]),
        ("Wow! " + "very " * 80, [(0, 42), (42, 82)]),
        ("red, " * 20 + "and blue " * 40, [(0, 40), (40, 80), (80, 120)]),
        ('He said "go!" ' + "very " * 74, [(0, 5), (5, 80)]),
    ],
    ids=["sentences", "one too long", "clauses", "quoted"],
)
def test_windows_end_where_sentences_do(text: str, spans: list[tuple[int, int]], pipeline: Any) -> None:
    ids = pipeline.tokenizer_2(text).input_ids[1:-1]
    config = pipeline.text_encoder_2.config.windows
    assert window_spans(ids, 75, (config["sentence_ends"], config["clause_ends"])) == spans


def test_one_window_is_what_the_encoder_makes_of_it(pipeline: Any, tiny_pipelines: ModuleType) -> None:
    """Short text is read as at 77 tokens; the remaining rows repeat the last one."""
    plain = tiny_pipelines.xl()
    expected, got = read(plain, SENTENCE, SIZE), read(pipeline, SENTENCE, 256)
    torch.testing.assert_close(got.text_embeds, expected.text_embeds)
    for long, short in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(long[:, :SIZE], short)
        torch.testing.assert_close(long[:, SIZE:], short[:, -1:].expand(-1, 256 - SIZE, -1))
    assert torch.equal(read(pipeline, SENTENCE, SIZE).last_hidden_state, expected.last_hidden_state)


def test_each_token_has_the_features_of_its_window(pipeline: Any) -> None:
    """110 tokens in five sentences: windows of three and two."""
    got = read(pipeline, SENTENCE * 5, 256)
    first, second = (read(pipeline, SENTENCE * number, SIZE) for number in (3, 2))
    features = got.hidden_states[-2][0]
    assert features.shape == (256, pipeline.text_encoder_2.config.hidden_size)
    torch.testing.assert_close(features[:67], first.hidden_states[-2][0, :67])
    torch.testing.assert_close(features[67:143], second.hidden_states[-2][0, 1:])  # its words, end token and padding
    torch.testing.assert_close(features[143:], second.hidden_states[-2][0, -1:].expand(113, -1))
    torch.testing.assert_close(got.text_embeds, (first.text_embeds + second.text_embeds) / 2)
    torch.testing.assert_close(got.last_hidden_state[0, :67], first.last_hidden_state[0, :67])


def test_a_prompt_is_the_same_in_any_batch(pipeline: Any) -> None:
    texts = [SENTENCE * 8, "a cat", "very " * 250, ""]
    together = prompt_embeddings(pipeline, texts)
    for row, text in enumerate(texts):
        alone = prompt_embeddings(pipeline, text)
        torch.testing.assert_close(together.prompt_embeds[row], alone.prompt_embeds[0])
        torch.testing.assert_close(together.pooled_prompt_embeds[row], alone.pooled_prompt_embeds[0])


def test_tuples_and_masks(pipeline: Any) -> None:
    ids = pipeline.tokenizer_2([SENTENCE * 5], padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        output, values = pipeline.text_encoder_2(ids), pipeline.text_encoder_2(ids, return_dict=False)
    assert all(map(torch.equal, values, output.to_tuple()))
    with pytest.raises(InputError, match="expected no attention_mask and no position_ids with 256 tokens"):
        pipeline.text_encoder_2(ids, attention_mask=torch.ones_like(ids))
