"""What a cut of late interaction moves and multiplies, counted, and the most that a card could make of it.

No timing: bytes and products of a launch, over rates that are on data sheets. What a kernel waits for besides is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

# Of what data sheets say, what careful programs were seen to reach.
_OF_MEMORY, _OF_PRODUCTS = 0.9, 0.8
# Bytes that a multiprocessor gets from the L2 cache a clock. Its way there is twice as wide; on A100 and H100 others measured
# some two thirds of that, with all multiprocessors at it somewhat more than half.
_L2_BYTES = 32


class Card(NamedTuple):
    """Rates of a card: bytes and operations a second, dense; multiprocessors and their clock."""

    name: str
    memory: float
    float16: float
    int8: float
    multiprocessors: int
    clock: float


# By compute capability, from NVIDIA's data sheets; float16 with sums in float32.
CARDS = {
    80: Card("A100 80GB", 2.04e12, 312e12, 624e12, 108, 1.41e9),
    90: Card("H200", 4.8e12, 989e12, 1979e12, 132, 1.755e9),
    100: Card("B200", 8.0e12, 2250e12, 4500e12, 148, 1.85e9),
    120: Card("RTX 5090", 1.79e12, 210e12, 838e12, 170, 2.41e9),
}


class Count(NamedTuple):
    """What one item costs.

    Attributes:
        memory: Bytes that must come from memory.
        l2: Bytes that multiprocessors ask the L2 cache for.
        needed: Operations of the products of both sides.
        done: Those of the tiles, with what is padded.
    """

    memory: float
    l2: float
    needed: float
    done: float

    def share_of_floor(self, card: Card, dtype: torch.dtype) -> float:
        """The least time over the time that the counted work takes at these rates: no run can have a larger share."""
        products = _OF_PRODUCTS * (card.int8 if dtype == torch.int8 else card.float16)
        memory, l2 = _OF_MEMORY * card.memory, _L2_BYTES * card.multiprocessors * card.clock
        least = max(self.memory / memory, self.needed / products)
        return least / max(least, self.l2 / l2, self.done / products)


def count(constants: Mapping[str, Any], n_queries: int, dtype: torch.dtype) -> Count:
    """The work of a launch of the scores' kernel, by its constants, over its items."""
    item_tokens, width, block_width = (constants[name] for name in ("ITEM_TOKENS", "WIDTH", "BLOCK_WIDTH"))
    blocks = -(-n_queries // constants["QUERIES"])  # programs that read the same items
    item = item_tokens * (width * dtype.itemsize + (4 if dtype == torch.int8 else 0))
    queries = n_queries * constants["QUERY_COLUMNS"] * width * dtype.itemsize
    times = 1 if block_width >= width else item_tokens  # in one piece, queries stay with the program
    pieces = -(-width // block_width)
    return Count(
        memory=item,
        l2=blocks * item + times * queries / constants["BLOCK_ITEMS"],
        needed=2 * n_queries * constants["QUERY_TOKENS"] * item_tokens * width,
        done=2 * blocks * constants["COLUMNS"] * item_tokens * pieces * block_width,
    )
