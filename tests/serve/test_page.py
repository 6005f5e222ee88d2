"""The page in a real Chromium: a user's actions, at common sizes and in both colour schemes."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from finelip_fast import Retriever
from finelip_fast.datasets import Scenes
from finelip_fast.serve.app import create_app
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.settings import ServeSettings

from .asgi import running

SCENES = list(Scenes("test", 60, image_size=256))
QUERY = 28
TEXT = SCENES[QUERY].caption
HOSTILE = "<img src=x onerror=\"document.title='owned'\">.png"
DESK, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
# Milliseconds; a machine that is too slow can fail only by this timeout.
PATIENCE = 300_000
expect.set_options(timeout=PATIENCE)


def await_requests(page: Page, routes: list[Route]) -> None:
    """Wait until the page has made a request that a route took."""
    until = time.monotonic() + PATIENCE / 1000
    while not routes:
        assert time.monotonic() < until
        page.wait_for_timeout(50)


def name_of(number: int) -> str:
    return HOSTILE if number == 3 else f"{SCENES[number].id}.png"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Sixty scenes with metadata, every seventh 1.5 times as wide as high, and one named like HTML."""
    folder = tmp_path_factory.mktemp("scenes")
    paths = [folder / name_of(number) for number in range(len(SCENES))]
    for number, (scene, path) in enumerate(zip(SCENES, paths, strict=True)):
        scene.draw().resize((384, 256) if number % 7 == 1 else (256, 256)).save(path)
        metadata = {
            "weather": scene.weather,
            "family": scene.family,
            "taken": f"2024-{1 + number // 28:02}-{1 + number % 28:02}T12:00:00",
            "drawn by": "O'Hara" if number % 2 else "Łucja",
        }
        Path(f"{path}.json").write_text(json.dumps(metadata))
    return paths


@pytest.fixture(scope="module")
def retriever(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retriever]:
    with Retriever(index=tmp_path_factory.mktemp("index"), engine="torch", device="cpu") as retriever:
        retriever.add_folder(pictures[0].parent, progress=False)
        yield retriever


def serving(retriever: Retriever, **settings: Any) -> AbstractContextManager[str]:
    """Serve an index, and return a context manager that yields the address."""
    uploads = Path(settings["uploads"]) if "uploads" in settings else None
    app = create_app(IndexCollection(retriever, uploads), ServeSettings(**settings))
    return running(app, timeout_graceful_shutdown=2)


@pytest.fixture(scope="module")
def address(retriever: Retriever) -> Iterator[str]:
    with serving(retriever) as address:
        yield address


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return a function that opens pages of other sizes and colour schemes; unexpected logged errors fail the test."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def opened(size: dict[str, int] = DESK, scheme: Any = "light") -> Page:
        is_phone = size is PHONE
        context = browser.new_context(
            viewport=size, color_scheme=scheme, reduced_motion="reduce", has_touch=is_phone, is_mobile=is_phone
        )
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # The console reports failed requests however the page handles them.
        page.on(
            "console",
            lambda line: (
                wrong.append(line.text) if line.type == "error" and "Failed to load resource" not in line.text else None
            ),
        )
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Callable[..., Page], address: str) -> Page:
    page = open_page()
    page.goto(address)
    expect(cards(page).first).to_be_visible()
    return page


def cards(page: Page) -> Locator:
    return page.locator("#grid a")


def search(page: Page, text: str) -> None:
    page.get_by_label("Description of the picture").fill(text)
    page.get_by_role("button", name="Search", exact=True).click()
    # Text of an earlier search remains until its results are replaced.
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")
    expect(page.locator("#said")).to_contain_text("best first")


def open_best(page: Page) -> Locator:
    cards(page).first.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".word").first).to_be_visible()
    return dialog


def names(page: Page) -> list[str]:
    return page.locator("#grid .name").all_inner_texts()


