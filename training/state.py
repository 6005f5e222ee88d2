"""``state.pt`` in a run's folder: the state that an interrupted run resumes from, and which configurations may do so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finelip_fast._files import write_whole
from finelip_fast.errors import CheckpointError, ConfigError, TrainingError
from finelip_fast.training.config import RENAMED, TrainConfig

# Options that may differ when a run is resumed: without an effect on its weights, and with one.
_FREE_TO_CHANGE = (
    "out",
    "stop_at",
    "workers",
    "threads",
    "device",
    "log_every",
    "eval_every",
    "save_every",
    "tensorboard",
    "max_broken_share",
    "remote_data",
    "alpha",
)
_CHANGE_THE_RUN = ("steps", "encoder_lr", "aggregator_lr", "epoch_batches", "precision", "processes")


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a state atomically, so that no partial file is ever left.

    Raises:
        WriteError: The disk is full, which is detected before anything is written.
    """
    moments = (value for values in state["optimizer"]["state"].values() for value in values.values())
    tensors = [*state["model"].values(), *(state["ema"] or {}).values(), *moments]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    write_whole(path, lambda unfinished: torch.save(state, unfinished), size=size)


def check_resumable(
    state: Mapping[str, Any], config: TrainConfig, *, processes: int, identity: Mapping[str, Any]
) -> str | None:
    """Refuse to resume with changes that would make it another run.

    Args:
        state: Contents of ``state.pt``.
        config: Configuration to resume with.
        processes: Number of processes to resume with.
        identity: Identity of the data, as returned by :func:`finelip_fast.training.data.identity_of`.

    Returns:
        A warning if the run changes in a permitted way, otherwise None.

    Raises:
        ConfigError: The configuration changes in a way that is not permitted, or the data differ.
    """
    current = {**dataclasses.asdict(config), "processes": processes}
    # Options that an earlier version lacked behaved as today's defaults do.
    before: dict[str, Any] = {option.name: option.default for option in dataclasses.fields(config)}
    stored: Mapping[str, Any] = state["config"]
    before.update((RENAMED.get(name, name), value) for name, value in stored.items())
    changed = [name for name in current if name not in _FREE_TO_CHANGE and current[name] != before.get(name)]
    allowed = [name for name in changed if name in _CHANGE_THE_RUN]
    if "steps" in allowed and config.steps < before["steps"]:
        allowed.remove("steps")
    former, chosen = ({name: values.get(name) for name in changed} for values in (before, current))
    folder = Path(config.out)
    if changed != allowed:
        raise ConfigError(
            f"{folder} holds a run with {former}, got {chosen}; it resumes only with the same options: pass them, or another "
            "--out"
        )
    trained_on = state.get("data", identity)  # earlier versions did not keep it
    if trained_on != identity:
        former_data, data = (
            ", ".join(f"{name} {value!s:.12}" for name, value in values.items()) for values in (trained_on, identity)
        )
        raise ConfigError(
            f"the data of the run in {folder} have changed: {config.train!r} had {former_data}, now {data}; restore them to "
            "resume, or pass another --out"
        )
    if not changed:
        return None
    schedule = "; the learning rate follows the schedule of the new length" if "steps" in changed else ""
    changes = f"resumes with {chosen} instead of {former}"
    return f"{changes}; its weights will differ from those of a run with these options from the start{schedule}"


@contextmanager
def damage_explained(folder: Path) -> Iterator[None]:
    """If the state in ``folder`` cannot be restored, explain what to start from instead.

    Raises:
        CheckpointError: The state is damaged or does not belong to a run.
    """
    try:
        yield
    except (ConfigError, TrainingError, torch.cuda.OutOfMemoryError):
        raise
    except (
        CheckpointError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        checkpoints = [folder / name for name in ("last", "best") if (folder / name / "config.json").is_file()]
        start = f" with --init {checkpoints[0]}" if checkpoints else ""
        raise CheckpointError(
            f"{folder / 'state.pt'}: expected the state of a run, found a truncated or damaged one, or another file "
            f"({type(error).__name__}: {error!s:.400}); start again with another --out{start}, or remove the "
            "file and start again in this one"
        ) from error
