"""The log of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finelip_fast._files import read_bytes, write_error, write_whole
from finelip_fast._json import parse_json
from finelip_fast.errors import TrainingError

_MAX_BYTES = 1 << 30


class Log:
    """Training log in ``log.jsonl``, with TensorBoard events beside it.

    Raises:
        TrainingError: An existing log cannot be read.
        WriteError: A file cannot be written.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():  # lines past the resumed state would be written twice
            lines = read_bytes(self.path, error=TrainingError, max_bytes=_MAX_BYTES).splitlines()
            earlier = b"".join(line + b"\n" for line in lines if _logged_step(line) <= step)
            write_whole(self.path, lambda temporary: temporary.write_bytes(earlier))
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append a line.

        Raises:
            WriteError: The disk is full.
        """
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
            if self.events:
                for name, value in values.items():
                    self.events.add_scalar(name, value, step)
                self.events.flush()
        except OSError as error:
            raise write_error(self.path, error) from error

    def close(self) -> None:
        if self.events:
            self.events.close()


def _logged_step(line: bytes) -> float:
    """Step of a line; infinity if the line is damaged, or was cut short by a crash."""
    try:
        step = parse_json(line, "log.jsonl", error=TrainingError, kind=dict).get("step")
    except TrainingError:
        step = None
    return step if isinstance(step, (int, float)) else math.inf
