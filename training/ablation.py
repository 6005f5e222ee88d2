"""Which parts of FineLIP help: ``finelip study ablation``, short runs from one start at equal budget, several seeds each.

All runs go on from one checkpoint, as FineLIP goes on from CLIP; the one that the recipe ``ablation-start`` trains has learned
the global contrast and where phrases are, and its aggregators are untrained. Losses differ in the learning rate that suits
them: each variant is first trained at every one of ``--rates`` with the first seed, and keeps the one that is best on
validation pairs. A run that was stopped goes on, a finished one is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from finelip_fast._errors import ConfigError, FineLIPError
from finelip_fast._weight_files import write_whole
from finelip_fast.datasets import open_dataset
from finelip_fast.embed import embed_images, embed_texts
from finelip_fast.metrics import pair_ranks, summary
from finelip_fast.model import FineLIP
from finelip_fast.records import Plot, Record, Series, Table, commit
from finelip_fast.training.config import TrainConfig, load_recipe
from finelip_fast.training.train import Trainer, choose_device, train

_PAPER = "triplet (the paper's)"

# Metrics of each score: "global", and with late interaction "fine" and "combined".
Measures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What a trained run leaves: the commit whose code finished it, and its measures by the data they were taken on."""

    commit: str
    measured: dict[str, Measures]


@dataclass(frozen=True)
class Variant:
    """What one group of runs differs in.

    Args:
        loss: Terms, as in :class:`TrainConfig`.
        image, text: ``"aggregated"``: row 0 and what ATRM makes of the tokens; ``"raw"``: row 0 and the tokens themselves;
            ``"pooled"``: one row, the mean of what ATRM makes.
        grounding: Weight of the grounding loss.
    """

    loss: tuple[str, ...]
    image: str = "aggregated"
    text: str = "aggregated"
    grounding: float = 0.0

    @property
    def is_fine(self) -> bool:
        """Whether the score compares tokens."""
        return any(not term.startswith(("contrastive:global", "adaptive_margin:global")) for term in self.loss)


class Arm(NamedTuple):
    """A variant and its learning rates, as multiples of the recipe's."""

    variant: Variant
    rate: float


_GLOBAL = ("contrastive:global",)
_BOTH = ("contrastive:global", "contrastive:fine")

PARTS = {
    "neither": Variant(_GLOBAL),
    "ATRM only": Variant(_GLOBAL, "pooled", "pooled"),
    "CLIM only": Variant(_BOTH, "raw", "raw"),
    "ATRM on the picture's side, CLIM": Variant(_BOTH, "aggregated", "raw"),
    "ATRM on the text's side, CLIM": Variant(_BOTH, "raw", "aggregated"),
    "ATRM and CLIM": Variant(_BOTH),
}
LOSSES = {
    "global contrast": PARTS["neither"],
    _PAPER: Variant(("triplet:fine",)),
    "contrast": PARTS["ATRM and CLIM"],
    "adaptive margins": Variant(("adaptive_margin:global", "adaptive_margin:fine")),
    "contrast on the combined score, grounding": Variant(("contrastive:combined",), grounding=1.0),
    "contrast on three scores": Variant((*_BOTH, "contrastive:combined")),
    "contrast on three scores, grounding": Variant((*_BOTH, "contrastive:combined"), grounding=1.0),
}
GROUPS = {"parts": PARTS, "losses": LOSSES}


