"""Run a contender in a process of its own, so that whatever it loads, breaks or hangs stays there.

``python bench/apart.py FD MODULE NAME`` starts that process. It creates the contender ``MODULE.CONTENDERS[NAME]`` and answers
requests from a pipe. It may use another interpreter, with packages that cannot be installed beside ours.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "TOKIO_WORKER_THREADS",
    "LANCE_CPU_THREADS",
    "NUMEXPR_NUM_THREADS",
)
# If an administrator selected OpenBLAS kernels for an older processor, peers that multiply with NumPy would be slowed.
_CHOSEN_KERNELS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class Failure(Exception):
    """The contender raised an error, died, or exceeded its time limit, as the message says."""


@dataclass(frozen=True)
class Answer:
    """The result of a request, and the seconds that it took inside the contender's process."""

    value: Any
    seconds: float


class Apart:
    """A contender's process.

    Args:
        module, name: Location of the contender: ``MODULE.CONTENDERS[NAME]``.
        seconds: Time limit for startup and all requests together.
        python: Interpreter that has the contender's packages.
        threads: Number of threads and of processors it may use.
        log: File for everything that it prints.
    """

    def __init__(
        self,
        module: str,
        name: str,
        *,
        seconds: float,
        python: str = sys.executable,
        threads: int = 2,
        log: Path | None = None,
    ) -> None:
        self.seconds, self.seconds_left = seconds, seconds
        self._pipe, theirs_end = Pipe()
        environment = {key: value for key, value in os.environ.items() if key not in _CHOSEN_KERNELS}
        environment |= dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1"}
        command = [python, __file__, str(theirs_end.fileno()), module, name]
        with (log or Path(os.devnull)).open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs_end.fileno()],
                start_new_session=True,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        theirs_end.close()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[:threads])

    def ask(self, method: str, *arguments: Any) -> Answer:
        """Call a method of the contender.

        Raises:
            Failure: The contender raised an error, its process died, or its time is used up. The last two end the process.
        """
        start = time.perf_counter()
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(max(0.0, self.seconds_left)):
                self.end()
                raise Failure(f"took more than {self.seconds:g} s")
            error, value, seconds = self._pipe.recv()
        except (EOFError, OSError):
            self.end()
            raise Failure(f"its process ended with exit status {self._process.returncode}") from None
        finally:
            self.seconds_left -= time.perf_counter() - start
        if error:
            raise Failure(error)
        return Answer(value, seconds)

    def memory(self) -> float:
        """Resident memory in MiB, including child processes."""
        import psutil

        try:
            process = psutil.Process(self._process.pid)
            return sum(member.memory_info().rss for member in [process, *process.children(recursive=True)]) / 2**20
        except psutil.NoSuchProcess:
            return 0.0

    def end(self) -> None:
        """End the process and its child processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()


def _serve(pipe: Connection, module: str, name: str) -> None:
    contender, problem = None, ""
    try:
        contender = importlib.import_module(module).CONTENDERS[name]()
    except Exception as error:  # a peer's packages fail in many ways; each is a reason to leave it out
        problem = _reason(error)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            method, arguments = pipe.recv()
            pipe.send(_answer(contender, problem, method, arguments))


def _answer(contender: object, problem: str, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any, float]:
    """Return error, value and seconds of a request; the error is empty on success."""
    if problem:
        return problem, None, 0.0
    start = time.perf_counter()
    try:
        value = getattr(contender, method)(*arguments)
    except Exception as error:
        return _reason(error), None, 0.0
    return "", value, time.perf_counter() - start


def _reason(error: Exception) -> str:
    """Return the error as one line, short enough for a table."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], sys.argv[3])
