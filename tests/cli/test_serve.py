"""``finelip serve``, and searches by a server: refusals and their order, and what the server receives."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finelip_fast
from finelip_fast import serve as package
from finelip_fast.cli import main
from finelip_fast.serve.guards import check_exposure
from finelip_fast.serve.opening import Opening
from finelip_fast.serve.settings import ServeSettings

KEY = "a-key-of-16-or-more"
HIT = {
    "id": "a.png",
    "score": 0.9,
    "global_score": 0.8,
    "fine_score": 1.2,
    "stands_out": 0.95,
    "metadata": {"camera": "front"},
    "mode": "exact",
    "path": "/photos/a.png",
    "shard": None,
}


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of two pictures, embedded by a model with random weights."""
    folder = tmp_path_factory.mktemp("serve")
    finelip_fast.save(make_model(context_length=40, vision_layers=1, text_width=32), folder / "checkpoint")
    (folder / "photos").mkdir()
    for number in range(2):
        colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(colours).save(folder / "photos" / f"{number}.png")
    words = ["add", folder / "photos", "--checkpoint", folder / "checkpoint", "--index", folder / "index", "--quiet"]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeSettings, Opening, int]]:
    """The arguments of started servers; none actually starts."""
    calls: list[Any] = []
    module = ModuleType("finelip_fast.serve.run")
    module.print_address = print  # type: ignore[attr-defined]

    def serve(*arguments: Any, ready: Callable[[str], object]) -> None:
        check_exposure(arguments[0])
        calls.append(arguments)
        ready("http://127.0.0.1:8123")

    module.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, "run", module, raising=False)
    monkeypatch.delenv("FINELIP_API_KEY", raising=False)
    return calls


