"""Whether one evaluation is better than another on the same pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finelip_fast._errors import InputError
from finelip_fast.metrics import mcnemar
from finelip_fast.records import Table

_ABOUT = ("checkpoint", "engine", "context", "score")


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        rows: One for each run, context and score. ``i2t_p`` and ``t2i_p``: how probable so great a difference of recall@1 from
            the first run would be if both were equally good (McNemar's exact test); None in the first run's rows.
    """

    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"rows": self.rows}

    @property
    def table(self) -> Table:
        """For people: shares in %."""
        shown = []
        for row in self.rows:
            told: dict[str, Any] = {name: row[name] for name in ("run", *_ABOUT)}
            for way in ("i2t", "t2i"):
                told |= {f"{way} R@{k}": f"{100 * row[f'{way}_recall@{k}']:.1f}" for k in (1, 5, 10)}
                told[f"{way} p"] = "" if row[f"{way}_p"] is None else f"{row[f'{way}_p']:.2g}"
            shown.append(told)
        return Table("Comparison", shown)

    def __str__(self) -> str:
        return str(self.table)


def compare(files: Sequence[str | Path]) -> Comparison:
    """Compare what ``finelip eval --out FILE`` wrote, with the first file as the baseline.

    Each row of a later run is compared with the first run's row of the same context and score, or with its only row of that
    score.

    Args:
        files: At least two, of the same pairs.

    Raises:
        InputError: Fewer files, one that is no evaluation, or runs on different pairs.
    """
    if len(files) < 2:
        raise InputError(f"expected at least two results of finelip eval --out, got {len(files)}")
    runs = [_read(Path(file)) for file in files]
    baseline = runs[0]
    rows = []
    for file, run in zip(files, runs, strict=True):
        if run["pairs_fingerprint"] != baseline["pairs_fingerprint"]:
            raise InputError(
                f"{file} is of other pairs ({run['data']}, {run['pairs']}) than {files[0]} ({baseline['data']}, "
                f"{baseline['pairs']}): evaluate both on the same data"
            )
        for row in run["rows"]:
            other = None if run is baseline else _counterpart(baseline["rows"], row)
            about = {"run": Path(file).stem, **{name: row.get(name, run.get(name)) for name in _ABOUT}}
            metrics = {name: value for name, value in row.items() if isinstance(value, float)}
            tests = {f"{way}_p": None if other is None else _p_value(other, row, way) for way in ("i2t", "t2i")}
            rows.append(about | metrics | tests)
    return Comparison(rows)


def _p_value(a: dict[str, Any], b: dict[str, Any], way: str) -> float:
    return mcnemar(*(torch.tensor(row[f"{way}_ranks"]) <= 1 for row in (a, b)))


def _counterpart(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    same = [one for one in rows if one["score"] == row["score"]]
    exact = [one for one in same if one["context"] == row["context"]]
    return exact[0] if exact else same[0] if len(same) == 1 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["rows"][0]["i2t_ranks"] and found["pairs_fingerprint"]:
            return dict(found)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path} is no result of finelip eval --out ({error!r}); make one") from None
    raise InputError(f"{path} is no result of finelip eval --out; make one")
