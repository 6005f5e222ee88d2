"""A Ray cluster on this machine, shared by the tests of a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from finelip_fast.distributed.cluster import cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    if importlib.util.find_spec("ray") is None:  # not imported, because its settings must come first
        pytest.skip("ray is not installed")
    with cluster(2) as module:
        yield module
