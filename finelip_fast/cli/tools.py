"""``finelip demo``, ``convert``, ``info``, ``tune``, ``verify`` and ``completion``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from finelip_fast.cli.commands import Command, Several, after_result, is_quiet, shows_progress, speaks_json
from finelip_fast.cli.values import Number, OneOf
from finelip_fast.errors import InputError, KernelError

COMPLETE_VARIABLE = "_FINELIP_COMPLETE"
_SHELLS = {
    "bash": 'eval "$(finelip completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(finelip completion zsh)" in ~/.zshrc',
    "fish": "finelip completion fish | source in ~/.config/fish/config.fish",
}


@click.command(cls=Command)
@click.option("--out", default="demo", metavar="FOLDER", help="Folder of pictures, index and page.")
@click.option("--scenes", type=int, default=400, help="Number of scenes.")
@click.option("--serve", "serves", is_flag=True, help="Then serve the search page.")
@click.option("--port", type=Number(1, 65535), metavar="PORT", default=8000, help="With --serve: port of the page.")
def demo(out: str, scenes: int, serves: bool, port: int) -> Any:
    """Draw scenes, search them with the bundled model, and write an HTML page.

    At the end it prints the command that searches them in a browser.
    """
    from finelip_fast.cli.serve import require_packages, run

    if serves:
        require_packages()
    from finelip_fast.demo import run_demo

    report = run_demo(out, scenes=scenes, progress=shows_progress())
    index = str(Path(out) / "index")
    if not serves:
        if not (is_quiet() or speaks_json()):
            after_result(
                lambda: print(f"search them in a browser: {_program()} serve --index {shlex.quote(index)} --open")
            )
        return report
    from finelip_fast.serve.opening import Opening
    from finelip_fast.serve.settings import ServeSettings

    return chain([report], run(ServeSettings(port=port), Opening(index=index)))


def _program() -> str:
    """Return this command as it can be typed here, even if its environment is not active."""
    path = shutil.which("finelip")
    if path is not None and os.path.realpath(path) == os.path.realpath(sys.argv[0]):
        return "finelip"
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).stem == "finelip" else "finelip"


@click.command(cls=Command, renamed={"--half": "--dtype float16", "--part": "--key"})
@click.argument("source")
@click.argument("out", metavar="OUT")
@click.option("--context-length", type=int, help="Longest caption in tokens.  [default: the checkpoint's, or 256]")
@click.option(
    "--dtype", type=OneOf("float32", "float16"), default="float32", help="Number type to store: float32, float16."
)
@click.option(
    "--activation",
    type=OneOf("quick_gelu", "gelu"),
    help="Activation, for weights that do not specify it: quick_gelu (OpenAI's), gelu (LAION's).",
)
@click.option(
    "--heads",
    cls=Several,
    type=int,
    metavar="NUMBER",
    help="Attention heads, for weights of an unusual width: of both transformers, or of vision and text.",
)
@click.option("--key", metavar="KEY", help="Key of a training checkpoint to read weights from, such as ema_state_dict.")
@click.option("--alpha", type=float, help="Weight of the global score to store in it.  [default: the checkpoint's]")
def convert(
    source: str,
    out: str,
    context_length: int | None,
    dtype: str,
    activation: str | None,
    heads: tuple[int, ...],
    key: str | None,
    alpha: float | None,
) -> Any:
    """Convert a CLIP, SigLIP, Long-CLIP or FineLIP checkpoint to a folder of this package.

    SOURCE is a file, a folder, open_clip:MODEL/WEIGHTS or a hub name; OUT is the folder to write.
    """
    import torch

    from finelip_fast.checkpoint import convert

    dtypes = {"float32": None, "float16": torch.float16}
    return convert(
        source,
        out,
        context_length=context_length,
        dtype=dtypes[dtype],
        activation=activation,
        heads=heads or None,  # type: ignore[arg-type]  # one or two, or refused
        key=key,
        alpha=alpha,
    )


@click.command(cls=Command, renamed={"--out": "--settings"})
@click.option(
    "--operations",
    cls=Several,
    type=OneOf("clim", "clim_gradient", "atrm", "atrm_gradient", closed=False),
    metavar="NAME",
    help="Operations to tune: clim, clim_gradient, atrm, atrm_gradient.  [default: all]",
)
@click.option("--seconds", type=float, help="Time after which no new case starts; run the command again to continue.")
@click.option("--again", is_flag=True, help="Also tune what was tuned before.")
@click.option(
    "--settings",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Table of settings to write.  [default: this user's, which every later run reads]",
)
def tune(operations: tuple[str, ...], seconds: float | None, again: bool, settings: Path | None) -> Any:
    """Find the fastest launch settings of the kernels on this GPU, and keep them; takes a few minutes."""
    from finelip_fast.kernels import describe

    implementation, reason = describe()
    if implementation != "triton":
        raise KernelError(
            f"expected a GPU that runs the fused kernels, but {reason}: tune on the machine that searches"
        )
    from finelip_fast.kernels import tune

    cases = tune.cases_for(operations or tune.OPERATIONS)
    tuned = tune.tune(cases, again=again, seconds=seconds, settings=settings, progress=shows_progress())
    return {
        case.name: f"{case.speedup:.2f}x the default settings; {case.failed} candidates were out" for case in tuned
    } or "nothing to tune: --again tunes what was tuned before"


@click.command(cls=Command)
@click.option("--kernels", cls=Several, metavar="NAME", help="Kernels to check, such as clim-int8.  [default: all]")
@click.option("--untimed", is_flag=True, help="Check only that the kernels are right; measure no speed.")
def verify(kernels: tuple[str, ...], untimed: bool) -> Any:
    """Check that the kernels are right on this machine and, on a GPU, measure how fast they are; takes a minute.

    Each kernel is compared with float64, must give the same bits twice and, on a GPU, the same bits from a captured CUDA
    graph. Speeds are shares of the rates at which the same GPU copies and multiplies. Without a GPU, the command checks what
    runs on the CPU instead.
    """
    from finelip_fast.verify import verify

    report = verify(kernels, timed=not untimed)

    def refuse() -> None:
        if report.wrong:
            names = ", ".join(verdict.kernel for verdict in report.wrong)
            raise KernelError(
                f"expected the results of float64, got others from {names}: FINELIP_KERNELS=reference searches without "
                "the fused kernels; where launch settings were tuned, delete their table, which finelip info names"
            )

    after_result(refuse)
    return report


@click.command(cls=Command)
@click.argument("path", required=False)
@click.option("--index", metavar="FOLDER", help="Folder of an index to describe; the same as PATH.")
@click.option(
    "--verify", is_flag=True, help="Also compare the files with the checksums recorded when they were written."
)
def info(path: str | None, index: str | None, verify: bool) -> Any:
    """Show versions, devices, and which kernels and engines run here, or describe a checkpoint or an index.

    PATH is the folder of an index, or a checkpoint: a folder, a file, open_clip:MODEL/WEIGHTS or a hub name. Without PATH,
    --verify checks the bundled checkpoint.
    """
    from finelip_fast.info import checkpoint_info, index_info, path_info
    from finelip_fast.info import info as describe

    if path is not None and index is not None:
        raise InputError(
            f"expected either PATH or --index, got both: finelip info {shlex.quote(path)} describes {path}"
        )
    if index is not None:
        return index_info(index, verify=verify)
    if path is not None:
        return path_info(path, verify=verify)
    return checkpoint_info(verify=True) if verify else describe()


@click.command(cls=Command, epilog="\b\n" + "\n".join(f"{shell:6}{line}" for shell, line in _SHELLS.items()))
@click.argument("shell", type=OneOf(*_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> str:
    """Print the script that lets SHELL (bash, zsh or fish) complete commands and options."""
    completer = get_completion_class(shell)
    assert completer is not None
    return completer(ctx.find_root().command, {}, "finelip", COMPLETE_VARIABLE).source()
