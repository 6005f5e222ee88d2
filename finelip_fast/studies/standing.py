"""Study of whether a search can tell that what it looks for is not there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.engines import Engine
from finelip_fast.errors import InputError
from finelip_fast.hits import Hit
from finelip_fast.index.standing import FEWEST, ratios, sampled_rows, stands_out
from finelip_fast.kernels import clim_scores
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.setting import Setting

_SIZES = (100, 1000, 5000)
_QUERIES = 500  # of each kind: with their picture in the index, and without
_BLOCK = 32  # queries scored at once
_RATIO, _FLAT = "z relative to chance", "score (flat cut-off)"


def _gap(scores: Tensor, _: Tensor) -> Tensor:
    best = scores.topk(10, dim=1).values
    return best[:, 0] - best[:, -1]


def _z(scores: Tensor, sampled: Tensor) -> Tensor:
    return (scores.amax(dim=1) - sampled.mean(dim=1)) / sampled.std(dim=1)


def _robust_z(scores: Tensor, sampled: Tensor) -> Tensor:
    median = sampled.median(dim=1, keepdim=True).values
    return (scores.amax(dim=1) - median[:, 0]) / (1.4826 * (sampled - median).abs().median(dim=1).values)


# Statistics [Q] of the best hits, from scores [Q, N] and those of a sample [Q, n].
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    _FLAT: lambda scores, _: scores.amax(dim=1),
    "gap to the tenth": _gap,
    "z": _z,
    "robust z": _robust_z,
    _RATIO: lambda scores, sampled: ratios(scores.amax(dim=1, keepdim=True), sampled, scores.shape[1])[:, 0],
}


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Probability that a value of the first kind is above one of the second; ties count half."""
    ranked = negative.sort().values
    below, upto = (torch.searchsorted(ranked, positive, right=right) for right in (False, True))
    return ((below + upto).double().mean() / (2 * len(negative))).item()


