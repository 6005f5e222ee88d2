"""Shared fixtures: the independent NumPy reference, small models, captions, and the devices of this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

import finelip_fast
from finelip_fast.config import EOT_TOKEN, START_TOKEN, FineLIPConfig
from finelip_fast.model import FineLIP

# The tensors are small: with more threads than free cores, nearly all the time would be spent waiting.
torch.set_num_threads(1)

# Read when Ray is imported: its monitor would end workers because of the memory that other processes take.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")

# Profile of all tests: how long an example takes is the machine's matter.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# Profile of the fuzz tests, `@settings(settings.get_profile("fuzz"))`: bounded by default; `FINELIP_FUZZ=100000` runs long.
settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FINELIP_FUZZ", "50")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")[:2]))


def _module_of_a_file(path: Path) -> ModuleType:
    """Load a module by path, because ``tests/`` is not on the import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _skip_where_triton_cannot_be_interpreted() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _version(metadata.version("triton")) < (3, 8) and _version(np.__version__) >= (2, 4):
        pytest.skip("loops of run-time length need Triton 3.8 or NumPy before 2.4 in the interpreter")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") and os.environ.get("TRITON_INTERPRET") == "1":
        _skip_where_triton_cannot_be_interpreted()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests from using this user's cache of exports, timings and tuned settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINELIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Skip tests that start a process with Triton's interpreter if it cannot run here."""
    _skip_where_triton_cannot_be_interpreted()


@pytest.fixture(scope="session")
def method() -> ModuleType:
    """The module `method_reference.py`."""
    return _module_of_a_file(Path(__file__).with_name("method_reference.py"))


@pytest.fixture(scope="session")
def tiny_pipelines() -> ModuleType:
    """The module `diffusion/tiny_pipelines.py`, which creates text-to-image pipelines."""
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'finelip-fast[diffusion]'")
    return _module_of_a_file(Path(__file__).parent / "diffusion" / "tiny_pipelines.py")


@pytest.fixture(scope="session", params=[1, 2], ids=["SigLIP", "SigLIP 2"])
def open_clip_siglip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small open_clip SigLIP and the folder of its files, as written by ``open_clip_siglip.py``."""
    module = sys.modules.get("open_clip_siglip") or _module_of_a_file(Path(__file__).with_name("open_clip_siglip.py"))
    return module.write(tmp_path_factory.mktemp("siglip"), request.param)


