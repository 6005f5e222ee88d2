"""Information on what this machine can run, and on the contents and integrity of checkpoints and indexes."""

from __future__ import annotations

import os
import platform
from os import PathLike
from typing import Any

import torch

from finelip_fast import checkpoint as checkpoints
from finelip_fast._terminal import printable
from finelip_fast._versions import installed
from finelip_fast.engines import ENGINES, why_not
from finelip_fast.errors import CheckpointError, StoreError
from finelip_fast.index import remedies, stored_index
from finelip_fast.index.spec import CATALOGUE
from finelip_fast.kernels import describe, tuned_settings

_PACKAGES = ("finelip-fast", "torch", "triton", "open_clip_torch", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")


def info() -> dict[str, Any]:
    """Return package versions, devices, and for each kernel and engine whether it runs here and, if not, why."""
    kernel, reason = describe()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict.fromkeys(_PACKAGES, "not installed") | installed(*_PACKAGES),
        "cpu": {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "kernels": f"{kernel} ({reason})",
        "tuned settings": tuned_settings(),
        "engines": {name: why_not(name) or "runs here" for name in ENGINES if name != "auto"},
    }


def path_info(path: str | PathLike[str], *, verify: bool = False) -> dict[str, Any]:
    """Return :func:`index_info` of an index folder, :func:`checkpoint_info` of anything else.

    Args:
        path: Folder of an index; or a checkpoint, as accepted by :func:`finelip_fast.load`.
        verify: Whether to compare the files with their checksums.

    Raises:
        CheckpointError, StoreError: The checkpoint or the index cannot be read, or with ``verify`` it is damaged.
    """
    describe_path = index_info if os.path.exists(os.path.join(path, CATALOGUE)) else checkpoint_info
    return describe_path(path, verify=verify)


def checkpoint_info(checkpoint: str | PathLike[str] | None = None, *, verify: bool = False) -> dict[str, Any]:
    """Return the report of :func:`finelip_fast.checkpoint.describe`.

    Args:
        checkpoint: Checkpoint, as accepted by :func:`finelip_fast.load`; None: the bundled one.
        verify: Whether to compare the weights with what was recorded when they were written.

    Raises:
        CheckpointError: The checkpoint cannot be loaded, or with ``verify`` its weights differ from those recorded.
    """
    report = checkpoints.describe(checkpoint, verify=verify)
    if report.get("status") == "mismatch":
        raise CheckpointError(
            f"{report['weights']}: expected the weights of SHA-256 {report['recorded_sha256']}, found {report['sha256']}"
            + (f", with damaged records: {report['damaged']}" if report["damaged"] else "")
            + "; get it again from where it came from"
        )
    return report


def check_index(folder: str | PathLike[str]) -> dict[str, int]:
    """Read an entire index folder and compare it with its checksums.

    Returns:
        Number of ``items``, of ``damaged`` ones (0), and of ``lost`` ones: those in segments that nothing refers to, from
        which ``finelip index repair`` recovers them.

    Raises:
        StoreError: There is no index, it cannot be read, or items are damaged; the message lists these.
    """
    index = stored_index(folder, skip_damaged=True)
    damaged = index.check()
    count = index.total
    if damaged:
        listed = "\n".join(f"  {printable(item)}: {printable(reason)}" for item, reason in damaged.items())
        raise StoreError(
            f"{len(damaged)} of {count} items are damaged, the others are sound; restore their files, or take them out and "
            f"keep the others with {remedies.repair(folder)}:\n{listed}"
        )
    return {"items": count, "damaged": 0, "lost": sum(index.lost().values())}


def index_info(folder: str | PathLike[str], *, verify: bool = False) -> dict[str, Any]:
    """Return what an index folder contains, and when each part is compared with its checksums.

    Args:
        folder: Folder of an index.
        verify: Whether to compare everything now.

    Raises:
        StoreError: There is no index, it cannot be read, or with ``verify`` it is damaged.
    """
    if verify:
        check_index(folder)
    index = stored_index(folder)
    spec = index.spec
    return {
        "items": len(index),
        "version": index.version,
        "checkpoint": index.source or "the bundled one",
        "fingerprint": spec.checkpoint,
        "tokens": spec.tokens,
        "width": spec.width,
        "dtype": spec.dtype,
        "verified": {
            "now": "all files" if verify else "the part of the catalogue that was read; --verify compares all files",
            "on opening": "the catalogue's tables, and each row that is read",
            "by each search": "embeddings and metadata of the hits only; finelip search --verify compares all embeddings",
            "never": "the origin: checksums do not show who made an index",
        },
    }
