"""Losses for training FineLIP, and their weighted sum. Most are functions of one score matrix.

``scores [B, B]`` has a row for each picture and a column for each caption; row ``i`` and column ``i`` belong together. The
caller chooses the score: ``global`` cosine, ``fine`` late interaction or the ``combined`` retrieval score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.errors import ConfigError
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import SCORES

LOSSES = ("contrastive", "triplet", "hardest_triplet", "adaptive_margin")
COMBINED_ALPHA = 0.8

# Sharpness of a caption part's attention to patches: a cosine higher by 0.1 has seven times the weight.
_SHARPNESS = 20.0


def fine_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Late interaction only: embeddings ``[B, L, D]`` to float32 ``[B, B]``."""
    return clim_scores(images, texts, alpha=0.0)


def contrastive_loss(
    scores: Tensor, logit_scale: Tensor | float, *, label_smoothing: float = 0.0, ignored: Tensor | None = None
) -> Tensor:
    """Symmetric cross entropy of ``logit_scale * scores`` with the diagonal as target (CLIP, arXiv 2103.00020).

    Args:
        scores: ``[B, B]``.
        logit_scale: Multiplier of the scores (the exponential already taken).
        label_smoothing: Share of the target spread over all entries; FineLIP's baseline uses 0.1.
        ignored: bool ``[B, B]``, True for entries that are not negatives; not with label smoothing.

    Returns:
        Scalar, the mean of both directions and of the batch.
    """
    logits = logit_scale * scores
    if ignored is not None:
        logits = logits.masked_fill(ignored, -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    by_image = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    by_text = F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)
    return (by_image + by_text) / 2


def triplet_loss(
    scores: Tensor, image_ids: Tensor | None = None, *, margin: float = 0.2, hardest: bool = False
) -> Tensor:
    """Hinge loss of every negative against its pair, in both directions (FineLIP, arXiv 2504.01916, section 3)::

        sum_{j != i} relu(margin + s[i,j] - s[i,i]) + sum_{j != i} relu(margin + s[j,i] - s[i,i])

    Args:
        scores: ``[B, B]``.
        image_ids: int64 ``[B]``; entries of pairs that share an id are not negatives. None: all ids differ.
        margin: Amount by which a pair must beat its negatives.
        hardest: Take the worst negative of each row and column instead of the sum over all.

    Returns:
        Scalar, summed over the batch.
    """
    if image_ids is None:
        image_ids = torch.arange(len(scores), device=scores.device)
    same_image = image_ids[:, None] == image_ids[None, :]
    positive = scores.diagonal()
    by_image = (margin + scores - positive[:, None]).relu().masked_fill(same_image, 0.0)
    by_text = (margin + scores - positive[None, :]).relu().masked_fill(same_image, 0.0)
    if hardest:
        return by_image.max(dim=1).values.sum() + by_text.max(dim=0).values.sum()
    return by_image.sum() + by_text.sum()


def adaptive_margin_loss(
    scores: Tensor, caption_similarity: Tensor, logit_scale: Tensor | float, *, gamma: float = 0.5
) -> Tensor:
    """Contrastive loss with larger margins for negatives whose captions are more alike (HN-CLIP, arXiv 2608.18521).

    ``z = logit_scale * (scores + gamma * G)``, where ``G`` holds the captions' cosines, detached, with a zero diagonal.

    Args:
        scores: ``[B, B]``.
        caption_similarity: Cosines between the captions ``[B, B]``; its gradient is stopped and its diagonal ignored.
        logit_scale: Multiplier of the scores (the exponential already taken).
        gamma: Weight of the margins.

    Returns:
        Scalar, the mean of both directions and of the batch.
    """
    margins = caption_similarity.detach().clone().fill_diagonal_(0.0)
    return contrastive_loss(scores + gamma * margins, logit_scale)


