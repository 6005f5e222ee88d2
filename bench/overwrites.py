"""Whether a compiled kernel overwrites what its own matrix products still read.

Hopper's products (``wgmma``) run on while the program goes on. Two errors of Triton's pipelines of such loops let what comes
next overwrite an operand under way. On a GPU the results are then wrong now and then; in the interpreter they are right.
Triton's intermediate code of the GPU (TTGIR) shows both.
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
    """What may be overwritten while an asynchronous product reads it, in words; empty: nothing.

    - A tile that registers read, too, has as many buffers as tiles are loaded ahead, where a product in flight needs one
      more (triton-lang/triton#6691).
    - A product that takes its first operand from registers is not waited for before they are written again, where several
      such products are in flight (triton-lang/triton#9433).
    """
    buffers: dict[str, int] = {}
    views: dict[str, str] = {}
    slots: dict[str, str] = {}  # of views, by which number
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
            if slots.get(match[1], "").startswith("%c"):  # a constant: before the loop
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