def fit(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Centre and slope of a logistic regression with equal weight for both kinds."""
    values = torch.cat([positive, negative]).double()
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    weights = torch.where(labels == 1, 0.5 / len(positive), 0.5 / len(negative))
    mean, deviation = values.mean(), values.std()
    values = (values - mean) / deviation
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # A small penalty keeps the slope finite if the kinds do not overlap.
        total = F.binary_cross_entropy_with_logits(values * line[0] + line[1], labels, weights, reduction="sum")
        total = total + 1e-4 * line[0] ** 2
        total.backward()
        return total

    optimizer.step(loss)
    slope, offset = line.detach().tolist()
    return (mean - deviation * offset / slope).item(), (slope / deviation).item()


class Searches:
    """Best hits of descriptions: with their picture in the index, without it and similar ones, and with similar ones only.

    Descriptions of the second kind belong to the last pictures, which are never searched: in Scenes, no earlier picture is of
    their family.

    Attributes:
        kinds: Statistics and probability of the best hit, by alpha, size of the index and kind of search.
    """

    KINDS = ("with", "without", "alike")

    def __init__(self, engine: Engine, setting: Setting, data: str, alphas: tuple[float, ...]) -> None:
        pairs = setting.embed(engine, data)
        count = len(pairs.images)
        queries = min(_QUERIES, count // 4)
        held = count - queries
        self.sizes = [*(size for size in _SIZES if size < held), min(held, _SIZES[-1])]
        if self.sizes[0] < FEWEST:
            raise InputError(
                f"expected {FEWEST} pictures to search and a quarter more, got {count}; give --data with more"
            )
        first: dict[int, int] = {}
        for at, owner in enumerate(pairs.owners.tolist()):
            first.setdefault(owner, at)
        owners = [*range(queries), *range(held, count)]
        texts = engine.embed_texts([pairs.captions[first[owner]] for owner in owners])
        self.queries = queries
        self.kinds: dict[tuple[float, int, str], dict[str, Tensor]] = {}
        for alpha in alphas:
            blocks = [clim_scores(block, pairs.images[:held], alpha=alpha).cpu() for block in texts.split(_BLOCK)]
            scores = torch.cat(blocks)
            for size in self.sizes:
                self._search(alpha, size, scores)

    def _search(self, alpha: float, size: int, scores: Tensor) -> None:
        parts: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in self.KINDS}
        edges = [*range(0, self.queries, size), self.queries]
        for start, stop in pairwise(edges):
            if start + size > scores.shape[1]:
                break
            present = scores[start:stop, start : start + size]
            right_picture = torch.eye(stop - start, size, dtype=torch.bool)
            parts["with"].append(_measured(present, alpha))
            absent = scores[self.queries + start : self.queries + stop, start : start + size]
            parts["without"].append(_measured(absent, alpha))
            parts["alike"].append(_measured(present[~right_picture].reshape(stop - start, -1), alpha))
        for kind, dicts in parts.items():
            self.kinds[alpha, size, kind] = {name: torch.cat([part[name] for part in dicts]) for name in dicts[0]}

    def pooled(self, alpha: float, kind: str, name: str) -> Tensor:
        """Values of a statistic over searches in indexes of all sizes."""
        return torch.cat([self.kinds[alpha, size, kind][name] for size in self.sizes])


def _measured(scores: Tensor, alpha: float) -> dict[str, Tensor]:
    sampled = scores[:, sampled_rows(scores.shape[1], None)]
    best = scores.amax(dim=1, keepdim=True)
    values = {name: statistic(scores, sampled) for name, statistic in STATISTICS.items()}
    return values | {"probability": stands_out(best, sampled, scores.shape[1], alpha)[:, 0]}


def standing(engine: Engine, setting: Setting) -> Record:
    """Measure how well several statistics distinguish searches whose picture is in the index from others.

    Raises:
        InputError: There are too few pictures.
    """
    alphas = tuple(dict.fromkeys((engine.alpha, 1.0)))
    known = Searches(engine, setting, setting.validation, (engine.alpha,))
    tested = Searches(engine, setting, setting.data, alphas)
    alpha = engine.alpha
    rows: list[dict[str, Any]] = []
    for size in [*tested.sizes, None]:
        for kind, title in (("without", "the picture and similar ones"), ("alike", "the picture only")):
            row: dict[str, Any] = {"items": "all sizes" if size is None else f"{size:,}", "not in the index": title}
            for name in STATISTICS:
                values = [
                    tested.pooled(alpha, part, name) if size is None else tested.kinds[alpha, size, part][name]
                    for part in ("with", kind)
                ]
                row[name] = round(auroc(*values), 3)
            rows.append(row)
    cuts, lines = [], []
    for name in (_FLAT, _RATIO):
        centre, slope = fit(*(known.pooled(alpha, kind, name) for kind in ("with", "without")))
        lines.append((centre, slope))
        row = {"statistic": name, "centre": round(centre, 3), "slope": round(slope, 1)}
        for weight in alphas:
            sides = [tested.pooled(weight, kind, name) for kind in ("with", "without")]
            right = [(sides[0] >= centre).double().mean().item(), (sides[1] < centre).double().mean().item()]
            row[f"right at alpha {weight:g} (%)"] = round(50 * sum(right), 1)
        cuts.append(row)
    verdicts = []
    for kind, title in zip(
        Searches.KINDS, ("in the index", "missing, similar ones too", "missing, similar ones are there"), strict=True
    ):
        words = [
            Hit("", 0, 0, None, {}, stands_out=p).verdict for p in tested.pooled(alpha, kind, "probability").tolist()
        ]
        verdicts.append(
            {"the picture is": title}
            | {
                f"{verdict} (%)": round(100 * words.count(verdict) / len(words), 1)
                for verdict in ("stands out", "perhaps", "does not stand out")
            }
        )
    pooled = next(row for row in rows if row["items"] == "all sizes")
    finding = (
        f"In indexes of {' and '.join(f'{size:,}' for size in tested.sizes)} items, the AUROC of searches whose picture is in "
        f"the index against searches without it and without similar ones is {pooled[_RATIO]} for z relative to chance, on "
        f"which Hit.stands_out is based, and {pooled[_FLAT]} for a flat cut-off on the score. Of the former, "
        f"{verdicts[0]['stands out (%)']} % stand out; of the latter, {verdicts[1]['stands out (%)']} %. Fitted on the "
        f"validation pairs, the curve has its centre at {lines[1][0]:.3f} and a slope of {lines[1][1]:.1f}."
    )
    series = tuple(
        Series(
            name,
            [f"{size:,}" for size in tested.sizes],
            [auroc(*(tested.kinds[alpha, size, kind][name] for kind in ("with", "alike"))) for size in tested.sizes],
        )
        for name in STATISTICS
    )
    about = setting.about(engine, validation=setting.validation, queries=tested.queries)
    tables = (
        Table("AUROC", rows),
        Table("One cut-off, chosen on the validation pairs", cuts),
        Table("Verdicts", verdicts),
    )
    plots = (Plot("auroc", "items", "AUROC where the picture is missing and similar ones are there", series),)
    return Record("standing-out", "Whether a search tells that nothing matches", tables, plots, about, finding)