def test_a_description_finds_pictures_best_first_and_its_link_is_the_search(
    page: Page, address: str, retriever: Retriever
) -> None:
    expect(cards(page)).to_have_count(48)  # the collection, because nothing was searched for
    search(page, TEXT)
    hits = retriever.search(TEXT, k=48)
    best = [Path(hit.id).name for hit in hits]
    assert names(page) == best
    verdict = hits[0].verdict
    assert verdict
    expect(page.locator("#grid .verdict").first).to_have_text(verdict)
    expect(page.locator("#grid img").first).to_have_js_property("complete", True)
    assert page.title().startswith(TEXT[:30])
    link = page.url
    page.reload()
    expect(page.locator("#said")).to_contain_text("best first")
    assert (page.url, names(page)) == (link, best)
    assert page.get_by_label("Description of the picture").input_value() == TEXT


def test_what_is_typed_before_the_server_has_answered_stays(open_page: Callable[..., Page], address: str) -> None:
    page = open_page()
    waiting: list[Route] = []
    page.route("**/v1/info", lambda route: waiting.append(route))
    page.goto(address)
    page.get_by_label("Description of the picture").fill(TEXT)
    page.wait_for_function("document.querySelector('#text').value")
    await_requests(page, waiting)
    waiting[0].continue_()
    expect(cards(page).first).to_be_visible()
    assert page.get_by_label("Description of the picture").input_value() == TEXT


def test_more_comes_on_scrolling_and_by_a_button(page: Page) -> None:
    search(page, TEXT)
    page.mouse.wheel(0, 20_000)
    expect(cards(page)).to_have_count(60)
    expect(page.locator("#said")).to_have_text("60 pictures, best first")
    assert len(set(names(page))) == 60
    expect(page.get_by_role("button", name="More pictures")).to_be_hidden()


def test_filters_that_the_metadata_offer_narrow_the_search(page: Page, retriever: Retriever) -> None:
    def expect_hits_of(where: str) -> None:
        """Expect exactly the hits that pass the filter."""
        expect(page.locator("#said")).to_have_text(re.compile("best first|No picture"))
        ids = [Path(hit.id).name for hit in retriever.search(TEXT, k=48, where=where)]
        expect(page.locator("#grid .name")).to_have_text(ids)

    search(page, TEXT)
    page.get_by_role("button", name="Refine").click()
    page.get_by_label("O'Hara").check()
    expect_hits_of("\"drawn by\" = 'O''Hara'")
    page.get_by_label("family from").fill("3")
    page.get_by_label("family to").fill("9")
    page.get_by_label("family to").press("Tab")
    expect_hits_of("\"drawn by\" = 'O''Hara' and family between 3 and 9")
    page.get_by_label("taken to").fill("2024-01-28")
    page.get_by_label("taken to").press("Tab")
    expect_hits_of("\"drawn by\" = 'O''Hara' and family between 3 and 9 and taken < '2024-01-29'")
    expression = page.get_by_label("Filter by an expression")
    expression.fill("weather = 'rain' or weather = 'snow'")
    expression.press("Enter")
    narrow = (
        "\"drawn by\" = 'O''Hara' and family between 3 and 9 and taken < '2024-01-29' and weather in ('rain', 'snow')"
    )
    expect_hits_of(narrow)
    expect(page.locator("#refined")).to_have_text("4")
    page.reload()
    expect_hits_of(narrow)
    page.get_by_role("button", name="Refine").click()
    expect(page.get_by_label("O'Hara")).to_be_checked()
    expect(page.get_by_label("taken to")).to_have_value("2024-01-28")
    expression.fill("weather =")
    expression.press("Enter")
    expect(page.locator("#where-fault")).to_contain_text("Expected a value, got")
    expect(expression).to_be_focused()


FILE = """(address) => {
    const bytes = Uint8Array.from(atob(address.split(",")[1]), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "picture.png", {type: "image/png"}));
    return data;
}"""


def pasted(page: Page, path: Path) -> None:
    page.evaluate(
        """(data) => document.body.dispatchEvent(
            new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}))""",
        page.evaluate_handle(FILE, data_uri(path)),
    )


def dropped(page: Page, path: Path) -> None:
    hint = page.get_by_text("Drop a picture to search by it")
    data = page.evaluate_handle(FILE, data_uri(path))
    for event in ("dragenter", "dragover"):
        page.dispatch_event("#results", event, {"dataTransfer": data})
    expect(hint).to_be_visible()
    page.dispatch_event("#results", "drop", {"dataTransfer": data})
    expect(hint).to_be_hidden()


