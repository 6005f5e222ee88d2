"""The log of a run: what a resumed run keeps of it, and the error if it cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import TrainingError, WriteError
from finelip_fast.training.log import Log

SOUND = b'{"step": 1, "loss": 0.5}'
LINES = st.sampled_from(
    [
        *(
            SOUND,
            SOUND,
            b'{"step": 3, "loss": 0.5}',
            b'{"step": 2, "lo',
            b'{"loss": 1}',
            b'{"step": null}',
            b'{"step": "1"}',
        ),
        *(
            b"",
            b"[]",
            b"5",
            b"null",
            b"\xff",
            b"[" * 9999,
            b'{"step": [1]}',
            b'{"step": NaN}',
            b'{"step": 1e999}',
            b"{\x00}",
        ),
    ]
)


@settings(settings.get_profile("fuzz"))
@given(st.lists(LINES))
def test_a_resumed_run_keeps_the_sound_lines_up_to_its_step(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    log = Log(tmp_path, 2, tensorboard=False)
    log.write(3, {"loss": 0.25})
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert entries == [{"step": 1, "loss": 0.5}] * lines.count(SOUND) + [{"step": 3, "loss": 0.25}]


def test_a_pipe_in_the_place_of_a_log_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(TrainingError, match=r"log\.jsonl: expected a regular file, got a pipe"):
        Log(tmp_path, 2, tensorboard=False)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, tensorboard=False)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(WriteError, match=r"cannot write .*log\.jsonl: Is a directory"):
        log.write(1, {"loss": 0.25})
