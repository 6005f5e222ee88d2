"""The README's screenshots of ``finelip serve`` in Chromium, with the scenes of ``make demo``.

``python docs/serve_pictures.py`` writes ``docs/serve-*.png``; with a FOLDER argument it writes every state to that folder,
at desktop and phone widths, in light and dark.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, Route, sync_playwright

from finelip_fast.datasets import Scenes
from finelip_fast.retriever import Retriever
from finelip_fast.serve.app import create_app
from finelip_fast.serve.index_collection import IndexCollection
from finelip_fast.serve.settings import ServeSettings

DOCS = Path(__file__).parent
SCENES, QUERY = 200, 76
STATES = [
    *("empty", "results", "opened", "explained", "too-long", "filters", "wrong-filter"),
    *("nothing-stands-out", "no-answer"),
]
SIZES = {"desk": (1440, 900), "phone": (390, 844)}
# The states that the documentation shows.
SHOWN = [("results", "desk", "light"), ("explained", "desk", "dark"), ("explained", "phone", "light")]


@contextmanager
def serving() -> Iterator[str]:
    """Run a server over drawn scenes, and yield its address."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        pictures = Path(folder) / "scenes"
        pictures.mkdir()
        for scene in Scenes("test", SCENES, image_size=512):
            scene.draw().save(pictures / f"{scene.id}.png")
            (pictures / f"{scene.id}.png.json").write_text(f'{{"weather": "{scene.weather}", "time": "{scene.time}"}}')
        with Retriever(index=Path(folder) / "index", engine="torch", device="cpu") as retriever:
            retriever.add_folder(pictures, progress=False)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            app = create_app(IndexCollection(retriever), ServeSettings(port=port))
            server = uvicorn.Server(uvicorn.Config(app, log_config=None))
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                server.should_exit = True
                thread.join()


def show_states(page: Page, address: str, text: str, save: Callable[[str], None]) -> None:
    """Bring the page into each state in turn, and save it."""

    def search(text: str) -> None:
        page.get_by_label("Description of the picture").fill(text)
        page.get_by_role("button", name="Search", exact=True).click()
        page.get_by_text("best first").wait_for()
        page.locator("#results:not([aria-busy])").wait_for()

    page.goto(address)
    page.locator("#grid li").first.wait_for()
    save("empty")
    page.get_by_role("button", name="Do not show this again").click()
    search(text)
    page.evaluate("document.activeElement.blur()")
    save("results")
    page.locator("#grid a").first.click()
    page.locator(".word").first.wait_for()
    save("opened")
    words = [word.strip(".,;") for word in page.locator(".word").all_inner_texts()]
    page.locator(".word").nth(words.index("truck")).click()
    save("explained")
    page.keyboard.press("Escape")
    page.get_by_label("Description of the picture").fill(f"{text} {text}")
    page.locator("#count.over").wait_for()
    save("too-long")
    page.get_by_role("button", name="Refine").click()
    page.get_by_label("rain").check()
    save("filters")
    page.get_by_label("Filter by an expression").fill("weather =")
    page.get_by_label("Filter by an expression").press("Enter")
    page.locator("#where-fault:not(:empty)").wait_for()
    save("wrong-filter")
    page.goto(address)
    search("an equation on a blackboard")
    save("nothing-stands-out")
    page.route("**/v1/search", lambda route: route.abort())
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator("#fault:not([hidden])").wait_for()
    save("no-answer")


def photograph(browser: Browser, address: str, size: str, scheme: str, places: dict[str, Path]) -> None:
    """Write screenshots of some states."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
        is_mobile=size == "phone",
        has_touch=size == "phone",
    )
    page = context.new_page()

    def hide_folder(route: Route) -> None:
        """Replace the pictures' folder, which exists only on this machine and is of no use to readers."""
        answer = route.fetch()
        route.fulfill(response=answer, body=re.sub(r'"/[^"]*/(scenes/[^"/]*\.png)"', r'"/home/ada/\1"', answer.text()))

    page.route("**/v1/search", hide_folder)

    def save(state: str) -> None:
        if state not in places:
            return
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(300)
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.quantize(192, dither=Image.Dither.NONE).save(places[state], optimize=True)

    show_states(page, address, Scenes("test", SCENES)[QUERY].caption, save)
    context.close()


def main() -> None:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("expected Chromium: apt-get install chromium")
    with serving() as address, sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        if sys.argv[1:]:
            folder = Path(sys.argv[1])
            folder.mkdir(parents=True, exist_ok=True)
            for size in SIZES:
                for scheme in ("light", "dark"):
                    places = {state: folder / f"{state}-{size}-{scheme}.png" for state in STATES}
                    photograph(browser, address, size, scheme, places)
        else:
            for state, size, scheme in SHOWN:
                photograph(browser, address, size, scheme, {state: DOCS / f"serve-{state}-{size}.png"})
        browser.close()


if __name__ == "__main__":
    main()
