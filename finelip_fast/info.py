"""What runs here: versions, devices, kernels, engines."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from finelip_fast.engines import ENGINES, why_not
from finelip_fast.kernels import describe, tuned_settings

_PACKAGES = ("finelip-fast", "torch", "triton", "open_clip_torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")


def info() -> dict[str, Any]:
    """Versions of the packages that matter, devices, and for each kernel and engine whether it runs and why not."""
    kernel, reason = describe()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "kernels": f"{kernel} ({reason})",
        "tuned settings": tuned_settings(),
        "engines": {name: why_not(name) or "runs here" for name in ENGINES if name != "auto"},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
