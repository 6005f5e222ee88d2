"""``finelip eval`` and ``finelip eval compare``: recall of a checkpoint, and runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVAL_COMMANDS = ("eval compare",)


def add_commands(add: Callable[..., argparse.ArgumentParser], model: argparse.ArgumentParser) -> None:
    """Give the ``finelip`` command its evaluations; ``add`` makes one of name, function, description and parent parsers."""
    evaluate = add(
        "eval",
        _evaluate,
        "Recall, ranks and their intervals on pairs of pictures and captions, both directions.",
        model,
    )
    evaluate.add_argument(
        "data",
        help="scenes:test, scenes:test:SIZE:VARIANT, jsonl:FILE, sharegpt4v:FILE, or a folder as published: urban1k:ROOT, "
        "docci:ROOT:SPLIT, dci:ROOT:SPLIT, long-dci:ROOT, coco:ROOT, flickr30k:ROOT:SPLIT",
    )
    evaluate.add_argument("--root", help="folder that relative picture paths start from")
    evaluate.add_argument("--context", type=int, nargs="+", default=[], help="cut captions at these lengths in tokens")
    evaluate.add_argument("--alpha", type=float, help="weight of the global score (default: the checkpoint's)")
    evaluate.add_argument(
        "--alpha-sweep",
        metavar="VALIDATION_DATA",
        help="choose the weight on these pairs, which must be others than the measured ones: of 0, 0.05 .. 1 the one of the "
        "best mean recall@1 of both directions",
    )
    evaluate.add_argument("--batch-size", type=int, default=64, help="pictures or captions at once (default: 64)")
    evaluate.add_argument(
        "--cache",
        metavar="DIR",
        help="keep embeddings in files here: an evaluation that was stopped goes on, and memory does not grow with the data "
        "(default: in memory, in the engine's precision: 128 KB a picture and a caption each of 64 tokens by 512 in float32)",
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="FILE", help="write the result with all ranks, for finelip eval compare"
    )

    compare = add("eval compare", _compare, "Results of finelip eval --out side by side, the first as the baseline.")
    compare.add_argument("files", nargs="+", metavar="FILE", help="two or more, of the same pairs")
    compare.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: text")


def _evaluate(options: argparse.Namespace) -> Any:
    from finelip_fast.datasets import open_dataset
    from finelip_fast.engines import open_engine
    from finelip_fast.errors import InputError
    from finelip_fast.evaluation import evaluate

    if options.out and (options.out.is_dir() or not options.out.parent.is_dir()):  # better now than after an hour
        raise InputError(f"expected --out to be a file in a folder that is there, got {options.out}")
    engine = open_engine(options.engine, options.checkpoint, options.device, precision=options.precision)
    pairs, validation = (
        None if data is None else open_dataset(data, image_size=engine.config.image_size, root=options.root)
        for data in (options.data, options.alpha_sweep)
    )
    assert pairs is not None  # argparse demands it
    result = evaluate(
        engine,
        pairs,
        contexts=options.context,
        alpha=options.alpha,
        validation=validation,
        cache=options.cache,
        batch_size=options.batch_size,
        progress=not options.quiet,
        data=options.data,
        validation_data=options.alpha_sweep or "",
    )
    if options.out:
        options.write.append(lambda: result.save(options.out))
    return result


def _compare(options: argparse.Namespace) -> Any:
    from finelip_fast.evaluation import compare

    comparison = compare(options.files)
    options.json = options.json or options.format == "json"
    return comparison.markdown() if options.format == "markdown" and not options.json else comparison