def chosen(page: Page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Picture", exact=True).click()
    chooser.value.set_files(path)


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("way", [chosen, pasted, dropped])
def test_a_picture_is_searched_by(page: Page, pictures: list[Path], way: Callable[[Page, Path], None]) -> None:
    way(page, pictures[20])
    expect(page.locator("#grid .name").first).to_have_text(name_of(20))
    expect(page.get_by_text("Like your picture")).to_be_visible()
    page.reload()
    expect(page.locator("#grid .name").first).to_have_text(name_of(20))
    page.get_by_role("button", name="Search by a description instead").click()
    expect(page.get_by_label("Description of the picture")).to_be_focused()
    page.go_back()
    expect(page.locator("#grid .name").first).to_have_text(name_of(20))


def test_a_large_picture_is_scaled_before_it_is_sent(page: Page, tmp_path: Path) -> None:
    Image.effect_noise((2400, 1800), 90).save(tmp_path / "large.png")
    with page.expect_request("**/v1/search") as request:
        chosen(page, tmp_path / "large.png")
    assert len(request.value.post_data or "") < 2_000_000
    expect(page.locator("#said")).to_contain_text("best first")


def test_words_light_places_and_places_mark_words(page: Page) -> None:
    search(page, TEXT)
    dialog = open_best(page)
    words, square, message = dialog.locator(".word"), dialog.locator(".seen"), dialog.locator(".message")
    assert words.all_inner_texts() == TEXT.split()
    assert dialog.locator(".word[tabindex='0']").count() == 1
    words.nth(4).hover()
    expect(square).to_have_class(re.compile("lit"))
    expect(message).to_contain_text("most at row")
    page.mouse.move(5, 5)
    expect(square).not_to_have_class(re.compile("lit"))

    words.first.focus()
    page.keyboard.press("ArrowRight")
    expect(words.nth(1)).to_be_focused()
    page.keyboard.press("End")
    expect(words.last).to_be_focused()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.className") == "word"
    expect(words.last).not_to_be_focused()
    page.keyboard.press("Enter")
    assert dialog.locator(".word[aria-pressed='true']").count() == 1
    page.keyboard.press("Home")
    page.keyboard.press("Shift+Tab")
    expect(square).to_have_class(re.compile("lit"))  # the selection remains

    view = dialog.locator(".view")
    box = square.bounding_box()
    assert box
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.9 * box["height"])
    expect(message).to_contain_text("row 8, column 3:")
    assert dialog.locator(".word").evaluate_all(
        "words => words.some((word) => word.style.getPropertyValue('--level') > 0.5)"
    )
    page.mouse.move(5, 5)
    view.focus()
    place = message.inner_text()
    page.keyboard.press("ArrowLeft")
    expect(message).not_to_have_text(place)
    expect(dialog).to_be_visible()


def test_the_grid_lies_on_what_the_model_sees(page: Page) -> None:
    """The model sees the central square of a picture that is 1.5 times as wide as high."""
    search(page, SCENES[15].caption)
    page.locator("#grid a", has_text=name_of(15)).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".word").first).to_be_visible()
    expect(dialog.locator(".view img")).not_to_have_js_property("naturalWidth", 0)
    view, square = dialog.locator(".view").bounding_box(), dialog.locator(".seen").bounding_box()
    assert view
    assert square
    assert view["width"] / view["height"] == pytest.approx(1.5, abs=0.02)
    assert square["width"] == pytest.approx(square["height"], abs=2)
    assert square["x"] - view["x"] == pytest.approx((view["width"] - square["width"]) / 2, abs=2)


