"""Real processes: they start, drain, stop and are replaced as documented."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from finelip_fast import Client, Retriever
from finelip_fast.errors import InputError
from finelip_fast.serve import run
from finelip_fast.serve.run import address_of, listen, serve
from finelip_fast.serve.settings import ServeSettings

from .asgi import file_of, picture

SEARCH = json.dumps({"text": "a red house", "k": 1})
HOST = b"\r\nHost: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
HANG_SECONDS = 300.0  # after which an event that has not happened never will

PROGRAM = """
import sys
from finelip_fast._command_line import run_command
from finelip_fast.serve.opening import Opening
from finelip_fast.serve.run import serve
from finelip_fast.serve.settings import ServeSettings

if __name__ == "__main__":
    index, checkpoint, workers, settings = sys.argv[1:]
    opening = Opening(index, checkpoint=checkpoint, engine="torch", device="cpu")
    sys.exit(run_command(lambda: serve(ServeSettings(**eval(settings)), opening, int(workers))))
"""


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process, self._errors = process, errors
        assert process.stdout is not None
        self.address = process.stdout.readline().split(" ")[0]
        self.port = int(self.address.rpartition(":")[2]) if self.address else 0

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def refuses(self) -> bool:
        """Whether it accepts no more requests."""
        try:
            return self.ask("GET", "/v1/info")[0] == 503
        except ConnectionError:
            return True

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Return the exit code and the standard error output."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        return self.process.wait(timeout=HANG_SECONDS), self._errors.read_text()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Return a function that runs Python with arguments as a server, and waits until it answers."""
    processes: list[subprocess.Popen[str]] = []

    def launched(*words: object) -> Server:
        errors = tmp_path_factory.mktemp("launched") / "errors"  # a file, because a pipe that is not read fills up
        with errors.open("w") as sink:
            process = subprocess.Popen(
                [sys.executable, "-P", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "OMP_NUM_THREADS": "1",
                },
            )
        processes.append(process)
        return Server(process, errors)

    yield launched
    for process in processes:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def start(
    launch: Callable[..., Server], folder: Path, checkpoint: Path, tmp_path_factory: Any
) -> Callable[..., Server]:
    """Return a function that starts a server at a free port."""
    program = tmp_path_factory.mktemp("run") / "program.py"
    program.write_text(PROGRAM)

    def started(workers: int = 1, index: Path = folder, **settings: Any) -> Server:
        return launch(program, index, checkpoint, workers, repr({"port": 0} | settings))

    return started


@pytest.fixture(scope="module")
def command(launch: Callable[..., Server], checkpoint: Path) -> Callable[..., Server]:
    """Return a function that starts ``finelip serve`` with further arguments."""
    arguments = ("--checkpoint", checkpoint, "--engine", "torch", "--device", "cpu", "--port", 0)
    return lambda *words: launch("-m", "finelip_fast.cli", "serve", *arguments, *words)


