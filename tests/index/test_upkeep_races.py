"""Maintenance beside processes that write, search and copy: no file is lost, and no operation fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from finelip_fast.index import Index, IndexSpec

SECONDS = float(os.environ.get("FINELIP_RACE_SECONDS", 2))
ROLES = ("add", "adopt", "maintain", "exact-int8", "snapshot")


def test_upkeep_beside_writers_and_searches(tmp_path: Path) -> None:
    """Run ``FINELIP_RACE_SECONDS=300 pytest tests/index/test_upkeep_races.py`` for longer."""
    folder = tmp_path / "index"
    Index(IndexSpec("abc", 3, 8), folder).close()
    script = str(Path(__file__).with_name("race_an_index.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, script, role, str(folder), str(SECONDS), str(seed)] for seed, role in enumerate(ROLES)]
    with ExitStack() as resources:
        runs = [
            resources.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
            for command in commands
        ]
        reports = [json.loads(run.communicate(timeout=240 + 2 * SECONDS)[0]) for run in runs]
    assert [report["errors"] for report in reports] == [{}] * len(ROLES)
    with closing(Index(IndexSpec("abc", 3, 8), folder, verify=True)) as index:
        assert set(index.ids) == {item for report in reports for item in report["added"]}
        assert index.check() == {}
        assert index.maintain()["unreferenced_segments"] == 0
    for copy in tmp_path.glob("index-*"):
        with closing(Index(IndexSpec("abc", 3, 8), copy, verify=True)) as index:
            assert index.check() == {}
