"""Compiling for a GPU that is not here: what is read from the result, and what is refused."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

from finelip_fast._errors import InputError, KernelError
from finelip_fast.kernels._ahead_of_time import SHARED_MEMORY_LIMIT, compile_for


@triton.jit
def double(x, out, n, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def product(x, y, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = rows * SIZE + columns
    tl.store(out + tile, tl.dot(tl.load(x + tile), tl.load(y + tile)))


@triton.jit
def normalise(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, values / tl.sum(values))


POINTERS = {"x": "*fp16", "y": "*fp16", "out": "*fp32"}


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_a_small_kernel_compiles(capability):
    compiled = compile_for(
        double, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 256, "WIDE": False}, capability=capability
    )
    assert 0 < compiled.registers <= 255
    assert compiled.shared_bytes == 0
    assert compiled.spilled_bytes == 0
    assert ".target sm_" + str(capability) in compiled.ptx
    assert "tt.func" in compiled.ttir


def test_the_width_of_offsets_is_seen():
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32"}
    for wide in (True, False):
        assert compile_for(double, signature, {"BLOCK": 256, "WIDE": wide}, capability=80).uses_64_bit_offsets is wide


def test_tensor_cores_and_shared_memory_are_seen():
    for capability, has_wgmma in ((80, False), (90, True)):
        compiled = compile_for(product, POINTERS, {"SIZE": 64}, capability=capability, divisible=["x", "y", "out"])
        assert compiled.uses_wgmma is has_wgmma
        assert 0 < compiled.shared_bytes <= SHARED_MEMORY_LIMIT[capability]


def test_spills_are_seen():
    """One warp of 32 threads, with up to 255 registers each, cannot hold 16,384 numbers until their sum is known."""
    for block, spills in ((1024, False), (16384, True)):
        compiled = compile_for(normalise, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": block}, capability=80, num_warps=1)
        assert (compiled.spilled_bytes > 0) is spills


def test_divisible_pointers_are_loaded_in_wide_pieces():
    signature, constants = {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 512, "WIDE": False}
    narrow = compile_for(double, signature, constants, capability=80)
    wide = compile_for(double, signature, constants, capability=80, divisible=["x", "out", "n"])
    assert "ld.global.v4" not in narrow.ptx
    assert "ld.global.v4" in wide.ptx


@pytest.mark.parametrize(
    ("signature", "names"),
    [({"x": "*fp16", "y": "*fp16"}, r"missing \['out'\]"), (POINTERS | {"z": "i32"}, r"unknown \['z'\]")],
)
def test_arguments_that_do_not_fit_are_refused(signature, names):
    with pytest.raises(InputError, match=names):
        compile_for(product, signature, {"SIZE": 64}, capability=80)


def test_a_plain_function_is_refused():
    with pytest.raises(KernelError, match="expected a compiled kernel, got function"):
        compile_for(product.fn, POINTERS, {"SIZE": 64}, capability=80)
