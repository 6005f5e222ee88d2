"""Compiling for a GPU that is not present: what is read from the result, and what is refused."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import torch
import triton
import triton.language as tl
from ahead_of_time import SHARED_MEMORY_LIMIT, Compiled, compile_for, recorded_launches

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels.clim import triton as clim
from finelip_fast.kernels.clim.launches import default_settings


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
    """One warp of 32 threads with up to 255 registers each cannot hold 16,384 numbers until their sum is known."""
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


@pytest.mark.parametrize(
    ("capability", "registers", "shared_kib", "num_warps", "programs"),
    [
        (90, 121, 96, 8, 2),  # limited by registers and by shared memory
        (80, 126, 32, 4, 4),  # by registers: 4,096 per warp, of 16,384 in each quarter
        (80, 129, 0, 4, 3),  # one more, rounded up: 3 warps per quarter
        (90, 40, 227, 4, 1),  # by shared memory, including the driver's 1 KiB
        (90, 16, 0, 16, 4),  # by warps
        (80, 16, 0, 1, 32),  # by programs
        (120, 16, 0, 1, 24),
        (120, 40, 100, 4, 0),  # too much shared memory for any
        (90, 255, 0, 16, 0),  # too many registers
    ],
)
def test_programs_side_by_side(capability, registers, shared_kib, num_warps, programs):
    """The numbers equal those of ``cuda_occupancy.h``."""
    compiled = Compiled(registers, shared_kib << 10, 0, capability, num_warps, ptx="", ttir="")
    assert compiled.programs_per_sm == programs
    assert compiled.fits is (programs > 0)


@pytest.mark.parametrize(("n", "constants", "divisible"), [(4096, {}, ["n"]), (4095, {}, []), (1, {"n": 1}, [])])
def test_a_recorded_launch_compiles_as_one_written_by_hand(n, constants, divisible):
    x, out = (torch.empty(n, device="meta") for _ in range(2))
    with recorded_launches(90) as launches:
        double[(8,)](x, out, n, BLOCK=512, WIDE=False, num_warps=2)
    [[launch]] = launches
    types = {"x": "*fp32", "out": "*fp32", "n": "i32"}
    by_hand = compile_for(
        double,
        {name: kind for name, kind in types.items() if name not in constants},
        {"BLOCK": 512, "WIDE": False, **constants},
        capability=90,
        num_warps=2,
        divisible=["x", "out", *divisible],
    )
    assert launch.constants == {"BLOCK": 512, "WIDE": False}
    assert launch.compile(90) == by_hand


def test_tensors_in_the_middle_of_memory_are_not_taken_for_divisible():
    x = torch.empty(4097, device="meta")
    with recorded_launches(80) as launches:
        for rows in (x, x[1:]):
            double[(8,)](rows, rows, 4096, BLOCK=512, WIDE=False)
    assert ["ld.global.v4" in launch.compile(80).ptx for [launch] in launches] == [True, False]


def test_all_that_an_autotuner_would_try_is_recorded():
    configs = [triton.Config({"BLOCK": block}, num_warps=block // 128) for block in (128, 256, 512)]
    small = {
        "early_config_prune": lambda configs, arguments, **_: [
            c for c in configs if c.kwargs["BLOCK"] <= arguments["n"]
        ]
    }
    # The benchmark is never run; it is set explicitly because the default needs a GPU.
    tuned = triton.autotune(configs, key=["n"], prune_configs_by=small, do_bench=lambda *_, **__: 0.0)(double)
    x = torch.empty(256, device="meta")
    with recorded_launches(90) as launches:
        tuned[(1,)](x, x, 256, WIDE=False)
    [candidates] = launches
    assert [(launch.constants["BLOCK"], launch.num_warps) for launch in candidates] == [(128, 1), (256, 2)]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_launchers_choose_as_on_the_recorded_gpu(capability, monkeypatch, tmp_path):
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))  # ignore settings tuned on this machine
    queries, items = (torch.empty(count, 40, 512, dtype=torch.float16, device="meta") for count in (8, 100_000))
    with recorded_launches(capability) as launches:
        clim.scores(queries, items, alpha=0.8)
    [[launch]] = launches
    cut = default_settings(capability=capability, dtype=torch.float16, width=512, n_queries=8, query_tokens=40)
    assert launch.kernel is clim.scores_kernel
    assert (launch.constants["BLOCK_ITEMS"], launch.constants["QUERIES"]) == (cut.block_items, cut.queries_per_program)
    assert (launch.num_warps, launch.num_stages) == (cut.num_warps, cut.num_stages)
    assert not queries.is_cuda
