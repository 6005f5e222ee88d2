"""Compile Triton kernels for a GPU that is not present, and report registers, shared memory and spills.

Triton bundles ``ptxas`` and ``cuobjdump``, so any machine can check that a kernel fits a GPU, spills nothing and uses its
tensor cores. :func:`compile_for` takes explicit types and constants; :func:`recorded_launches` takes them from a launcher,
ours or another package's. Only tests and benchmarks need this module.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from overwrites import overwrites
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, mangle_type

from finelip_fast.errors import InputError, KernelError


class Multiprocessor(NamedTuple):
    """Resources shared by the programs that run concurrently on one multiprocessor."""

    shared_bytes: int
    warps: int
    programs: int


# By compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MULTIPROCESSOR = {
    80: Multiprocessor(164 << 10, warps=64, programs=32),
    86: Multiprocessor(100 << 10, warps=48, programs=16),
    89: Multiprocessor(100 << 10, warps=48, programs=24),
    90: Multiprocessor(228 << 10, warps=64, programs=32),
    100: Multiprocessor(228 << 10, warps=64, programs=32),
    120: Multiprocessor(100 << 10, warps=48, programs=24),
}

# Shared memory that the driver reserves per program: the guide's "Shared Memory", compute capability 8.x and later.
_RESERVED_BYTES = 1 << 10

# Largest shared memory of one program.
SHARED_MEMORY_LIMIT = {
    capability: multiprocessor.shared_bytes - _RESERVED_BYTES for capability, multiprocessor in MULTIPROCESSOR.items()
}

# Allocation granularity on all of them, from ``cuda_occupancy.h`` in the CUDA toolkit. Each quarter of a multiprocessor has
# a quarter of its 65,536 registers.
_QUARTERS, _QUARTER_REGISTERS, _WARP = 4, 16_384, 32
_REGISTER_UNIT, _SHARED_UNIT = 256, 128


@dataclass(frozen=True)
class Compiled:
    """Resources that a kernel needs on one GPU."""

    registers: int  # per thread
    shared_bytes: int  # per program
    spilled_bytes: int  # per thread: registers or arrays spilled to memory
    capability: int  # of the GPU: 80, 90, 120, ...
    num_warps: int
    ptx: str = field(repr=False)
    ttir: str = field(repr=False)
    ttgir: str = field(repr=False, default="")

    @property
    def fits(self) -> bool:
        """Whether the GPU can run the kernel at all."""
        return self.programs_per_sm > 0

    @property
    def programs_per_sm(self) -> int:
        """Number of programs that run concurrently on one multiprocessor, which hides memory latency."""
        limits = MULTIPROCESSOR[self.capability]
        shared_bytes = _round_up(self.shared_bytes + _RESERVED_BYTES, _SHARED_UNIT)
        warp_registers = _round_up(self.registers * _WARP, _REGISTER_UNIT)
        warps = min(limits.warps, _QUARTERS * (_QUARTER_REGISTERS // warp_registers))
        return min(limits.programs, limits.shared_bytes // shared_bytes, warps // self.num_warps)

    @property
    def uses_wgmma(self) -> bool:
        """Whether the matrix products run on Hopper's tensor cores at full rate."""
        return "wgmma.mma_async" in self.ptx

    @property
    def overwritten(self) -> list[str]:
        """Buffers that may be overwritten while a product still reads them; if not empty, results are sometimes wrong."""
        return overwrites(self.ttgir)

    @property
    def uses_64_bit_offsets(self) -> bool:
        """Whether any pointer is advanced by a 64-bit offset; says nothing about the other pointers."""
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
        signature: Types of the run-time arguments by name: ``"*fp16"``, ``"i32"``, ``"fp32"``, ...
        constants: Values of the ``tl.constexpr`` arguments, and of the integers that a launch would specialise (those
            equal to 1).
        divisible: Pointers and integers that are multiples of 16, which a launch detects by itself. Wide loads need it.

    Raises:
        InputError: An argument of the kernel has no type or value, or a name is unknown.
        KernelError: The kernel was imported under ``TRITON_INTERPRET=1``.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise KernelError(
            f"expected a compiled kernel, got {type(kernel).__name__}: import it without TRITON_INTERPRET=1"
        )
    arguments = {*signature, *constants, *divisible}
    if arguments != set(kernel.arg_names):
        raise InputError(
            f"expected a type or a value for each of {kernel.arg_names}, "
            f"missing {sorted(set(kernel.arg_names) - arguments)}, unknown {sorted(arguments - set(kernel.arg_names))}"
        )
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in kernel.arg_names},
        dict(constants),
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    # Fused multiply-add is set explicitly because Triton 3.9 warns if it is left at its default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        capability=capability,
        num_warps=num_warps,
        ptx=compiled.asm["ptx"],
        ttir=compiled.asm["ttir"],
        ttgir=compiled.asm["ttgir"],
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the resources that ``cuobjdump`` reports for the only kernel in `cubin`: ``REG``, ``STACK``, ``LOCAL``, ..."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class KernelLaunch:
    """A kernel launch as its launcher requested it, with the two Triton options that the launchers vary."""

    kernel: Any  # decorated with ``@triton.jit``
    arguments: Mapping[str, Any]  # all arguments of the kernel by name
    num_warps: int = 4  # this default and the next are Triton's own
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, Any]:
        """The ``tl.constexpr`` arguments, which define the tiling and the variant."""
        return {
            parameter.name: self.arguments[parameter.name] for parameter in self.kernel.params if parameter.is_constexpr
        }

    def compile(self, capability: int) -> Compiled:
        """Compile the launch as Triton would on a GPU of that capability, with Triton's own specialisation.

        Raises:
            KernelError: The kernel was imported under ``TRITON_INTERPRET=1``.
        """
        signature, constants, divisible = {}, self.constants, []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            if name in constants:
                continue
            specialised = not parameter.do_not_specialize
            if value is None or (specialised and type(value) is int and value == 1):
                constants[name] = value
            else:
                signature[name] = mangle_type(value)
                if specialised and _is_divisible(value):
                    divisible.append(name)
        return compile_for(
            self.kernel,
            signature,
            constants,
            capability=capability,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            divisible=divisible,
        )

    def compile_into_cache(self, capability: int) -> None:
        """Compile into Triton's cache, where the launch itself will find it on a GPU of that capability.

        The GPU is not opened: for the rest of this process, Triton assumes that it runs on such a GPU.
        """
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target,
                get_current_device=lambda: 0,
                get_current_stream=lambda device=None: 0,
            )
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        with patch.object(Tensor, "is_cuda", True):
            self.kernel.run(grid=None, warmup=True, **self.arguments, **options)


