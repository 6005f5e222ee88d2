"""The model: each embedding depends only on its own item, every parameter learns, and wrong inputs are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.aggregator import join_windows
from finelip_fast.config import EOT_TOKEN
from finelip_fast.encoders import caption_lengths, spread_positions
from finelip_fast.errors import ConfigError, InputError
from finelip_fast.model import FineLIP

SIGLIP = {"family": "siglip", "quick_gelu": False, "text_positions": 16, "pad_token": 7, "embed_dim": 64}


@pytest.fixture(scope="module", params=[{}, SIGLIP], ids=["CLIP", "SigLIP"])
def model(request, make_model):
    return make_model(**request.param)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Embeddings ----------------------------------------------------------------------------------------------------------


def test_embeddings_are_unit_rows(model, make_captions, pixels):
    with torch.no_grad():
        for embeddings, batch in ((model.encode_image(pixels), 3), (model.encode_text(make_captions([5, 9], 9)), 2)):
            assert embeddings.shape == (batch, model.config.tokens, model.config.embed_dim)
            norms = embeddings.norm(dim=-1)
            assert_close(norms, torch.ones_like(norms), 1e-6)


def test_row_0_is_clips_own_embedding(model, make_captions, pixels):
    ids = make_captions([5, 9, 40], 40)
    with torch.no_grad():
        assert_close(model.encode_image(pixels)[:, 0], F.normalize(model.visual(pixels)[:, 0], dim=-1))
        assert_close(model.encode_text(ids)[:, 0], F.normalize(model.text(ids)[[0, 1, 2], [4, 8, 39]], dim=-1))


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=5),
    padding=st.integers(0, 40),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_a_caption_is_the_same_alone_in_any_batch_at_any_padding(model, make_captions, lengths, padding, seed):
    together = make_captions(lengths, max(lengths) + padding, seed)
    with torch.no_grad():
        embeddings = model.encode_text(together)
        for row, (ids, length) in enumerate(zip(together, lengths, strict=True)):
            assert_close(model.encode_text(ids[None, :length]), embeddings[row : row + 1])


def test_many_captions_and_their_gradients_are_those_of_each_alone(model, make_captions):
    lengths = [2 + 7 * number % 40 for number in range(40)]  # unsorted, and more than are encoded together
    ids = make_captions(lengths, 64)
    weights = torch.linspace(0.1, 1.0, 40)[:, None, None]

    def gradient(embeddings):
        return torch.autograd.grad((embeddings * weights).sum(), model.text.token_embedding.weight)[0]

    together = model.encode_text(ids)
    alone = torch.cat([model.encode_text(ids[row : row + 1]) for row in range(40)])
    assert_close(together, alone)
    expected = gradient(alone)
    assert (gradient(together) - expected).norm() <= 1e-5 * expected.norm()


def test_a_picture_is_the_same_alone_and_in_any_batch(model, pixels):
    with torch.no_grad():
        together = model.encode_image(pixels)
        for row in range(3):
            assert_close(model.encode_image(pixels[row : row + 1]), together[row : row + 1])
        assert_close(model.encode_image(pixels.flip(0)), together.flip(0))


def test_positions_past_the_longest_caption_change_nothing(model, make_captions):
    ids = make_captions([7, 2, 31], 256)
    with torch.no_grad():
        tokens = model.text(ids)  # all 256 positions, none trimmed
        last = torch.tensor([6, 1, 30])
        untrimmed = model.text_aggregator(tokens, anchor=tokens[[0, 1, 2], last], lengths=last)
        assert_close(model.encode_text(ids), untrimmed)


def test_what_follows_the_end_token_changes_nothing(model, make_captions):
    ids = make_captions([7, 31], 40)
    littered = ids.clone()
    littered[0, 7:] = 1234
    littered[1, 31:] = EOT_TOKEN
    with torch.no_grad():
        assert_close(model.encode_text(littered), model.encode_text(ids))


def test_a_caption_of_exactly_the_context_length(model, make_captions):
    ids = make_captions([256, 4], 256)
    with torch.no_grad():
        embeddings = model.encode_text(ids)
        tokens = model.text(ids[:1])
        expected = model.text_aggregator(tokens[:, :255], anchor=tokens[:, 255])
    assert_close(embeddings[:1], expected)


def test_a_row_of_padding_gives_zeros_and_leaves_the_others_alone(model, make_captions):
    ids = make_captions([0, 9, 0], 20)
    with torch.no_grad():
        embeddings = model.encode_text(ids)
        assert not embeddings[[0, 2]].any()
        assert_close(embeddings[1:2], model.encode_text(ids[1:2]))
        assert not model.encode_text(ids[:1]).any()


def test_a_caption_of_its_end_token_alone_has_no_other_row(model):
    """CLIP's also has a start token; SigLIP's is the empty caption, with all rows equal to the global one."""
    with torch.no_grad():
        embeddings = model.encode_text(torch.tensor([[EOT_TOKEN, 0, 0]]))
    assert_close(embeddings[:, 0].norm(dim=-1), torch.ones(1), 1e-6)
    expected = (
        embeddings[:, :1].expand(-1, model.config.aggregated_tokens, -1) if model.config.family == "siglip" else 0
    )
    assert_close(embeddings[:, 1:], expected + torch.zeros_like(embeddings[:, 1:]))


def test_batches_of_nothing(model):
    with torch.no_grad():
        images, texts = model.encode_image(torch.zeros(0, 3, 32, 32)), model.encode_text(torch.zeros(0, 256).long())
    shape = (0, model.config.tokens, model.config.embed_dim)
    assert images.shape == texts.shape == shape
    assert model.score(images, texts).shape == (0, 0)


def test_caption_lengths(make_captions):
    lengths = [0, 2, 9, 12]
    ids = make_captions(lengths, 12)
    assert caption_lengths(ids).tolist() == lengths
    ids[2, 11] = EOT_TOKEN  # the first end token ends the caption
    assert caption_lengths(ids).tolist() == lengths


@pytest.mark.parametrize("rows", [2, 16])
def test_positions_are_spread_evenly(rows):
    table = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([rows, rows + 1, 2 * rows - 1, 37])
    spread = spread_positions(table, lengths, 40)
    assert torch.equal(spread[0, :rows], table)
    for positions, length in zip(spread, lengths.tolist(), strict=True):
        expected = F.interpolate(table.T[None], length, mode="linear", align_corners=True)[0].T
        assert_close(positions[:length], expected, 1e-12)
        assert_close(positions[length:], table[-1:].expand(40 - length, -1), 1e-12)
    half = spread_positions(table.half(), torch.tensor([4096]), 8192)  # adjacent positions stay distinct
    assert half.isfinite().all()
    assert_close(half[0, :4096].double(), spread_positions(table, torch.tensor([4096]), 4096)[0], 5e-3)


def test_forward_is_both_encoders_and_the_multiplier(model, make_captions, pixels):
    ids = make_captions([5, 9, 3], 16)
    with torch.no_grad():
        images, texts, multiplier, patches, tokens = model(pixels, ids)
        assert torch.equal(multiplier, model.logit_scale.exp())
        assert torch.equal(patches, model.visual(pixels)[:, 1:])
        assert torch.equal(tokens, model.text(ids[:, :9]))
        assert torch.equal(images, model.encode_image(pixels))
        assert torch.equal(texts, model.encode_text(ids))


def test_the_multiplier_starts_at_clips(model):
    assert FineLIP(model.config).logit_scale.exp().item() == pytest.approx(1 / 0.07)


# The score -----------------------------------------------------------------------------------------------------------


def test_alpha_is_one_where_the_aggregators_are_untrained(make_model, model, make_captions, pixels):
    untrained = make_model(trained_aggregators=False)
    assert (model.alpha, untrained.alpha) == (0.8, 1.0)
    with torch.no_grad():
        images, texts, *_ = model(pixels, make_captions([5, 9], 16))
    cosine = images[:, 0] @ texts[:, 0].T
    fine = model.score(images, texts, alpha=0.0)
    assert model.score(images, texts).shape == (3, 2)
    assert_close(model.score(images, texts), 0.8 * cosine + 0.2 * fine, 1e-6)
    assert_close(untrained.score(images, texts), cosine, 1e-6)
    assert_close(untrained.score(images, texts, alpha=0.0), fine, 1e-6)


@torch.no_grad()
def test_without_trained_aggregators_the_global_row_is_all(make_model, make_captions, pixels):
    """The row equals that with aggregators, also for a padding-only caption; the training forward pass still has all rows."""
    trained, untrained = make_model(), make_model(trained_aggregators=False)
    ids = make_captions([5, 9, 0], 16)
    assert untrained.config.tokens == 1
    for encode, batch in (("encode_image", pixels), ("encode_text", ids)):
        rows = getattr(untrained, encode)(batch)
        assert rows.shape == (3, 1, 48)
        assert torch.equal(rows, getattr(trained, encode)(batch)[:, :1])
    assert untrained(pixels, ids).images.shape == trained.encode_image(pixels).shape


@pytest.mark.parametrize(
    ("trained", "alpha", "expected"), [(True, None, 0.8), (True, 0, 0), (False, None, 1.0), (False, 1, 1)]
)
def test_alpha_is_chosen_where_there_is_a_choice(make_model, trained, alpha, expected):
    assert make_model(trained_aggregators=trained).config.choose_alpha(alpha) == expected


@pytest.mark.parametrize(
    ("trained", "alpha", "message"),
    [(False, 0.8, "expected alpha=1, got 0.8: without trained aggregators"), (True, 1.5, "got 1.5")],
)
def test_an_alpha_that_means_nothing_is_refused(make_model, trained, alpha, message):
    with pytest.raises(InputError, match=message):
        make_model(trained_aggregators=trained).config.choose_alpha(alpha)


# Windows -------------------------------------------------------------------------------------------------------------


def windows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, 16, generator=generator), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_captions_of_one_window_keep_their_bits(dtype):
    embeddings = windows(5).to(dtype)
    assert torch.equal(join_windows(embeddings, torch.arange(5)), embeddings)
    joined = join_windows(embeddings, torch.tensor([0, 1, 1, 1, 2]))
    assert joined.dtype == dtype
    assert torch.equal(joined[[0, 2]], embeddings[[0, 4]])


def test_windows_are_averaged_row_by_row():
    embeddings = windows(6)
    joined = join_windows(embeddings, torch.tensor([0, 0, 1, 2, 2, 2]))
    expected = [embeddings[:2].mean(0), embeddings[2], embeddings[3:].mean(0)]
    assert_close(joined, F.normalize(torch.stack(expected), dim=-1), 1e-6)


def test_a_window_said_twice_is_itself():
    embeddings = windows(1).expand(3, -1, -1)
    assert_close(join_windows(embeddings, torch.zeros(3, dtype=torch.int64)), embeddings[:1], 1e-6)


def test_no_windows_make_no_captions():
    assert join_windows(windows(0), torch.zeros(0, dtype=torch.int64)).shape == (0, 5, 16)


# Learning ------------------------------------------------------------------------------------------------------------


def gradients(model, pixels, ids):
    """Return every parameter's gradient of an arbitrary scalar that depends on both whole embeddings."""
    model.zero_grad(set_to_none=True)
    images, texts, *_ = model(pixels, ids)
    generator = torch.Generator().manual_seed(1)
    loss = sum((rows * torch.randn(rows.shape, generator=generator)).sum() for rows in (images, texts))
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_backward_reaches_every_parameter(make_model, make_captions, pixels):
    parameter_gradients = gradients(make_model(), pixels, make_captions([5, 256, 3], 256))
    # The temperature belongs to the losses.
    assert parameter_gradients.pop("logit_scale") is None
    assert [name for name, gradient in parameter_gradients.items() if gradient is None] == []
    # The softmax over the tokens is invariant to a common shift, so these two have a gradient of exactly zero.
    shifts = [parameter_gradients.pop(f"{side}_aggregator.logits.bias") for side in ("image", "text")]
    assert max(gradient.abs().max().item() for gradient in shifts) < 1e-5
    assert [name for name, gradient in parameter_gradients.items() if not gradient.abs().max() > 1e-4] == []
    assert [name for name, gradient in parameter_gradients.items() if not gradient.isfinite().all()] == []


