"""Frozen encoders give the plain model's embeddings in any batch, and take over its weights."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import finelip_fast
from finelip_fast import frozen
from finelip_fast.engines.torch import TorchEngine
from finelip_fast.frozen import freeze, why_not
from finelip_fast.kernels import cpu
from finelip_fast.model import FineLIP

CONTEXT = 40
# Widths that are not multiples of oneDNN's blocks, a patch size that is not a power of two, one layer and several.
MODELS = {
    "QuickGELU": {"quick_gelu": True, "vision_width": 72, "vision_heads": 3, "text_width": 40, "text_heads": 4},
    "GELU": {"quick_gelu": False, "image_size": 36, "patch_size": 12, "vision_layers": 3, "text_layers": 1},
    "SigLIP": {
        "family": "siglip",
        "quick_gelu": False,
        "text_tanh_gelu": True,
        "text_positions": 16,
        "pad_token": 7,
        "embed_dim": 72,
        "vision_width": 72,
        "vision_heads": 3,
        "text_width": 40,
    },
    "global rows alone": {"quick_gelu": True, "trained_aggregators": False},
}
# Largest difference of an entry; for int8 and bfloat16, as observed with these small models.
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2, "int8": 5e-2}
PRECISIONS = [precision for precision in TOLERANCES if why_not(precision) is None]


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest, make_model: Callable[..., FineLIP]) -> FineLIP:
    return make_model(context_length=CONTEXT, **MODELS[request.param])


@pytest.fixture(scope="module")
def quick(plain: FineLIP) -> FineLIP:
    return freeze(copy.deepcopy(plain))


def pixels(model: FineLIP, count: int) -> Tensor:
    side = model.config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def check(model: FineLIP, expected: FineLIP, ids: Tensor, pictures: int, tolerance: float = 1e-5) -> None:
    close = {"atol": tolerance, "rtol": 0}
    torch.testing.assert_close(model.encode_text(ids), expected.encode_text(ids), **close)
    x = pixels(expected, pictures)
    torch.testing.assert_close(model.encode_image(x), expected.encode_image(x), **close)


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_embeddings_are_the_plain_model_s(plain: FineLIP, quick: FineLIP, make_captions, size: int) -> None:
    lengths = [2 + (13 * n) % (CONTEXT - 1) for n in range(size)]  # unsorted, some of them equal
    check(quick, plain, make_captions(lengths, CONTEXT), size)


@pytest.mark.parametrize("lengths", [[CONTEXT], [1], [2], [0], [0, 0], [CONTEXT, 1, 0, CONTEXT, 2], []])
def test_the_longest_and_the_shortest_captions(
    plain: FineLIP, quick: FineLIP, make_captions, lengths: list[int]
) -> None:
    check(quick, plain, make_captions(lengths, CONTEXT), len(lengths))


def test_tokens_after_the_end_or_without_one_change_nothing(plain: FineLIP, quick: FineLIP, make_captions) -> None:
    ids = make_captions([5, 9, 3], CONTEXT)
    ids[0, 5:] = 17
    ids[1, ids[1].argmax()] = 23  # without an end token, this is no caption
    check(quick, plain, ids, 1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_near(plain: FineLIP, make_captions, precision: str) -> None:
    ids = make_captions([5, 9, CONTEXT], CONTEXT)
    check(freeze(copy.deepcopy(plain), precision), plain, ids, 3, TOLERANCES[precision])


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, CONTEXT), min_size=1, max_size=12), rows=st.integers(1, 100))
def test_company_changes_nothing(make_model, make_captions, lengths: list[int], rows: int) -> None:
    model = freeze(make_model(context_length=CONTEXT, text_layers=1, vision_layers=1))
    ids = make_captions(lengths, CONTEXT)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        alone = torch.cat([model.encode_text(ids[n : n + 1]) for n in range(len(ids))])
        picture = model.encode_image(pixels(model, 5))
        patch.setattr(frozen, "_ROWS", rows)  # computed together
        torch.testing.assert_close(model.encode_text(ids), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_image(pixels(model, 5)), picture, atol=1e-5, rtol=0)


def test_captions_take_what_their_own_tokens_take(make_model, make_captions, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(frozen.F, "layer_norm", lambda x, *rest: rows.append(len(x)) or norm(x, *rest))
    model = freeze(make_model(context_length=CONTEXT, text_layers=1, trained_aggregators=False))
    with torch.inference_mode():
        model.encode_text(make_captions([3, CONTEXT, 4], CONTEXT))
    assert set(rows) == {cpu.filled_rows(3 + CONTEXT + 4)}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(plain: FineLIP, quick: FineLIP, make_captions, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(quick, plain, make_captions([7, 30, 2], CONTEXT), 3)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("absent", ["oneDNN", "AVX-512"])
def test_without_onednn_the_same(plain: FineLIP, make_captions, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    name = "has_onednn" if absent == "oneDNN" else "has"
    monkeypatch.setattr(cpu, name, lambda *_: False)
    check(freeze(copy.deepcopy(plain)), plain, make_captions([7, 30, 2], CONTEXT), 3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_onednn_switched_off(plain: FineLIP, make_captions, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    model = copy.deepcopy(plain)
    if when == "after":
        freeze(model)
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        check(model if when == "after" else freeze(model), plain, make_captions([7, 30, 2], CONTEXT), 3)
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_the_bundled_model() -> None:
    model = finelip_fast.load()
    ids = finelip_fast.tokenize(["a red house", "", "two people with umbrellas walk past a yellow house " * 12])
    check(freeze(copy.deepcopy(model)), model, ids, 3)


def test_a_frozen_model_alone_holds_its_weights(make_model) -> None:
    model = make_model()
    weights = [weakref.ref(parameter) for tower in (model.visual, model.text) for parameter in tower.parameters()]
    frozen_model = freeze(model)
    del model
    gc.collect()
    alive = sum(weight().numel() for weight in weights if weight() is not None)
    assert not list(frozen_model.visual.parameters()) + list(frozen_model.text.parameters())
    if cpu.suits_onednn(torch.empty(1, 1)):
        assert not alive


def test_an_engine_freezes_and_gives_the_model_again(make_model, make_captions, tmp_path) -> None:
    model = make_model(context_length=CONTEXT)
    finelip_fast.save(model, tmp_path / "checkpoint")
    engine = TorchEngine(tmp_path / "checkpoint", "cpu")
    ids = make_captions([5, 12], CONTEXT)
    loaded = engine.load_model()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(engine.encode_text(ids), loaded.encode_text(ids), atol=1e-5, rtol=0)
    assert not engine.encode_text(ids).requires_grad
