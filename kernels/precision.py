"""Float32 products at full precision, whatever precision the process has chosen for its other products."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # active searches in all threads: PyTorch's setting applies to the whole process
_restore: Callable[[], None] = lambda: None  # noqa: E731


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep float32 products from being rounded to TF32 or bfloat16: a bound on rounding relies on it."""
    global _inside, _restore
    with _lock:
        if not _inside:
            _restore = _require()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore()


def _require() -> Callable[[], None]:
    """Require full precision from here on; return a function that restores the previous settings."""
    products: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    try:
        for_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by `fp32_precision`, which is then all that PyTorch lets one read
        for_all = None
    if for_all is not None:
        torch.set_float32_matmul_precision("highest")
    for product in products:
        product.fp32_precision = "ieee"

    def restore() -> None:
        if for_all is not None:
            torch.set_float32_matmul_precision(for_all)
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision

    return restore