def grounding_loss(
    patches: Tensor,
    tokens: Tensor,
    owners: Tensor,
    spans: Tensor,
    boxes: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
) -> Tensor:
    """Symmetric cross entropy between phrases and the parts of pictures that they describe.

    A phrase is the mean of its tokens' features within the whole caption, and a part is the mean of the patches' features
    weighted by how much of each patch the box covers (region-text contrast of RegionCLIP, arXiv 2112.09106, and FG-CLIP,
    arXiv 2505.05071, but with the phrase left in its caption). Every phrase with another label in the batch is a negative,
    including those of the same caption.

    Args:
        patches: Projected features ``[B, P, D]`` of a square grid of patches, row by row, without CLS.
        tokens: Projected features ``[B, T, D]`` of the captions' tokens.
        owners: int64 ``[R]``, the pair that each phrase belongs to.
        spans: int64 ``[R, 2]``, the tokens ``first .. last + 1`` of each phrase.
        boxes: float ``[R, 4]``, the place of each phrase, ``x0, y0, x1, y1`` in [0, 1].
        labels: int64 ``[R]``, equal for phrases that describe the same thing.
        logit_scale: Multiplier of the cosines (the exponential already taken).

    Returns:
        Scalar, the mean of both directions and of the phrases; 0 without phrases.
    """
    if not len(owners):
        return patches.new_zeros(())
    position = torch.arange(tokens.shape[1], device=tokens.device)
    inside = (spans[:, :1] <= position) & (position < spans[:, 1:])
    regions = _pooled(patches.float(), _coverage(boxes, patches.shape[1]), owners)
    phrases = _pooled(tokens.float(), inside.float(), owners)
    same_label = (labels[:, None] == labels[None, :]).fill_diagonal_(False)
    return contrastive_loss(regions @ phrases.T, logit_scale, ignored=same_label)


def contextual_alignment_loss(
    patches: Tensor,
    tokens: Tensor,
    captions: Tensor,
    owners: Tensor,
    parts: Tensor,
    image_ids: Tensor,
    logit_scale: Tensor | float,
    *,
    beta: float = 0.5,
) -> Tensor:
    """Symmetric cross entropy between captions or their parts and what each attends to in its picture.

    Based on the contextualised alignment of beta-CLIP (arXiv 2512.12678). A query is a caption, or a part of one: the mean of
    its tokens' features within the caption. It attends to the patches of its picture, by cosine; their weighted mean is
    contrasted with those of all other queries in the batch. Queries of one picture are also positives of each other, to a
    lesser degree. The loss has no parameters and plays no role at inference.

    Args:
        patches: Projected features ``[B, P, D]``, without CLS.
        tokens: Projected features ``[B, T, D]`` of the captions' tokens.
        captions: Global rows ``[B, D]`` of the captions, of unit length.
        owners: int64 ``[S]``, the pair that each part belongs to, ascending.
        parts: int64 ``[S, 2]``, the tokens ``first .. last + 1`` of each part.
        image_ids: int64 ``[B]``, equal for pairs with the same picture.
        logit_scale: Multiplier of the cosines (the exponential already taken).
        beta: Target weight of another query of the same picture, relative to 1 for the query itself.

    Returns:
        Scalar, the mean of both directions and of the queries.
    """
    patches, tokens = patches.float(), tokens.float()
    position = torch.arange(tokens.shape[1], device=tokens.device)
    inside = ((parts[:, :1] <= position) & (position < parts[:, 1:])).float()
    pairs = torch.arange(len(captions), device=captions.device)
    queries = torch.cat([captions.float(), _pooled(tokens, inside, owners)])
    owners, order = torch.cat([pairs, owners]).sort(stable=True)
    queries = queries[order]
    padded, place = _by_owner(queries, owners, len(patches))
    attention = (_SHARPNESS * padded @ F.normalize(patches, dim=-1).transpose(1, 2)).softmax(dim=-1)
    attended = F.normalize((attention @ patches)[owners, place], dim=-1)
    logits = logit_scale * attended @ queries.T
    pictures = image_ids[owners]
    target = (beta * (pictures[:, None] == pictures)).fill_diagonal_(1.0)
    target = target / target.sum(dim=1, keepdim=True)  # still symmetric: queries of one picture have the same sum
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _pooled(features: Tensor, weights: Tensor, owners: Tensor) -> Tensor:
    """Pool features ``[B, N, D]`` into unit rows by each row of weights ``[R, N]``, which belongs to one of the ``B``."""
    padded, place = _by_owner(weights, owners, len(features))
    return F.normalize(torch.bmm(padded, features)[owners, place], dim=-1)


