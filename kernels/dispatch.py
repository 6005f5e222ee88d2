"""Choice of the implementation of the operations, and the reason why no faster one runs.

``FINELIP_KERNELS`` forces one: ``reference`` (plain, readable PyTorch) or ``triton`` (the fused kernels, or an error that says
why they cannot run). By default, the fused kernels run on GPUs that support them, and blocked PyTorch elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, NamedTuple

import torch

from finelip_fast.errors import KernelError

VARIABLE = "FINELIP_KERNELS"

# Ampere, the first architecture whose tensor cores multiply bfloat16.
LOWEST_CAPABILITY = 80


class Choice(NamedTuple):
    """An implementation, and the reason why no faster one runs."""

    implementation: Literal["triton", "blocked", "reference"]
    reason: str


def choose(device: torch.device, limit: str = "") -> Choice:
    """Choose the implementation for tensors on a device.

    Args:
        device: Device of the tensors.
        limit: Reason why the fused kernels cannot take these inputs; empty if they can.

    Raises:
        KernelError: ``FINELIP_KERNELS`` has an unknown value, or requests kernels that cannot run here.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "reference", "triton"):
        raise KernelError(
            f"expected {VARIABLE} to be reference or triton, got {forced!r}; unset it to choose automatically"
        )
    if forced == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    refusal = _why_no_kernels(device.type, device.index) or limit
    if not refusal:
        return Choice("triton", "fused kernels")
    if forced == "triton":
        raise KernelError(f"{VARIABLE}=triton, but {refusal}; unset it to choose automatically")
    return Choice("blocked", refusal)


def describe() -> Choice:
    """Choose the implementation for the default device of a model: the GPU if there is one."""
    return choose(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _why_no_kernels(kind: str, index: int | None) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get(VARIABLE) == "triton"
    if kind != "cuda" and not interpreted:
        return f"the fused kernels need a CUDA device, not {kind}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if kind != "cuda":
        return ""
    capability = _capability(index)
    if capability < LOWEST_CAPABILITY:
        return f"the fused kernels need compute capability {LOWEST_CAPABILITY / 10}, this GPU has {capability / 10}"
    return ""


@functools.cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
