"""A Ray cluster of this machine, for the tests of a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from finelip_fast.distributed.cluster import cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:  # not imported, which has to come after its settings
        pytest.skip("ray is not installed")
    with cluster(2) as module:
        yield module