class AblatedFineLIP(FineLIP):
    """FineLIP with parts left out; its captions' raw tokens are followed by rows of zeros, which are no tokens."""

    def __init__(self, model: FineLIP, variant: Variant) -> None:
        super().__init__(model.config.replace(trained_aggregators=variant.is_fine))
        self.load_state_dict(model.state_dict())
        self.variant = variant

    def _aggregate_image(self, tokens: Tensor) -> Tensor:
        if self.variant.image == "raw":
            return F.normalize(tokens.float(), dim=-1)
        return self._pooled(super()._aggregate_image(tokens), self.variant.image)

    def _aggregate_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        rows = super()._aggregate_text(tokens, lengths)
        if self.variant.text == "raw":
            unit = F.normalize(tokens.float(), dim=-1)
            beyond = torch.arange(unit.shape[1], device=unit.device) >= lengths[:, None] - 1
            rows = torch.cat([rows[:, :1], unit.masked_fill(beyond[..., None], 0.0)], dim=1)
            return F.pad(rows, (0, 0, 0, 1 + self.config.context_length - rows.shape[1]))
        return self._pooled(rows, self.variant.text)

    def _pooled(self, rows: Tensor, kind: str) -> Tensor:
        return F.normalize(rows.mean(dim=1, keepdim=True), dim=-1) if kind == "pooled" else rows

    def score(self, images: Tensor, texts: Tensor, *, alpha: float | None = None) -> Tensor:
        """As :meth:`FineLIP.score`; texts may end in rows of zeros.

        Captions of equal length are scored together, since late interaction knows no rows that do not count.
        """
        counts = texts.detach().any(dim=-1).sum(dim=1)
        groups = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
        parts = [super(AblatedFineLIP, self).score(images, texts[own, : counts[own[0]]], alpha=alpha) for own in groups]
        return torch.cat(parts, dim=1)[:, torch.cat(groups).argsort()]


class AblationTrainer(Trainer):
    """A training run of one variant."""

    def __init__(self, config: TrainConfig, variant: Variant, device: torch.device) -> None:
        self.variant = variant
        super().__init__(config, device)
        late_interaction = partial(self.model.score, alpha=0.0)
        self.criterion = dataclasses.replace(config.criterion, late_interaction=late_interaction)

    def _start_model(self) -> FineLIP:
        return AblatedFineLIP(super()._start_model(), self.variant)


@torch.inference_mode()
def measure(model: FineLIP, data: str, *, batch_size: int = 64) -> Measures:
    """Recall and mean reciprocal rank of a variant.

    Args:
        model: Its fine score is measured where its aggregators are trained.
        data: Pairs, as in :func:`open_dataset`.
        batch_size: Pictures or captions at once.

    Returns:
        ``{"global": {"i2t_recall@1": ..., ...}, "fine": ..., "combined": ...}``; without late interaction only the first.
    """
    pairs = open_dataset(data, image_size=model.config.image_size)
    examples = [pairs[index] for index in range(len(pairs))]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(example.image_id for example in examples))}
    owners = torch.tensor([numbers[example.image_id] for example in examples])
    pictures = {example.image_id: example.image for example in examples}
    images = embed_images(
        lambda pixels: model.encode_image(pixels.to(model.device)),
        model.preprocess,
        [pictures[name] for name in numbers],
        batch_size=batch_size,
    )
    texts = embed_texts(
        lambda ids: model.encode_text(ids.to(model.device)),
        [example.caption for example in examples],
        context_length=model.config.context_length,
        batch_size=batch_size,
    )
    result = {}
    scores = {"global": images[:, 0] @ texts[:, 0].T}
    if model.config.trained_aggregators:
        scores["fine"] = model.score(images, texts, alpha=0.0)
        scores["combined"] = model.alpha * scores["global"] + (1 - model.alpha) * scores["fine"]
    for name, matrix in scores.items():
        ways = zip(("i2t", "t2i"), pair_ranks(matrix.cpu(), owners), strict=True)
        result[name] = {f"{way}_{key}": value for way, ranks in ways for key, value in summary(ranks).items()}
    return result


def run_one(config: TrainConfig, variant: Variant, data: str) -> Run:
    """Train one variant with one seed, measure it, and keep the result in its folder.

    What is there is not done again: a finished run is only measured on what it was not measured on.

    Raises:
        ConfigError: The folder holds a run of other options.
    """
    path = Path(config.out) / "result.json"
    asked = {"variant": dataclasses.asdict(variant), "config": dataclasses.asdict(config)}
    asked = json.loads(json.dumps(asked))  # tuples become lists, as in the file
    now = {**commit(), "measured": {}}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**asked, **now}
    if {name: stored.get(name) for name in asked} != asked:
        raise ConfigError(f"{config.out} holds a run of other options; give another --runs, or delete that folder")
    if data not in stored["measured"]:
        if config.threads:
            torch.set_num_threads(config.threads)
        trainer = AblationTrainer(config, variant, choose_device(config))
        trainer.run(progress=False)  # the bar of all runs is the caller's
        stored["measured"][data] = measure(trainer.model.eval(), data)
        text = json.dumps(stored, indent=2) + "\n"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    changed = ", with changes" if stored["dirty"] else ""
    return Run(f"{(stored['commit'] or 'unknown')[:10]}{changed}", stored["measured"])


