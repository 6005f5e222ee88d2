"""``finelip study``: the paper's questions, each a table and a plot."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import Any

from finelip_fast._terminal import printable
from finelip_fast.errors import ConfigError

NAMES = {
    "length": "what more tokens are worth, and what they cost",
    "overhead": "what ATRM and CLIM add to CLIP in parameters, memory and time",
    "noise": "what is lost when descriptions are spoilt",
    "ablation": "which parts and which losses help, by training runs (finelip study ablation --help)",
    "beyond": "descriptions longer than the context: cut, or read in windows",
    "tokens": "recall, bytes and search time by aggregated tokens and precision",
    "pointing": "whether the maps of phrases peak where the phrases are true",
}


def add_command(add: Callable[..., argparse.ArgumentParser], model: argparse.ArgumentParser) -> None:
    """Give the ``finelip`` command its ``study``; ``add`` makes one of name, function, description and parent parsers."""
    study = add("study", _study, "A question of the paper, answered by a table and a plot.", model)
    study.formatter_class = argparse.RawDescriptionHelpFormatter
    study.epilog = "\n".join(f"{name:10}{question}" for name, question in NAMES.items())
    study.add_argument(
        "name",
        nargs="?",
        choices=[name for name in NAMES if name != "ablation"],
        metavar="NAME",
        help=f"{', '.join(NAMES)}; without one, tell what each asks",
    )
    study.add_argument(
        "--data", help="pairs, as finelip eval takes them (default: scenes:test; beyond: scenes:very_long)"
    )
    study.add_argument("--validation", default="scenes:val:200", help="pairs to choose on (default: scenes:val:200)")
    study.add_argument("--root", help="folder that relative picture paths start from")
    study.add_argument("--out", default="studies", help="folder of the record (default: studies)")
    study.add_argument(
        "--build", action="store_true", help="overhead: first export the checkpoint to ONNX where that was not done"
    )


def _study(options: argparse.Namespace) -> Any:
    if options.name is None:
        return NAMES
    if options.build and options.name != "overhead":
        raise ConfigError(f"expected --build with overhead, which compares engines, got {options.name}")
    from finelip_fast.engines import open_engine
    from finelip_fast.studies import STUDIES, Setting

    study = STUDIES[options.name]
    engine = open_engine(options.engine, options.checkpoint, options.device, precision=options.precision)
    setting = Setting(
        options.data or study.data, options.validation, options.root, progress=not options.quiet, build=options.build
    )
    record = study.run(engine, setting)

    def write() -> None:
        for path in record.save(options.out, command=shlex.join(["finelip", *options.arguments])):
            print(printable(path), file=sys.stderr)

    options.write.append(write)
    return record
