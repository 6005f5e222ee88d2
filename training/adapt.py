"""Make a FineLIP from any CLIP: train its aggregators on precomputed features, then also the encoders' last blocks.

Both stages are runs of :mod:`finelip_fast.training.train` in the folder of the checkpoint, so the same command resumes an
interrupted adaptation.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from finelip_fast import checkpoint
from finelip_fast._quantities import readable_duration, readable_size
from finelip_fast.checkpoint.saving import name_of
from finelip_fast.datasets import PairDataset, open_dataset
from finelip_fast.datasets.survey import survey
from finelip_fast.errors import ConfigError
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.model import FineLIP
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.features import compute, encoders_of, missing_bytes
from finelip_fast.training.forecast import encoding_seconds, step_seconds
from finelip_fast.training.start import choose_device, load_base
from finelip_fast.training.train import train
from finelip_fast.training.validation import mean_recall, validate

# Default options of each stage.
AGGREGATORS: dict[str, Any] = {"steps": 1500, "aggregator_lr": 1e-3, "warmup_steps": 100}
ENCODERS: dict[str, Any] = {"steps": 500, "encoder_lr": 1e-5, "warmup_steps": 50}

# Options of one stage only. Features are computed from unaugmented captions.
_OF_AGGREGATORS = ("steps", "aggregator_lr", "features")
OF_ENCODERS = ("encoder_lr", "augment", "gradient_checkpointing")
# In the second stage, the trained aggregators get this fraction of their first learning rate.
_SECOND_SHARE = 0.2


def stages(
    base: str, *, out: str, unfreeze: str = "last:2", encoder_steps: int | None = None, **options: Any
) -> list[TrainConfig]:
    """Configure the runs of an adaptation.

    Args:
        base: Checkpoint, as accepted by :func:`finelip_fast.load`.
        out: Folder of the resulting checkpoint, which also contains the runs.
        unfreeze: Part of the encoders to train in the second stage; ``"none"``: there is no second stage.
        encoder_steps: Steps of the second stage; None: 500.
        options: Fields of :class:`TrainConfig`: ``steps`` and ``features`` for the first stage, ``encoder_lr``, ``augment``
            and ``gradient_checkpointing`` for the second, all others for both.

    Raises:
        ConfigError: A run cannot honour the options, or some apply only to a second stage and there is none.
    """
    folder = Path(out)
    alone = [name for name in OF_ENCODERS if name in options] + ["encoder_steps"] * (encoder_steps is not None)
    if unfreeze == "none" and alone:
        raise ConfigError(
            f"expected no {', '.join(alone)} with unfreeze none, which trains only the aggregators, on precomputed features; "
            "omit them, or use unfreeze last:2"
        )
    if "loss" in options and all(term.split(":")[1:2] == ["global"] for term in options["loss"]):
        raise ConfigError(
            f"expected a loss with a term on fine or combined, which trains the aggregators, got {options['loss']}"
        )
    first = {
        **AGGREGATORS,
        "features": str(folder / "features"),
        **{name: value for name, value in options.items() if name not in OF_ENCODERS},
    }
    runs = [TrainConfig(**first, unfreeze="none", init=base, out=str(folder / "aggregators"))]
    if unfreeze != "none":
        second = {**ENCODERS, **{name: value for name, value in options.items() if name not in _OF_AGGREGATORS}}
        second |= {
            "steps": ENCODERS["steps"] if encoder_steps is None else encoder_steps,
            "aggregator_lr": _SECOND_SHARE * first["aggregator_lr"],
        }
        start = str(folder / "aggregators" / "best")
        runs.append(TrainConfig(**second, unfreeze=unfreeze, init=start, out=str(folder / "encoders")))
    return runs


def adapt(base: str, *, progress: bool = True, **options: Any) -> dict[str, Any]:
    """Train a checkpoint's aggregators, then part of its encoders, and keep the best weights on validation pairs.

    Args:
        base: Checkpoint, as accepted by :func:`finelip_fast.load`.
        progress: Whether to print a forecast of disk space and time, and to show progress bars.
        options: Options of :func:`stages`.

    Returns:
        Mean recall@1 of both directions on the validation pairs: ``base_recall@1`` for the base with its own score, and
        ``aggregators_recall@1`` and ``encoders_recall@1`` for the stages. Also ``chosen``, the stage whose weights the
        checkpoint holds, ``alpha``, stored with them, ``checkpoint``, its folder, and ``features``, a folder that is no
        longer needed.

    Raises:
        CheckpointError: The base cannot be loaded.
        ConfigError, TrainingError, WriteError: As raised by :func:`finelip_fast.training.train.train`. The same command then
            resumes.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "an adaptation runs in a single process, not under torchrun; run its two trainings with training/train.py, as "
            "docs/how-to/adapt.md describes"
        )
    runs = stages(base, **options)
    out, first = Path(options["out"]), runs[0]
    if first.threads:
        torch.set_num_threads(first.threads)
    model = load_base(base, first.context_length).to(choose_device(first.device)).eval()
    pairs, validation = (_open(spec, model, first) for spec in (first.train, first.validation))
    if progress:
        _tell(_forecast(model, runs, pairs))
    folder = Path(first.features) / "validation"
    features = compute(model, validation, folder, precision=_precision(first), progress=progress)
    before = validate(model, validation, name=first.validation, features=features)
    del model
    results = {"base": mean_recall(before)}
    metrics: dict[str, dict[str, float]] = {}
    for run in runs:
        stage = Path(run.out).name
        metrics[stage] = train(run, progress=progress)
        results[stage] = mean_recall(metrics[stage])
        if progress:
            _tell([f"{stage}: recall@1 {results[stage]:.1%}, the base {results['base']:.1%}"])
    chosen = max(metrics, key=lambda stage: results[stage])
    best = checkpoint.load(out / chosen / "best")
    checkpoint.save(best, out, metadata={"base": name_of(base), "stage": chosen, "validation": metrics[chosen]})
    return {
        **{f"{name}_recall@1": recall for name, recall in results.items()},
        "chosen": chosen,
        "alpha": best.alpha,
        "checkpoint": str(out),
        "features": first.features,
    }


def _forecast(model: FineLIP, runs: list[TrainConfig], pairs: PairDataset) -> list[str]:
    """Forecast the disk space and time of the stages that have not begun."""
    known = survey(pairs, stamps=True)
    first = runs[0]
    lines = [f"{len(known.ids)} pictures, {len(known.captions)} captions:"]
    folder = Path(first.features) / "train"
    if size := missing_bytes(model, pairs, known, folder):
        seconds = encoding_seconds(encoders_of(model, _precision(first)), pairs, known)
        lines.append(f"  features: {readable_size(size)} in {folder}, about {readable_duration(seconds)}")
    for run in runs:
        if not (Path(run.out) / "state.pt").exists():
            seconds = run.steps * step_seconds(model, run, known)
            lines.append(f"  {Path(run.out).name}: {run.steps} steps, about {readable_duration(seconds)}")
    return lines if len(lines) > 1 else []


def _tell(lines: list[str]) -> None:
    for line in lines:
        tqdm.write(line, file=sys.stderr)


def _precision(config: TrainConfig) -> LinearPrecision:
    return cast("LinearPrecision", config.feature_precision)


def _open(spec: str, model: FineLIP, config: TrainConfig) -> PairDataset:
    pairs: PairDataset = open_dataset(spec, image_size=model.config.image_size, root=config.root or None)
    return pairs