def test_backward_through_a_row_of_padding_is_finite(make_model, make_captions, pixels):
    parameter_gradients = gradients(make_model(), pixels, make_captions([5, 0, 3], 16))
    bad = [
        name for name, gradient in parameter_gradients.items() if gradient is not None and not gradient.isfinite().all()
    ]
    assert bad == []


def test_a_loss_reaches_the_temperature(make_model, make_captions, pixels):
    from finelip_fast.training.losses import contrastive_loss

    model = make_model()
    images, texts, multiplier, *_ = model(pixels, make_captions([5, 9, 3], 16))
    contrastive_loss(model.score(images, texts), multiplier).backward()
    assert model.logit_scale.grad.abs() > 0


def test_gradient_checkpointing_changes_no_gradient(make_model, make_captions, pixels):
    plain = make_model()
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing()
    ids = make_captions([5, 9, 3], 16)
    expected = gradients(plain.train(), pixels, ids)
    actual = gradients(frugal.train(), pixels, ids)
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
    frugal.gradient_checkpointing(False)
    torch.testing.assert_close(gradients(frugal, pixels, ids)["visual.proj"], expected["visual.proj"])


def test_gradient_checkpointing_recomputes(make_model, make_captions, pixels):
    calls = []
    model = make_model().train()
    for tower in (model.visual, model.text):
        tower.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing()
    gradients(model, pixels, make_captions([5, 9, 3], 16))
    assert len(calls) == 4  # each tower once forward, and again in the backward pass


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        ((3, 32, 32), r"\[3, 32, 32\]"),
        ((1, 1, 32, 32), r"\[1, 1, 32, 32\]"),
        ((1, 3, 32, 40), r"\[1, 3, 32, 40\]"),
        ((1, 3, 224, 224), r"\[1, 3, 224, 224\]"),
        ((1, 32, 32, 3), r"\[1, 32, 32, 3\]"),
    ],
)
def test_pixels_of_another_shape_are_refused(model, shape, got):
    with pytest.raises(InputError, match=rf"expected pixels \[B, 3, 32, 32\], got {got}; use model.preprocess"):
        model.encode_image(torch.zeros(shape))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ("a.jpg", r"expected pixels \[B, 3, 32, 32\], got 'a.jpg'; use model.preprocess.batch"),
        ([[0.0]], r"expected pixels \[B, 3, 32, 32\], got \[\[0.0\]\]"),
        (np.zeros((1, 3, 32, 32)), r"expected pixels \[B, 3, 32, 32\], got array"),
        (
            torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
            "expected normalised pixels of a floating dtype, got torch.uint8",
        ),
    ],
)
def test_what_are_no_pixels_is_refused(model, pixels, message):
    with pytest.raises(InputError, match=message):
        model.encode_image(pixels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_pixels_may_be_of_another_floating_dtype(model, dtype):
    assert model.encode_image(torch.zeros(1, 3, 32, 32, dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("a man", "expected integer ids .*, got 'a man'; use finelip_fast.tokenize"),
        ([[1, 2]], r"expected integer ids .*, got \[\[1, 2\]\]"),
        (torch.ones(1, 4, dtype=torch.bool), r"expected integer ids .*, got torch.bool \[1, 4\]"),
        (torch.tensor([[1, 60_000]]), "expected ids from 0 to 49407, got 60000; use the tokenizer of the model"),
        (torch.tensor([[1, -1]]), "expected ids from 0 to 49407, got -1"),
    ],
)
def test_what_are_no_ids_is_refused(model, ids, message):
    with pytest.raises(InputError, match=message):
        model.encode_text(ids)


@pytest.mark.parametrize(("shape", "got"), [((2, 257), r"\[2, 257\]"), ((7,), r"\[7\]"), ((1, 2, 7), r"\[1, 2, 7\]")])
def test_ids_of_another_shape_or_too_long_are_refused(model, shape, got):
    with pytest.raises(InputError, match=rf"expected integer ids \[B, T\] with T in 1..256, got torch.int64 {got}"):
        model.encode_text(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "expected image_size to be a multiple of patch_size, got 32"),
        ({"vision_heads": 7}, "expected vision_width to be a multiple of vision_heads, got 64"),
        ({"text_heads": 3}, "expected text_width to be a multiple of text_heads, got 64"),
        ({"context_length": 1}, "expected context_length of at least 3, got 1"),
    ],
)
def test_a_model_of_impossible_sizes_is_refused(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        FineLIP(model.config.replace(**changes))
