"""A folder of drawn scenes, and a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

import finelip_fast
from finelip_fast.datasets import Scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures, named after their scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    for scene in Scenes("test", 8, image_size=256):
        scene.draw().save(folder / f"{scene.id}.png")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in a folder of its own."""
    folder = tmp_path_factory.mktemp("checkpoints") / "my-model"
    finelip_fast.save(finelip_fast.load(), folder)
    return folder
