"""The pointing game: does the map of a phrase peak inside the box of what the phrase describes?

Zhang et al., Top-down Neural Attention by Excitation Backprop, arXiv 1608.00507, section 4.1, without its tolerance of some
pixels around the box.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from finelip_fast._errors import InputError
from finelip_fast.datasets import PairDataset
from finelip_fast.explain.explanation import MAPS, Explanation, explain, patch_centres
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import token_spans


def pointing_game(model: FineLIP, pairs: PairDataset, *, progress: bool = True) -> list[dict[str, Any]]:
    """Play it with every phrase whose place is known.

    Args:
        model: The model.
        pairs: Their ``regions`` are the phrases; those beyond the context, and boxes without a patch's centre, are left out.
        progress: Show a progress bar.

    Returns:
        For each phrase ``label``, ``chance`` (share of the patches whose centre is in the box), and for each kind of map
        (``"raw"``, ``"aggregated"``) whether its highest patch's centre is in the box, the first of equals.

    Raises:
        InputError: No phrase is left.
    """
    played = []
    for index in tqdm(range(len(pairs)), unit="picture", disable=not progress, mininterval=0.5):
        example = pairs[index]
        explanation = explain(model, example.image, example.caption)
        x, y = patch_centres(explanation.side)
        spans = token_spans(example.caption, [(region.start, region.end) for region in example.regions])
        for region, (first, last) in zip(example.regions, spans, strict=True):
            inside = (x >= region.box[0]) & (x < region.box[2]) & (y >= region.box[1]) & (y < region.box[3])
            if inside.any() and first < last < len(explanation.contributions):
                played.append({"label": region.label, "chance": float(inside.float().mean())} | {
                    kind: _hits(explanation, first, last, kind, inside) for kind in MAPS
                })  # fmt: skip
    if not played:
        raise InputError("expected pairs whose phrases have boxes (regions), as those of scenes:test; found none")
    return played


def _hits(explanation: Explanation, first: int, last: int, kind: str, inside: torch.Tensor) -> bool:
    return bool(inside[explanation.map_of_tokens(first, last, tokens=kind).argmax()])
