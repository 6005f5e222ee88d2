"""Processes and sockets: one server, or several workers that share an address and an index.

A server told to stop (SIGTERM, Ctrl-C) accepts no more requests, answers pending ones within ``settings.drain``, and exits at
most ``STOP_SECONDS`` later. Workers are spawned, never forked, and a worker that dies is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, get_context, parent_process
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from finelip_fast._terminal import printable
from finelip_fast.errors import EngineError, FineLIPError, InputError
from finelip_fast.serve.answers import Refusal
from finelip_fast.serve.batching import Workers
from finelip_fast.serve.guards import MAX_HEADERS, check_exposure, headers_too_large
from finelip_fast.serve.settings import ServeSettings

if TYPE_CHECKING:
    from finelip_fast.serve.opening import Opening

STOP_SECONDS = 10.0

_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_BACKLOG = 1024
_HEADER_SECONDS = 20.0  # within which a connection must have sent a request, apart from its body
_RESTART_SECONDS = (0.5, 30.0)  # between a worker's death and its successor's start: first and longest pause

_log = logging.getLogger("finelip_fast.serve")


def print_address(address: str) -> None:
    """Print the server's address, flushed also into a pipe: whoever started the server may wait for this line."""
    print(f"{address} (Ctrl-C stops it)", flush=True)


def serve(
    settings: ServeSettings, opening: Opening, workers: int = 1, *, ready: Callable[[str], object] = print_address
) -> None:
    """Serve an index until the process is told to stop.

    Args:
        settings: Settings, including the address; port 0 takes any free port.
        opening: Description of what each process opens.
        workers: Number of processes.
        ready: Function that is called with the address once the server answers.

    Raises:
        InputError: An address that is in use or not one of this machine, or one that other machines reach, without a key.
        FineLIPError: The model or the collection cannot be opened.
    """
    check_exposure(settings)
    with contextlib.closing(listen(settings)) as listener:
        if workers == 1:
            _answer(settings, opening, listener, lambda: ready(address_of(listener)))
        else:
            _supervise(settings, opening, workers, listener, lambda: ready(address_of(listener)))


def listen(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens on the address.

    Raises:
        InputError: The address is in use or not one of this machine; the message says how to choose another.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(
            f"expected a host name or address of this machine, got {host!r:.80}: {error}; try --host 127.0.0.1"
        ) from None
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} is in use; choose another with --port"
        else:
            message = f"cannot listen on {printable(host)}, port {port}: {error.strerror}; see --host and --port"
        raise InputError(message) from None
    listener.set_inheritable(True)
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address to open in a browser."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# One process ---------------------------------------------------------------------------------------------------------


def _answer(settings: ServeSettings, opening: Opening, listener: socket.socket, ready: Callable[[], object]) -> None:
    """Answer requests in this process until told to stop."""
    from finelip_fast.serve.app import create_app  # with workers, the metrics folder is known only now

    configure_logs()
    computing = Workers("compute")
    with contextlib.closing(computing.call(opening.open)) as collection:
        app = create_app(collection, settings, computing)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=math.ceil(settings.drain),
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
        server = _Server(config, app.state.serving, settings.drain, ready)
        server.run([listener])
    if not server.started:
        raise EngineError("the server could not start; see the log above")