def test_back_and_forward_lead_through_searches_and_results(page: Page) -> None:
    search(page, TEXT)
    first = names(page)
    search(page, SCENES[30].caption)
    expect(page.locator("#grid .name").first).not_to_have_text(first[0])
    second = names(page)
    dialog = open_best(page)
    page.go_back()
    expect(dialog).to_be_hidden()
    assert names(page) == second
    page.go_back()
    expect(page.locator("#grid .name")).to_have_text(first)
    assert page.get_by_label("Description of the picture").input_value() == TEXT
    page.go_forward()
    page.go_forward()
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("heading").first).to_have_text(second[0])
    page.reload()
    expect(dialog.locator(".word").first).to_be_visible()
    expect(dialog.get_by_role("heading").first).to_have_text(second[0])
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_the_keyboard_is_enough(page: Page) -> None:
    page.keyboard.press("/")
    expect(page.get_by_label("Description of the picture")).to_be_focused()
    page.keyboard.insert_text(TEXT)
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_contain_text("best first")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#grid') !== null"):
            break
    expect(cards(page).first).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading").first).to_have_text(names(page)[0])
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_role("heading").first).to_have_text(names(page)[1])
    page.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("heading").first).to_have_text(names(page)[0])
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(cards(page).first).to_be_focused()


def test_similar_pictures_are_found_and_a_path_is_copied(page: Page, pictures: list[Path]) -> None:
    search(page, TEXT)
    dialog = open_best(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    dialog.get_by_role("button", name="Copy path").click()
    expect(dialog.get_by_text("Copied.")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == str(pictures[QUERY])
    dialog.get_by_role("link", name="Find similar").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("Like this picture")).to_be_visible()
    expect(page.locator("#grid .name").first).to_have_text(name_of(QUERY))
    assert "similar=" in page.url
    cards(page).nth(1).click()
    expect(dialog).to_be_visible()
    expect(dialog.get_by_text("Why it matched")).to_be_hidden()  # no words were searched for


def test_results_of_two_shards_with_one_id_are_two(page: Page) -> None:
    """What is opened, explained and searched by is the clicked one's shard."""
    explained: list[str] = []

    def two_shards(route: Route) -> None:
        answer = route.fetch().json()
        (hit, *_) = answer["results"][0]["hits"]
        address = hit["thumbnail"]
        hits = [{**hit, "shard": shard, "thumbnail": f"{address}?shard={shard}"} for shard in ("a", "b")]
        answer["results"][0]["hits"] = hits
        route.fulfill(json=answer)

    def explain(route: Route) -> None:
        explained.append(route.request.post_data_json["shard"])
        route.abort()

    page.route("**/v1/search", two_shards)
    page.route("**/v1/explain", explain)
    search(page, TEXT)
    dialog = page.locator("#opened")
    for number, shard in ((1, "b"), (0, "a")):
        cards(page).nth(number).click()
        expect(dialog.locator(".scores")).to_contain_text(f"from {shard}")
        expect(dialog.locator(".view img")).to_have_attribute("src", re.compile(rf"shard={shard}&side="))
        expect(dialog.get_by_role("link", name="Find similar")).to_have_attribute(
            "href", re.compile(f"similarShard={shard}")
        )
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
    assert explained == ["b", "a"]


def test_what_is_tapped_on_a_phone_answers_on_the_screen(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(PHONE)
    page.goto(address)
    search(page, TEXT)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    dialog = open_best(page)
    for at in (0, 60, -1):
        word = dialog.locator(".word").nth(at)
        word.tap()
        expect(word).to_have_attribute("aria-pressed", "true")
        expect(dialog.locator(".view")).to_be_in_viewport(ratio=0.95)
        expect(dialog.locator(".message")).to_be_in_viewport(ratio=1)
        expect(dialog.locator(".message")).to_contain_text("most at row")
    assert page.evaluate("document.querySelector('.content').scrollWidth") <= PHONE["width"]
    for button in dialog.get_by_role("button").all()[:3] + dialog.locator(".actions .quiet:visible").all():
        box = button.bounding_box()
        assert box
        assert min(box["width"], box["height"]) >= 44


def test_nothing_moves_when_a_picture_arrives(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(PHONE)
    page.goto(address)
    search(page, SCENES[15].caption)
    expect(page.locator("#grid img").first).to_have_js_property("complete", True)
    held: list[Route] = []
    page.route(re.compile("/thumbnail"), lambda route: held.append(route))
    page.locator("#grid a", has_text=name_of(15)).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".word").first).to_be_visible()
    picture, word = dialog.locator(".view img"), dialog.locator(".word").first
    expect(picture).to_have_js_property("naturalWidth", 0)
    before = dialog.locator(".view").bounding_box(), word.bounding_box()
    await_requests(page, held)
    for route in held:
        route.continue_()
    expect(picture).not_to_have_js_property("naturalWidth", 0)
    assert (dialog.locator(".view").bounding_box(), word.bounding_box()) == before


def test_a_name_of_html_is_a_name(page: Page) -> None:
    search(page, SCENES[3].caption)
    assert names(page)[0] == HOSTILE
    dialog = open_best(page)
    expect(dialog.get_by_role("heading").first).to_have_text(HOSTILE)
    expect(dialog.locator("dl")).to_contain_text(HOSTILE)
    expect(dialog.locator(".view img")).to_have_js_property("complete", True)
    assert page.locator("[onerror]").count() == 0
    assert page.title() != "owned"


def test_what_lies_beyond_the_context_is_struck_out(page: Page) -> None:
    box = page.get_by_label("Description of the picture")
    box.fill("a red house")
    expect(page.locator("#count")).to_have_text("5 of 256 tokens")
    assert page.locator("#describe mark").text_content() == ""
    text = "a 🏠 in the rain. " + "red " * 300 + "dog"
    box.fill(text)
    expect(page.locator("#count")).to_contain_text("of 256 tokens; what is struck out is not read")
    beyond = page.locator("#describe mark").text_content() or ""
    assert text.endswith(beyond)
    assert 40 < len(beyond.split()) < 60
    search(page, text)
    dialog = open_best(page)
    assert (dialog.locator(".words s").text_content() or "").split() == beyond.split()


def failing(page: Page, pattern: str, status: int, headers: dict[str, str] | None = None) -> None:
    """Make the next requests to an address fail."""
    body = json.dumps({"error": {"message": "expected less, got more; wait", "param": None}})
    page.route(
        pattern,
        lambda route: route.fulfill(status=status, headers=headers or {}, content_type="application/json", body=body),
    )


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (429, {"Retry-After": "7"}, "The server has more to do than it can take. Try again in 7 seconds."),
        (503, {"Retry-After": "1"}, "Expected less, got more; wait. Try again in 1 second."),
        (504, {}, "The server took too long. Try again in a moment."),
        (413, {}, "Expected less, got more; wait."),
        (0, {}, "The server does not answer. It may have been stopped: start it again, then try again."),
    ],
)
def test_what_goes_wrong_is_a_sentence(page: Page, status: int, headers: dict[str, str], sentence: str) -> None:
    if status:
        failing(page, "**/v1/search", status, headers)
    else:
        page.route("**/v1/search", lambda route: route.abort())
    page.get_by_label("Description of the picture").fill(TEXT)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert").filter(visible=True)).to_contain_text(sentence)
    page.unroute("**/v1/search")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#grid .name").first).to_have_text(name_of(QUERY))
    expect(page.locator("#fault")).to_be_hidden()


