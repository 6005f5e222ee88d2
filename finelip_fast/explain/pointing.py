"""The pointing game: does the map of a phrase peak inside the box of what the phrase describes?

Zhang et al., Top-down Neural Attention by Excitation Backprop, arXiv 1608.00507, section 4.1, without its tolerance of some
pixels around the box.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from finelip_fast._arguments import whole_number
from finelip_fast.datasets import Example, PairDataset
from finelip_fast.errors import InputError
from finelip_fast.explain.explanation import Explanation, explain_pairs, patches_inside
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import Tokenizer, token_spans


def pointing_game(
    model: FineLIP, pairs: PairDataset, *, batch_size: int = 64, progress: bool = True
) -> list[dict[str, Any]]:
    """Play the pointing game with every phrase whose place is known.

    Args:
        model: The model.
        pairs: Pairs whose ``regions`` are the phrases; skips those beyond the context, and boxes without a patch's centre.
        batch_size: Number of pairs processed at once.
        progress: Whether to show a progress bar.

    Returns:
        For each phrase, ``label``, ``chance`` (share of the patches whose centre is in the box), and for each kind of map
        (``"raw"``, and with trained aggregators ``"aggregated"``) whether the centre of its highest patch, the first of
        equals, is in the box.

    Raises:
        InputError: No phrase is left, or the batch size is below 1.
    """
    batch_size = whole_number("batch_size", batch_size)
    played: list[dict[str, Any]] = []
    with tqdm(total=len(pairs), unit="picture", disable=not progress, mininterval=0.5) as bar:
        for first in range(0, len(pairs), batch_size):
            examples = [pairs[at] for at in range(first, min(first + batch_size, len(pairs)))]
            explanations = explain_pairs(
                model, [example.image for example in examples], [example.caption for example in examples]
            )
            for example, explanation in zip(examples, explanations, strict=True):
                played += _played(example, explanation, model.tokenizer)
            bar.update(len(examples))
    if not played:
        raise InputError("expected pairs whose phrases have boxes (regions), as those of scenes:test; found none")
    return played


def _played(example: Example, explanation: Explanation, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    spans = token_spans(example.caption, [(region.start, region.end) for region in example.regions], tokenizer)
    for region, (first, last) in zip(example.regions, spans, strict=True):
        inside = patches_inside(region.box, explanation.side)
        if inside.any() and first < last < len(explanation.contributions):
            peaks = {kind: explanation.map_of_tokens(first, last, tokens=kind).argmax() for kind in explanation.maps}
            hits = {kind: bool(inside[peak]) for kind, peak in peaks.items()}
            yield {"label": region.label, "chance": float(inside.float().mean()), **hits}
