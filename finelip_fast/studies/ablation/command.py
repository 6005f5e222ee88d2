"""Ablation of FineLIP's parts by short runs from one start at equal budget, with several seeds each.

All runs start from one checkpoint, as FineLIP starts from CLIP; the one that the recipe ``ablation-start`` trains has learned
the global contrast and where phrases are, and its aggregators are untrained. Losses differ in the learning rate and in the
weight of the global cosine that suit them. Both are chosen on validation pairs: each variant is first trained at each of
``rates`` with the first seed, and keeps the best; over its runs, the weight that is best on average is reported beside the
paper's. A stopped run is resumed, and a finished one is not trained again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from finelip_fast._arguments import one_of, whole_number
from finelip_fast.errors import ConfigError
from finelip_fast.records import Record
from finelip_fast.studies.ablation.record import record
from finelip_fast.studies.ablation.runs import choose_rates, run
from finelip_fast.studies.ablation.variants import GROUPS, Variant
from finelip_fast.training.config import TrainConfig, load_recipe
from finelip_fast.training.train import train


def run_ablation(
    *,
    recipe: str,
    start: str,
    steps: int | None,
    seeds: Sequence[int],
    variants: Sequence[str],
    rates: Sequence[float],
    validation: str,
    jobs: int,
    data: str,
    runs: str | None,
    name: str,
    progress: bool,
) -> Record:
    """Train the variants and measure them.

    Args:
        recipe: Recipe that all runs share.
        start: Recipe that trains the ``init`` of ``recipe`` if it is missing.
        steps: Optimizer steps of each run; None: the recipe's.
        seeds: Seeds of each variant's runs.
        variants: Names of variants; empty: all of them.
        rates: Learning rates to choose from, as multiples of the recipe's.
        validation: Pairs to choose on.
        jobs: Number of runs at once, each in its own process.
        data: Pairs to measure on.
        runs: Folder of the runs; None: the recipe's ``out``.
        name: Stem of the record's files.
        progress: Whether to show progress bars.

    Returns:
        The record, not yet saved.

    Raises:
        InputError: A variant is unknown, or ``steps`` or ``jobs`` is below 1.
        ConfigError: The validation pairs are the measured ones, or a recipe cannot be honoured.
    """
    known = {name: variant for group in GROUPS.values() for name, variant in group.items()}
    for variant in variants:
        one_of("variants", variant, known)
    if validation == data:
        raise ConfigError(f"expected --validation to be other pairs than those measured, got {data} for both")
    jobs = whole_number("jobs", jobs)
    base = load_recipe(recipe, out=runs or None)
    base |= {"threads": max(1, torch.get_num_threads() // jobs)}
    base |= {} if steps is None else {"steps": whole_number("steps", steps)}
    first = TrainConfig(**load_recipe(start))
    if base.get("init") == f"{first.out}/last" and not Path(base["init"]).exists():
        train(first, progress=progress)
    names: dict[Variant, str] = {}
    for variant in variants or known:
        names.setdefault(known[variant], variant)  # a variant with two names is trained once
    chosen, tables = choose_rates(
        base, names, list(rates), data=validation, seed=seeds[0], jobs=jobs, progress=progress
    )
    finished = run(base, chosen, data=[validation, data], seeds=list(seeds), jobs=jobs, progress=progress)
    settings = {key: value for key, value in base.items() if key not in ("out", "threads")}
    settings |= {"seeds": list(seeds), "data": data, "chosen on": validation}
    commits = {seeded_run.commit for repeated in finished.values() for seeded_run in repeated}
    settings["trained at commit"] = ", ".join(sorted(commits))
    study = record(finished, settings, data=data, validation=validation, name=name)
    return dataclasses.replace(study, tables=(*study.tables, *tables))
