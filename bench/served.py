"""Start a server of ours on this machine, and clients that load it: shared by the serving benchmarks.

``python bench/served.py URL CLIENTS REQUESTS SEED NAME BODY`` runs the clients' process, which prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WORDS = (
    "red",
    "blue",
    "tall",
    "small",
    "house",
    "tree",
    "car",
    "bird",
    "left",
    "of",
    "beside",
    "two",
    "door",
    "window",
)
HOST = "127.0.0.1"
_START_SECONDS, _STOP_SECONDS, _REQUEST_SECONDS = 300, 60, 600


def query(rng: random.Random) -> str:
    """Return a description of 4 to 40 words that has not been sent before."""
    return " ".join([*rng.choices(WORDS, k=rng.randint(4, 40)), str(rng.randrange(10**6))])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process of its own, ready to answer.

    Args:
        command: Command that starts the server; its port is appended.
        ready: Path that answers once the server is ready.
    """

    def __init__(self, command: Sequence[str], ready: str = "/health/ready") -> None:
        port = free_port()
        self.address, self._ready = f"http://{HOST}:{port}", ready
        self._command = [*command, "--port", str(port)]
        self.start()

    def start(self) -> None:
        """Start the process, and wait until the server answers.

        Raises:
            RuntimeError: The process ended, or does not answer.
        """
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(10 * _START_SECONDS):
            if self.process.poll() is not None:
                break
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.address}{self._ready}", timeout=10).close()
                return
            time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"the server did not start: {' '.join(self._command)}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def served(index: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Run ``finelip serve`` on an index, with further options."""
    with started([sys.executable, "-P", "-m", "finelip_fast.cli", "serve", "--index", str(index), *options]) as server:
        yield server


@contextmanager
def started(command: Sequence[str], ready: str = "/health/ready") -> Iterator[Server]:
    server = Server(command, ready)
    try:
        yield server
    finally:
        server.stop()


def load(url: str, clients: int, requests: int, seed: int, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send requests from clients in another process; each client sends one after another.

    Args:
        url: URL that requests are posted to.
        clients, requests: Number of clients, and total number of requests.
        seed: Seed of the descriptions.
        name: Key of the description in the request body.
        body: Remainder of each request body.

    Returns:
        ``latencies`` of all requests, and ``seconds`` from the first to the last.
    """
    command = [sys.executable, "-P", __file__, url, str(clients), str(requests), str(seed), name, json.dumps(body)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * _REQUEST_SECONDS).stdout
    result: dict[str, Any] = json.loads(output)
    return result


async def _ask(url: str, clients: int, requests: int, seed: int, name: str, body: dict[str, Any]) -> dict[str, Any]:
    import httpx2

    rng = random.Random(seed)
    bodies = iter([{name: query(rng), **body} for _ in range(requests)])
    latencies: list[float] = []
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(timeout=_REQUEST_SECONDS, limits=limits) as session:

        async def client() -> None:
            for content in bodies:
                start = time.perf_counter()
                answer = await session.post(url, json=content)
                answer.raise_for_status()
                latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"latencies": latencies, "seconds": time.perf_counter() - start}


def export_model(folder: Path) -> Path:
    """Export a ViT-B/16-sized model with random weights and int8 graphs; ``FINELIP_BENCH_MODEL`` names an existing one."""
    import torch

    import finelip_fast

    if present := os.environ.get("FINELIP_BENCH_MODEL"):
        return Path(present)
    torch.manual_seed(0)
    finelip_fast.save(finelip_fast.FineLIP(finelip_fast.FineLIPConfig.preset("ViT-B-16")).eval(), folder)
    command = [sys.executable, "-P", "-m", "finelip_fast.cli", "export", "onnx", str(folder), "--precision", "int8"]
    subprocess.run([*command, "--data", "scenes:test:30", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return folder


if __name__ == "__main__":
    url, n_clients, n_requests, seed, name, body = sys.argv[1:]
    print(json.dumps(asyncio.run(_ask(url, int(n_clients), int(n_requests), int(seed), name, json.loads(body)))))
