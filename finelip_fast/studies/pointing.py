"""Study of whether maps of phrases peak on what the phrases describe."""

from __future__ import annotations

from typing import Any

import torch

from finelip_fast.checkpoint import load
from finelip_fast.engines import Engine
from finelip_fast.explain import pointing_game
from finelip_fast.metrics import bootstrap_interval
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.setting import Setting


def pointing(engine: Engine, setting: Setting) -> Record:
    """Play the pointing game by kind of map and kind of object, with PyTorch whatever the engine.

    Raises:
        InputError: The phrases have no boxes, or the checkpoint has no trained aggregators.
    """
    setting.refuse_untrained(engine)
    played = pointing_game(load(engine.source or None, engine.device), setting.open(engine), progress=setting.progress)
    groups = {"all": played}
    for game in played:
        groups.setdefault(game["label"].partition("(")[0], []).append(game)
    ways = {"chance": "chance", "raw": "raw tokens", "aggregated": "aggregated tokens"}
    rows: list[dict[str, Any]] = [
        {"phrases of": name, "phrases": len(members)}
        | {
            f"{title} (%)": round(100 * sum(game[way] for game in members) / len(members), 1)
            for way, title in ways.items()
        }
        for name, members in groups.items()
    ]
    series = []
    for way, title in ways.items():
        values = [torch.tensor([float(game[way]) for game in members]) for members in groups.values()]
        bounds = [bootstrap_interval(hits) for hits in values]
        means = [100 * hits.mean().item() for hits in values]
        low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
        series.append(Series(title, list(groups), means, low, high))
    best = rows[0]
    finding = (
        f"The map of raw tokens peaks inside the right box for {best['raw tokens (%)']} % of {best['phrases']} phrases, that "
        f"of aggregated tokens for {best['aggregated tokens (%)']} %, a patch by chance for {best['chance (%)']} %. "
        + (
            "Aggregation costs localisation: explanations show raw maps unless asked otherwise."
            if best["aggregated tokens (%)"] < best["raw tokens (%)"]
            else ""
        )
    )
    plots = (Plot("hits", "", "peaks inside the box (%)", tuple(series)),)
    about = setting.about(engine) | {"engine": "torch fp32"}
    return Record("pointing", "Where phrases are found", (Table("Hits", rows),), plots, about, finding)
