"""``finelip eval`` and ``finelip eval compare``: the recall of a checkpoint, and several results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    Several,
    after_result,
    alpha_option,
    batch_size_option,
    check_file,
    shows_progress,
    standalone_model_options,
)

RENAMED = {"--context": "--context-lengths", "--alpha-sweep": "--validation", "--out": "--save"}


def _complete_compare(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem("compare")] if "compare".startswith(incomplete) else []


@click.command("eval", cls=Command, renamed=RENAMED)
@click.argument("data", shell_complete=_complete_compare)
@click.option("--root", metavar="FOLDER", help="Folder that relative picture paths start from.")
@click.option(
    "--context-lengths",
    cls=Several,
    type=int,
    help="Lengths, in tokens, to truncate captions to.  [default: the model's context]",
)
@alpha_option
@click.option(
    "--validation",
    metavar="DATA",
    help="Other pairs to choose the weight of the global score on: the weight among 0, 0.05 .. 1 with the best "
    "recall@1, averaged over both directions.",
)
@batch_size_option
@click.option(
    "--cache",
    metavar="FOLDER",
    help="Folder to keep embeddings in, so that a stopped evaluation resumes and memory does not grow with the "
    "data.  [default: in memory]",
)
@click.option(
    "--save",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File to save the result to, with all ranks, for finelip eval compare.",
)
@standalone_model_options
def evaluate(
    data: str,
    root: str | None,
    context_lengths: tuple[int, ...],
    alpha: float | None,
    validation: str | None,
    batch_size: int,
    cache: str | None,
    save: Path | None,
    model: ModelOptions,
) -> Any:
    """Measure recall and ranks, with confidence intervals, on pairs of pictures and captions in both directions.

    DATA is scenes:test, scenes:test:SIZE:VARIANT, jsonl:FILE, sharegpt4v:FILE, or a folder as published: urban1k:ROOT,
    docci:ROOT:SPLIT, dci:ROOT:SPLIT, long-dci:ROOT, coco:ROOT, flickr30k:ROOT:SPLIT. Compare saved results with finelip eval
    compare.
    """
    from finelip_fast.datasets import open_dataset
    from finelip_fast.evaluation import evaluate

    check_file("--save", save)
    engine = model.open_engine()
    image_size = engine.config.image_size
    result = evaluate(
        engine,
        open_dataset(data, image_size=image_size, root=root),
        context_lengths=context_lengths,
        alpha=alpha,
        validation=None if validation is None else open_dataset(validation, image_size=image_size, root=root),
        cache=cache,
        batch_size=batch_size,
        progress=shows_progress(),
        data=data,
        validation_name=validation or "",
    )
    if save:
        after_result(lambda: result.save(save))
    return result


@click.command("eval compare", cls=Command, renamed={"--format": "--markdown or --json"})
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--markdown", is_flag=True, help="Print tables in Markdown.")
def compare(files: tuple[str, ...], markdown: bool) -> Any:
    """Show results of finelip eval --save side by side; the first is the baseline.

    All FILEs must be results on the same pairs.
    """
    from finelip_fast.evaluation import compare

    comparison = compare(files)
    return _Markdown(comparison) if markdown else comparison


class _Markdown(NamedTuple):
    """A comparison that prints itself as Markdown."""

    comparison: Any

    def to_dict(self) -> Any:
        return self.comparison.to_dict()

    def __str__(self) -> str:
        return str(self.comparison.markdown())
