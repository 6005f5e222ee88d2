"""Tests that need a GPU: graphs, streams, compiled code, bitwise reproducibility, and an index of 60 GB."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finelip_fast.kernels import atrm, clim_scores, clim_topk, quantize

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, PATCHES, HIDDEN = 40, 512, 196, 102


def unit_rows(*shape, seed=0, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, device="cuda"), dim=-1).to(dtype)


def embeddings(dtype=torch.float16, n_queries=9, n_items=300):
    return unit_rows(n_queries, TOKENS, WIDTH, dtype=dtype), unit_rows(n_items, TOKENS, WIDTH, seed=1, dtype=dtype)


def aggregation(batch=5, dtype=torch.float16):
    """Return the arguments of `atrm`, with lengths and anchor by name."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)

    parameters = [
        1 + draw(WIDTH, scale=0.1),
        draw(WIDTH, scale=0.1),
        draw(HIDDEN, WIDTH, scale=WIDTH**-0.5),
        draw(HIDDEN, scale=0.1),
        draw(TOKENS - 1, HIDDEN, scale=HIDDEN**-0.5),
        draw(TOKENS - 1, scale=0.1),
        torch.ones((), device="cuda"),
    ]
    lengths = torch.arange(batch, device="cuda") * PATCHES // max(1, batch - 1)
    return [draw(batch, PATCHES, WIDTH), *parameters], {"lengths": lengths, "anchor": draw(batch, WIDTH)}


def score_int8(queries, items):
    (queries, query_scales), (items, item_scales) = quantize(queries), quantize(items)
    return lambda: clim_scores(queries, items, query_scales=query_scales, item_scales=item_scales)


def runs():
    """Return each operation as ``(call, an input that it reads in place)``."""
    queries, items = embeddings()
    tensors, keyword_arguments = aggregation()
    return {
        "clim": (lambda: clim_scores(queries, items), queries),
        "clim of one": (lambda: clim_scores(queries[:1], items), queries),
        "atrm": (lambda: atrm(*tensors, **keyword_arguments), tensors[0]),
        "atrm of one": (
            lambda: atrm(tensors[0][-1:], *tensors[1:], anchor=keyword_arguments["anchor"][-1:]),
            tensors[0],
        ),
    }


NAMES = ["clim", "clim of one", "atrm", "atrm of one"]


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_gives_what_a_call_gives(name):
    call, input_tensor = runs()[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # triggers compilation
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    input_tensor.copy_(input_tensor.flip(0))
    graph.replay()
    assert torch.equal(captured, call())


@pytest.mark.parametrize("name", NAMES)
def test_a_call_does_not_wait_for_the_gpu(name):
    call, _ = runs()[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_streams_run_in_their_own_order(name):
    call, input_tensor = runs()[name]
    expected, changed = call(), input_tensor.flip(0).contiguous()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # cycles; whatever does not wait for this stream finishes earlier
        input_tensor.copy_(changed)
        changed_output = call()
        input_tensor.copy_(changed.flip(0))
        again = call()
    side.synchronize()
    assert not torch.equal(changed_output, expected)
    assert torch.equal(again, expected)


def gradients(operation, leaves):
    out = operation()
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype):
    queries, items = (rows.requires_grad_() for rows in embeddings(dtype, 64, 64))
    tensors, keyword_arguments = aggregation(64, dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for operation, inputs in [
        (lambda: clim_scores(queries, items), [queries, items]),
        (lambda: atrm(*tensors, **keyword_arguments), leaves),
    ]:
        first, *repeats = (gradients(operation, inputs) for _ in range(3))
        for repeat in repeats:
            assert all(
                torch.equal(tensor, repeated_tensor) for tensor, repeated_tensor in zip(first, repeat, strict=True)
            )
    first, *repeats = (score_int8(queries.detach(), items.detach())() for _ in range(3))
    assert all(torch.equal(first, repeat) for repeat in repeats)


def test_compiled_code_gives_what_a_call_gives():
    queries, items = (rows.requires_grad_() for rows in embeddings(n_items=32))
    tensors, keyword_arguments = aggregation()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    score, aggregate = (torch.compile(operation, fullgraph=True) for operation in (clim_scores, atrm))
    for eager, compiled, inputs in [
        (lambda: clim_scores(queries, items), lambda: score(queries, items), [queries, items]),
        (lambda: atrm(*tensors, **keyword_arguments), lambda: aggregate(*tensors, **keyword_arguments), leaves),
    ]:
        for eager_tensor, compiled_tensor in zip(gradients(eager, inputs), gradients(compiled, inputs), strict=True):
            torch.testing.assert_close(eager_tensor, compiled_tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_an_index_of_60_gb():
    n_items = 1_500_000  # 3.07e10 numbers, far beyond 32-bit offsets
    size = n_items * TOKENS * WIDTH * 2
    if torch.cuda.mem_get_info()[0] < size + (4 << 30):
        pytest.skip(f"needs {size / 1e9:.0f} GB of free GPU memory and 4 GB to work in")
    items = torch.empty(n_items, TOKENS, WIDTH, dtype=torch.float16, device="cuda")
    for first in range(0, n_items, 10_000):
        block = items[first : first + 10_000]
        block.copy_(unit_rows(len(block), TOKENS, WIDTH, seed=first))
    # The first and last items, and those at the limits of 31, 32 and 33 bits; each is its own best match.
    planted = [0, *(2**bits // (TOKENS * WIDTH) for bits in (31, 32, 33)), n_items - 1]
    queries = items[planted]
    scores = clim_scores(queries, items)
    assert scores.argmax(dim=1).tolist() == planted
    torch.testing.assert_close(scores[:, planted], clim_scores(queries, items[planted]), rtol=0, atol=1e-5)
    best, indices = clim_topk(queries, items, 3)
    assert indices[:, 0].tolist() == planted
    torch.testing.assert_close(best, scores.topk(3).values, rtol=0, atol=1e-5)
