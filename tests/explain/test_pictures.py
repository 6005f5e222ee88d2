"""Explanations as pictures and pages."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast.cli import main
from finelip_fast.datasets import Scenes
from finelip_fast.errors import WriteError
from finelip_fast.explain import MAPS, Explanation, explain
from finelip_fast.model import FineLIP

SCENE = Scenes("val", image_size=128)[1]


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explain(finelip_fast.load(), SCENE.draw(), SCENE.caption + " <b>R&B</b>")


def test_the_page_holds_every_word_and_nothing_from_elsewhere(explanation: Explanation, tmp_path: Path) -> None:
    text = explanation.to_html(tmp_path / "why.html")
    assert (tmp_path / "why.html").read_text(encoding="utf-8") == text
    assert len(text) < 1_000_000
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert text.count("data-word=") == len(explanation.words)
    assert "&lt;b&gt;R&amp;B&lt;/b&gt;" in text
    assert f"{explanation.score:.4f}" in text


@pytest.mark.parametrize("kind", MAPS)
def test_the_pages_maps_are_the_explanations(explanation: Explanation, kind: str) -> None:
    match = re.search(r'<script type="application/json" id="explained">(.*?)</script>', explanation.to_html())
    assert match
    data = json.loads(match[1])["maps"][kind]
    word = explanation.words[5]
    levels = torch.tensor(list(bytes.fromhex(data["maps"][5])))
    heat = explanation.map_of_tokens(word.first, word.last, tokens=kind)
    assert levels[heat.argmax()] == 255
    assert levels[heat.argmin()] == 0
    assert len(data["words"]) == explanation.side**2
    assert all(len(bytes.fromhex(row)) == len(explanation.words) for row in data["words"])


def test_a_long_caption_on_a_fine_grid_stays_small() -> None:
    """The size is that of ViT-B/16 at 224 pixels, with a caption that fills the context."""
    config = replace(finelip_fast.load().config, image_size=224)
    noise = Image.effect_noise((224, 224), 100).convert("RGB")
    explanation = explain(FineLIP(config).eval(), noise, "red " * 300)
    assert (explanation.side, len(explanation.words)) == (14, 254)
    assert len(explanation.to_html()) < 1_000_000


def test_a_page_without_words_opens() -> None:
    text = explain(finelip_fast.load(), SCENE.draw(), "").to_html()
    assert "data-word=" not in text


def test_an_overlay_is_lit_where_the_phrase_is(explanation: Explanation) -> None:
    phrase = SCENE.parts[0].text
    figure = explanation.overlay(phrase)
    assert figure.get_suptitle().rstrip("…") == phrase[:77]
    picture, lit = (axis.images[0].get_array() for axis in figure.axes[:2])
    light = torch.tensor(lit.sum(-1) / (picture.sum(-1) + 1e-6))
    row, column = divmod(int(light.argmax()), light.shape[1])
    best = divmod(int(explanation.heatmap(phrase).argmax()), explanation.side)
    cell = light.shape[0] // explanation.side
    assert abs(row // cell - best[0]) <= 1
    assert abs(column // cell - best[1]) <= 1


def test_the_command_writes_page_and_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scene.png"
    SCENE.draw().save(path)
    phrase = SCENE.parts[0].text
    command = ["explain", str(path), SCENE.caption, "--html", str(tmp_path / "why.html")]
    assert main([*command, "--phrase", phrase, "--overlay", str(tmp_path / "lit.png")]) == 0
    output = capsys.readouterr()
    assert "words that add most" in output.out
    assert output.err.splitlines()[-2:] == [str(tmp_path / "lit.png"), str(tmp_path / "why.html")]
    assert (tmp_path / "why.html").exists()
    assert (tmp_path / "lit.png").exists()
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["words"]) == len(SCENE.caption.split())
    assert main([*command, "--phrase", phrase]) == 2
    assert "--phrase and --overlay together" in capsys.readouterr().err
    assert main([*command, "--tokens", "fine"]) == 2
    assert "expected --tokens to be one of raw, aggregated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phrase", "red", "--overlay", "x.foo"], "expected a file that can be written, got 'x.foo': Format"),
        (["--html", "x" * 300], f"cannot write {'x' * 300}: File name too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_below_the_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    SCENE.draw(64).save("scene.png")
    assert main(["explain", "scene.png", "a red house", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("score ")
    assert printed.err.startswith(f"error: {message}")


@pytest.mark.parametrize("path", ["", ".", "file/x", "nowhere/x.png"])
@pytest.mark.parametrize("options", [["--html"], ["--phrase", "red", "--overlay"]], ids=["html", "overlay"])
def test_a_place_to_write_to_is_looked_at_first(
    options: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["explain", "scene.png", "a red house", "--checkpoint", "missing", *options, path]) == 2
    expected = f"expected {options[-1]} as a file in an existing folder, got {path!r}"
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_without_matplotlib_overlays_say_what_to_install(
    explanation: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(finelip_fast.FineLIPError, match=r"pip install 'finelip-fast\[plots\]'"):
        explanation.overlay(SCENE.parts[0].text)


HOSTILE = (
    "\ud800 </script><script>alert(1)</script> \"quoted' \x00 \u202edesrever <img src=x onerror=alert(1)> {size} a\tcat"
)


def test_a_hostile_caption_is_text_of_the_page(tmp_path: Path) -> None:
    explanation = explain(finelip_fast.load(), SCENE.draw(), HOSTILE)
    plain = explain(finelip_fast.load(), SCENE.draw(), "a cat")
    page = explanation.to_html(tmp_path / "why.html")
    assert (tmp_path / "why.html").read_bytes().decode("utf-8") == page
    for element in ("<script", "<img", "</script"):
        assert page.count(element) == plain.to_html().count(element)
    assert "onerror=alert(1)&gt;" in page
    assert r"\u202edesrever" in page
    assert r"\ud800" in page
    assert not re.search("[\x00\u202e]", page)
    str(explanation).encode()


def test_a_caption_as_long_as_may_be_is_explained_in_time() -> None:
    caption = "cafÃ© Ã  la crÃ¨me " * 13_000
    explanation = explain(finelip_fast.load(), SCENE.draw(), caption)
    assert 20 < len(explanation.words) < 256
    assert len(explanation.to_html()) < 2 * len(caption)


def test_a_page_that_cannot_be_written_is_named(explanation: Explanation, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*missing/why\.html: No such file"):
        explanation.to_html(tmp_path / "missing/why.html")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_answers_to_pointer_touch_and_keys(
    explanation: Explanation, browser: Any, check_access: Callable[[Any, str], None], tmp_path: Path, width: int
) -> None:
    wide = explain(finelip_fast.load(), SCENE.draw().resize((192, 128)), explanation.caption)
    wide.to_html(tmp_path / "why.html")
    page = browser.new_page(viewport={"width": width, "height": 844}, has_touch=True, reduced_motion="reduce")
    try:
        page.goto((tmp_path / "why.html").as_uri())
        assert (
            page.evaluate("document.querySelector('.view img').naturalWidth") == 192
        )  # the original, not the model's 64
        view, square = (page.locator(name).bounding_box() for name in (".view", ".seen"))
        assert view["width"] / view["height"] == pytest.approx(1.5, abs=0.02)
        assert square["width"] == pytest.approx(square["height"], abs=2)  # the square in the middle
        check_access(page, "at first")
        assert page.locator(".word[tabindex='0']").count() == 1
        last = page.locator(".word").last
        last.tap()
        assert page.locator(".word[aria-pressed='true']").count() == 1
        message = page.locator(".message")
        assert "most at row" in message.inner_text()
        for answer in (page.locator(".view"), message):  # both are visible after a tap
            box = answer.bounding_box()
            assert box["y"] >= -1
            assert box["y"] + box["height"] <= 845
        check_access(page, "a word chosen")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.dataset.word") == str(len(wide.words) - 2)
        page.locator(".view").focus()
        page.keyboard.press("ArrowUp")
        assert message.inner_text().startswith(f"row {wide.side // 2}, column {wide.side // 2 + 1}:")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally:
        page.close()


def test_the_picture_of_an_explanation_is_the_original_within_bounds() -> None:
    model = finelip_fast.load()
    assert explain(model, Image.new("RGB", (300, 200)), "a cat").picture.size == (300, 200)
    assert explain(model, Image.new("RGB", (3000, 2000)), "a cat").picture.size == (1024, 683)
    squash = FineLIP(replace(model.config, resize_mode="squash")).eval()
    assert explain(squash, Image.new("RGB", (300, 200)), "a cat").squashed
    assert not explain(model, Image.new("RGB", (300, 200)), "a cat").squashed