class _Server(uvicorn.Server):
    """uvicorn's server, except that it exits without an error when told to stop, and within a stated time."""

    def __init__(self, config: uvicorn.Config, serving: Any, drain: float, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._serving, self._drain, self._ready = serving, drain, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with caught_signals(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._serving.state = "draining"
            # A hanging thread cannot be ended in any other way.
            timer = threading.Timer(self._drain + STOP_SECONDS, os._exit, (0,))
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def caught_signals(handler: Any) -> Iterator[None]:
    """Have the signals that end a process call a handler; ignored signals stay ignored."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with refusals in this server's format, and a time limit for headers."""

    _timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._disarm()
        elif self._timer is None:
            self._arm()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse input that is not HTTP.

        Input after a complete request is ignored, and the connection ends with that request's answer. It also ends if part
        of an answer has already been sent.
        """
        state = self.conn.our_state
        if state in (h11.SEND_RESPONSE, h11.SEND_BODY) and not self.cycle.more_body:
            self.flow.pause_reading()
            return
        if state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        is_begun = state is h11.SEND_RESPONSE
        if is_begun:  # its application learns that nobody is waiting any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        hint = getattr(sys.exc_info()[1], "error_status_hint", None)
        if hint == 431 and not is_begun:
            refusal = headers_too_large()
        else:
            refusal = Refusal(400, "no_http", "expected an HTTP/1.1 request", headers={"Connection": "close"})
        answer = refusal.answer(None)
        headers = [*answer.raw_headers, (b"x-content-type-options", b"nosniff")]
        content = b"" if is_begun and self.scope["method"] == "HEAD" else bytes(answer.body)
        response = h11.Response(status_code=answer.status_code, headers=headers)
        for event in (response, h11.Data(data=content), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def configure_logs() -> None:
    """Send the server's log to standard error: one line of JSON for each request, and tracebacks of faults."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    for name, sink, level in (
        ("finelip_fast.serve", handler, logging.INFO),
        ("finelip_fast.serve.access", lines, logging.INFO),
        ("uvicorn", handler, logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [sink], False
        logger.setLevel(level)


# Several processes ---------------------------------------------------------------------------------------------------


def _work(settings: ServeSettings, opening: Opening, workers: int, listener: socket.socket, report: Any) -> None:
    """Run a worker process, which reports that it is ready, or why it never will be."""
    import torch

    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        _answer(settings, opening, listener, lambda: report.send(""))
    except FineLIPError as error:
        with contextlib.suppress(OSError):
            report.send(str(error))
        sys.exit(2)


def _follow_parent() -> None:
    """Stop once the parent process has ended."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


class _Process:
    """A worker process, as seen by its parent."""

    def __init__(self, settings: ServeSettings, opening: Opening, workers: int, listener: socket.socket) -> None:
        context = get_context("spawn")
        self.report, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(settings, opening, workers, listener, sender))
        self.process.start()
        sender.close()
        self.is_ready = False
        self.reason = ""  # why it never will be ready

    def hear(self) -> str | None:
        """Return the worker's report: empty if it is ready, otherwise why it never will be; None if there is no report."""
        try:
            text: str | None = self.report.recv() if self.report.poll() else None
        except (EOFError, OSError):
            text = None
        self.is_ready = self.is_ready or text == ""
        self.reason = text or self.reason
        return text


def _supervise(
    settings: ServeSettings, opening: Opening, workers: int, listener: socket.socket, ready: Callable[[], object]
) -> None:
    """Start workers, replace those that die, and stop them all when told to."""
    stopping = threading.Event()
    shared = tempfile.mkdtemp(prefix="finelip-metrics-")
    os.environ[_MULTIPROCESS] = shared
    processes: list[_Process] = []
    try:
        with caught_signals(lambda *_: stopping.set()):
            # What the first worker cannot open, none can; the error is reported once.
            processes.append(_Process(settings, opening, workers, listener))
            _await_first(processes[0], stopping)
            while not stopping.is_set() and len(processes) < workers:
                processes.append(_Process(settings, opening, workers, listener))
            if not stopping.is_set():
                ready()
            _replace_dead(processes, lambda: _Process(settings, opening, workers, listener), stopping)
            _stop([process.process for process in processes], settings.drain)
    finally:
        for process in processes:
            if process.process.is_alive():
                process.process.kill()
        del os.environ[_MULTIPROCESS]
        shutil.rmtree(shared, ignore_errors=True)


def _await_first(first: _Process, stopping: threading.Event) -> None:
    """Wait until the first worker is ready.

    Raises:
        EngineError: The worker ended before it was ready.
    """
    while not stopping.is_set() and not first.is_ready:
        connection.wait([first.report, first.process.sentinel], timeout=0.2)
        text = first.hear()
        if text:
            raise EngineError(text)
        if text is None and not first.process.is_alive() and not first.report.poll():
            raise EngineError(
                f"a worker exited with code {first.process.exitcode} before it was ready; see the log above"
            )


def _replace_dead(processes: list[_Process], start: Any, stopping: threading.Event) -> None:
    """Replace workers that end, until told to stop; pause longer each time one ends before it is ready."""
    from prometheus_client import multiprocess

    pause, longest = _RESTART_SECONDS
    while not stopping.is_set():
        connection.wait([process.process.sentinel for process in processes], timeout=0.2)
        for place, process in enumerate(processes):
            is_alive = process.process.is_alive()
            while process.hear() is not None:  # all that one that ended has reported
                pass
            if is_alive or stopping.is_set():
                continue
            ending = f"worker {process.process.pid} exited with code {process.process.exitcode}"
            _log.error("%s%s; starting another", ending, f": {process.reason}" if process.reason else "")
            multiprocess.mark_process_dead(process.process.pid)  # type: ignore[no-untyped-call]
            pause = _RESTART_SECONDS[0] if process.is_ready else min(2 * pause, longest)
            if not stopping.wait(pause):
                processes[place] = start()


def _stop(processes: list[Any], drain: float) -> None:
    for process in processes:
        process.terminate()
    until = time.monotonic() + drain + STOP_SECONDS
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
