"""The log of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Log:
    """``log.jsonl``, and TensorBoard events beside it."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():  # lines behind the state that the run goes on from would be written twice
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _logged_step(line) <= step]
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)
            self.events.flush()

    def close(self) -> None:
        if self.events:
            self.events.close()


def _logged_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # cut short by a crash
        return math.inf