def _by_owner(rows: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Group rows ``[R, N]`` by owner into ``[count, R', N]``, zero-padded; also return the place of each in its group."""
    counts = torch.bincount(owners, minlength=count)
    place = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
    padded = rows.new_zeros(count, int(counts.max()), rows.shape[1])
    padded[owners, place] = rows
    return padded, place


def _coverage(boxes: Tensor, patches: int) -> Tensor:
    """Area of each patch that each box covers: ``[R, 4]`` to ``[R, P]``."""
    side = math.isqrt(patches)
    edges = torch.arange(side + 1, device=boxes.device) / side
    low, high = edges[:-1], edges[1:]
    across, down = (
        (torch.minimum(boxes[:, axis + 2, None], high) - torch.maximum(boxes[:, axis, None], low)).clamp(min=0.0)
        for axis in (0, 1)
    )
    return (down[:, :, None] * across[:, None, :]).flatten(1)


@dataclass(frozen=True)
class LossTerm:
    """One term of the sum: ``weight`` times ``loss`` of the ``on`` scores."""

    loss: str
    on: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES or self.on not in SCORES or not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"expected a loss of {LOSSES} on a score of {SCORES} with a positive weight, "
                f"got {self.loss!r} on {self.on!r} with {self.weight!r}"
            )

    @classmethod
    def parse(cls, text: str) -> LossTerm:
        """Parse ``"contrastive:fine"`` or ``"contrastive:fine:0.5"``."""
        loss, on, weight = [*text.split(":"), "1"][:3] if text.count(":") in (1, 2) else ("", "", "0")
        try:
            return cls(loss, on, float(weight))
        except ValueError as error:
            raise ConfigError(f"expected LOSS:SCORE or LOSS:SCORE:WEIGHT, got {text!r}: {error}") from None

    def __str__(self) -> str:
        return f"{self.loss}:{self.on}:{self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The weighted sum of loss terms over one batch of embeddings.

    Args:
        terms: Terms of the loss, at least one.
        margin: Margin of the triplet losses.
        gamma: Weight of the adaptive margins.
        label_smoothing: Label smoothing of the contrastive loss.
        late_interaction: Function from embeddings of pictures and of captions to fine scores ``[B, B]``.
    """

    terms: tuple[LossTerm, ...]
    margin: float = 0.2
    gamma: float = 0.5
    label_smoothing: float = 0.1
    late_interaction: Callable[[Tensor, Tensor], Tensor] = fine_scores

    def __call__(
        self, images: Tensor, texts: Tensor, image_ids: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch of pairs.

        Args:
            images, texts: Embeddings ``[B, L, D]``; pair ``i`` belongs together.
            image_ids: int64 ``[B]``.
            logit_scale: The multiplier itself, not its logarithm.

        Returns:
            The loss, and each term by name, unweighted and detached.
        """
        scores = {"global": images[:, 0].float() @ texts[:, 0].float().T}
        if any(term.on != "global" for term in self.terms):
            scores["fine"] = self.late_interaction(images, texts)
            scores["combined"] = COMBINED_ALPHA * scores["global"] + (1 - COMBINED_ALPHA) * scores["fine"]
        values = {str(term): self._term(term, scores[term.on], texts, image_ids, logit_scale) for term in self.terms}
        total = torch.stack([term.weight * values[str(term)] for term in self.terms]).sum()
        return total, {name: value.detach() for name, value in values.items()}

    def _term(self, term: LossTerm, scores: Tensor, texts: Tensor, image_ids: Tensor, logit_scale: Tensor) -> Tensor:
        if term.loss == "contrastive":
            return contrastive_loss(scores, logit_scale, label_smoothing=self.label_smoothing)
        if term.loss == "adaptive_margin":
            captions = texts[:, 0].float()
            return adaptive_margin_loss(scores, captions @ captions.T, logit_scale, gamma=self.gamma)
        return triplet_loss(scores, image_ids, margin=self.margin, hardest=term.loss == "hardest_triplet")
