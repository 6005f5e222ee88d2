"""Detect whether a compiled kernel overwrites operands that its own matrix products still read.

Hopper's products (``wgmma``) run asynchronously. Two bugs in Triton's pipelining of loops with such products let later code
overwrite an operand that is still being read. On a GPU the results are then occasionally wrong; in the interpreter they are
right. Triton's GPU intermediate representation (TTGIR) shows both bugs.
"""

from __future__ import annotations

import re
from collections import defaultdict

_ALLOCATION = re.compile(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\S+) = ttg\.memdesc_\w+ (%\w+)(?:\[(%\w+))?")
_COPY = re.compile(r"async_(?:copy_global_to_local %\S+,|tma_copy_global_to_local .*\]) (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),.*isAsync = true.*? : (\S+<.*?>) \*")
_PENDING = re.compile(r"ttng\.warp_group_dot_wait .*pendings = ([1-9]\d*)")


def overwrites(ttgir: str) -> list[str]:
    """Describe operands that may be overwritten while an asynchronous product reads them; empty if there are none.

    - A tile that is also read into registers has as many buffers as tiles are loaded ahead, but a product in flight needs one
      more (triton-lang/triton#6691).
    - A product that takes its first operand from registers is not awaited before those registers are written again, while
      several such products are in flight (triton-lang/triton#9433).
    """
    buffers: dict[str, int] = {}
    views: dict[str, str] = {}
    slots: dict[str, str] = {}  # of views: their index
    ahead: dict[str, set[str]] = defaultdict(set)
    refilled: set[str] = set()
    operands: set[str] = set()

    def allocation(view: str) -> str:
        while view in views:
            view = views[view]
        return view

    from_registers = []
    for line in ttgir.splitlines():
        if match := _ALLOCATION.search(line):
            buffers[match[1]] = int(match[2])
        elif match := _VIEW.search(line):
            views[match[1]], slots[match[1]] = match[2], match[3] or ""
        elif match := _COPY.search(line):
            if slots.get(match[1], "").startswith("%c"):  # a constant index: before the loop
                ahead[allocation(match[1])].add(slots[match[1]])
            else:
                refilled.add(allocation(match[1]))
        elif match := _PRODUCT.search(line):
            operands |= {allocation(match[1]), allocation(match[2])}
            if "dot_op" in match[3]:
                from_registers.append(match[1])
    wrong = [
        f"{name}: {buffers[name]} buffers, {len(ahead[name])} filled ahead"
        for name in sorted(operands)
        if name in refilled and name in buffers and len(ahead[name]) >= buffers[name]
    ]
    if from_registers and _PENDING.search(ttgir):
        wrong.append(f"{', '.join(from_registers)}: registers, several products in flight")
    return wrong
