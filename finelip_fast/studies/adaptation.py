"""Study of what an adaptation gains for its cost, compared with training the whole model from the same base."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from finelip_fast._files import read_bytes, write_text_whole
from finelip_fast._json import parse_json, read_json, stated_otherwise
from finelip_fast._typed import typed
from finelip_fast.checkpoint import fingerprint, load
from finelip_fast.datasets import PairDataset, open_dataset
from finelip_fast.errors import ConfigError
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.metrics import WAYS
from finelip_fast.model import FineLIP
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.training.adapt import OF_ENCODERS, stages
from finelip_fast.training.config import TrainConfig, load_recipe
from finelip_fast.training.features import compute
from finelip_fast.training.start import load_base
from finelip_fast.training.train import train
from finelip_fast.training.validation import mean_recall, validate

# Part of the encoders that each adaptation trains in its second stage.
ADAPTATIONS = {"aggregators alone": "none", "then the last 2 blocks": "last:2", "then all blocks": "all"}
EVERYTHING = "everything at once"

# Fields of the recipe that an adaptation sets itself.
_OF_THE_RECIPE = ("out", "init", "preset", "steps", "encoder_lr", "aggregator_lr", "warmup_steps", "unfreeze")
_MAX_BYTES = 1 << 24


@dataclass(frozen=True)
class AdaptationSetting:
    """Settings of the study: what is adapted, and how.

    Attributes:
        base: Checkpoint, as accepted by :func:`finelip_fast.load`.
        recipe: Recipe that trains everything from the base; the adaptations use its pairs, loss and batches.
        data: Pairs to measure on, as in :func:`finelip_fast.datasets.open_dataset`.
        runs: Folder of the runs and of the features.
        steps, encoder_steps: Steps of the adaptations' first and second stages.
        aggregator_lr, encoder_lr: Peak learning rates of the adaptations.
        progress: Whether to show progress bars.
    """

    base: str
    recipe: str
    data: str
    runs: str
    steps: int
    encoder_steps: int
    aggregator_lr: float
    encoder_lr: float
    progress: bool = True


class Way(NamedTuple):
    """One way from the base to a FineLIP: its runs, one after another."""

    name: str
    runs: list[TrainConfig]

    @property
    def has_features(self) -> bool:
        """Whether the encoders run once over all pairs, before the first run."""
        return bool(self.runs[0].features)


def adaptation(setting: AdaptationSetting) -> Record:
    """Adapt a base in three ways, train all of it at once, and compare the costs and results.

    The cost is processor time, including that of the features. A stopped run is resumed, and a finished one is not trained
    again.

    Raises:
        ConfigError: The recipe or the rates cannot be honoured, or the folder holds runs of another setting.
    """
    recipe = {**load_recipe(setting.recipe, out=f"{setting.runs}/everything"), "init": setting.base, "workers": 0}
    ways = _ways(setting, recipe)
    first = ways[0].runs[0]
    base = load_base(setting.base, first.context_length).eval()
    _refuse_others(setting, recipe, base)
    folder, precision = Path(first.features), cast("LinearPrecision", first.feature_precision)
    for_features = _hours(
        folder,
        lambda: compute(
            base, _open(first.train, base, first.root), folder / "train", precision=precision, progress=setting.progress
        ),
    )
    hours = {
        run.out: _hours(Path(run.out), lambda run=run: train(run, progress=setting.progress))  # type: ignore[misc]
        for way in ways
        for run in way.runs
    }
    start, curves = 100 * mean_recall(_measured(base, first.validation, first.root)), []
    rows = [_row("the base", base, setting.data)]
    for way in ways:
        spent = for_features if way.has_features else 0.0
        costs, reached = [0.0], [start]
        for run in way.runs:
            for step, recall in _validations(run):
                costs.append(spent + hours[run.out] * step / run.steps)
                reached.append(recall)
            spent += hours[run.out]
        curves.append(Series(way.name, costs, reached))
        rows.append(_row(way.name, load(str(Path(way.runs[-1].out) / "best")), setting.data, spent))
    return _record(rows, curves, setting)


def _ways(setting: AdaptationSetting, recipe: dict[str, Any]) -> list[Way]:
    """List the adaptations, which share their first stage, and the training of everything at once."""
    folder = Path(setting.runs)
    shared = {name: value for name, value in recipe.items() if name not in _OF_THE_RECIPE}
    shared |= {"steps": setting.steps, "aggregator_lr": setting.aggregator_lr, "features": str(folder / "features")}
    ways = []
    for name, unfreeze in ADAPTATIONS.items():
        if unfreeze == "none":
            options = {name: value for name, value in shared.items() if name not in OF_ENCODERS}
        else:
            options = shared | {"encoder_steps": setting.encoder_steps, "encoder_lr": setting.encoder_lr}
        runs = stages(setting.base, out=str(folder), unfreeze=unfreeze, **options)
        second = [dataclasses.replace(run, out=f"{folder / unfreeze.replace(':', '-')}") for run in runs[1:]]
        ways.append(Way(name, [runs[0], *second]))
    return [*ways, Way(EVERYTHING, [TrainConfig(**recipe)])]


def _refuse_others(setting: AdaptationSetting, recipe: dict[str, Any], base: FineLIP) -> None:
    """Refuse a folder with runs of another setting, since a finished run is not checked again."""
    names = ("steps", "encoder_steps", "aggregator_lr", "encoder_lr")
    about = {"base": fingerprint(base), "recipe": recipe, **{name: getattr(setting, name) for name in names}}
    path = Path(setting.runs) / "setting.json"
    changed = stated_otherwise(path, about, error=ConfigError, expected="settings of a study", max_bytes=_MAX_BYTES)
    if changed:
        raise ConfigError(
            f"{setting.runs} holds runs of another {' and another '.join(changed)}: give another --runs, or remove it"
        )


def _open(spec: str, model: FineLIP, root: str) -> PairDataset:
    pairs: PairDataset = open_dataset(spec, image_size=model.config.image_size, root=root or None)
    return pairs


@torch.inference_mode()
def _measured(model: FineLIP, data: str, root: str = "") -> dict[str, float]:
    return validate(model.eval(), _open(data, model, root), name=data)


def _hours(folder: Path, work: Callable[[], object]) -> float:
    """Do some work unless it is finished, and return its processor hours with earlier tries, kept in its folder."""
    path = folder / "cost.json"
    hours, finished = _cost(path) if path.exists() else (0.0, False)
    if not finished:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        try:
            work()
            finished = True
        finally:
            hours += (time.process_time() - start) / 3600
            write_text_whole(path, json.dumps({"hours": hours, "finished": finished}) + "\n")
    return hours


def _cost(path: Path) -> tuple[float, bool]:
    values: dict[str, Any] = read_json(
        path, error=ConfigError, expected="what a run has cost", kind=dict, max_bytes=_MAX_BYTES
    )
    try:
        return typed(values.get("hours"), float, "hours"), typed(values.get("finished"), bool, "finished")
    except ValueError as error:
        raise ConfigError(
            f"{path}: expected what a run has cost ({error}); delete that folder to train it again"
        ) from None


def _validations(run: TrainConfig) -> list[tuple[int, float]]:
    """Steps at which a run was validated, with recall@1 at each, the mean of both directions in %."""
    path = Path(run.out) / "log.jsonl"
    lines = read_bytes(path, error=ConfigError, max_bytes=_MAX_BYTES).splitlines()
    values = [parse_json(line, str(path), error=ConfigError, kind=dict) for line in lines]
    return [(int(line["step"]), 100 * mean_recall(line)) for line in values if "val_alpha" in line]


def _row(name: str, model: FineLIP, data: str, hours: float = 0.0) -> dict[str, Any]:
    metrics = _measured(model, data)
    return {
        "trained": name,
        "core-hours": hours,
        **{f"{way} (%)": 100 * metrics[f"val_{way}_recall@1"] for way in WAYS},
        "recall@1 (%)": 100 * mean_recall(metrics),
        "alpha": model.alpha,
    }


def _record(rows: list[dict[str, Any]], curves: list[Series], setting: AdaptationSetting) -> Record:
    base, *ways, everything = rows
    gain = everything["recall@1 (%)"] - base["recall@1 (%)"]
    sentences = []
    for row in ways:
        share = 100 * (row["recall@1 (%)"] - base["recall@1 (%)"]) / gain if gain else float("nan")
        cost = 100 * row["core-hours"] / everything["core-hours"]
        sentences.append(f"{row['trained'].capitalize()}: {share:.0f} % of the gain for {cost:.0f} % of the cost.")
    finding = f"Everything at once gains {gain:.1f} points of recall@1 (mean of both directions). {' '.join(sentences)}"
    plot = Plot("curve", "core-hours", "recall@1 on validation pairs, both directions, %", tuple(curves))
    about = {name: value for name, value in dataclasses.asdict(setting).items() if name not in ("runs", "progress")}
    tables = (Table(f"recall@1 on {setting.data}, of the step that is best on validation pairs", rows),)
    return Record("adaptation", "What an adaptation gives for its cost", tables, (plot,), about, finding)
