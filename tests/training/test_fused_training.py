"""A run with the fused operations has the same losses as one with the reference, step by step.

Started by ``torchrun``, this file is the program of the processes: it trains one configuration.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finelip_fast.config import PRESETS, FineLIPConfig
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.train import train

TINY = FineLIPConfig(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    text_width=32,
    text_layers=1,
    text_heads=1,
)
STEPS = 12
OPTIONS = {
    "train": "scenes:train:64",
    "validation": "scenes:val:2",
    "preset": "tiny",
    "context_length": 64,
    "loss": ["contrastive:global", "contrastive:fine", "triplet:fine"],
    "batch_size": 4,
    "steps": STEPS,
    "encoder_lr": 3e-3,
    "aggregator_lr": 3e-3,
    "warmup_steps": 0,
    "freeze_positions": 0,
    "precision": "fp32",
    "workers": 0,
    "log_every": 1,
    "tensorboard": False,
    "threads": 1,
    "device": "cpu",
}

# Environment variables of each run.
REFERENCE = {"FINELIP_KERNELS": "reference"}
DEFAULT: dict[str, str] = {}
KERNELS = {"FINELIP_KERNELS": "triton"}
INTERPRETED = KERNELS | {"TRITON_INTERPRET": "1"}

# Relative, at every step: the log has six digits, and a different order of float32 sums changes about 1e-6.
TOLERANCE = 1e-5


def losses(out, environment, *, processes=2, **options):
    """Return the logged loss of each step."""
    out.mkdir()
    (out / "options.json").write_text(json.dumps(OPTIONS | options | {"out": str(out / "run")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    clean = {name: value for name, value in os.environ.items() if name not in INTERPRETED}
    clean |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [*command, __file__, str(out)], cwd=out, env=clean | environment, capture_output=True, text=True, timeout=1800
    )
    assert process.returncode == 0, process.stderr[-4000:]
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    values = losses(tmp_path_factory.mktemp("reference") / "run", REFERENCE)
    assert len(values) == STEPS
    assert values[-1] < 0.97 * values[0]  # the loss decreases, so equal losses mean equal gradients
    return values


def test_two_processes_on_a_cpu_lose_as_with_the_reference(reference, tmp_path):
    assert losses(tmp_path / "run", DEFAULT) == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.slow
def test_two_processes_with_interpreted_kernels_lose_as_with_the_reference(reference, tmp_path, interpreter):
    assert losses(tmp_path / "run", INTERPRETED) == pytest.approx(reference, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_process_on_a_gpu_loses_as_with_the_reference(tmp_path):
    expected, measured = (
        losses(tmp_path / str(number), environment, processes=1, device="cuda", batch_size=8)
        for number, environment in enumerate((REFERENCE, KERNELS))
    )
    # There, PyTorch's own gradients come from atomic additions and, in convolutions, TF32 products.
    assert measured == pytest.approx(expected, rel=1e-4)


def main(folder):
    PRESETS["tiny"] = TINY
    train(TrainConfig(**json.loads((folder / "options.json").read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
