"""Add commit, machine, versions and machine capabilities to every recorded result.

Record with ``pytest bench/ --benchmark-only --benchmark-json=bench/results/MACHINE/NAME.json``.
"""

from __future__ import annotations

from typing import Any

import record
import torch

from finelip_fast.kernels import floor


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info |= record.versions(
        "triton",
        "late-interaction-kernels",
        "flash-maxsim",
        "open_clip_torch",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx",
        "pylance",
    )
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    machine_info["peaks"] = floor.peaks()
    machine_info.pop("node", None)  # the host name is useless and may be private


def pytest_benchmark_update_commit_info(config: Any, commit_info: dict[str, Any]) -> None:
    commit_info |= record.commit()
