"""The choice of implementation: what can be forced, what is refused, and why."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from finelip_fast.errors import KernelError
from finelip_fast.kernels import atrm, clim_scores, describe, dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def capability(monkeypatch):
    def pretend(value):
        monkeypatch.setattr(dispatch, "_capability", lambda index: value)

    return pretend


def test_a_cpu_runs_blocked_pytorch_and_says_why():
    assert dispatch.choose(CPU) == ("blocked", "the fused kernels need a CUDA device, not cpu")


def test_a_gpu_runs_the_kernels_within_their_limits(capability):
    capability(90)
    assert dispatch.choose(CUDA) == ("triton", "fused kernels")
    assert dispatch.choose(CUDA, "too wide") == ("blocked", "too wide")


def test_an_old_gpu_does_not(capability):
    capability(75)
    assert dispatch.choose(CUDA) == ("blocked", "the fused kernels need compute capability 8.0, this GPU has 7.5")


def test_without_triton_there_are_no_kernels(monkeypatch, capability):
    capability(90)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose(CUDA) == ("blocked", "the package triton is not installed")


def test_the_reference_can_be_forced(monkeypatch, capability):
    capability(90)
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch.choose(CUDA) == ("reference", "FINELIP_KERNELS=reference")
    assert describe().implementation == "reference"


def test_kernels_that_are_forced_and_impossible_are_an_error(monkeypatch, capability):
    capability(90)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.choose(CUDA).implementation == "triton"
    with pytest.raises(KernelError, match="FINELIP_KERNELS=triton, but too wide; unset it"):
        dispatch.choose(CUDA, "too wide")
    with pytest.raises(KernelError, match="need a CUDA device, not cpu; unset it"):
        clim_scores(torch.ones(1, 1, 8), torch.ones(1, 1, 8))


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(KernelError, match="expected FINELIP_KERNELS to be reference or triton, got 'cuda'"):
        clim_scores(torch.ones(1, 1, 8), torch.ones(1, 1, 8))


def test_what_the_kernels_cannot_take_is_said(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "_why_no_kernels", lambda kind, index: "")
    wide, short = torch.ones(1, 2, 8, dtype=torch.float64), torch.ones(1, 2, 8)
    with pytest.raises(KernelError, match=r"one dtype of at most 32 bits, not torch.float64 and torch.float64; unset"):
        clim_scores(wide, wide)
    with pytest.raises(KernelError, match=r"one dtype of at most 32 bits, not torch.float32 and torch.float64"):
        clim_scores(short, wide)
    with pytest.raises(KernelError, match="up to 256 query tokens, not 300"):
        clim_scores(short.repeat(1, 150, 1), short)
    parameters = [torch.ones(8), torch.ones(8), torch.ones(3, 8), torch.ones(3), torch.ones(2, 3), torch.ones(2)]
    with pytest.raises(KernelError, match=r"numbers of at most 32 bits, not torch.float64"):
        atrm(wide, *parameters, torch.ones(1), anchor=wide[:, 0])
