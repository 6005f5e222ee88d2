"""Compile a Triton kernel for a GPU that is not here, and read what came out: registers, shared memory, spills.

Triton carries ``ptxas`` and ``cuobjdump``, so that any machine can hold a kernel to "fits, spills nothing, uses the
tensor cores of that GPU". Only tests and benchmarks need this.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from finelip_fast._errors import InputError, KernelError

# What one program may ask for: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY_LIMIT = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one GPU."""

    registers: int  # of one thread
    shared_bytes: int  # of one program
    spilled_bytes: int  # of one thread: registers, or arrays, that went to memory
    ptx: str = field(repr=False)
    ttir: str = field(repr=False)

    @property
    def uses_wgmma(self) -> bool:
        """Whether the products run on Hopper's tensor cores at their full rate."""
        return "wgmma.mma_async" in self.ptx

    @property
    def uses_64_bit_offsets(self) -> bool:
        """Whether any pointer is moved by a 64-bit offset; says nothing about the other pointers."""
        return re.search(r"tt\.addptr .*[ x]i64>?( loc|$)", self.ttir, re.MULTILINE) is not None


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Sequence[str] = (),
) -> Compiled:
    """Compile `kernel` for a GPU of compute capability `capability` (80, 90, 120, ...).

    Args:
        kernel: A function under ``@triton.jit``.
        signature: Types of its run-time arguments by name: ``"*fp16"``, ``"i32"``, ``"fp32"``, ...
        constants: Values of its ``tl.constexpr`` arguments, and of integers that a launch would specialise: those
            that are 1.
        divisible: Pointers and integers that are multiples of 16, as a launch finds out by itself. Wide loads need it.

    Raises:
        InputError: An argument of the kernel without a type or a value, or a name it does not have.
        KernelError: The kernel was imported under ``TRITON_INTERPRET=1``.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise KernelError(
            f"expected a compiled kernel, got {type(kernel).__name__}: import it without TRITON_INTERPRET=1"
        )
    named = {*signature, *constants, *divisible}
    if named != set(kernel.arg_names):
        raise InputError(
            f"expected a type or a value for each of {kernel.arg_names}, "
            f"missing {sorted(set(kernel.arg_names) - named)}, unknown {sorted(named - set(kernel.arg_names))}"
        )
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        dict(constants),
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    # Fused multiply-add is named because Triton 3.9 warns when its default is left alone.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        ptx=compiled.asm["ptx"],
        ttir=compiled.asm["ttir"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What ``cuobjdump`` says of the one kernel in `cubin`: ``REG``, ``STACK``, ``LOCAL``, ..."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
