"""Test whether one evaluation is better than another on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finelip_fast._terminal import printable
from finelip_fast.errors import InputError
from finelip_fast.evaluation.result import Evaluation, Row, read_evaluation
from finelip_fast.metrics import WAYS, bootstrap_interval, mcnemar
from finelip_fast.records import markdown_table

_NAMES = ("recall@1", "recall@5", "recall@10", "mrr")
_HEADS = ("R@1", "R@5", "R@10", "MRR")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        data: Name of the pairs.
        rows: One row per run, context and score: ``run``, ``checkpoint``, ``engine``, ``precision``, ``context_length``,
            ``score``, ``alpha``, and recall@1, @5, @10 and mrr of each direction, such as ``i2t_recall@1``. ``against`` is the
            context length of the baseline's row that it was tested against; None in the baseline's own rows, and if the
            baseline lacks the score. ``i2t_difference`` is the difference in recall@1 from the baseline, ``i2t_interval`` its
            95 % interval ``(low, high)`` from a paired bootstrap that draws pictures with all their captions, and ``i2t_p``
            the probability of so large a difference if both were equally good (McNemar's exact test). ``t2i_p`` is None if
            pictures have several captions: these are found and missed together, so the test would claim too much; the
            interval does not.
    """

    data: str
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"data": self.data, "rows": self.rows}

    def __str__(self) -> str:
        return "\n\n".join(_aligned(lines) for lines in self._tables(short=True))

    def markdown(self) -> str:
        """Return two tables: the runs, and their differences from the first."""
        return "\n\n".join(map(markdown_table, self._tables(short=False)))

    def _tables(self, *, short: bool) -> list[list[list[str]]]:
        """Return the header and the rows as text; recall in %."""
        metrics = [f"{way} {head}" if head == "R@1" or not short else head for way in WAYS for head in _HEADS]
        runs = [["run", "checkpoint", "engine", "context", "score", *metrics]]
        tests = [
            [
                "run",
                "context",
                "score",
                "against",
                *(f"{way} R@1 {quantity}" for way in WAYS for quantity in ("[95 %]", "p")),
            ]
        ]
        for row in self.rows:
            name = Path(row["checkpoint"]).name[-24:] if short else row["checkpoint"]
            about = [row["run"], name, f"{row['engine']} {row['precision']}", str(row["context_length"]), row["score"]]
            runs.append([*about, *(f"{100 * row[f'{way}_{metric}']:.1f}" for way in WAYS for metric in _NAMES)])
            if row["against"] is not None:
                cells = [text for way in WAYS for text in _cells(row, way)]
                tests.append(
                    [row["run"], str(row["context_length"]), row["score"], f"context {row['against']}", *cells]
                )
        return [runs, tests] if len(tests) > 1 else [runs]


def compare(files: Sequence[str | Path]) -> Comparison:
    """Compare results of ``finelip eval --save FILE``, with the first file as the baseline.

    Each row of a later run is tested against the first run's row of the same score with the same context or, if there is
    none, the longest.

    Args:
        files: Results on the same pairs, at least two.

    Raises:
        InputError: Fewer files, a file that is not an evaluation, or runs on different pairs.
    """
    if len(files) < 2:
        raise InputError(f"expected at least two results of finelip eval --save, got {len(files)}")
    runs = [read_evaluation(file) for file in files]
    baseline = runs[0]
    stems = [Path(file).stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    rows = []
    for file, name, run in zip(files, names, runs, strict=True):
        if (run.pairs_fingerprint, run.picture_of) != (baseline.pairs_fingerprint, baseline.picture_of):
            raise InputError(
                f"{file} and {files[0]} are results on different pairs, {_described(run)} and {_described(baseline)}: "
                f"{_differs(run, baseline)}; evaluate both on the same data"
            )
        for row in run.rows:
            counterpart = None if run is baseline else _counterpart(baseline.rows, row)
            about = {"run": name, **{key: getattr(run, key) for key in ("checkpoint", "engine", "precision", "alpha")}}
            metrics = {f"{way}_{metric}": row.metrics[f"{way}_{metric}"] for way in WAYS for metric in _NAMES}
            tests = {"against": counterpart and counterpart.context_length, **_tests(counterpart, row, run.picture_of)}
            rows.append(about | {"context_length": row.context_length, "score": row.score} | metrics | tests)
    return Comparison(baseline.data, rows)


def _tests(baseline: Row | None, row: Row, picture_of: list[int]) -> dict[str, Any]:
    tests: dict[str, Any] = {}
    for way in WAYS:
        if baseline is None:
            tests |= {f"{way}_{name}": None for name in ("difference", "interval", "p")}
            continue
        before, after = (torch.tensor(measured.ranks[way]) <= 1 for measured in (baseline, row))
        differences = after.double() - before.double()
        shared = way == "t2i" and len(set(picture_of)) < len(picture_of)
        groups = torch.tensor(picture_of) if shared else None
        tests[f"{way}_difference"] = differences.mean().item()
        tests[f"{way}_interval"] = bootstrap_interval(differences, groups=groups)
        tests[f"{way}_p"] = None if shared else mcnemar(before, after)
    return tests


def _counterpart(rows: list[Row], row: Row) -> Row | None:
    by_length = {candidate.context_length: candidate for candidate in rows if candidate.score == row.score}
    return by_length.get(row.context_length) or (by_length[max(by_length)] if by_length else None)


def _described(run: Evaluation) -> str:
    return f"{printable(run.data)[:80] or 'data without a name'} ({run.pictures} pictures, {run.pairs} captions)"


def _differs(run: Evaluation, baseline: Evaluation) -> str:
    for name in ("pictures", "pairs", "picture_of"):
        if getattr(run, name) != getattr(baseline, name):
            return {"pictures": "the numbers of pictures differ", "pairs": "the numbers of captions differ"}.get(
                name, "captions belong to other pictures"
            )
    return "captions, names of pictures or their order differ"


def _cells(row: dict[str, Any], way: str) -> tuple[str, str]:
    low, high = row[f"{way}_interval"]
    p = row[f"{way}_p"]
    return (
        f"{100 * row[f'{way}_difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        "-" if p is None else f"{p:.2g}",
    )


def _aligned(lines: list[list[str]]) -> str:
    """Align columns of text to the left, and columns of numbers to the right."""
    columns = []
    for column in zip(*([printable(cell) for cell in line] for line in lines), strict=True):
        width = max(map(len, column))
        number = all(text[:1] in "+-" or text[:1].isdigit() for text in column[1:])
        columns.append([text.rjust(width) if number else text.ljust(width) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
