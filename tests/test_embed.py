"""Encoding of lists in batches: order, batch sizes, windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.errors import ImageError, InputError
from finelip_fast.preprocess import Preprocess
from finelip_fast.tokenizer import TruncationWarning, encode_batch, tokenize

CONTEXT = 10
TEXTS = ["a b c d e", "a", "", "a b c d e f", "b", "a b c", "c d"]


class TextEncoder:
    """Stand-in for a model: its embedding depends on every token of the row, and it records its inputs."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids):
        self.lengths.append((ids != 0).sum(dim=1).tolist())
        places = torch.arange(1, ids.shape[1] + 1) * ids.double()
        features = torch.stack([torch.sin(places * frequency).sum(dim=1) for frequency in range(1, 7)], dim=1)
        return F.normalize(features.view(-1, 2, 3).float(), dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3, len(TEXTS), 64])
def test_texts_come_back_in_order_and_go_in_by_length(batch_size):
    encoder = TextEncoder()
    embeddings = embed_texts(encoder, TEXTS, context_length=CONTEXT, batch_size=batch_size)
    assert torch.equal(embeddings, TextEncoder()(tokenize(TEXTS, CONTEXT)))
    lengths = [length for batch in encoder.lengths for length in batch]
    assert lengths == sorted(lengths)
    assert sorted(lengths) == [2, 3, 3, 4, 5, 7, 8]
    full_batches, rest = divmod(len(TEXTS), batch_size)
    assert [len(batch) for batch in encoder.lengths] == [batch_size] * full_batches + [rest] * (rest > 0)


def test_windows_are_joined_to_one_embedding_a_caption():
    long = "a b c d e f g h i j k l m n o p q"
    texts = [long, "a", f"{long} r s t u v w", "b c"]
    embeddings = embed_texts(TextEncoder(), texts, context_length=CONTEXT, batch_size=2, overflow="window")
    assert embeddings.shape == (4, 2, 3)
    for text, embedding in zip(texts, embeddings, strict=True):
        windows = TextEncoder()(encode_batch(text, CONTEXT, overflow="window").ids)
        torch.testing.assert_close(embedding, F.normalize(windows.sum(dim=0), dim=-1))
    assert torch.equal(embeddings[[1, 3]], TextEncoder()(tokenize(["a", "b c"], CONTEXT)))


def test_a_caption_too_long_is_cut_with_a_warning_or_refused():
    texts = ["a b", "a b c d e f g h i j"]
    with pytest.warns(TruncationWarning, match="1 of 2 texts exceeded"):
        embeddings = embed_texts(TextEncoder(), texts, context_length=CONTEXT)
    assert torch.equal(embeddings, TextEncoder()(tokenize(["a b", "a b c d e f g h"], CONTEXT)))
    with pytest.raises(InputError, match="at position 1"):
        embed_texts(TextEncoder(), texts, context_length=CONTEXT, overflow="error")


def test_images_are_read_batch_by_batch():
    images = [np.full((4, 5, 3), 20 * index, dtype=np.uint8) for index in range(7)]
    read_indices, calls = [], []

    def reading():
        for index, image in enumerate(images):
            read_indices.append(index)
            yield image

    def encode(pixels):
        calls.append((len(pixels), len(read_indices)))
        return pixels.mean(dim=(2, 3))[:, None]

    preprocess = Preprocess(4)
    embeddings = embed_images(encode, preprocess, reading(), batch_size=3)
    assert calls == [(3, 3), (3, 6), (1, 7)]
    assert torch.equal(embeddings, preprocess.batch(images).mean(dim=(2, 3))[:, None])


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        embed_images(lambda pixels: pixels, Preprocess(4), [np.zeros((4, 4), dtype=np.uint8), broken])
