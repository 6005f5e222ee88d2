"""Which implementation of an operation runs here, and why not a faster one."""

from __future__ import annotations

import os

from finelip_fast._errors import KernelError

VARIABLE = "FINELIP_KERNELS"


def choose() -> tuple[str, str]:
    """The implementation in use and the reason, after ``FINELIP_KERNELS`` (``auto``, ``reference``).

    Raises:
        KernelError: The variable names an implementation that cannot run.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "reference"):
        raise KernelError(
            f"expected {VARIABLE} to be 'auto' or 'reference', got {wanted!r}: no other implementation is installed"
        )
    reason = f"forced by {VARIABLE}" if wanted == "reference" else "this version has no fused kernels"
    return "reference", reason
