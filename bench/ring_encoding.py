"""Race encoders on the same weights, captions and pictures, from text and PIL pictures to global embeddings.

``python bench/ring_encoding.py --out bench/results/MACHINE/encoding.json`` races the contenders of ``ring_encoders.py``, at
the sizes of ViT-B/16 with random weights, in batches of 1 and 32, each in a process of its own with a time limit. A
contender whose embeddings are wrong is not timed. ``--python infinity-emb=PATH`` sets the interpreter of a package that
cannot be installed beside ours.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
import transformers_layout
from apart import Apart, Failure
from contest import Result
from ring_encoders import CAPTIONS, CONTENDERS, PICTURES

import finelip_fast
from finelip_fast.datasets import Scenes

BATCHES, ROUNDS = (1, 32), 7
BASELINE = "open_clip, fp32"
# Largest error of an entry that still counts as right, by precision.
ERRORS = {"fp32": 1e-3, "bf16": 5e-2, "int8": 1e-1}
_PAUSE = 0.05  # seconds; threads keep spinning for a while after their work

Start = Callable[[str], Apart]  # starts a contender's process, given its name


def batches(config: finelip_fast.FineLIPConfig) -> dict[tuple[str, int], list[Any]]:
    """Return batches by kind and size: captions of medium length, and pictures that need no resizing."""
    world = list(Scenes("test", 101, image_size=config.image_size))
    by_length = sorted(world, key=lambda scene: len(scene.caption))
    work: dict[tuple[str, int], list[Any]] = {}
    for size in BATCHES:
        middle = by_length[50 - size // 2 : 50 - size // 2 + size]
        work[CAPTIONS, size] = [scene.caption for scene in middle]
        work[PICTURES, size] = [scene.draw() for scene in middle]
    return work


def race(
    start: Start, names: Sequence[str], checkpoint: Path, folder: Path, work: dict[tuple[str, int], list[Any]]
) -> dict[tuple[str, int], dict[str, Result]]:
    """Race the contenders; return results by kind and size of the batch, then by contender."""
    engine = finelip_fast.Retriever(checkpoint, engine="torch", device="cpu").engine
    expected = {
        (kind, size): (engine.embed_texts if kind == CAPTIONS else engine.embed_images)(batch)[:, 0].numpy()
        for (kind, size), batch in work.items()
    }
    results = {cell: {name: Result() for name in names} for cell in work}
    opened: dict[str, Apart] = {}
    try:
        for number, name in enumerate(names):
            place = folder / str(number)
            place.mkdir()
            try:
                opened[name], about = ready(partial(start, name), checkpoint, place)
                print(f"{name}: ready", flush=True)
            except Failure as failure:
                print(f"{name}: {failure}", flush=True)
                for by_name in results.values():
                    by_name[name].refusal = str(failure)
                continue
            for by_name in results.values():
                by_name[name].info |= about
        for cell, batch in work.items():
            timed(opened, results[cell], cell[0], batch, expected[cell])
    finally:
        for process in opened.values():
            process.end()
    return results


def ready(start: Callable[[], Apart], checkpoint: Path, place: Path) -> tuple[Apart, dict[str, Any]]:
    """Build a contender in one process, open it in another, and return that process with the contender's description.

    Raises:
        Failure: The contender is not installed, fails, or takes too long.
    """
    builder = start()
    try:
        builder.ask("about")
        builder.ask("build", checkpoint, place)
    finally:
        builder.end()
    process = start()
    try:
        about: dict[str, Any] = process.ask("about").value
        process.ask("open", checkpoint, place)
    except Failure:
        process.end()
        raise
    return process, about


def timed(
    processes: dict[str, Apart], results: dict[str, Result], kind: str, batch: list[Any], expected: np.ndarray
) -> None:
    """Check each process's embeddings of a batch, then time the right ones in turns."""
    for number in range(-1, ROUNDS):  # the first round checks, and warms up
        for name, process in processes.items():
            result = results[name]
            if result.refusal:
                continue
            time.sleep(_PAUSE)
            try:
                answer = process.ask("encode", kind, batch)
            except Failure as failure:
                result.refusal = str(failure)
                continue
            if number < 0:
                error, limit = float(np.abs(answer.value - expected).max()), ERRORS[result.info["precision"]]
                result.info["max_error"] = error
                result.refusal = "" if error <= limit else f"wrong by {error:.3g}, more than {limit:.3g}"
            else:
                result.seconds.append(answer.seconds)
    for result in results.values():
        if not result.refusal:
            quantiles = np.quantile(result.seconds, [0.2, 0.5, 0.8]).tolist()
            result.info |= dict(zip(("p20", "p50", "p80"), quantiles, strict=True))
            result.info["items_per_second"] = len(batch) / result.info["p50"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Race encoders.")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds to build, and to open and encode")
    parser.add_argument("--threads", type=int, default=2, help="threads and processors of each")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PACKAGE=PATH", help="interpreter of a package"
    )
    parser.add_argument("--only", default="", help="parts of the names of those that race, separated by ;")
    parser.add_argument("--log", type=Path, help="file for what contenders print")
    parser.add_argument("--out", type=Path, help="the record: a JSON file, to which groups are added")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # also ends the contenders' processes
    if options.out:
        record.opened(options.out)  # fails now rather than after the race
    pythons = dict(text.split("=", 1) for text in options.python)
    names = [name for name in CONTENDERS if any(part.strip() in name for part in options.only.split(";"))]

    def start(name: str) -> Apart:
        python = pythons.get(CONTENDERS[name]().package, sys.executable)
        return Apart(
            "ring_encoders", name, seconds=options.limit, python=python, threads=options.threads, log=options.log
        )

    torch.manual_seed(0)
    model = finelip_fast.FineLIP(finelip_fast.FineLIPConfig.preset("ViT-B-16")).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        finelip_fast.save(model, checkpoint)
        transformers_layout.write(model, checkpoint / "transformers")
        results = race(start, names, checkpoint, folder, batches(model.config))
    for (kind, size), by_name in results.items():
        group = f"{size} {kind if size > 1 else kind[:-1]} to global embeddings, ViT-B/16"
        for name, result in by_name.items():
            print(group, name, result.refusal or result.info, sep=": ")
        if options.out:
            record.add(options.out, group, by_name, baseline=BASELINE, threads=options.threads)


if __name__ == "__main__":
    main()
