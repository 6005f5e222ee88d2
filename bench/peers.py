"""Installed peers of late interaction. They support one direction, MaxSim: the sum, over the rows of a query, of the largest
product with a row of an item. Two calls give both directions.

``late-interaction-kernels`` (on a CPU, its own reference) and ``flash-maxsim`` (GPU only) are timed as installed packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from inputs import ON_GPU
from torch import Tensor

LATE, FLASH = "late-interaction-kernels", "flash-maxsim"

# They use 32-bit offsets: at 40 x 512, they read wrong addresses past 105,000 items.
AT_ONCE = 50_000

MaxSim = Callable[[Tensor, Tensor], Tensor]  # queries [Q, L_q, D], items [N, L_i, D] to [Q, N]


def maxsims(*, gradient: bool = False) -> dict[str, MaxSim]:
    """Return the installed contenders that run here; with ``gradient``, those that support autograd."""
    installed: dict[str, MaxSim] = {}
    if importlib.util.find_spec("late_interaction_kernels"):
        if ON_GPU:
            from late_interaction_kernels import maxsim
        else:
            from late_interaction_kernels.reference import maxsim_reference as maxsim

        installed[LATE] = maxsim
    if ON_GPU and importlib.util.find_spec("flash_maxsim"):
        from flash_maxsim import flash_maxsim_batched, flash_maxsim_batched_train

        # Its padding of query rows is disabled: it would copy all items in one of the directions.
        installed[FLASH] = flash_maxsim_batched_train if gradient else partial(flash_maxsim_batched, pad_lq=False)
    return installed


def scores(maxsim: MaxSim, queries: Tensor, items: Tensor, *, alpha: float = 0.8) -> Tensor:
    """Return ``[Q, N]`` scores of both directions; they equal ours if every maximum is positive, as with many random rows."""
    chunks = items.split(AT_ONCE)
    over_items = torch.cat([maxsim(queries, chunk) for chunk in chunks], dim=1).float() / queries.shape[1]
    over_queries = torch.cat([maxsim(chunk, queries) for chunk in chunks]).T.float() / items.shape[1]
    cosine = queries[:, 0].float() @ items[:, 0].float().T
    return alpha * cosine + (1 - alpha) * (over_items + over_queries)


def has_chamfer() -> bool:
    return ON_GPU and importlib.util.find_spec("flash_maxsim") is not None


def chamfer_scores(query: Tensor, items: Tensor, *, alpha: float = 0.8) -> Tensor:
    """Return scores ``[1, N]`` of one query by flash-maxsim's chamfer distance, which takes one pair at a time.

    For unit rows, ``|a - b|^2 = 2 - 2 a . b``, and the sum of both mean distances is ``4 - 2 fine``.
    """
    from flash_maxsim import flash_chamfer

    distances = torch.stack([flash_chamfer(query, item) for item in items])
    cosine = query[:1].float() @ items[:, 0].float().T
    return alpha * cosine + (1 - alpha) * (2 - distances / 2)
