"""``finelip study`` and its subcommands: questions about FineLIP, each answered by a table and a plot."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from finelip_fast._terminal import printable
from finelip_fast.cli.commands import (
    Command,
    ModelOptions,
    Several,
    after_result,
    command_line,
    device_option,
    is_quiet,
    shows_progress,
    standalone_model_options,
)
from finelip_fast.cli.fields import FieldsCommand, typed
from finelip_fast.cli.values import OneOf
from finelip_fast.errors import ConfigError, InputError

NAMES = {
    "length": "what more tokens are worth, and what they cost",
    "overhead": "what ATRM and CLIM add to CLIP in parameters, memory and time",
    "noise": "how corrupted captions affect recall",
    "ablation": "which parts and which losses help, by training runs (finelip study ablation --help)",
    "beyond": "descriptions longer than the context: cut, or read in windows",
    "tokens": "recall, bytes and search time by aggregated tokens and precision",
    "pointing": "whether the maps of phrases peak on what the phrases describe",
    "standing-out": "whether a search tells that nothing in the index matches",
    "adaptation": "what adapting a CLIP gives for its cost (finelip study adaptation --help)",
    "drawing": "how much of a description is drawn from 77 tokens, and from 256 (finelip study drawing --help)",
    "generation": "whether pictures from longer prompts are closer to the described ones (finelip study generation --help)",
}

_out_option = click.option("--out", default="studies", metavar="FOLDER", help="Folder to write the results to.")


def _complete_name(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=text) for name, text in NAMES.items() if name.startswith(incomplete)]


@click.command(cls=Command, epilog="\b\n" + "\n".join(f"{name:14}{question}" for name, question in NAMES.items()))
@click.argument("name", required=False, shell_complete=_complete_name)
@click.option("--data", help="Pairs to measure on, as finelip eval takes them.  [default: scenes:test, or the study's]")
@click.option("--validation", metavar="DATA", default="scenes:val:200", help="Pairs to choose on.")
@click.option("--root", metavar="FOLDER", help="Folder that relative picture paths start from.")
@_out_option
@click.option("--build", is_flag=True, help="For overhead: export the checkpoint to ONNX first if that is missing.")
@standalone_model_options
def study(
    name: str | None,
    data: str | None,
    validation: str,
    root: str | None,
    out: str,
    build: bool,
    model: ModelOptions,
) -> Any:
    """Answer a question about FineLIP with a table and a plot.

    Without NAME, the command lists what each study asks.
    """
    if name is None:
        return NAMES
    if name not in NAMES:
        raise InputError(f"expected a study of {', '.join(NAMES)}, got {name!r:.80}")
    if build and name != "overhead":
        raise ConfigError(f"expected --build with overhead, which compares engines, got {name}")
    from finelip_fast.studies import STUDIES, Setting

    chosen = STUDIES[name]
    engine = model.open_engine()
    setting = Setting(data or chosen.data, validation, root, progress=shows_progress(), build=build)
    return _record(chosen.run(engine, setting), out)


@click.command("study ablation", cls=Command, renamed={"--choose-on": "--validation"})
@click.option("--recipe", default="ablation", help="Recipe that all runs share: a name, or a JSON file.")
@click.option(
    "--start", default="ablation-start", help="Recipe that trains the checkpoint all runs start from, if it is missing."
)
@click.option("--steps", type=int, help="Optimizer steps of each run.  [default: the recipe's]")
@click.option("--seeds", cls=Several, type=int, default=(0, 1, 2), help="Seeds of the runs.")
@click.option(
    "--variants", cls=Several, metavar="NAME", help="Variants to train; quote names that have spaces.  [default: all]"
)
@click.option(
    "--rates",
    cls=Several,
    type=float,
    default=(1.0,),
    help="Learning rates to choose from for each variant, as multiples of the recipe's.",
)
@click.option(
    "--validation",
    metavar="DATA",
    default="scenes:val",
    help="Pairs to choose learning rates and the weight of the global score on.",
)
@click.option("--jobs", type=int, default=1, help="Number of runs at once, each in its own process.")
@click.option("--data", default="scenes:test", help="Pairs to measure on.")
@click.option("--runs", metavar="FOLDER", help="Folder of the runs.  [default: the recipe's out]")
@_out_option
@click.option("--name", default="ablation", help="Stem of the names of the result files.")
def ablation(out: str, **options: Any) -> Any:
    """Train variants of FineLIP's parts and losses at an equal budget, and compare them.

    All runs start from one checkpoint. A stopped run resumes, and a finished one is not trained again.
    """
    from finelip_fast.studies.ablation.command import run_ablation

    return _record(run_ablation(**options, progress=not is_quiet()), out)


@click.command("study adaptation", cls=Command)
@click.option("--base", required=True, metavar="CHECKPOINT", help="Checkpoint to adapt.")
@click.option("--recipe", default="scenes-full", help="Recipe that trains everything at once: a name, or a JSON file.")
@click.option("--data", default="scenes:test", help="Pairs to measure on.")
@click.option("--runs", default="runs/adaptation", metavar="FOLDER", help="Folder of the runs and of the features.")
@click.option("--steps", type=int, default=1500, help="Steps of the aggregators alone.")
@click.option("--encoder-steps", type=int, default=500, help="Steps of the second stage.")
@click.option("--aggregator-lr", type=float, default=1e-3, help="Peak learning rate of the aggregators.")
@click.option("--encoder-lr", type=float, default=1e-5, help="Peak learning rate of the encoders in the second stage.")
@_out_option
def adaptation(out: str, **options: Any) -> Any:
    """Adapt a CLIP in three ways, train all of it at once, and compare recall and cost.

    A stopped run resumes, and a finished one is not trained again.
    """
    from finelip_fast.studies.adaptation import AdaptationSetting, adaptation

    return _record(adaptation(AdaptationSetting(**options, progress=not is_quiet())), out)


@click.command("study generation", cls=Command)
@click.option("--pipeline", required=True, metavar="NAME_OR_FOLDER", help="Text-to-image pipeline of diffusers.")
@click.option("--checkpoint", required=True, help="Checkpoint whose text encoder extends it.")
@click.option("--data", required=True, help="Pairs whose captions to generate from, as finelip eval takes them.")
@click.option(
    "--pictures",
    required=True,
    metavar="FOLDER",
    help="Folder of the generated pictures; existing ones are not generated again.",
)
@click.option("--judge", help="Checkpoint that judges the pictures.  [default: open_clip:ViT-B-32/laion2b_s34b_b79k]")
@click.option("--root", metavar="FOLDER", help="Folder that relative picture paths start from.")
@click.option("--steps", type=int, help="Denoising steps.  [default: the pipeline's]")
@click.option("--guidance-scale", type=float, help="Guidance scale.  [default: the pipeline's]")
@click.option("--seed", type=int, default=0, help="Seed of the first picture's noise.")
@click.option(
    "--layer",
    type=OneOf("penultimate", "last"),
    help="Layer of the text encoders: penultimate, last.  [default: the pipeline's]",
)
@click.option(
    "--second",
    type=OneOf("stretch", "windows"),
    default="stretch",
    help="How a second text encoder reads long prompts: stretch, windows.",
)
@_out_option
@device_option
def generation(out: str, **options: Any) -> Any:
    """Generate pictures from 77 tokens and from the checkpoint's context, and compare both with the described pictures.

    The distance is FID on features of an independent CLIP, whose mean cosine with the descriptions is the score. A stopped
    run resumes.
    """
    from finelip_fast.studies.generation import GenerationSetting, generation

    values = {name: value for name, value in options.items() if value is not None}
    return _record(generation(GenerationSetting(**values, progress=shows_progress())), out)


@click.command("study drawing", cls=Command)
@click.option(
    "--generators", cls=Several, metavar="FOLDER", required=True, help="Runs of finelip study generator, to compare."
)
@click.option("--scenes", type=int, default=400, help="Number of scenes to generate, a multiple of 4.")
@click.option("--judge", metavar="CHECKPOINT", help="Checkpoint that ranks the pictures.  [default: the bundled one]")
@click.option("--steps", type=int, default=30, help="Denoising steps.")
@click.option("--guidance-scale", type=float, default=3.0, help="Guidance scale.")
@click.option("--seed", type=int, default=0, help="Seed of the first batch's noise.")
@_out_option
def drawing(out: str, generators: tuple[str, ...], **options: Any) -> Any:
    """Generate pictures of scenes, and count which of the described details are in them.

    Scenes of a family differ in one or two details. Where they differ, a generated picture is closer either to the
    renderer's picture of the described scene or to that of another scene of the family.
    """
    from finelip_fast.studies.drawing import DrawingSetting, drawing

    return _record(drawing(DrawingSetting(generators, **options, progress=shows_progress())), out)


def _generator_config() -> type[Any]:
    from finelip_fast.training.generator_config import GeneratorConfig

    return GeneratorConfig


@click.command("study generator", cls=FieldsCommand, config=_generator_config, required=("out",))
def generator(**options: Any) -> Any:
    """Train a small text-to-image model of drawn scenes for finelip study drawing; run again with the same --out, it resumes.

    It is trained from random weights and reads the text tokens of a checkpoint. Train one on captions cut at 77 tokens and
    another at 256.
    """
    from finelip_fast.training.generator import train_generator
    from finelip_fast.training.generator_config import GeneratorConfig

    config = GeneratorConfig(**typed(options))
    train_generator(config, progress=not is_quiet())
    return {"out": config.out, "steps": config.steps}


def _record(record: Any, out: str) -> Any:
    """Return the record, which is saved after it is printed."""
    command = command_line()

    def write() -> None:
        for path in record.save(out, command=command):
            print(printable(path), file=sys.stderr)

    after_result(write)
    return record
