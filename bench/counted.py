"""Count the bytes and operations of a tiling of late interaction, and derive the best speed that a GPU could reach with it.

Nothing is timed: the bytes and products of a launch are divided by data-sheet rates, and no other stalls of the
kernel are modelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Fractions of the data-sheet rates that well-tuned programs have reached.
_OF_MEMORY, _OF_PRODUCTS = 0.9, 0.8
# Bytes that a multiprocessor receives from the L2 cache per clock. The path is twice as wide; published measurements on A100
# and H100 reach about two thirds of it, or slightly more than half with all multiprocessors active.
_L2_BYTES = 32


class Card(NamedTuple):
    """Rates of a GPU: bytes and dense operations per second; multiprocessors and their clock rate."""

    name: str
    memory: float
    float16: float
    int8: float
    multiprocessors: int
    clock: float


# By compute capability, from NVIDIA's data sheets; float16 with float32 accumulation.
CARDS = {
    80: Card("A100 80GB", 2.04e12, 312e12, 624e12, 108, 1.41e9),
    90: Card("H200", 4.8e12, 989e12, 1979e12, 132, 1.755e9),
    100: Card("B200", 8.0e12, 2250e12, 4500e12, 148, 1.85e9),
    120: Card("RTX 5090", 1.79e12, 210e12, 838e12, 170, 2.41e9),
}


class Count(NamedTuple):
    """Cost of one item.

    Attributes:
        memory: Bytes that must come from memory.
        needed: Operations that the products of queries and items need.
        needed: Operations of the products in both directions.
        done: Operations of the tiles, including padding.
    """

    memory: float
    l2: float
    needed: float
    done: float

    def share_of_floor(self, card: Card, dtype: torch.dtype) -> float:
        """Minimum time divided by the time of the counted work at these rates; no run can have a larger share."""
        products = _OF_PRODUCTS * (card.int8 if dtype == torch.int8 else card.float16)
        memory, l2 = _OF_MEMORY * card.memory, _L2_BYTES * card.multiprocessors * card.clock
        least = max(self.memory / memory, self.needed / products)
        return least / max(least, self.l2 / l2, self.done / products)


def count(constants: Mapping[str, Any], n_queries: int, dtype: torch.dtype) -> Count:
    """Count the work per item of a launch of the scores' kernel, from its constants."""
    item_tokens, width, block_width = (constants[name] for name in ("ITEM_TOKENS", "WIDTH", "BLOCK_WIDTH"))
    blocks = -(-n_queries // constants["QUERIES"])  # programs that read the same items
    item = item_tokens * (width * dtype.itemsize + (4 if dtype == torch.int8 else 0))
    queries = n_queries * constants["QUERY_COLUMNS"] * width * dtype.itemsize
    times = 1 if block_width >= width else item_tokens  # if in one piece, queries stay with the program
    pieces = -(-width // block_width)
    return Count(
        memory=item,
        l2=blocks * item + times * queries / constants["BLOCK_ITEMS"],
        needed=2 * n_queries * constants["QUERY_TOKENS"] * item_tokens * width,
        done=2 * blocks * constants["COLUMNS"] * item_tokens * pieces * block_width,
    )
