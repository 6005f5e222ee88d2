"""Studies of questions about FineLIP, each a command that writes a table and a plot: ``finelip study NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from finelip_fast.engines import Engine
from finelip_fast.records import Record
from finelip_fast.studies.beyond import beyond
from finelip_fast.studies.length import length
from finelip_fast.studies.noise import noise
from finelip_fast.studies.overhead import overhead
from finelip_fast.studies.pointing import pointing
from finelip_fast.studies.setting import Setting
from finelip_fast.studies.standing import standing
from finelip_fast.studies.tokens import tokens

__all__ = ["STUDIES", "Setting", "Study"]


class Study(NamedTuple):
    """A study: the function that makes its record, and its default data."""

    run: Callable[[Engine, Setting], Record]
    data: str


STUDIES = {
    "length": Study(length, "scenes:test"),
    "overhead": Study(overhead, "scenes:test"),
    "noise": Study(noise, "scenes:test"),
    "beyond": Study(beyond, "scenes:very_long"),
    "tokens": Study(tokens, "scenes:test"),
    "pointing": Study(pointing, "scenes:test"),
    "standing-out": Study(standing, "scenes:test:5500"),
}