@pytest.fixture
def serve(
    folder: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command and returns its exit code and output."""
    monkeypatch.chdir(folder)

    def run(*words: str, index: bool = True) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["serve", *words, *(["--index", "index"] if index else [])])
        return code, *capsys.readouterr()

    return run


def test_a_server_is_told_what_to_serve(serve, served, folder: Path) -> None:
    assert serve() == (0, "http://127.0.0.1:8123\n", "")
    assert served == [(ServeSettings(), Opening(index="index"), 1)]


def test_every_option_arrives(serve, served, folder: Path) -> None:
    (folder / "key").write_text(KEY + "\n")
    options = (
        "--host ::1 --port 9000 --workers 3 --api-key-file key --writable --uploads photos --allowed-host a.example "
        "--allowed-host b.example --origin https://a.example:8443 --timeout 5 --batch-wait 1.5 --max-batch 8 --queue 16 "
        "--drain 3 --log-queries --alpha 0.3 --checkpoint checkpoint --engine torch --device cpu"
    )
    assert serve(*options.split())[0] == 0
    settings = ServeSettings(
        host="::1",
        port=9000,
        api_key=KEY,
        hosts=("a.example", "b.example"),
        origins=("https://a.example:8443",),
        writable=True,
        uploads="photos",
        timeout=5,
        batch_wait=0.0015,
        max_batch=8,
        queue=16,
        drain=3,
        log_queries=True,
    )
    opening = Opening(index="index", checkpoint="checkpoint", engine="torch", device="cpu", alpha=0.3, uploads="photos")
    assert served == [(settings, opening, 3)]
    assert KEY not in repr(settings)


def test_shards_are_opened_in_the_place_of_an_index(serve, served) -> None:
    assert serve("--shards", "index", "--ray", "ray://head:10001", index=False)[0] == 0
    assert served[0][1] == Opening(shards=("index",), ray="ray://head:10001")


def test_uploads_lie_in_the_index_unless_told(serve, served) -> None:
    assert serve("--writable")[0] == 0
    assert served[0][1].uploads == str(Path("index") / "uploads")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--host 0.0.0.0", "expected an API key to listen on '0.0.0.0'"),
        ("--host photos.example", "expected an API key to listen on 'photos.example'"),
        ("--host ::", "expected an API key to listen on '::'"),
        ("--host a/b", "expected --host as an address or a name"),
        ("--port 65536", "expected --port from 0 to 65535, got 65536"),
        ("--workers 0", "expected --workers from 1 to 256, got 0"),
        ("--timeout nan", "expected --timeout from 0.1 to 3600, got nan"),
        ("--batch-wait -1", "expected --batch-wait from 0 to 1000, got -1"),
        ("--drain inf", "expected --drain from 0 to 3600, got inf"),
        ("--api-key-file none", "cannot read none"),
        ("--api-key-file short", "expected an API key of 16 to 4096"),
        ("--allowed-host http://a", "expected --allowed-host as a name"),
        ("--allowed-host *", "expected --allowed-host as a name"),
        ("--origin *", "expected --origin as scheme"),
        ("--origin http://a/", "expected --origin as scheme"),
        ("--origin http://u@a", "expected --origin as scheme"),
        ("--uploads photos", "expected --uploads with --writable"),
        ("--shards a b", "expected --index or --shards, got both"),
        ("--ray ray://a", "expected --ray with --shards"),
        ("--index nothing", "there is no index at nothing"),
        ("--shards nothing", "there is no index at nothing"),
    ],
)
def test_what_is_wrong_is_told_before_a_server_starts(serve, served, folder: Path, words: str, message: str) -> None:
    (folder / "short").write_text("key")
    code, _, err = serve(*words.split(), index=not words.startswith(("--index", "--shards nothing")))
    assert code == 2
    assert message in err
    assert not served


@pytest.mark.parametrize("words", ["--shards index --writable", "--shards index --workers 2"])
def test_shards_are_processes_and_folders_of_their_own(serve, served, words: str) -> None:
    code, _, err = serve(*words.split(), index=False)
    assert (code, served) == (2, [])
    assert "got " in err


def test_the_key_comes_from_the_environment_too(serve, served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_API_KEY", KEY)
    assert serve("--host", "0.0.0.0")[0] == 0
    assert served[0][0].api_key == KEY
    monkeypatch.setenv("FINELIP_API_KEY", "a b")
    assert "expected an API key of 16 to 4096" in serve()[2]


def test_a_missing_package_is_named_with_what_brings_it(serve, served, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    code, _, err = serve()
    assert (code, served) == (2, [])
    assert "needs the packages uvicorn: pip install 'finelip-fast[serve]'" in err


def test_an_index_of_another_user_is_not_served_unasked(
    serve, served, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))
    code, _, err = serve()
    assert (code, served) == (2, [])
    assert "if you trust it, pass --checkpoint" in err


def test_the_demo_is_served_and_names_the_command_otherwise(
    served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def draw(out: str, **_: Any) -> str:
        finelip_fast.Index(finelip_fast.IndexSpec("0" * 64, 1, 4), Path(out) / "index").close()
        return "done"

    monkeypatch.setattr("finelip_fast.demo.run_demo", draw)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/finelip", "demo"])
    monkeypatch.setenv("PATH", "")
    assert main(["demo"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "search them in a browser: .venv/bin/finelip serve --index demo/index --open"
    assert main(["demo", "--serve", "--port", "9000"]) == 0
    assert capsys.readouterr().out == "done\nhttp://127.0.0.1:8123\n"
    assert served == [(ServeSettings(port=9000), Opening(index=str(Path("demo") / "index")), 1)]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({"alpha": 0.8, "items": 3} if self.path == "/v1/info" else {"status": "live"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)  # type: ignore[attr-defined]
        hits = [] if "where" in request else [HIT]
        self.answer({"results": [{"hits": hits, "tokens_cut": 0}], "covered": 1, "missing": {}})

    def answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server that answers like ours, and keeps the requests."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_the_browser_is_opened_once_the_server_answers(serve, served, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: Queue[str] = Queue()
    monkeypatch.setattr(webbrowser, "open", lambda address: addresses.put(address) or True)
    assert serve("--open")[0] == 0
    assert addresses.get(timeout=300) == "http://127.0.0.1:8123"


@pytest.fixture
def search(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs a search in an empty folder and returns its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINELIP_SERVER", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(["search", *words]), *capsys.readouterr()

    return run


def test_a_server_answers_a_search(search, server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = search("a house", "--server", url, "-k", "3", "--alpha", "0.5", "--mode", "exact")
    assert (code, err) == (0, "")
    assert out == "  1  0.9000  (global 0.8000, fine 1.2000)  stands out          a.png\n"
    assert server.requests == [{"text": ["a house"], "k": 3, "mode": "exact", "alpha": 0.5}]
    assert search("a house", "--server", url, "--paths")[1] == "/photos/a.png\n"
    assert json.loads(search("a house", "--server", url, "--json")[1]) == [HIT]
    monkeypatch.setenv("FINELIP_SERVER", url)
    Image.new("RGB", (4, 4)).save("query.png")
    assert search("--image", "query.png", "--json")[0] == 0
    assert server.requests[-1]["image"][0].startswith("iVBOR")
    nothing = "the filter n > 5 matches none of the 3 items\n"
    assert search("a house", "--where", "n > 5")[1:] == ("", nothing)
    assert search("a house", "--html", "out.html")[0] == 0
    assert "0.8 times global" in Path("out.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--index index", "--index"),
        ("--checkpoint c", "--checkpoint"),
        ("--verify", "--verify"),
        ("--why 2 --open", "--why"),
    ],
)
def test_what_needs_the_index_here_is_refused_by_name(search, url: str, option: str, name: str) -> None:
    code, _, err = search("a house", "--server", url, *option.split())
    assert code == 2
    assert f"expected --server without {name}" in err


def test_the_environments_server_is_left_aside_for_an_index(search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_SERVER", "http://127.0.0.1:9")
    assert "there is no index at here" in search("a house", "--index", "here")[2]
    assert "no server answers at http://127.0.0.1:9" in search("a house")[2]


def test_a_search_on_a_server_imports_no_pytorch(url: str) -> None:
    code = (
        "import sys; from finelip_fast.cli import main\n"
        f"assert main(['search', 'a house', '--server', {url!r}, '--json']) == 0\n"
        "print(sorted({'torch', 'numpy', 'open_clip', 'fastapi'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
