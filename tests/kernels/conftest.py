"""Test devices of the operations: ``pytest -m gpu`` runs on a CUDA device what other runs test on the CPU.

A test with the `device` fixture runs on the CPU and on a CUDA device. A test of a Triton kernel runs compiled on a CUDA
device, or on the CPU in Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels -m triton``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS needs this to be deterministic; PyTorch reads it once, at the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("triton"):
        devices = ["cpu"] if INTERPRETED else [CUDA]
    elif metafunc.definition.get_closest_marker("gpu"):
        devices = ["cuda"]
    else:
        devices = ["cpu", CUDA]
    metafunc.parametrize("device", devices, indirect=True, scope="session")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; without one, TRITON_INTERPRET=1 interprets the kernels")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, or the largest integer, so that anything a kernel leaves unwritten is visible."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
