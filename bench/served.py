"""A server of ours on this machine, and clients that load it: what the measurements of serving share.

``python bench/served.py ADDRESS CLIENTS REQUESTS SEED MODE`` is the clients' process; it prints JSON.
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
    """A description of 4 to 40 words, such as nobody has sent before."""
    return " ".join([*rng.choices(WORDS, k=rng.randint(4, 40)), str(rng.randrange(10**6))])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """``finelip serve`` in a process of its own, ready to answer.

    Args:
        index: Folder of the index.
        options: Further options of the command.
    """

    def __init__(self, index: Path, options: Sequence[str] = ()) -> None:
        self._port = free_port()
        self.address = f"http://{HOST}:{self._port}"
        self._command = [sys.executable, "-P", "-m", "finelip_fast.cli", "serve", "--index", str(index)]
        self._command += ["--port", str(self._port), *options]
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it answers.

        Raises:
            RuntimeError: It ended, or does not answer.
        """
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(10 * _START_SECONDS):
            if self.process.poll() is not None:
                break
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.address}/health/ready", timeout=10).close()
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
    server = Server(index, options)
    try:
        yield server
    finally:
        server.stop()


def load(address: str, clients: int, requests: int, seed: int, mode: str) -> dict[str, Any]:
    """Searches by clients in another process, each one request after another.

    Returns:
        ``latencies`` of all requests, and the ``seconds`` from the first to the last.
    """
    command = [sys.executable, "-P", __file__, address, str(clients), str(requests), str(seed), mode]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=2 * _REQUEST_SECONDS).stdout
    result: dict[str, Any] = json.loads(output)
    return result


async def _search(address: str, clients: int, requests: int, seed: int, mode: str) -> dict[str, Any]:
    import httpx2

    rng = random.Random(seed)
    bodies = iter([{"text": query(rng), "k": 10, "mode": mode} for _ in range(requests)])
    latencies: list[float] = []
    limits = httpx2.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=_REQUEST_SECONDS, limits=limits) as session:

        async def client() -> None:
            for body in bodies:
                start = time.perf_counter()
                answer = await session.post("/v1/search", json=body)
                answer.raise_for_status()
                latencies.append(time.perf_counter() - start)

        await session.get("/health/live")
        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return {"latencies": latencies, "seconds": time.perf_counter() - start}


def export_model(folder: Path) -> Path:
    """A checkpoint of ViT-B/16's size with random weights, and its int8 graphs; ``FINELIP_BENCH_MODEL``: one that is there."""
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
    where, n_clients, n_requests, seed, mode = sys.argv[1:]
    print(json.dumps(asyncio.run(_search(where, int(n_clients), int(n_requests), int(seed), mode))))
