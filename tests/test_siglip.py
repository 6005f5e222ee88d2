"""A SigLIP through the public interface: indexed, searched, explained, counted, described and converted like a CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast.cli import main as finelip
from finelip_fast.engines.torch import TorchEngine
from finelip_fast.explain.explanation import explain
from finelip_fast.serve.api import _counted
from finelip_fast.tokenizer import encode_batch

CONTEXT = 24  # of siglip_checkpoint
TEXTS = ["a red house", "two cars drive left of the tree", "", "the blue car in front of the large house and " * 2]
PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
pytestmark = pytest.mark.filterwarnings("ignore::finelip_fast.errors.TruncationWarning")


def test_an_index_is_searched_by_texts_and_pictures(siglip_checkpoint: Path, tmp_path: Path) -> None:
    retriever = finelip_fast.Retriever(siglip_checkpoint, engine="torch", device="cpu", index=tmp_path / "index")
    retriever.add_images(PICTURES, ids=["red", "green", "blue"], progress=False)
    retriever.add_texts(TEXTS, ids=["a", "b", "c", "d"], progress=False)
    assert retriever.search(image=PICTURES[1], k=1)[0].id == "green"
    again = finelip_fast.Retriever(siglip_checkpoint, engine="torch", device="cpu", index=tmp_path / "index")
    assert [again.search(text, k=1)[0].id for text in TEXTS] == ["a", "b", "c", "d"]
    model = finelip_fast.load(siglip_checkpoint)
    with torch.inference_mode():
        ids = encode_batch(TEXTS, CONTEXT, tokenizer=model.tokenizer).ids
        scores = model.score(model.encode_image(model.preprocess.batch(PICTURES)), model.encode_text(ids))
    torch.testing.assert_close(again.score(PICTURES, TEXTS), scores, atol=1e-4, rtol=0)


def test_an_index_refuses_the_same_weights_with_another_tokenizer(siglip_checkpoint: Path, tmp_path: Path) -> None:
    other_checkpoint = shutil.copytree(siglip_checkpoint, tmp_path / "other")
    model = finelip_fast.load(other_checkpoint)
    content = model.tokenizer.content + b"\n"
    model.tokenizer = type(model.tokenizer)(content, model.config.end_token, model.config.vocab_size)
    model.config = model.config.replace(tokenizer=model.tokenizer.sha256)
    finelip_fast.save(model, other_checkpoint)
    first, second = (TorchEngine(folder, "cpu") for folder in (siglip_checkpoint, other_checkpoint))
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("text", TEXTS)
def test_an_explanation_adds_up_to_the_score(siglip_checkpoint: Path, text: str) -> None:
    model = finelip_fast.load(siglip_checkpoint)
    explanation = explain(model, PICTURES[0], text)
    with torch.inference_mode():
        ids = encode_batch([text], CONTEXT, tokenizer=model.tokenizer).ids
        expected = model.score(model.encode_image(model.preprocess.batch(PICTURES[:1])), model.encode_text(ids))
    assert explanation.score == pytest.approx(expected.item(), abs=1e-5)
    assert explanation.contributions.sum().item() == pytest.approx(expected.item(), abs=1e-5)
    assert [word.text for word in explanation.words] == text.split()[: len(explanation.words)]


def test_a_server_counts_its_tokens(siglip_checkpoint: Path) -> None:
    tokenizer = finelip_fast.load(siglip_checkpoint).tokenizer
    short, long = "a red house", "a red house " * 20
    assert _counted(short, CONTEXT, tokenizer) == {
        "tokens": len(tokenizer.tokens(short)) + 1,
        "context_length": CONTEXT,
        "cut_at": None,
    }
    cut_at = _counted(long, CONTEXT, tokenizer)["cut_at"]
    assert cut_at is not None
    assert len(tokenizer.tokens(long[:cut_at])) < CONTEXT <= len(tokenizer.tokens(long[: cut_at + 8]))


def test_commands_convert_and_describe_it(
    open_clip_siglip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "converted"
    assert finelip(["convert", str(open_clip_siglip.folder), str(out), "--context-length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "siglip"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert finelip(["info", str(out), "--verify", "--json"]) == 0
    assert '"ok"' in capsys.readouterr().out
