"""Tiling of late interaction's launches on the GPU: its settings, and what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton

from finelip_fast.kernels import settings as _settings

# A query's columns come in groups of 8, the width of a tensor core's tile: the query that a register belongs to is then known
# at compile time, and masking the others costs nothing.
GROUP = 8

# KiB of shared memory that one program may request, by compute capability; the minimum applies to all others. GPUs with the
# maximum have products that read it without registers.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_LEAST_SHARED_KIB, _MOST_SHARED_KIB = 99, 227
# Number of pairs of rows whose sums and maxima fit the registers of a warp.
_PAIRS_PER_WARP = 2048
# The widest piece of D that Triton compiles for every GPU.
_WIDEST = 512
# If all of D is one piece, queries stay in shared memory and are read once per program, not once per item token. Items, warps
# and stages of such programs, by whether they hold several queries; the first that fits is used. With two-byte embeddings,
# such pieces leave room for two stages; three stages of smaller pieces are 1.36 times as fast (measured on an H200).
_IN_ONE_PIECE = {False: ((128, 8, 3), (128, 8, 2), (64, 8, 2)), True: ((64, 4, 4), (64, 4, 3), (64, 4, 2))}

# Items per program are halved down to this number, as long as there are fewer programs than multiprocessors on a large GPU.
_FEWEST_ITEMS, _PROGRAMS = 16, 128


@dataclass(frozen=True)
class ClimSettings:
    """Tiling of the work; it affects only the speed and the order of rounding."""

    block_items: int  # items of one program, a power of two, at least 16
    queries_per_program: int
    block_width: int  # piece of D of one product, a power of two, at least 16 (32 for one-byte embeddings)
    num_warps: int = 4
    num_stages: int = 3
    descriptor: bool = False  # whether to read items by a tensor descriptor (TMA) if possible

    def columns(self, query_tokens: int) -> int:
        """Columns of the tile, a power of two."""
        return max(16, int(triton.next_power_of_2(self.queries_per_program * query_columns(query_tokens))))


def query_columns(query_tokens: int) -> int:
    """Columns that one query takes."""
    return -(-query_tokens // GROUP) * GROUP


def default_settings(
    *, capability: int, dtype: torch.dtype, width: int, n_queries: int, query_tokens: int, winners: bool = False
) -> ClimSettings:
    """Default settings for a case that was not tuned.

    Args:
        capability: Compute capability of the GPU: 80, 90, 120, ...
        dtype: Dtype of the embeddings.
        width: ``D``.
        n_queries, query_tokens: ``Q`` and ``L_q``.
        winners: Whether the kernel also records the winner of each maximum.
    """
    if dtype == torch.float32:
        # Full float32 products run on the plain arithmetic units, whose operands are held in registers.
        return ClimSettings(64, 1, block_width=16, num_warps=16 if winners else 8, num_stages=2)
    hopper = _SHARED_KIB.get(capability) == _MOST_SHARED_KIB
    # Winners, and float8's sums across pieces, need as many registers again as the sums themselves.
    most_columns = 128 if hopper and not winners and dtype != torch.float8_e4m3fn else 64
    queries = max(1, min(n_queries, most_columns // query_columns(query_tokens)))
    whole_width = int(triton.next_power_of_2(width))
    block_width = min(128 // dtype.itemsize, max(32, whole_width))
    settings = ClimSettings(128, queries, block_width, num_warps=8, num_stages=4 if hopper else 3)
    columns = settings.columns(query_tokens)
    if hopper and block_width < width == whole_width and not winners and dtype == torch.int8:
        launch = Launch(capability, dtype, width, n_queries, query_tokens)
        cuts = (
            replace(settings, block_items=items, block_width=width, num_warps=warps, num_stages=stages)
            for items, warps, stages in _IN_ONE_PIECE[columns > 64]
        )
        in_one_piece = next((cut for cut in cuts if fits(cut, launch)), None)
        if in_one_piece and (columns <= 64 or capability == 90):  # on other GPUs, larger sums are held in registers
            return in_one_piece
    if hopper and columns <= 64 and not winners and dtype.itemsize == 2:
        return replace(settings, block_width=min(128, max(32, whole_width)), num_warps=4, num_stages=3)
    if columns > most_columns or (dtype == torch.int8 and columns > 64 and capability != 90):
        return replace(settings, block_items=64, num_stages=3)
    return replace(settings, num_warps=4) if 2 * columns <= most_columns else settings


class Launch(NamedTuple):
    """Launch that settings are chosen for; its fields are the arguments of :func:`default_settings`."""

    capability: int
    dtype: torch.dtype
    width: int
    n_queries: int
    query_tokens: int
    winners: bool = False

    @property
    def case(self) -> str:
        """Name in the table of tuned settings, which distinguishes one, few and many queries."""
        operation = "clim_winners" if self.winners else "clim"
        queries = 1 if self.n_queries == 1 else 8 if self.n_queries <= 16 else 64
        sizes = {"D": self.width, "L": self.query_tokens, "Q": queries}
        return _settings.key(operation, capability=self.capability, dtype=self.dtype, **sizes)


def fits(settings: ClimSettings, launch: Launch) -> bool:
    """Whether the tiles fit shared memory and registers, as far as can be told without compiling."""
    columns = settings.columns(launch.query_tokens)
    shared_kib = _SHARED_KIB.get(launch.capability, _LEAST_SHARED_KIB)
    # On other GPUs, operands are held in registers, and the next piece takes their place in shared memory.
    pieces = settings.num_stages if shared_kib == _MOST_SHARED_KIB else settings.num_stages - 1
    rows = pieces * settings.block_items + columns * (1 if settings.block_width >= launch.width else pieces)
    pairs = _PAIRS_PER_WARP * settings.num_warps // (2 if launch.winners else 1)
    return (
        settings.block_width <= _WIDEST
        and rows * settings.block_width * launch.dtype.itemsize <= shared_kib << 10
        and settings.block_items * columns <= pairs
    )


@_settings.until_saved
def settings_for(launch: Launch) -> ClimSettings:
    """Tuned settings if there are any, otherwise the default ones."""
    return _settings.tuned(launch.case, ClimSettings) or default_settings(**launch._asdict())


def spread(settings: ClimSettings, n_queries: int, n_items: int) -> ClimSettings:
    """Reduce the items per program if there are few, such as a second stage's candidates: most of a GPU would be idle."""
    block_items, query_blocks = settings.block_items, triton.cdiv(n_queries, settings.queries_per_program)
    while block_items > _FEWEST_ITEMS and triton.cdiv(n_items, block_items) * query_blocks < _PROGRAMS:
        block_items //= 2
    return replace(settings, block_items=block_items)


def describes(settings: ClimSettings, capability: int, width: int) -> bool:
    """Whether this GPU has tensor descriptors and the pieces suit them, which may not reach into the next token."""
    return capability >= 90 and width % settings.block_width == 0
