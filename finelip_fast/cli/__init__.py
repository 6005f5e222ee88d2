"""The ``finelip`` command; its exit codes are those of :mod:`finelip_fast._command_line`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import click
from click.shell_completion import shell_complete

from finelip_fast._command_line import run_command
from finelip_fast.cli.add import add
from finelip_fast.cli.commands import Group
from finelip_fast.cli.evaluate import compare, evaluate
from finelip_fast.cli.explain import explain
from finelip_fast.cli.export import export
from finelip_fast.cli.generate import generate
from finelip_fast.cli.index import index
from finelip_fast.cli.items import list_, remove
from finelip_fast.cli.search import search
from finelip_fast.cli.serve import serve
from finelip_fast.cli.study import ablation, adaptation, drawing, generation, generator, study
from finelip_fast.cli.tools import COMPLETE_VARIABLE, completion, convert, demo, info, tune, verify
from finelip_fast.cli.train import adapt, train
from finelip_fast.errors import InputError


class _Finelip(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a user meets them."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after ``finelip``; ``version`` is ``--version``."""
        return super().parse_args(ctx, ["--version"] if args == ["version"] else args)


@click.group(
    cls=_Finelip,
    epilog="Start with finelip demo. Then: finelip add PHOTOS; finelip search 'a long description'. For "
    "completion of commands and options in the shell, see finelip completion.",
)
@click.version_option(None, "-V", "--version", package_name="finelip-fast", message="%(prog)s %(version)s")
def finelip() -> None:
    """Search pictures with long descriptions."""


# When several threads call PyTorch, as in a server, GNU's OpenMP has more threads than processors and lets them sleep at every
# barrier, which makes the PyTorch engine take a third longer. With the active policy they stay awake there, here for a fifth
# of a millisecond; any longer would obstruct the threads that search. LLVM's OpenMP sleeps after 200 ms, as by default.
_AWAKE = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "200"}


for command in (
    *(demo, add, search, serve, list_, remove, explain, generate, evaluate, compare),
    *(study, ablation, adaptation, drawing, generator, generation),
    *(train, adapt, export, convert, info, tune, verify, index, completion),
):
    finelip.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if sys.platform == "linux" and "torch" not in sys.modules and _AWAKE.keys().isdisjoint(os.environ):
        os.environ.update(_AWAKE)  # read when PyTorch is imported
    return run_command(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int | None:
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        return shell_complete(finelip, {}, "finelip", COMPLETE_VARIABLE, instruction)
    for argument in arguments:  # the system never passes such ones, but a caller may
        if "\0" in argument or re.search("[\ud800-\udc7f\udd00-\udfff]", argument):
            raise InputError(f"expected arguments that can be names of files, got {argument!r:.80}")
    # Not Click's own main: how a command ends, even by a signal, is defined in one place.
    with finelip.make_context("finelip", arguments) as context:
        finelip.invoke(context)
    return None
