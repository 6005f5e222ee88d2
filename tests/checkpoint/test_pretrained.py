"""Models by name: loaded, saved with a card, and pushed to a fake hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

import finelip_fast
from finelip_fast import FineLIP
from finelip_fast.checkpoint import UntrainedAggregatorsWarning, fingerprint
from finelip_fast.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory) -> FineLIP:
    folder = tmp_path_factory.mktemp("pretrained")
    finelip_fast.save(make_model(context_length=32), folder)
    return FineLIP.from_pretrained(folder)


def test_what_is_saved_comes_back(model: FineLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, metadata={"note": "mine"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = FineLIP.from_pretrained(tmp_path)
    assert type(again) is type(finelip_fast.load(tmp_path)) is FineLIP
    assert fingerprint(again) == fingerprint(model)
    assert not again.training
    half = FineLIP.from_pretrained(str(tmp_path), "cpu", dtype=torch.float16, context_length=40)
    assert (half.dtype, half.config.context_length) == (torch.float16, 40)


def test_a_card_says_what_the_model_is_and_replaces_no_other(model: FineLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    config = model.config
    assert card.startswith("---\nlibrary_name: finelip-fast\n")
    for text in (
        f"| captions | {config.context_length} tokens |",
        f"| an embedding | {config.tokens} x {config.embed_dim} |",
    ):
        assert text in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_warning_points_to_who_loads(make_model, tmp_path: Path) -> None:
    finelip_fast.save(make_model(context_length=32, trained_aggregators=False), tmp_path)
    for load in (FineLIP.from_pretrained, finelip_fast.load):
        with pytest.warns(UntrainedAggregatorsWarning) as caught:
            untrained = load(tmp_path)
        assert caught[0].filename == __file__
    untrained.save_pretrained(tmp_path)
    assert "untrained" in (tmp_path / "README.md").read_text()


class Hub:
    """A fake hub that records calls and keeps uploads."""

    card = False
    fault: Exception | None = None
    token: str | None
    repository: dict[str, Any]
    files: dict[str, bytes]

    def __init__(self, token: str | None = None) -> None:
        type(self).token = token

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        if self.fault is not None:
            raise self.fault
        type(self).repository = {"private": private, "exist_ok": exist_ok}
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        assert (repo_id, name) == ("me/scenes", "README.md")
        return self.card

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        type(self).files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{commit_message}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    kind = type("OwnHub", (Hub,), {})
    monkeypatch.setattr(huggingface_hub, "HfApi", kind)
    return kind


def test_a_model_is_pushed_with_its_card(model: FineLIP, hub: type[Hub], tmp_path: Path) -> None:
    assert model.push_to_hub("scenes", private=True, token="secret") == "https://hub/me/scenes/Upload FineLIP"
    assert (hub.token, hub.repository) == ("secret", {"private": True, "exist_ok": True})
    assert b'from_pretrained("me/scenes")' in hub.files["README.md"]
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert fingerprint(tmp_path) == fingerprint(model)


def test_a_card_that_is_on_the_hub_stays(model: FineLIP, hub: type[Hub]) -> None:
    hub.card = True
    model.push_to_hub("scenes")
    assert set(hub.files) == {"config.json", "model.safetensors"}


def test_a_hub_that_refuses_says_what_to_do(model: FineLIP, hub: type[Hub]) -> None:
    hub.fault = ConnectionError("401 Unauthorized")
    with pytest.raises(
        CheckpointError, match=r"'scenes' cannot be pushed to the hub: .*401 Unauthorized.*hf auth login"
    ):
        model.push_to_hub("scenes")
    with pytest.raises(InputError, match="expected repo_id as the name of a repository, got 5"):
        model.push_to_hub(5)


def test_a_model_says_what_it_is(model: FineLIP) -> None:
    config = model.config
    first = repr(model).splitlines()[:2]
    assert first[0] == "FineLIP("
    assert f"context_length=32, tokens={config.tokens}, embed_dim={config.embed_dim}" in first[1]
