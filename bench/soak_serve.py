"""Load ``finelip serve`` for minutes: record memory over time, and check acknowledged uploads, also after ``kill -9``.

``python bench/soak_serve.py --minutes 30 --out bench/results/MACHINE/soak_serve.json``: clients search, upload, delete, and
send invalid requests. Twice, in the middle and at the end, the server is killed under load and restarted, and everything that
it had acknowledged is looked up. It serves the bundled model; all files are in a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import record
from PIL import Image
from served import Server, query, served

from finelip_fast import Retriever
from finelip_fast.datasets import Scenes

ITEMS, CLIENTS = 500, 8
SAMPLE_SECONDS, WARM_UP = 5.0, 0.2
_MOST_ITEMS = 2_000  # so that memory growth is not due to the mapped index

_BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/search", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    ("POST", "/v1/search", {"json": {"text": "a house", "k": -1}}),
    ("POST", "/v1/search", {"json": {"text": "a house", "where": "number <"}}),
    ("POST", "/v1/search", {"json": {"image": base64.b64encode(b"no picture").decode()}}),
    ("POST", "/v1/items", {"files": {"image": ("a.png", b"no picture", "image/png")}}),
    ("GET", "/v1/items/..%2F..%2Fetc%2Fpasswd/thumbnail", {}),
    ("DELETE", "/v1/items/nobody", {}),
    ("PUT", "/v1/nothing", {}),
]


@dataclass
class Ledger:
    """Responses of the server, as the clients have seen them."""

    present: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    undecided: set[str] = field(default_factory=set)  # deletion sent but not acknowledged
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    interrupted: int = 0


def picture(rng: np.random.Generator) -> bytes:
    colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(colours).resize((160, 120), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()


async def client(session: httpx2.AsyncClient, ledger: Ledger, seed: int, stop: asyncio.Event) -> None:
    rng, colours = random.Random(seed), np.random.default_rng(seed)
    while not stop.is_set():
        action = rng.random()
        try:
            if action < 0.6:
                await ask(session, ledger, "POST", "/v1/search", 200, json={"text": query(rng), "k": 10})
            elif action < 0.7:
                content = base64.b64encode(picture(colours)).decode()
                await ask(session, ledger, "POST", "/v1/search", 200, json={"image": content})
            elif action < 0.8 and len(ledger.present) < _MOST_ITEMS:
                file = {"image": ("new.png", picture(colours), "image/png")}
                answer = await ask(session, ledger, "POST", "/v1/items", 201, files=file)
                if answer is not None:
                    ledger.present.update(item["id"] for item in answer["items"] if item["id"])
            elif action < 0.9 and ledger.present:
                item = rng.choice(sorted(ledger.present))
                ledger.present.discard(item)
                ledger.undecided.add(item)
                if await ask(session, ledger, "DELETE", f"/v1/items/{item.replace('/', '%2F')}", 200) is not None:
                    ledger.removed.add(item)
                    ledger.undecided.discard(item)
            else:
                method, path, body = rng.choice(_BAD)
                await ask(session, ledger, method, path, None, **body)
        except httpx2.TransportError:
            ledger.interrupted += 1
            await asyncio.sleep(0.2)


async def ask(
    session: httpx2.AsyncClient, ledger: Ledger, method: str, path: str, expected: int | None, **body: Any
) -> dict[str, Any] | None:
    """Return the response, or None if its status is not the expected one; unless it is a refusal, that is noted as a fault."""
    answer = await session.request(method, path, **body)
    ledger.statuses[f"{method} {path.partition('?')[0].split('/')[2]} {answer.status_code}"] += 1
    if answer.status_code == expected:
        result: dict[str, Any] = answer.json()
        return result
    refusal = answer.status_code in (429, 503) or (expected is None and 400 <= answer.status_code < 500)
    if not refusal and len(ledger.faults) < 20:
        ledger.faults.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
    return None


async def listed(session: httpx2.AsyncClient) -> set[str]:
    ids: set[str] = set()
    after: str | None = None
    while True:
        parameters = {"limit": "500"} | ({"after": after} if after else {})
        page = (await session.get("/v1/items", params=parameters)).raise_for_status().json()
        ids.update(item["id"] for item in page["items"])
        after = page["next"]
        if after is None:
            return ids


async def compared(session: httpx2.AsyncClient, ledger: Ledger) -> dict[str, int]:
    """Count the items that differ from what was acknowledged."""
    ids = await listed(session)
    outcome = {
        "acknowledged": len(ledger.present),
        "lost": len(ledger.present - ids),
        "risen": len(ledger.removed & ids),
    }
    ledger.undecided.clear()
    return outcome


async def phase(
    server: Server, ledger: Ledger, seconds: float, seed: int
) -> tuple[list[tuple[float, int]], dict[str, int]]:
    """Apply load, kill the server in its midst, restart it and compare its items; also return memory samples."""
    samples, stop, start = [], asyncio.Event(), time.monotonic()
    process = psutil.Process(server.process.pid)
    async with httpx2.AsyncClient(base_url=server.address, timeout=60) as session:
        tasks = [asyncio.create_task(client(session, ledger, seed + number, stop)) for number in range(CLIENTS)]
        while time.monotonic() < start + seconds:
            await asyncio.sleep(min(SAMPLE_SECONDS, seconds / 20))
            with contextlib.suppress(psutil.Error):
                samples.append((time.monotonic() - start, process.memory_info().rss))
        server.kill()
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*tasks)
    await asyncio.to_thread(server.start)
    async with httpx2.AsyncClient(base_url=server.address, timeout=60) as session:
        return samples, await compared(session, ledger)


def growth(samples: list[tuple[float, int]]) -> float:
    """Return memory growth: the last quarter's median relative to the first quarter's after the warm-up, minus 1."""
    steady = [memory for _, memory in samples[int(WARM_UP * len(samples)) :]]
    part = max(1, len(steady) // 4)
    return float(np.median(steady[-part:]) / np.median(steady[:part]) - 1)


def soak(minutes: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("FINELIP_BENCH_FOLDER")) as scratch:
        folder, ledger = Path(scratch), Ledger()
        (folder / "pictures").mkdir()
        for scene in Scenes("test", ITEMS, image_size=64):
            scene.draw().save(folder / "pictures" / f"{scene.id}.png")
        with Retriever(index=folder / "index", engine="torch", device="cpu") as retriever:
            retriever.add_folder(folder / "pictures", progress=False)
            ledger.present.update(retriever.index.ids)
        phases = []
        with served(folder / "index", ["--writable", "--engine", "torch"]) as server:
            for number in range(2):
                samples, outcome = asyncio.run(phase(server, ledger, 30 * minutes, 100 * number))
                phases.append({"growth": growth(samples), **outcome, "memory": samples})
    return {
        "commit_info": record.commit(),
        "versions": record.versions("torch", "fastapi", "uvicorn"),
        "minutes": minutes,
        "clients": CLIENTS,
        "requests": sum(ledger.statuses.values()),
        "statuses": dict(sorted(ledger.statuses.items())),
        "interrupted": ledger.interrupted,
        "faults": ledger.faults,
        "phases": phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed load on a server, with kills.")
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes of load, at most 120")
    parser.add_argument("--out", type=Path, required=True, help="file to write, JSON")
    arguments = parser.parse_args()
    result = soak(min(arguments.minutes, 120.0))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for part in result["phases"]:
        print({name: value for name, value in part.items() if name != "memory"})
    print(f"{result['requests']} requests, {result['interrupted']} interrupted by kills, faults: {result['faults']}")


if __name__ == "__main__":
    main()