def run(
    base: dict[str, Any], arms: dict[Arm, str], *, data: str, seeds: list[int], jobs: int, progress: bool = True
) -> dict[Arm, list[Run]]:
    """Train and measure all arms with all seeds.

    Args:
        base: What all runs share: values of :class:`TrainConfig`; ``out`` is the folder above the runs' own.
        arms: With the names of their variants.
        data: Pairs to measure on.
        seeds: Of the order of the training data.
        jobs: Runs at once, each in a process.
        progress: Show a progress bar.

    Returns:
        The runs of each arm, seed by seed.

    Raises:
        ConfigError: A folder holds a run of other options.
    """
    shared = TrainConfig(**base)
    configs = {
        (arm, seed): dataclasses.replace(
            shared,
            out=str(Path(shared.out) / f"{_slug(name)}-{arm.rate:g}x-{seed}"),
            seed=seed,
            loss=arm.variant.loss,
            grounding=arm.variant.grounding,
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
    """Each variant at the learning rate of the best recall@1, mean of both directions; the first of equals.

    A single rate is taken untried.

    Args:
        base: As in :func:`run`.
        names: Of the variants.
        rates: To try, as multiples of the recipe's.
        data: Pairs to choose on; what is chosen should be measured on others.
        seed: Of the runs.
        how: ``jobs`` and ``progress`` of :func:`run`.

    Returns:
        The arms chosen with the names of their variants, and a table of what each rate reached.
    """
    if len(rates) == 1:
        return {Arm(variant, rates[0]): name for variant, name in names.items()}, []
    arms = {Arm(variant, rate): name for variant, name in names.items() for rate in rates}
    runs = run(base, arms, data=data, seeds=[seed], **how)
    recalls = {arm: _recall(_score(own[0].measured[data])) for arm, own in runs.items()}
    rows = [
        {"variant": name, **{f"{rate:g}x": f"{100 * recalls[Arm(variant, rate)]:.1f}" for rate in rates}}
        for variant, name in names.items()
    ]
    best = [max((Arm(variant, rate) for rate in rates), key=lambda arm: recalls[arm]) for variant in names]
    table = Table(f"recall@1 (%) on {data} by learning rate, seed {seed}", rows)
    return {arm: names[arm.variant] for arm in best}, [table]


def record(results: dict[Arm, list[Measures]], settings: dict[str, Any], *, name: str) -> Record:
    """Tables and plots of what the runs of each arm measured; a group of which one variant was tried compares nothing."""
    rates = {arm.variant: arm.rate for arm in results}
    measured = {arm.variant: runs for arm, runs in results.items()}
    tables, plots = [], []
    groups = {
        group: {name: measured[variant] for name, variant in members.items() if variant in measured}
        for group, members in GROUPS.items()
    }
    most = max(map(len, groups.values()))
    for group, tried in groups.items():
        if len(tried) < min(2, most):
            continue
        theirs = _error(measured[LOSSES[_PAPER]]) if LOSSES[_PAPER] in measured else None
        rows = []
        for variant, runs in tried.items():
            row: dict[str, Any] = {group: variant, "learning rates": f"{rates[GROUPS[group][variant]]:g}x"}
            row |= {
                f"{key} (%)": _spread([100 * _score(one)[f"{key}_recall@1"] for one in runs]) for key in ("i2t", "t2i")
            }
            for score in ("global", "fine"):
                row[f"{score} alone (%)"] = (
                    _spread([100 * _recall(one[score]) for one in runs]) if score in runs[0] else ""
                )
            row["mrr"] = _spread([(_score(one)["i2t_mrr"] + _score(one)["t2i_mrr"]) / 2 for one in runs], digits=3)
            if theirs:
                row["error beside the triplet's"] = f"{_error(runs) / theirs:.2f}x"
            rows.append(row)
        tables.append(Table(f"{group}: recall@1, mean and standard deviation over seeds", rows))
        recalls = [[_recall(_score(one)) for one in runs] for runs in tried.values()]
        means = [statistics.mean(values) for values in recalls]
        low, high = [min(values) for values in recalls], [max(values) for values in recalls]
        plots.append(
            Plot(group, "", "recall@1, both directions", (Series("mean, range", list(tried), means, low, high),))
        )
    title = "Which parts and which losses help"
    return Record(name, title, tuple(tables), tuple(plots), settings, _finding(groups))


def _finding(groups: dict[str, dict[str, list[Measures]]]) -> str:
    """Each group in order of recall@1."""
    sentences = []
    for group, tried in groups.items():
        recalls = {name: 100 - 100 * _error(runs) for name, runs in tried.items()}
        if len(recalls) > 1:
            ordered = sorted(recalls, key=lambda name: -recalls[name])
            told = ", ".join(f"{name} {recalls[name]:.1f} %" for name in ordered)
            sentences.append(f"Recall@1 of {group}, from the best: {told}.")
    return " ".join(sentences)


def _score(measured: Measures) -> dict[str, float]:
    """Of the score that a variant retrieves with."""
    return measured.get("combined", measured["global"])


def _recall(metrics: dict[str, float]) -> float:
    return (metrics["i2t_recall@1"] + metrics["t2i_recall@1"]) / 2


def _error(runs: list[Measures]) -> float:
    return 1 - statistics.mean(_recall(_score(one)) for one in runs)


def _spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: list[str] | None = None, *, prog: str = "finelip study ablation") -> int:
    """The command line; 0 on success, 2 on an error that its message explains."""
    arguments = sys.argv[1:] if arguments is None else arguments
    variants = {name: variant for group in GROUPS.values() for name, variant in group.items()}
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", default="ablation", help="what all runs share: a recipe's name or a JSON file")
    parser.add_argument(
        "--start", default="ablation-start", help="recipe that trains the other's init where it is absent"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: the recipe's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--variants", nargs="+", choices=variants, default=list(variants), metavar="NAME", help=", ".join(variants)
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1.0],
        help="learning rates to choose from for each variant, as multiples of the recipe's (default: 1)",
    )
    parser.add_argument(
        "--choose-on", default="scenes:val", help="pairs to choose the learning rates on (default: scenes:val)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a process (default: 1)")
    parser.add_argument("--data", default="scenes:test", help="pairs to measure on (default: scenes:test)")
    parser.add_argument("--runs", help="folder of the runs (default: the recipe's out)")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the record (default: studies)")
    parser.add_argument("--name", default="ablation", help="of the record's files (default: ablation)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    try:
        if len(options.rates) > 1 and options.choose_on == options.data:
            raise ConfigError(
                f"expected --choose-on to be other pairs than those measured, got {options.data} for both"
            )
        base = load_recipe(options.recipe) | {"threads": max(1, torch.get_num_threads() // options.jobs)}
        base |= {name: value for name, value in (("steps", options.steps), ("out", options.runs)) if value}
        start = TrainConfig(**load_recipe(options.start))
        if base.get("init") == f"{start.out}/last" and not Path(base["init"]).exists():
            train(start, progress=not options.quiet)
        names: dict[Variant, str] = {}
        for name in options.variants:
            names.setdefault(variants[name], name)  # what two names share is trained once
        how = {"jobs": options.jobs, "progress": not options.quiet}
        chosen, tables = choose_rates(base, names, options.rates, data=options.choose_on, seed=options.seeds[0], **how)
        runs = run(base, chosen, data=options.data, seeds=options.seeds, **how)
        settings = {name: value for name, value in base.items() if name not in ("out", "threads")}
        settings |= {"seeds": options.seeds, "data": options.data}
        settings["trained at commit"] = ", ".join(sorted({one.commit for own in runs.values() for one in own}))
        measured = {arm: [one.measured[options.data] for one in own] for arm, own in runs.items()}
        made = record(measured, settings, name=options.name)
        made = dataclasses.replace(made, tables=(*made.tables, *tables))
        print(made)
        for path in made.save(options.out, command=shlex.join([*prog.split(), *arguments])):
            print(path)
    except FineLIPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
