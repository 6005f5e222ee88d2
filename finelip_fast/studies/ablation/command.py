"""Which parts of FineLIP help: ``finelip study ablation``, short runs from one start at equal budget, several seeds each.

All runs go on from one checkpoint, as FineLIP goes on from CLIP; the one that the recipe ``ablation-start`` trains has learned
the global contrast and where phrases are, and its aggregators are untrained. Losses differ in the learning rate and in the
weight of the global cosine that suit them. Both are chosen on validation pairs: each variant is first trained at every one of
``--rates`` with the first seed, and keeps the best; of its runs, the weight that is best on average is reported beside the
paper's. A run that was stopped goes on, a finished one is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

import torch

from finelip_fast._command_line import run_command
from finelip_fast.errors import ConfigError
from finelip_fast.studies.ablation.record import record
from finelip_fast.studies.ablation.runs import choose_rates, run
from finelip_fast.studies.ablation.variants import GROUPS, Variant
from finelip_fast.training.config import TrainConfig, load_recipe
from finelip_fast.training.train import train


def main(arguments: list[str] | None = None, *, prog: str = "finelip study ablation") -> int:
    """The command line; its exit code as of :mod:`finelip_fast._command_line`."""
    return run_command(lambda: _run(sys.argv[1:] if arguments is None else arguments, prog))


def _run(arguments: list[str], prog: str) -> None:
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
        "--choose-on",
        default="scenes:val",
        help="pairs to choose learning rates and the weight of the global cosine on (default: scenes:val)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each in a process (default: 1)")
    parser.add_argument("--data", default="scenes:test", help="pairs to measure on (default: scenes:test)")
    parser.add_argument("--runs", help="folder of the runs (default: the recipe's out)")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the record (default: studies)")
    parser.add_argument("--name", default="ablation", help="of the record's files (default: ablation)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    if options.choose_on == options.data:
        raise ConfigError(f"expected --choose-on to be other pairs than those measured, got {options.data} for both")
    base = load_recipe(options.recipe, out=options.runs or None)
    base |= {"threads": max(1, torch.get_num_threads() // options.jobs)}
    base |= {"steps": options.steps} if options.steps else {}
    start = TrainConfig(**load_recipe(options.start))
    if base.get("init") == f"{start.out}/last" and not Path(base["init"]).exists():
        train(start, progress=not options.quiet)
    names: dict[Variant, str] = {}
    for name in options.variants:
        names.setdefault(variants[name], name)  # what two names share is trained once
    how = {"jobs": options.jobs, "progress": not options.quiet}
    chosen, tables = choose_rates(base, names, options.rates, data=options.choose_on, seed=options.seeds[0], **how)
    runs = run(base, chosen, data=[options.choose_on, options.data], seeds=options.seeds, **how)
    settings = {name: value for name, value in base.items() if name not in ("out", "threads")}
    settings |= {"seeds": options.seeds, "data": options.data, "chosen on": options.choose_on}
    settings["trained at commit"] = ", ".join(sorted({one.commit for own in runs.values() for one in own}))
    made = record(runs, settings, data=options.data, validation=options.choose_on, name=options.name)
    made = dataclasses.replace(made, tables=(*made.tables, *tables))
    print(made)
    for path in made.save(options.out, command=shlex.join([*prog.split(), *arguments])):
        print(path)
