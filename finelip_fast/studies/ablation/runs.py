"""Training and measuring the ablation's runs, and the choices made on validation pairs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from finelip_fast._files import write_text_whole
from finelip_fast._json import read_json
from finelip_fast._typed import typed
from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.survey import survey
from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.errors import ConfigError
from finelip_fast.metrics import ALPHAS, pair_ranks, pair_summary, quality
from finelip_fast.model import FineLIP
from finelip_fast.records import Table, commit
from finelip_fast.studies.ablation.variants import AblatedFineLIP, Arm, Variant
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.start import choose_device
from finelip_fast.training.train import Trainer

# Metrics of the score by the weight of the global cosine in it, as text: "1" is the cosine alone, the only score of a model
# without late interaction, and "0" is late interaction alone.
Measures = dict[str, dict[str, float]]
GLOBAL_ALONE, FINE_ALONE, PAPERS_ALPHA = "1", "0", "0.8"


@dataclass(frozen=True)
class Run:
    """Result of a trained run: the commit whose code finished it, and its measures by the data they were taken on."""

    commit: str
    measured: dict[str, Measures]


class AblationTrainer(Trainer):
    """A training run of one variant."""

    def __init__(self, config: TrainConfig, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        super().__init__(config, device, progress=False)  # the caller shows a bar for all runs
        late_interaction = partial(self.model.score, alpha=0.0)
        self.computation.criterion = dataclasses.replace(config.criterion, late_interaction=late_interaction)

    def _start_model(self) -> FineLIP:
        return AblatedFineLIP(super()._start_model(), self.variant)


@torch.inference_mode()
def measure(model: FineLIP, data: str, *, batch_size: int = 64) -> Measures:
    """Measure recall and mean reciprocal rank of a variant, by the weight of the global cosine.

    Args:
        model: Model, whose late interaction is measured if its aggregators are trained.
        data: Pairs, as in :func:`open_dataset`.
        batch_size: Number of pictures or captions at once.

    Returns:
        ``{"0": {"i2t_recall@1": ..., ...}, "0.05": ..., "1": ...}``; without late interaction, only the last entry.
    """
    pairs = open_dataset(data, image_size=model.config.image_size)
    known = survey(pairs)
    images = embed_images(
        lambda pixels: model.encode_image(pixels.to(model.device)),
        model.preprocess,
        [pairs[number].image for number in known.first],
        batch_size=batch_size,
    )
    texts = embed_texts(
        lambda ids: model.encode_text(ids.to(model.device)),
        known.captions,
        context_length=model.config.context_length,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
    )
    global_scores, fine, alphas = (images[:, 0] @ texts[:, 0].T).cpu(), torch.tensor(0.0), [1.0]
    if model.config.trained_aggregators:
        fine, alphas = model.score(images, texts, alpha=0.0).cpu(), list(ALPHAS)
    picture_of = torch.tensor(known.picture_of)
    return {
        f"{alpha:g}": pair_summary(pair_ranks(alpha * global_scores + (1 - alpha) * fine, picture_of))
        for alpha in alphas
    }


def run_one(config: TrainConfig, variant: Variant, data: Sequence[str]) -> Run:
    """Train one variant with one seed, measure it on each of ``data``, and save the result in its folder.

    Existing results are reused: a finished run is only measured on data that it was not measured on before.

    Raises:
        ConfigError: The folder holds a run with other options, or a damaged result.
    """
    path = Path(config.out) / "result.json"
    request = {"variant": dataclasses.asdict(variant), "config": dataclasses.asdict(config)}
    request = json.loads(json.dumps(request))  # tuples become lists, as in the file
    stored = _stored(path) if path.exists() else {**request, **commit(), "measured": {}}
    if {name: stored[name] for name in request} != request:
        raise ConfigError(f"{config.out} holds a run with other options; pass another --runs, or delete that folder")
    missing = [pairs for pairs in data if pairs not in stored["measured"]]
    if missing:
        if config.threads:
            torch.set_num_threads(config.threads)
        trainer = AblationTrainer(config, variant, choose_device(config.device))
        trainer.run()
        stored["measured"] |= {pairs: measure(trainer.model.eval(), pairs) for pairs in missing}
        text = json.dumps(stored, indent=2) + "\n"
        write_text_whole(path, text)
    changed = ", with changes" if stored["dirty"] else ""
    return Run(f"{(stored['commit'] or 'unknown')[:10]}{changed}", stored["measured"])


def run(
    base: dict[str, Any],
    arms: dict[Arm, str],
    *,
    data: Sequence[str],
    seeds: list[int],
    jobs: int,
    progress: bool = True,
) -> dict[Arm, list[Run]]:
    """Train and measure all arms with all seeds.

    Args:
        base: Values of :class:`TrainConfig` that all runs share; ``out`` is the parent folder of the runs.
        arms: Runs to compare, with the names of their variants.
        data: Pairs to measure on, one set or several.
        seeds: Seeds of the order of the training data.
        jobs: Number of runs at once, each in its own process.
        progress: Whether to show a progress bar.

    Returns:
        The runs of each arm, seed by seed.

    Raises:
        ConfigError: A folder holds a run with other options.
    """
    shared = TrainConfig(**base)
    configs = {
        (arm, seed): dataclasses.replace(
            shared,
            out=str(Path(shared.out) / f"{_slug(name)}-{arm.rate:g}x-{seed}"),
            seed=seed,
            loss=arm.variant.loss,
            grounding=arm.variant.grounding,
            contextual=arm.variant.contextual,
            gamma=arm.variant.gamma,
            augment=arm.variant.augment,
            encoder_lr=arm.rate * shared.encoder_lr,
            aggregator_lr=arm.rate * shared.aggregator_lr,
        )
        for seed in seeds
        for arm, name in arms.items()
    }
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_one, config, key[0].variant, data): key for key, config in configs.items()}
        try:
            finished = tqdm(as_completed(futures), total=len(futures), unit="run", disable=not progress)
            runs = {futures[future]: future.result() for future in finished}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {arm: [runs[arm, seed] for seed in seeds] for arm in arms}


def choose_rates(
    base: dict[str, Any], names: dict[Variant, str], rates: list[float], *, data: str, seed: int, **how: Any
) -> tuple[dict[Arm, str], list[Table]]:
    """Choose each variant's best learning rate, judging each rate with the weight of the global cosine that is best at it.

    The first of equal rates is chosen; a single rate is taken untried.

    Args:
        base: Configuration that the variants change, as in :func:`run`.
        names: Names of the variants.
        rates: Learning rates to try, as multiples of the recipe's.
        data: Pairs to choose on; the chosen arms should be measured on others.
        seed: Seed of the runs.
        how: ``jobs`` and ``progress`` of :func:`run`.

    Returns:
        The chosen arms with the names of their variants, and a table of the recall that each rate reached.
    """
    if len(rates) == 1:
        return {Arm(variant, rates[0]): name for variant, name in names.items()}, []
    arms = {Arm(variant, rate): name for variant, name in names.items() for rate in rates}
    runs = run(base, arms, data=[data], seeds=[seed], **how)
    reached = {arm: max(map(quality, seeded[0].measured[data].values())) for arm, seeded in runs.items()}
    rows = [
        {"variant": name, **{f"{rate:g}x": f"{100 * reached[Arm(variant, rate)][0]:.1f}" for rate in rates}}
        for variant, name in names.items()
    ]
    best = [max((Arm(variant, rate) for rate in rates), key=lambda arm: reached[arm]) for variant in names]
    table = Table(f"recall@1 (%) on {data} by learning rate, seed {seed}", rows)
    return {arm: names[arm.variant] for arm in best}, [table]


def _stored(path: Path) -> dict[str, Any]:
    """Read what :func:`run_one` wrote.

    Raises:
        ConfigError: The file is not a result.
    """
    values: dict[str, Any] = read_json(path, error=ConfigError, expected="a run's result", kind=dict, max_bytes=1 << 24)
    kinds = {"variant": dict[str, Any], "config": dict[str, Any], "commit": str | None, "dirty": bool}
    kinds["measured"] = dict[str, dict[str, dict[str, float]]]
    try:
        for name, kind in kinds.items():
            typed(values.get(name), kind, name)
        for pairs, measures in values["measured"].items():
            if GLOBAL_ALONE not in measures:
                raise ValueError(f"no measures at alpha {GLOBAL_ALONE} on {pairs!r:.80}")
            for measured in measures.values():
                quality(measured)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: expected a run's result ({error}); delete that folder to train it again") from None
    return values


def choose_alpha(runs: Sequence[Measures]) -> str:
    """Choose the weight of the global cosine that is best over all runs, the smallest one if several are equal."""
    return max(runs[0], key=lambda alpha: quality(*(measured[alpha] for measured in runs)))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