def _is_divisible(value: object) -> bool:
    """Whether Triton would treat the value as a multiple of 16; memory that it allocates is aligned to 16."""
    if isinstance(value, Tensor):
        return int(value.storage_offset()) * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0


def _as_launched(kernel: Any, arguments: Sequence[object], keywords: Mapping[str, Any]) -> KernelLaunch:
    values = {name: value for name, value in keywords.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*arguments, **values)
    bound.apply_defaults()
    options = {name: keywords[name] for name in ("num_warps", "num_stages") if name in keywords}
    return KernelLaunch(kernel, dict(bound.arguments), **options)


@contextmanager
def recorded_launches(capability: int, name: str = "") -> Iterator[list[tuple[KernelLaunch, ...]]]:
    """Record what launchers launch, instead of running it, as if on a GPU of that capability.

    Pass tensors on the ``meta`` device, which have shapes and strides but no data. A package that checks the GPU on import
    must be imported for the first time inside the context.

    Args:
        capability: 80, 90, 120, ...
        name: Name of the GPU, for launchers that ask for it.

    Yields:
        The launches so far, in order: all candidates of an autotuned kernel, a single one of any other kernel.
    """
    launches: list[tuple[KernelLaunch, ...]] = []

    def run(kernel: Any, *arguments: object, **keywords: Any) -> None:
        launches.append((_as_launched(kernel, arguments, keywords),))

    def tune(tuner: Any, *arguments: object, **keywords: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, arguments, strict=False))  # needed for pruning
        configs = tuner.prune_configs(keywords)
        launches.append(tuple(_as_launched(tuner.fn, arguments, keywords | config.all_kwargs()) for config in configs))

    major, minor = divmod(capability, 10)
    gpu: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: (major, minor),
        "get_device_properties": lambda device=None: SimpleNamespace(name=name, major=major, minor=minor),
        "device_of": lambda tensor: nullcontext(),
    }
    with (
        patch.multiple(torch.cuda, **gpu),
        patch.object(Tensor, "is_cuda", True),
        patch.object(JITFunction, "run", run),
        patch.object(Autotuner, "run", tune),
    ):
        yield launches


def compile_launches(capability: int, run: Callable[[], object]) -> list[Compiled]:
    """Compile each launch of ``run`` for a GPU of that capability, in order; see :func:`recorded_launches`."""
    with recorded_launches(capability) as launches:
        run()
    return [launch.compile(capability) for launch, *_ in launches]