def test_partial_answers_and_those_that_match_nothing_say_so(page: Page) -> None:
    search(page, "an equation on a blackboard")
    expect(page.locator("#note")).to_contain_text("Nothing here matches")

    def half(route: Route) -> None:
        answer = route.fetch().json()
        route.fulfill(json=answer | {"covered": 0.5, "missing": {"b": "no answer within 5 s"}})

    page.route("**/v1/search", half)
    search(page, TEXT)
    expect(page.locator("#note")).to_be_hidden()
    expect(page.locator("#partial")).to_have_text("Only 50 % of the pictures were searched: b: no answer within 5 s.")


def test_a_key_is_asked_for_and_kept_for_the_tab(
    open_page: Callable[..., Page], retriever: Retriever, check_access: Callable[[Page, str], None]
) -> None:
    with serving(retriever, api_key="a-long-secret-key") as address:
        page = open_page()
        page.goto(address)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        check_access(page, "a key is asked for")
        for key in ("wrong", "a-long-secret-key"):
            expect(dialog).to_be_visible()
            dialog.get_by_label("Key").fill(key)
            dialog.get_by_role("button", name="Continue").click()
        expect(dialog).to_be_hidden()
        expect(page.locator("#grid img").first).to_have_attribute("src", re.compile("^blob:"))
        page.reload()
        search(page, TEXT)
        open_best(page)


