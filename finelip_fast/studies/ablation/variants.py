"""Variants of the ablation: parts of the model, losses, and their learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.metrics import SCORES
from finelip_fast.model import FineLIP, aggregated_lengths

PAPER = "triplet (the paper's)"


@dataclass(frozen=True)
class Variant:
    """Parts and losses of one group of runs.

    Args:
        loss: Loss terms, as in :class:`TrainConfig`.
        image, text: ``"aggregated"``: row 0 and the tokens aggregated by ATRM; ``"raw"``: row 0 and the tokens themselves;
            ``"pooled"``: one row, the mean of the aggregated rows.
        grounding, contextual, gamma, augment: Fields of :class:`TrainConfig`.
    """

    loss: tuple[str, ...]
    image: str = "aggregated"
    text: str = "aggregated"
    grounding: float = 0.0
    contextual: float = 0.0
    gamma: float = 0.5
    augment: tuple[str, ...] = ()

    @property
    def is_fine(self) -> bool:
        """Whether the score compares tokens."""
        return any(not term.startswith(("contrastive:global", "adaptive_margin:global")) for term in self.loss)


class Arm(NamedTuple):
    """A variant and its learning rates, as multiples of the recipe's."""

    variant: Variant
    rate: float


_GLOBAL = ("contrastive:global",)
_BOTH = ("contrastive:global", "contrastive:fine")
_THREE = (*_BOTH, "contrastive:combined")

PARTS = {
    "neither": Variant(_GLOBAL),
    "ATRM only": Variant(_GLOBAL, "pooled", "pooled"),
    "CLIM only": Variant(_BOTH, "raw", "raw"),
    "ATRM on the picture's side, CLIM": Variant(_BOTH, "aggregated", "raw"),
    "ATRM on the text's side, CLIM": Variant(_BOTH, "raw", "aggregated"),
    "ATRM and CLIM": Variant(_BOTH),
}
LOSSES = {
    "global contrast": PARTS["neither"],
    PAPER: Variant(("triplet:fine",)),
    "contrast": PARTS["ATRM and CLIM"],
    "adaptive margins": Variant(("adaptive_margin:global", "adaptive_margin:fine")),
    "contrast on the combined score, grounding": Variant(("contrastive:combined",), grounding=1.0),
    "contrast on three scores": Variant(_THREE),
    "contrast on three scores, grounding": Variant(_THREE, grounding=1.0),
}
ADDITIONS = {
    "nothing added": LOSSES["contrast on three scores, grounding"],
    "contextual alignment": Variant(_THREE, grounding=1.0, contextual=0.5),
    "margins of 0.25": Variant(tuple(f"adaptive_margin:{on}" for on in SCORES), grounding=1.0, gamma=0.25),
    "augmented captions": Variant(
        _THREE, grounding=1.0, augment=("sentences:0.3", "words:0.15", "foreign:0.35", "typos:0.3")
    ),
}
GROUPS = {"parts": PARTS, "losses": LOSSES, "additions": ADDITIONS}


class AblatedFineLIP(FineLIP):
    """FineLIP with parts left out; its captions' raw tokens are padded with rows of zeros, which are not tokens."""

    def __init__(self, model: FineLIP, variant: Variant) -> None:
        super().__init__(model.config.replace(trained_aggregators=variant.is_fine), model.tokenizer)
        self.load_state_dict(model.state_dict())
        self.variant = variant

    @property
    def _aggregates(self) -> bool:
        return True  # the variant decides how

    def aggregate_image(self, tokens: Tensor) -> Tensor:
        if self.variant.image == "raw":
            return F.normalize(tokens.float(), dim=-1)
        return self._pooled(super().aggregate_image(tokens), self.variant.image)

    def aggregate_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows = super().aggregate_text(tokens, lengths)
        if self.variant.text == "raw":
            unit = F.normalize(tokens.float(), dim=-1)
            beyond = (
                torch.arange(unit.shape[1], device=unit.device) >= aggregated_lengths(lengths, self.config)[:, None]
            )
            rows = torch.cat([rows[:, :1], unit.masked_fill(beyond[..., None], 0.0)], dim=1)
            return F.pad(rows, (0, 0, 0, 1 + self.config.context_length - rows.shape[1]))
        return self._pooled(rows, self.variant.text)

    def _pooled(self, rows: Tensor, kind: str) -> Tensor:
        return F.normalize(rows.mean(dim=1, keepdim=True), dim=-1) if kind == "pooled" else rows

    def score(self, images: Tensor, texts: Tensor, *, alpha: float | None = None) -> Tensor:
        """Compute scores as :meth:`FineLIP.score` does; texts may end in rows of zeros.

        Captions of equal length are scored together, since late interaction cannot ignore rows.
        """
        counts = texts.detach().any(dim=-1).sum(dim=1)
        groups = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        parts = [
            super(AblatedFineLIP, self).score(images, texts[members, : counts[members[0]]], alpha=alpha)
            for members in groups
        ]
        return torch.cat(parts, dim=1)[:, torch.cat(groups).argsort()]