@pytest.fixture(scope="session")
def siglip_checkpoint(open_clip_siglip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint for 24 tokens, more than its positions, marked as trained: its aggregators are random but in use."""
    with pytest.warns(finelip_fast.UntrainedAggregatorsWarning):
        model = finelip_fast.load(open_clip_siglip.folder, context_length=24)
    model.config = model.config.replace(trained_aggregators=True, alpha=0.5)
    folder = tmp_path_factory.mktemp("checkpoint") / "siglip"
    finelip_fast.save(model, folder)
    return folder


@pytest.fixture(scope="session", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that this machine has."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., FineLIP]:
    """Return a function that builds a small model with no parameter at a trivial value (zero bias, unit gain)."""

    def build(seed: int = 0, **changes: object) -> FineLIP:
        sizes = {
            "embed_dim": 48,
            "image_size": 32,
            "patch_size": 8,
            "vision_width": 64,
            "vision_layers": 2,
            "vision_heads": 2,
            "text_width": 64,
            "text_layers": 2,
            "text_heads": 4,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = FineLIP(FineLIPConfig(**(sizes | changes)))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # Make the distributions over tokens peaked: a nearly uniform one would hide a wrong logit.
                    if "aggregator" in name and parameter.dim() == 2:
                        parameter.mul_(4.0)
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def make_captions() -> Callable[..., Tensor]:
    """Return a function that builds random captions, zero-padded; lengths include start and end token (0: only padding)."""

    def build(lengths: list[int], width: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, length in zip(ids, lengths, strict=True):
            if length:
                row[:length] = torch.randint(1, START_TOKEN, (length,), generator=generator)
                row[0], row[length - 1] = START_TOKEN, EOT_TOKEN
        return ids

    return build


_DEEP = "a list in a list in a list"
_HOSTILE = [
    *(None, True, False, 0, 1, -1, 3, 1000, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", " ", "\x00", "\ud800", "\u202e", "a" * 5000, "../../etc/passwd", "/dev/zero", "http://a/b", "~", "\n"),
    *([], {}, [[]], [None], {"": {}}, [1, "a"], [0] * 100, _DEEP),
]


@pytest.fixture(scope="session")
def damage_json() -> Callable[[st.DataObject, Any], bytes]:
    """Return a function that writes a value as JSON with parts replaced, removed, doubled or added, or the text damaged."""

    def change(data: st.DataObject, value: Any) -> Any:
        parts = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not parts or data.draw(st.integers(0, 5)) == 0:
            return data.draw(st.sampled_from(_HOSTILE))
        at, value = data.draw(st.sampled_from(parts)), value.copy()
        way = data.draw(st.integers(0, 9))
        if way == 0:
            del value[at]
        elif way == 1:
            value = {**value, "more": 1} if isinstance(value, dict) else [*value, value[at]]
        elif way == 2:
            value[at] = value[data.draw(st.sampled_from(parts))]
        else:
            value[at] = change(data, value[at])
        return value

    def damage(data: st.DataObject, value: Any) -> bytes:
        for _ in range(data.draw(st.integers(1, 3))):
            value = change(data, value)
        text = json.dumps(value).replace(json.dumps(_DEEP), "[" * 20_000 + "]" * 20_000).encode()
        if data.draw(st.integers(0, 4)) == 0:
            at = data.draw(st.integers(0, len(text)))
            text = text[:at] + data.draw(st.binary(max_size=4)) + text[at + data.draw(st.integers(0, 4)) :]
        return text

    return damage


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """Restore SIGINT handling: background jobs of a shell ignore interrupts, and their child processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def as_a_guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], AbstractContextManager[None]]:
    """Return a context manager in which the process may read a folder and its surroundings, but write nothing."""
    shared = tmp_path_factory.getbasetemp().parents  # other processes of the same run work below them

    @contextmanager
    def guest(folder: Path) -> Iterator[None]:
        import fcntl

        with Path(__file__).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # no other guest changes the shared folders back meanwhile
            closed = [path for path in folder.absolute().parents if path.stat().st_mode & 0o777 == 0o700]
            before = {path: path.stat().st_mode for path in [*folder.rglob("*"), folder, *closed]}
            for path in before:
                path.chmod(0o755 if path in shared else 0o555 if path.is_dir() else 0o444)
            is_root = os.geteuid() == 0
            if is_root:  # root may write everywhere
                os.seteuid(65534)
            try:
                yield
            finally:
                if is_root:
                    os.seteuid(0)
                for path, mode in before.items():
                    path.chmod(mode)

    return guest


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, with unrelated folders beside them."""
    for name in ("build", "setuptools"):
        pytest.importorskip(name)
    repository = Path(__file__).parent.parent
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("finelip_fast", "kernels", "training", "export"):
        shutil.copytree(repository / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for folder in ("tests", "bench"):
        (source / folder).mkdir()
        (source / folder / "stray.py").touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=out)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; module-scoped because Playwright occupies the thread's event loop meanwhile."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    programs = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    program = next(filter(None, programs), None)
    if program is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or dnf install chromium")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if is_root else []
        browser = playwright.chromium.launch(executable_path=program, args=arguments, timeout=300_000)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def check_access() -> Callable[[Any, str], None]:
    """Return a function that checks a page with axe-core: WCAG 2.2 AA and best practices, and contrast in dark mode."""
    from axe_playwright_python.base import AXE_FILE_PATH

    script = AXE_FILE_PATH.read_text(encoding="utf-8")
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

    def check(page: Any, state: str) -> None:
        page.evaluate(script)
        wrong = []
        for scheme, only in (("dark", ["color-contrast"]), ("light", tags)):
            page.emulate_media(color_scheme=scheme)
            kind = "rule" if scheme == "dark" else "tag"
            options = {"runOnly": {"type": kind, "values": only}, "resultTypes": ["violations"], "preload": False}
            violations = page.evaluate("(options) => axe.run(options)", options)["violations"]
            wrong += [
                f"{state}, {scheme}: {rule['help']}: {node['html']}" for rule in violations for node in rule["nodes"]
            ]
        assert not wrong, "\n".join(wrong)

    return check
