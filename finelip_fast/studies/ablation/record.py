"""Tables and plots of the ablation's runs."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from finelip_fast.metrics import WAYS, quality
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.ablation.runs import (
    FINE_ALONE,
    GLOBAL_ALONE,
    PAPERS_ALPHA,
    Measures,
    Run,
    choose_alpha,
)
from finelip_fast.studies.ablation.variants import GROUPS, LOSSES, PAPER, Arm


def record(runs: dict[Arm, list[Run]], settings: dict[str, Any], *, data: str, validation: str, name: str) -> Record:
    """Make tables and plots of each arm's runs; a group with only one variant tried compares nothing.

    Args:
        runs: Runs of each arm, measured on ``data`` and on ``validation``.
        settings: Settings that all runs share.
        data: Pairs whose results are reported.
        validation: Pairs on which each arm's alpha is chosen.
        name: Name of the record.
    """
    tried = {arm.variant: _Tried.of(arm, seeded, data, validation) for arm, seeded in runs.items()}
    groups = {
        group: {name: tried[variant] for name, variant in members.items() if variant in tried}
        for group, members in GROUPS.items()
    }
    tables, plots = [], []
    most = max(map(len, groups.values()))
    for group, members in groups.items():
        if len(members) < min(2, most):
            continue
        rows = [{group: name, **member.row(beside=tried.get(LOSSES[PAPER]))} for name, member in members.items()]
        title = (
            f"{group}: recall@1 on {data} at alpha {PAPERS_ALPHA} or as named, mean and standard deviation over seeds"
        )
        tables.append(Table(title, rows))
        series = tuple(
            Series(
                label, list(members), *_range([member.recalls(alpha or member.alpha) for member in members.values()])
            )
            for label, alpha in ((f"alpha {PAPERS_ALPHA}", PAPERS_ALPHA), ("chosen alpha", None))
        )
        plots.append(Plot(group, "", "recall@1, both directions, mean and range, %", series))
    title = f"Which {' and '.join(plot.name for plot in plots)} help on {data}"
    return Record(name, title, tuple(tables), tuple(plots), settings, _finding(groups))


class _Tried(NamedTuple):
    """Results of a variant's runs: the measures of each seed, and the alpha chosen on other pairs."""

    rate: float
    alpha: str
    runs: list[Measures]

    @classmethod
    def of(cls, arm: Arm, runs: list[Run], data: str, validation: str) -> _Tried:
        alpha = choose_alpha([run.measured[validation] for run in runs])
        return cls(arm.rate, alpha, [run.measured[data] for run in runs])

    def at(self, alpha: str) -> list[dict[str, float]]:
        """Metrics of each run; without late interaction, those of the cosine, whatever the alpha."""
        return [run.get(alpha, run[GLOBAL_ALONE]) for run in self.runs]

    def recalls(self, alpha: str = PAPERS_ALPHA) -> list[float]:
        """Recall@1 of each run in %, mean of both directions."""
        return [100 * quality(metrics)[0] for metrics in self.at(alpha)]

    def row(self, beside: _Tried | None) -> dict[str, str]:
        """Row of the table, with errors relative to another variant's, each at its own alpha where alphas are chosen."""
        paper = self.at(PAPERS_ALPHA)
        row = {"learning rates": f"{self.rate:g}x"}
        row |= {f"{way} (%)": _spread([100 * summary[f"{way}_recall@1"] for summary in paper]) for way in WAYS}
        row["mrr"] = _spread([quality(summary)[1] for summary in paper], digits=3)
        if beside:
            row["error beside the triplet's"] = _ratio(self.recalls(), beside.recalls())
        row["global alone (%)"] = _spread(self.recalls(GLOBAL_ALONE))
        is_fine = FINE_ALONE in self.runs[0]
        row["fine alone (%)"] = _spread(self.recalls(FINE_ALONE)) if is_fine else ""
        row["chosen alpha"] = self.alpha if is_fine else ""
        row["at chosen alpha (%)"] = _spread(self.recalls(self.alpha))
        if beside:
            row["error beside the triplet's, at chosen alphas"] = _ratio(
                self.recalls(self.alpha), beside.recalls(beside.alpha)
            )
        return row


def _finding(groups: dict[str, dict[str, _Tried]]) -> str:
    """Rank each group by recall@1, at the paper's alpha and at the chosen ones."""
    sentences = []
    for group, members in groups.items():
        if len(members) < 2:
            continue
        for where, alphas in (
            (f"alpha {PAPERS_ALPHA}", dict.fromkeys(members, PAPERS_ALPHA)),
            ("each one's chosen alpha", {name: variant.alpha for name, variant in members.items()}),
        ):
            recalls = {name: statistics.mean(variant.recalls(alphas[name])) for name, variant in members.items()}
            ordered = sorted(recalls, key=lambda name: -recalls[name])
            listed = ", ".join(f"{name} {recalls[name]:.1f} %" for name in ordered)
            sentences.append(f"Recall@1 of {group} at {where}, from the best: {listed}.")
    return " ".join(sentences)


def _range(runs: list[list[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean, minimum and maximum of each variant's runs."""
    mean, least, greatest = ([function(values) for values in runs] for function in (statistics.mean, min, max))
    return mean, least, greatest


def _ratio(recalls: list[float], baseline: list[float]) -> str:
    """Ratio of the errors of two recalls in %."""
    missed, their_missed = 100 - statistics.mean(recalls), 100 - statistics.mean(baseline)
    return f"{missed / their_missed:.2f}x" if their_missed else "-"


def _spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
