"""How commands end: exit codes, signals, and closed, full or abandoned streams; with real processes where necessary."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

from finelip_fast._command_line import run_command
from finelip_fast.cli.usage import typed_options
from finelip_fast.errors import InputError

REPOSITORY = Path(__file__).parent.parent.parent
WORK = """
import sys
from tqdm import tqdm
from finelip_fast._command_line import run_command

def work():
    with tqdm(total=400, mininterval=0) as bar:
        for step in range(400):
            bar.update()
    print("x" * 100_000)
    open(sys.argv[1], "w").close()

raise SystemExit(run_command(work))
"""

# A `sitecustomize` module: an interrupt at a fixed place within the import of PyTorch.
INTERRUPTING = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "torch.functional":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("expected a\n  b: c"), 2, "error: expected a\n  b: c\n"),
        (InputError("\x1b[2J\rof a\nerror: stranger"), 2, "error: \\x1b[2J\\rof a\n  error: stranger\n"),
        (PermissionError(13, "Permission denied", "out\n"), 2, "error: out\\n: Permission denied\n"),
        (OSError("pipe"), 2, "error: pipe\n"),
        (
            MemoryError(),
            2,
            "error: there is not enough memory: the system has no more; give less at once, or free some\n",
        ),
        (RuntimeError("can't allocate memory: 9"), 2, "error: there is not enough memory: can't allocate memory: 9; "),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: there is not enough memory: CUDA out of memory"),
        (RecursionError(), 2, "error: something is nested too deeply"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt(signal.SIGTERM), 143, "terminated\n"),
        (click.exceptions.Exit(0), 0, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_what_ends_a_command_is_explained(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == code
    assert capsys.readouterr().err.startswith(message)


def test_a_wrong_command_line_is_explained_with_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    context = click.Context(click.Command("find"), info_name="find\x1b[2J")
    assert run_command(raising(click.UsageError("Expected a\nb\x1b[2J.", context))) == 2
    usage, *message = capsys.readouterr().err.splitlines()
    assert usage == r"Usage: find\x1b[2J [OPTIONS]; see find\x1b[2J --help"
    assert message == ["error: Expected a", r"  b\x1b[2J."]


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_are_raised_where_the_work_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number, cleanups = getattr(signal, name), []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleanups.append("work")

    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run_command(work) == 128 + number
        assert cleanups == ["work"]
        assert capsys.readouterr().err == "terminated\n"
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        assert run_command(lambda: os.kill(os.getpid(), number)) == 0
    finally:
        signal.signal(number, before)


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def warn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *arguments: print(warnings.formatwarning(*arguments), end="", file=sys.stderr)
            warnings.warn("the file \x1b[1m is\nodd", UserWarning, stacklevel=1)

    assert run_command(warn) == 0
    assert capsys.readouterr().err == "warning: the file \\x1b[1m is\n  odd\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="for systems with /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "out", "message"),
    [
        ("| head -c 3", 0, "xxx", "400/400"),
        ("2>&1 | head -c 0", 0, "", ""),
        ("2>&-", 0, "x" * 100_000 + "\n", ""),
        ("2>/dev/full", 0, "x" * 100_000 + "\n", ""),
        (">&-", 0, "", "400/400"),
        (">/dev/full", 2, "", "the work is done, and its result cannot be printed: No space left on device"),
        (">&- 2>&- <&-", 0, "", ""),
        (">/dev/full 2>/dev/full", 2, "", ""),
    ],
)
def test_streams_that_nobody_reads_keep_the_work(
    redirection: str, code: int, out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "work.py").write_text(WORK)
    command, _, reader = redirection.partition("|")
    line = f'{{ "{sys.executable}" work.py done {command}; echo $? > code; }}' + (f" | {reader}" if reader else "")
    result = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert (tmp_path / "code").read_text() == f"{code}\n"
    assert (tmp_path / "done").read_bytes() == b""  # the work is kept, and nothing else was written into its file
    assert result.stdout == out
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process cannot interrupt itself")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "finelip_fast.cli", "info"],
        [REPOSITORY / "training" / "train.py", "scenes", "--out", "run"],
        [REPOSITORY / "export" / "to_onnx.py", "missing"],
    ],
    ids=["finelip", "train.py", "to_onnx.py"],
)
def test_an_interrupt_while_pytorch_is_imported(command: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    ended = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("use engine='torch' or engine='auto'", "use --engine torch or --engine auto"),
        ("expected k of at least 1, got 0", "expected -k of at least 1, got 0"),
        ("expected batch_size a multiple of group=4", "expected --batch-size a multiple of group=4"),
        ("give overwrite=True, or alpha=0.5", "give --again, or --alpha 0.5"),
        ("my.device='a'; where \"device='b'\"", "my.device='a'; where \"device='b'\""),
        ("expected engine rooms, got none", "expected engine rooms, got none"),
    ],
)
def test_errors_name_options_as_they_are_typed(message: str, typed: str) -> None:
    names = {"engine": "--engine", "k": "-k", "batch_size": "--batch-size", "overwrite": "--again", "alpha": "--alpha"}
    params = [click.Option([flag, name]) for name, flag in {**names, "device": "--device"}.items()]
    assert typed_options(message, params) == typed