def test_pictures_are_added_and_deleted_only_where_that_is_on(
    page: Page,
    open_page: Callable[..., Page],
    pictures: list[Path],
    tmp_path: Path,
    check_access: Callable[[Page, str], None],
) -> None:
    expect(page.get_by_role("button", name="Add pictures")).to_be_hidden()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with (
        Retriever(index=tmp_path / "index", engine="torch", device="cpu") as retriever,
        serving(retriever, writable=True, uploads=str(tmp_path / "uploads")) as address,
    ):
        page = open_page()
        page.goto(address)
        expect(page.get_by_text("There are no pictures yet.")).to_be_visible()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add pictures").click()
        chooser.value.set_files([pictures[QUERY], pictures[20], tmp_path / "broken.png"])
        expect(page.locator("#news")).to_contain_text("2 pictures added. broken.png:")
        expect(cards(page)).to_have_count(2)
        check_access(page, "pictures were added")
        chosen(page, pictures[QUERY])
        expect(page.get_by_text("Like your picture")).to_be_visible()
        check_access(page, "a search by a picture")
        page.get_by_role("button", name="Search by a description instead").click()
        search(page, TEXT)
        dialog = open_best(page)
        dialog.get_by_role("button", name="Delete").click()
        expect(cards(page)).to_have_count(2)
        dialog.get_by_role("button", name="Delete for good").click()
        expect(dialog).to_be_hidden()
        expect(cards(page)).to_have_count(1)
        expect(page.locator("#holdings")).to_have_text("1 picture")


def test_the_models_warning_is_shown_until_it_is_closed(page: Page) -> None:
    warning = page.locator("#warning")
    expect(warning).to_contain_text("drawn street scenes")
    warning.get_by_role("button").click()
    page.reload()
    expect(cards(page).first).to_be_visible()
    expect(warning).to_be_hidden()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing_in_any_state(
    size: dict[str, int], open_page: Callable[..., Page], address: str, check_access: Callable[[Page, str], None]
) -> None:
    page = open_page(size)
    page.goto(f"{address}/?to.family=2")  # few pictures, because axe takes time for each
    expect(cards(page).first).to_be_visible()
    check_access(page, "empty")
    search(page, TEXT)
    check_access(page, "results")
    dialog = open_best(page)
    check_access(page, "opened")
    dialog.locator(".word").nth(7).click()
    expect(dialog.locator(".word[aria-pressed='true']")).to_have_count(1)
    check_access(page, "explained")
    dialog.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Refine").click()
    page.get_by_label("Description of the picture").fill("red " * 300)
    expect(page.locator("#count.over")).to_be_visible()
    check_access(page, "filters, and a text beyond the context")
    page.get_by_label("Filter by an expression").fill("weather =")
    page.get_by_label("Filter by an expression").press("Enter")
    expect(page.locator("#where-fault")).to_contain_text("Expected")
    check_access(page, "a wrong filter")
    page.goto(f"{address}/?q=an+equation+on+a+blackboard")
    expect(page.locator("#note")).to_be_visible()
    check_access(page, "nothing stands out")
    failing(page, "**/v1/search", 429)
    page.reload()
    expect(page.locator("#fault")).to_be_visible()
    check_access(page, "an error")


def test_the_apis_documentation_is_drawn_under_its_own_policy(open_page: Callable[..., Page], address: str) -> None:
    page = open_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"{address}/docs")
    operations = page.locator(".opblock-summary")
    expect(operations.filter(has_text="/v1/search")).to_be_visible()
    expect(operations.nth(10)).to_be_visible()
    operations.filter(has_text="/v1/tokens").get_by_role("button").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    answer = page.locator(".live-responses-table .response-col_description .microlight").first
    expect(answer).to_contain_text('"context_length": 256')
    assert all(url.startswith((address, "data:")) for url in requests)