def wait_until(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + HANG_SECONDS
    while not (value := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    """A server shared by tests that leave it running, because starting takes seconds."""
    return start()


def test_what_is_no_http_is_refused_and_answers_go_on(server: Server) -> None:
    def say(content: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_SECONDS) as client:
            for at in range(0, min(len(content), 120_000), 60_000):  # the rest would be reset, together with the answer
                client.sendall(content[at : at + 60_000])
                time.sleep(0.1)
            parts = []
            while part := client.recv(1 << 16):
                parts.append(part)
            return b"".join(parts)

    bad = [
        b"\0" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1" + HOST + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST / HTTP/1.1" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ]
    for content in bad:
        answer = say(content)
        assert answer.startswith(b"HTTP/1.1 400 "), (content[:40], answer)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "no_http"
    long = b"a" * 70_000
    for content in (
        b"GET / HTTP/1.1" + HOST + b"X: " + b"a" * 300_000,
        b"GET /?" + long + b" HTTP/1.1" + HOST + b"\r\n",
        b"GET / HTTP/1.1" + HOST + b"X: " + long + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1" + HOST + b"\r\nGET / HTTP/1.1" + HOST + b"X: " + long + b"\r\n\r\n",
    ):
        answer = say(content)
        assert b"HTTP/1.1 431 " in answer, (content[:40], answer)
        assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
    upgrade = b"GET /health/live HTTP/1.1" + HOST + b"Connection: close, Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert say(upgrade).startswith(b"HTTP/1.1 200 ")
    for method in (b"POST", b"HEAD"):
        answer = say(method + b" /v1/search HTTP/1.1" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert answer.count(b"HTTP/1.1 400") == 1
        head, _, body = answer.partition(b"\r\n\r\n")
        assert (head.split()[1], bool(body)) == (b"400", method == b"POST")
    for rest in (b"\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 9000):  # after a request marked as the last one
        request = (
            b"POST /v1/search HTTP/1.1" + HOST + JSON + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(SEARCH)
        )
        answer = say(request + SEARCH.encode() + rest)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["results"]
    assert server.ask("GET", "/health/ready")[0] == 200


def hostile_bytes(random: Random) -> bytes:
    """Return consecutive requests on one connection, most of them damaged."""
    body = SEARCH.encode()
    cut = random.randrange(len(body))
    chunks = b"%x\r\n%b\r\n%x;a=b\r\n%b\r\n0\r\n\r\n" % (cut, body[:cut], len(body) - cut, body[cut:])
    sound = [
        b"GET /health/live HTTP/1.1" + HOST + b"\r\n",
        b"GET /v1/items?limit=2 HTTP/1.0" + HOST + b"\r\n",
        b"HEAD / HTTP/1.1" + HOST + b"Connection: close\r\n\r\n",
        b"POST /v1/search HTTP/1.1" + HOST + JSON + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        b"POST /v1/tokens HTTP/1.1" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
        b"POST /v1/tokens HTTP/1.1" + HOST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n",
        b"DELETE /v1/items/%2e%2e HTTP/1.1" + HOST + b"Content-Length: 3\r\n\r\nabc",
    ]
    odd = [
        b"",
        b"\r\n",
        b"\r\n\r\n",
        b" ",
        b":",
        b"\0",
        b"\n",
        b"\xff\xfe",
        b"HTTP/9.9",
        b"-1",
        b"9" * 40,
        b"%",
        b"a" * 3000,
    ]
    odd += [
        b"\r\nContent-Length: 7",
        b"\r\nTransfer-Encoding: gzip, chunked",
        b"\r\nHost: evil",
        b"\r\n X: folded",
        b"ffffffffff\r\n",
    ]
    content = b"".join(random.choices(sound, k=random.choice([1, 1, 2, 4])))
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        at = random.randrange(len(content) + 1)
        content = content[:at] + random.choice([*odd, random.randbytes(8)]) + content[at + random.randrange(12) :]
    return content


def test_damaged_bytes_leave_it_answering(server: Server) -> None:
    before = server.ask("POST", "/v1/search", SEARCH)
    started = time.monotonic()
    assert server.ask("POST", "/v1/search", SEARCH) == before
    silence = 0.3 + 10 * (time.monotonic() - started)  # after which the server is waiting for more

    def attack(seed: int) -> list[bytes]:
        """Return the status codes of the answers."""
        random = Random(seed)
        content, answer = hostile_bytes(random), b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=HANG_SECONDS) as client:
            if random.randrange(8) == 0:  # makes closing reset the connection
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(ConnectionError, socket.timeout):
                cut = random.randrange(len(content) + 1)
                client.sendall(content[:cut])
                if random.randrange(6) == 0:
                    return []
                client.sendall(content[cut:])
                client.settimeout(silence)
                while part := client.recv(1 << 16):
                    answer += part
        return re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)

    with ThreadPoolExecutor(8) as pool:
        statuses = Counter(status for answered in pool.map(attack, range(250)) for status in answered)
    assert b"500" not in statuses
    assert min(statuses[b"200"], statuses[b"400"]) > 20, statuses
    assert server.ask("GET", "/health/ready")[0] == 200
    assert server.ask("POST", "/v1/search", SEARCH) == before
    wait_until(lambda: b"finelip_in_flight 1.0" in server.ask("GET", "/metrics")[1])


def test_it_answers_ends_what_is_under_way_and_is_gone(start: Callable[..., Server]) -> None:
    server = start()
    assert server.ask("GET", "/health/ready")[0] == 200
    status, body = server.ask("POST", "/v1/search?q=secret", SEARCH)
    assert (status, len(json.loads(body)["results"][0]["hits"])) == (200, 1)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=HANG_SECONDS)
    connection.putrequest("POST", "/v1/search")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(SEARCH)))
    connection.endheaders(SEARCH[:5].encode())
    wait_until(lambda: b"finelip_in_flight 2.0" in server.ask("GET", "/metrics")[1])  # it and this very request
    ended: list[tuple[int, str]] = []
    stopping = threading.Thread(target=lambda: ended.append(server.stop()))
    stopping.start()
    wait_until(server.refuses)
    connection.send(SEARCH[5:].encode())
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("connection")) == (200, "close")
    stopping.join()
    ((code, errors),) = ended
    assert code == 0, errors
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    paths = [line["path"] for line in lines if line["path"] not in ("/metrics", "/v1/info")]
    assert paths == ["/health/ready", "/v1/search", "/v1/search"]
    assert "secret" not in errors
    assert "red house" not in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_what_does_not_end_is_cut_off(start: Callable[..., Server]) -> None:
    server = start(drain=1.0)
    assert server.ask("GET", "/health/ready")[0] == 200  # and signal handlers are installed
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        head = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: 9\r\n\r\n{")
        wait_until(lambda: b"finelip_in_flight 2.0" in server.ask("GET", "/metrics")[1])  # it and this very request
        assert server.stop(signal.SIGINT)[0] == 0


def test_a_port_that_is_taken() -> None:
    with listen(ServeSettings(port=0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use.*--port"):
            listen(ServeSettings(port=port))
        assert address_of(listener) == f"http://127.0.0.1:{port}"
    with pytest.raises(InputError, match="expected a host name or address of this machine"):
        listen(ServeSettings(host="no.such.name.invalid", port=0))
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1"):
        listen(ServeSettings(host="203.0.113.1", port=0))


def test_nothing_is_opened_where_others_would_reach_it() -> None:
    class Never:
        def open(self) -> None:
            raise AssertionError

    with pytest.raises(InputError, match="expected an API key to listen on"):
        serve(ServeSettings(host="0.0.0.0", port=0), Never())


@pytest.mark.slow
def test_what_cannot_be_opened_is_said(start: Callable[..., Server], tmp_path: Path) -> None:
    for workers in (1, 2):
        (tmp_path / "file").touch()
        server = start(workers, index=tmp_path / "file")
        code, errors = server.wait()
        assert (code, server.address) == (2, ""), errors
        assert errors.count("error: ") == 1
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(start: Callable[..., Server]) -> None:
    server = start(2)
    parent = psutil.Process(server.process.pid)

    def workers() -> set[int]:
        """Return all children except multiprocessing's tracker and dead processes."""
        pids = set()
        for child in parent.children():
            with contextlib.suppress(psutil.Error):
                if "resource_tracker" not in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    pids.add(child.pid)
        return pids

    before = wait_until(lambda: len(workers()) == 2 and workers())
    victim = next(iter(before))
    os.kill(victim, signal.SIGKILL)
    after = wait_until(lambda: len(workers() - {victim}) == 2 and workers())
    assert victim not in after
    wait_until(lambda: b"finelip_items 6.0" in server.ask("GET", "/metrics")[1])
    assert [server.ask("POST", "/v1/search", SEARCH)[0] for _ in range(10)] == [200] * 10
    assert b"finelip_request_seconds_count" in server.ask("GET", "/metrics")[1]
    code, errors = server.stop()
    assert (code, f"worker {victim} exited with code -9" in errors) == (0, True), errors
    assert not any(psutil.pid_exists(pid) for pid in after)


def test_the_log_says_why_a_worker_did_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(run, "_RESTART_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(run._log, "propagate", True)
    stopping = threading.Event()
    ended = run._Process.__new__(run._Process)
    ended.report, sender = multiprocessing.Pipe(duplex=False)
    ended.process = multiprocessing.get_context("spawn").Process(target=print)
    ended.process.start()
    ended.process.join(HANG_SECONDS)
    ended.is_ready, ended.reason = False, ""
    sender.send("there is no index at photos: make one")
    run._replace_dead([ended], lambda: stopping.set(), stopping)
    assert "exited with code 0: there is no index at photos: make one; starting another" in caplog.text


@pytest.mark.slow
def test_workers_end_with_their_parent(start: Callable[..., Server]) -> None:
    server = start(2)
    workers = psutil.Process(server.process.pid).children()
    os.kill(server.process.pid, signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=HANG_SECONDS)[1]


# As a user runs it ---------------------------------------------------------------------------------------------------


def test_what_is_added_over_http_is_there_after_a_kill(
    command: Callable[..., Server], checkpoint: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    with Retriever(checkpoint, index=index, device="cpu", engine="torch") as retriever:
        retriever.add_images([picture(0)], ids=["first"], progress=False)
    contents = [file_of(picture(1)), b"no picture", file_of(picture(2))]
    server = command("--index", index, "--writable")
    with Client(server.address, timeout=HANG_SECONDS) as client:
        report = client.add_images(contents, metadata=[{"place": name} for name in "abc"])
        assert ([name for name, _ in report.skipped], len(report.added)) == (["image-1"], 2)
        first, second = report.added
        (hit,) = client.search(image=contents[2], k=1, where="place = 'c'")
        assert (hit.id, Path(hit.path or "").read_bytes()) == (second, contents[2])
        status, thumbnail = server.ask("GET", f"/v1/items/{quote(second, safe='')}/thumbnail")
        assert (status, thumbnail[8:12]) == (200, b"WEBP")
        (deleted_hit,) = client.search(image=contents[0], k=1, where="place = 'a'")
        client.delete([first])
        assert not Path(deleted_hit.path or "").exists()
        (last,) = client.add_images(file_of(picture(3))).added
        os.kill(server.process.pid, signal.SIGKILL)
    server.wait()
    server = command("--index", index, "--writable")
    with Client(server.address, timeout=HANG_SECONDS) as client:
        assert {item.id for item in client.items()} == {"first", second, last}
        assert [client.search(image=picture(seed), k=1)[0].id for seed in (2, 3)] == [second, last]
    assert server.stop()[0] == 0


@pytest.mark.slow
def test_workers_of_the_command_answer(command: Callable[..., Server], folder: Path) -> None:
    server = command("--index", folder, "--workers", 2)
    wait_until(lambda: b"finelip_items 6.0" in server.ask("GET", "/metrics")[1])
    with Client(server.address, timeout=HANG_SECONDS) as client:
        assert len({hit.id for hit in client.search("a red house", k=6)}) == 6
    code, errors = server.stop()
    assert (code, "Traceback" in errors) == (0, False), errors


@pytest.mark.slow
def test_shards_are_served_and_those_that_are_gone_are_told(
    command: Callable[..., Server], checkpoint: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("ray") is None:  # not imported, because its settings must come first
        pytest.skip("ray is not installed")
    for shard, seeds in (("a", (0, 1)), ("b", (2, 3))):
        (tmp_path / f"photos-{shard}").mkdir()
        for seed in seeds:
            picture(seed).save(tmp_path / f"photos-{shard}" / f"{seed}.png")
        with Retriever(checkpoint, index=tmp_path / shard, device="cpu", engine="torch") as retriever:
            retriever.add_folder(tmp_path / f"photos-{shard}", progress=False)
    server = command("--shards", tmp_path / "a", tmp_path / "b", "--alpha", 1)

    def search() -> Any:
        status, body = server.ask("POST", "/v1/search", json.dumps({"text": "a red house", "k": 4}))
        assert status == 200, body
        return json.loads(body)

    answer = search()
    hits = answer["results"][0]["hits"]
    assert (answer["covered"], answer["missing"]) == (1, {})
    assert {(hit["id"], Path(hit["shard"]).name) for hit in hits} == {
        ("0.png", "a"),
        ("1.png", "a"),
        ("2.png", "b"),
        ("3.png", "b"),
    }
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx([hit["global_score"] for hit in hits], abs=1e-6)
    assert server.ask("GET", hits[-1]["thumbnail"])[0] == 200
    assert server.ask("POST", "/v1/items", "x")[0] == 403

    processes = psutil.Process(server.process.pid).children(recursive=True)
    victim = next(process for process in processes if "ray::_Server" in " ".join(process.cmdline()))
    victim.kill()
    partial = search()
    (missing_shard,) = partial["missing"]
    assert partial["covered"] == 0.5
    assert {hit["shard"] for hit in partial["results"][0]["hits"]} == {str(tmp_path / "a"), str(tmp_path / "b")} - {
        missing_shard
    }
    wait_until(lambda: search()["covered"] == 1)
    code, errors = server.stop()
    assert (code, "Traceback" in errors) == (0, False), errors
