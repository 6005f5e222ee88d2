"""The library in float32 against `method_reference.py` in float64: they differ by at most 1e-5 everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from finelip_fast.encoders import stretch_positions
from finelip_fast.kernels import atrm, clim_scores

TOLERANCE = 1e-5

AGGREGATOR_NAMES = {"norm": "weight.0", "hidden": "weight.1", "logits": "weight.3", "scale": "scale"}


def assert_near(actual, expected, tolerance=TOLERANCE):
    actual = actual.detach().double().cpu().numpy()
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def unit_rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def clip_state(model):
    """Return a model's parameters as float64 arrays under CLIP's and the released code's names."""
    state = {}
    for name, value in model.state_dict().items():
        first, _, rest = name.partition(".")
        if first == "text":
            name = rest
        elif first in ("image_aggregator", "text_aggregator"):
            part, _, leaf = rest.partition(".")
            owner = "cross_net.aggr_net" if first == "image_aggregator" else "cross_net.cap_aggr_net"
            name = ".".join(filter(None, (owner, AGGREGATOR_NAMES[part], leaf)))
        state[name] = value.double().numpy()
    return state


@pytest.fixture(scope="module", params=["quick", "exact"])
def case(request, method, make_model):
    """Two models that differ in every size: the model, its state dict in NumPy, the activation."""
    if request.param == "quick":
        return (model := make_model(quick_gelu=True)), clip_state(model), method.quick_gelu
    model = make_model(
        seed=1,
        quick_gelu=False,
        embed_dim=80,
        vision_width=128,
        vision_heads=4,
        vision_layers=3,
        vision_mlp_ratio=2.0,
        text_width=128,
        text_heads=2,
        text_layers=3,
        context_length=64,
        aggregated_tokens=7,
    )
    return model, clip_state(model), method.gelu


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def ids(make_captions):
    return make_captions([17, 2, 40, 9], 40)


@pytest.mark.parametrize("length", [77, 78, 120, 248, 256, 500])
def test_stretched_positions(method, length):
    table = torch.randn(77, 24, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positions(table, length)
    assert stretched.dtype == table.dtype
    assert_near(stretched, method.stretched_positions(table.numpy(), length))
    assert torch.equal(stretched[:20], table[:20])


def test_at_248_positions_are_long_clips(method):
    table = torch.randn(77, 24, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positions(table, 248)
    assert_near(stretched, method.long_clip_positions(table.numpy()))
    assert torch.equal(stretched[20::4], table[20:])  # the ratio is exactly 1/4, so every learned row recurs unchanged


def test_image_tokens(method, case, pixels):
    model, state, activation = case
    heads = model.config.vision_heads
    expected = np.stack([method.image_tokens(picture, state, heads, activation) for picture in pixels.double().numpy()])
    assert_near(model.visual(pixels), expected)


def test_text_tokens(method, case, ids):
    model, state, activation = case
    heads = model.config.text_heads
    expected = np.stack([method.text_tokens(caption, state, heads, activation) for caption in ids.numpy()])
    assert_near(model.text(ids), expected)


def test_embeddings_and_score(method, case, pixels, ids):
    model, state, activation = case
    heads = model.config.vision_heads
    images = np.stack([method.encode_image(picture, state, heads, activation) for picture in pixels.double().numpy()])
    heads = model.config.text_heads
    texts = np.stack([method.encode_text(caption, state, heads, activation) for caption in ids.numpy()])
    assert_near(model.encode_image(pixels), images)
    assert_near(model.encode_text(ids), texts)
    # The formulas put the text first; the library's rows are images.
    expected = method.score_matrix(texts, images).T
    assert_near(model.score(model.encode_image(pixels), model.encode_text(ids)), expected)


def test_atrm_at_the_sizes_of_vit_b_16(method):
    generator = torch.Generator().manual_seed(0)
    shapes = ((512,), (512,), (102, 512), (102,), (39, 102), (39,))
    x, anchor = torch.randn(2, 196, 512, generator=generator), torch.randn(2, 512, generator=generator)
    parameters = [torch.randn(shape, generator=generator) / math.sqrt(shape[-1]) for shape in shapes]
    scale = torch.tensor([[[1.3]]])
    arrays = [parameter.double().numpy() for parameter in parameters]
    pairs = zip(x.double().numpy(), anchor.double().numpy(), strict=True)
    expected = np.stack([method.atrm(item, first, *arrays, scale.double().item()) for item, first in pairs])
    assert_near(atrm(x, *parameters, scale, anchor=anchor), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_clim_at_the_sizes_of_vit_b_16(method, alpha):
    texts, images = unit_rows(3, 40, 512), unit_rows(5, 40, 512, seed=1)
    expected = method.score_matrix(texts.double().numpy(), images.double().numpy(), alpha)
    assert_near(clim_scores(texts, images, alpha=alpha), expected)


@pytest.fixture(scope="module")
def scores():
    """Scores of a batch, spread so that some hinges are active and others are not."""
    return 0.4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + 0.3 * torch.eye(6)


@pytest.mark.parametrize("image_ids", [None, [0, 1, 2, 3, 4, 5], [7, 3, 7, 3, 3, 9], [1] * 6], ids=str)
@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_triplet_loss(method, scores, image_ids, hardest, margin):
    from finelip_fast.training.losses import triplet_loss

    expected = method.triplet_loss(scores.double().numpy(), image_ids, margin, hardest)
    identities = None if image_ids is None else torch.tensor(image_ids)
    assert_near(triplet_loss(scores, identities, margin=margin, hardest=hardest), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logit_scale", [0.0, 2.0, math.log(100)])
def test_contrastive_loss(method, scores, label_smoothing, logit_scale):
    from finelip_fast.training.losses import contrastive_loss

    expected = method.contrastive_loss(scores.double().numpy(), logit_scale, label_smoothing)
    factor = math.exp(logit_scale)
    for scale in (factor, torch.tensor(factor)):
        actual = contrastive_loss(scores, scale, label_smoothing=label_smoothing)
        assert_near(actual, expected, TOLERANCE * max(1.0, expected))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("logit_scale", [0.0, 2.0, math.log(100)])
def test_adaptive_margin_loss(method, scores, gamma, logit_scale):
    from finelip_fast.training.losses import adaptive_margin_loss

    captions = unit_rows(6, 16, seed=4)
    expected = method.adaptive_margin_loss(scores.double().numpy(), captions.double().numpy(), logit_scale, gamma)
    similarity = captions @ captions.T
    actual = adaptive_margin_loss(scores, similarity, math.exp(logit_scale), gamma=gamma)
    assert_near(actual, expected, TOLERANCE * max(1.0, expected))
    torch.testing.assert_close(similarity, captions @ captions.T)  # the caller's matrix keeps its diagonal


def test_the_gradient_of_the_margins_is_stopped(scores):
    from finelip_fast.training.losses import adaptive_margin_loss

    captions = unit_rows(6, 16, seed=4).requires_grad_()
    leaf = scores.clone().requires_grad_()
    adaptive_margin_loss(leaf, captions @ captions.T, 2.0).backward()
    assert captions.grad is None
    assert leaf.grad.any()
