"""Training with several processes: start-up, and gathering embeddings with their gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The first process validates while the others wait; a validation of hours must not end the run, as PyTorch's 10 or 30 minutes
# would. torchrun notices a process that has died at once.
_LONGEST_WAIT = timedelta(days=1)


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the process group that ``torchrun`` announces, if there is one, and yield ``(rank, world)``."""
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        yield dist.get_rank(), dist.get_world_size()
        if device.type == "cpu":
            # Gloo's threads may still hold tensors of the last exchange. To release those while the interpreter shuts down
            # would abort the process; a barrier holds none, and until it is over, the threads have let go.
            dist.barrier()
    finally:
        dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Concatenate over processes; the gradient of a process's part is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.rows = local.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may still need the original
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


def gather(local: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order, differentiably; each must provide the same number.

    When each process computes the same loss from the result, the average of the processes' parameter gradients (what
    DistributedDataParallel computes) is the gradient of that loss.
    """
    if not dist.is_initialized():
        return local
    gathered: Tensor = _Gather.apply(local)
    return gathered
