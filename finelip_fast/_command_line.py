"""The end of every command: its exit code, whatever happens.

===== ==============================================================================================================
code  when
===== ==============================================================================================================
0     success, even if the output was not read to its end (``finelip search … | head -1``)
2     an error in the library, the system or the command line, which the message explains
130   interrupted by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP: 128 plus the number of the signal
===== ==============================================================================================================

Work that was acknowledged before is kept in each case. A signal is raised inside the running work, so a job that adds to an
index also keeps what it has embedded. A training run first finishes its step, saves its state and reports an error: 2.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from finelip_fast._terminal import paragraph, printable
from finelip_fast.errors import FineLIPError


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command and report the error that stops it, if any.

    Args:
        command: Function that does the work and prints; returns an exit code, None for 0, or exits as Click does.

    Returns:
        The exit code.
    """
    with _streams() as output, _signals(), _warnings():
        code = _explained(command)
        output.flush()
        if code == 0 and output.fault is not None and not isinstance(output.fault, BrokenPipeError):
            _complain(f"the work is done, and its result cannot be printed: {output.fault.strerror}")
            code = 2
    return code


def run_script(*words: str) -> int:
    """Run a script of the repository as the command it stands for: ``finelip WORDS`` with the process's arguments."""
    return run_command(lambda: importlib.import_module("finelip_fast.cli").main([*words, *sys.argv[1:]]))


def _explained(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except click.exceptions.Exit as stop:  # after --help and --version
        return stop.exit_code
    except click.UsageError as error:
        if error.ctx is not None:
            usage = " ".join(error.ctx.get_usage().split())
            print(printable(f"{usage}; see {error.ctx.command_path} --help"), file=sys.stderr)
        _complain(error.format_message())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except FineLIPError as error:
        _complain(str(error))
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        print("interrupted" if number == signal.SIGINT else "terminated", file=sys.stderr)
        return 128 + number
    except OSError as error:
        _complain(f"{printable(error.filename)}: {error.strerror}" if error.filename is not None else str(error))
    except Exception as error:
        if (shortage := _shortage(error)) is None:
            raise  # a bug in the library, which the traceback explains
        _complain(shortage)
    return 2


def _complain(message: str) -> None:
    print(f"error: {paragraph(message)}", file=sys.stderr)


def _shortage(error: Exception) -> str | None:
    """Describe the resource that ran out; None if the error has another cause."""
    if isinstance(error, RecursionError):
        return "something is nested too deeply, or refers to itself: give a simpler one"
    # PyTorch has messages of its own, one for the CPU's allocator and one for the GPU's.
    if isinstance(error, MemoryError) or any(word in str(error) for word in ("allocate memory", "out of memory")):
        return f"there is not enough memory: {str(error) or 'the system has no more'}; give less at once, or free some"
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """Raise signals that would end the process at once as KeyboardInterrupt, as Ctrl-C does."""
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != process:  # a forked child, which ends as its parent wishes
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # An ignored signal, as under nohup, stays ignored.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings() -> Iterator[None]:
    """Show warnings as plain lines: their position in the library's source means nothing to the user of a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {paragraph(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Stream:
    """A standard stream that never raises: a progress bar that nobody can see must not end the work.

    Attributes:
        fault: First error; all output after it is discarded.
    """

    def __init__(self, stream: Any, nowhere: Any) -> None:
        self._stream, self._nowhere = stream or nowhere, nowhere
        self.fault: OSError | None = None
        if hasattr(self._stream, "reconfigure"):  # paths may have characters that it cannot show
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.fault = self.fault or error
            # Output that is still in the buffer must not fail again when the interpreter exits.
            with suppress(OSError):
                os.dup2(self._nowhere.fileno(), self._stream.fileno())


@contextmanager
def _streams() -> Iterator[_Stream]:
    """Replace the standard streams with ones that never raise; yields the one for results."""
    for number in range(3):  # a file opened under a closed stream's number would receive its output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output, messages = (_Stream(stream, nowhere) for stream in before)  # None if it is closed
        sys.stdout, sys.stderr = output, messages
        try:
            yield output
        finally:
            messages.flush()
            sys.stdout, sys.stderr = before
