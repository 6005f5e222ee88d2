"""How every command ends: its exit code, whatever comes between.

===== ==============================================================================================================
code  when
===== ==============================================================================================================
0     done; also where nobody read all that was printed (``finelip search … | head -1``)
2     an error, which its message explains: of the library, of the system, or of the command line
130   interrupted by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP: 128 and the number of the signal
===== ==============================================================================================================

What was acknowledged before is kept in each case. A signal is raised where the work is, so a job that adds to an index also
keeps what it has embedded. A training first ends its step and saves its state, and says so as an error: 2.
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
    """Run a command and explain what stops it.

    Args:
        command: Function that does the work and prints; returns its exit code, None for 0, or exits as Click does.

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
    """Run a file of the repository as the command that it is: ``finelip WORDS`` with the arguments of the process."""
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
            raise  # a mistake of ours, which its traceback explains
        _complain(shortage)
    return 2


def _complain(message: str) -> None:
    print(f"error: {paragraph(message)}", file=sys.stderr)


def _shortage(error: Exception) -> str | None:
    """What there was too little of; None: it is another error."""
    if isinstance(error, RecursionError):
        return "something is nested too deeply, or refers to itself: give a simpler one"
    # PyTorch has its own words: of the CPU's allocator, and of the GPU's.
    if isinstance(error, MemoryError) or any(word in str(error) for word in ("allocate memory", "out of memory")):
        return f"there is not enough memory: {str(error) or 'the system has no more'}; give less at once, or free some"
    return None


@contextmanager
def _signals() -> Iterator[None]:
    """Raise the signals that would end the process at once, as Ctrl-C is raised."""
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != process:  # a child by fork, which is ended as its parent wishes
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # One that is ignored, as under nohup, stays so.
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings() -> Iterator[None]:
    """Show warnings as lines that a person reads: where they arose in the library says nothing to who runs a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {paragraph(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Stream:
    """A standard stream that never raises: a progress bar that nobody can see must not end the work.

    Attributes:
        fault: The first error; since then, all goes nowhere.
    """

    def __init__(self, stream: Any, nowhere: Any) -> None:
        self._stream, self._nowhere = stream or nowhere, nowhere
        self.fault: OSError | None = None
        if hasattr(self._stream, "reconfigure"):  # a path may hold what the terminal cannot show
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
            # What is still in its buffer must not fail again when the interpreter ends.
            with suppress(OSError):
                os.dup2(self._nowhere.fileno(), self._stream.fileno())


@contextmanager
def _streams() -> Iterator[_Stream]:
    """Put streams that never raise in the place of the standard ones; gives the one for results."""
    for number in range(3):  # a file that took the number of a closed stream would get its text
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        output, messages = (_Stream(stream, nowhere) for stream in before)  # None where it is closed
        sys.stdout, sys.stderr = output, messages
        try:
            yield output
        finally:
            messages.flush()
            sys.stdout, sys.stderr = before
