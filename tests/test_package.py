"""The package: its public names, the effects of importing it, and the contents of a wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import finelip_fast

REPOSITORY = Path(__file__).parent.parent
MAPPED = ("kernels", "training", "export")


def fresh_python(code: str) -> str:
    """Return the output of a new process started outside the repository."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_public_names_are_these() -> None:
    assert finelip_fast.__all__ == sorted(finelip_fast.__all__)
    assert set(finelip_fast.__all__) == {
        *("Retriever", "Hit", "Hits", "Explanation", "AddReport", "FolderReport", "Index", "IndexSpec", "Engine"),
        *("FineLIP", "FineLIPConfig", "Preprocess", "load", "open_image", "save", "tokenize"),
        *finelip_fast.errors.__all__,
        *("AsyncClient", "Client", "UntrainedAggregatorsWarning"),
    }
    for name in finelip_fast.__all__:
        value = getattr(finelip_fast, name)
        assert value.__module__.startswith("finelip_fast.")
        assert value.__doc__, f"{name} has no docstring"
    assert finelip_fast.__version__


def test_there_are_no_other_names() -> None:
    """The package's modules are exempt."""
    code = (
        "import importlib.util, finelip_fast\nfrom finelip_fast import *\n"
        "names = [name for name in dir(finelip_fast) if not name.startswith('__')]\n"
        "print(*(name for name in names if not importlib.util.find_spec(f'finelip_fast.{name}')))"
    )
    assert fresh_python(code).split() == finelip_fast.__all__


def test_dir_lists_names_modules_and_the_version() -> None:
    names = {*dir(finelip_fast)}
    modules = {
        "datasets",
        "kernels",
        "diffusion",
        "evaluation",
        "metrics",
        "checkpoint",
        "studies",
        "distributed",
        "errors",
    }
    assert names >= {*finelip_fast.__all__, *modules, "__version__", "__doc__"}
    assert not {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_importing_is_lean() -> None:
    code = (
        "import json, sys, finelip_fast\nbefore = 'torch' in sys.modules\n"
        "from finelip_fast import *\nimport torch\n"
        "print(json.dumps([before, sorted(sys.modules), torch.cuda.is_initialized()]))"
    )
    torch_at_once, modules, cuda = json.loads(fresh_python(code).splitlines()[-1])
    assert torch_at_once is False, "the command line is slow, and cannot be interrupted quietly"
    assert "finelip_fast.retriever" in modules
    unwanted = {
        *("onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorboard", "webdataset", "sklearn", "matplotlib"),
        *("faiss", "lance", "pyarrow", "ray", "finelip_fast.distributed", "finelip_fast.index.remote.lance"),
        *("diffusers", "finelip_fast.diffusion"),
        *("finelip_fast.training", "finelip_fast.export", "finelip_fast.cli"),
    }
    assert not unwanted & set(modules)
    assert cuda is False


def test_a_search_imports_what_it_needs(tmp_path: Path) -> None:
    code = (
        "import json, sys, finelip_fast\nfrom PIL import Image\n"
        f"retriever = finelip_fast.Retriever(engine='torch', index={str(tmp_path / 'index')!r}, device='cpu')\n"
        "retriever.add_images([Image.new('RGB', (8, 8))], progress=False)\n"
        "assert len(retriever.search('a house', k=1)) == 1\nprint(json.dumps(sorted(sys.modules)))"
    )
    modules = set(json.loads(fresh_python(code).splitlines()[-1]))
    assert "finelip_fast.frozen" in modules
    slow = {"open_clip", "timm", "torchvision", "transformers", "torch._dynamo", "sympy"}
    assert not slow & modules, "these take seconds, for which a command would wait"


def test_names_come_when_they_are_asked_for() -> None:
    code = (
        "import finelip_fast\nassert 'Retriever' in dir(finelip_fast)\nassert callable(finelip_fast.kernels.clim_scores)\n"
        "assert finelip_fast.index.Index and finelip_fast.load\n"
        "try:\n    finelip_fast.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert fresh_python(code) == "module 'finelip_fast' has no attribute 'nothing'\n"


def test_the_mapped_folders_have_no_bare_names() -> None:
    code = (
        "import importlib.util, json\n"
        f"found = {{name: importlib.util.find_spec(name) for name in {MAPPED!r}}}\n"
        "places = lambda spec: [spec.origin] if spec.origin else list(spec.submodule_search_locations)\n"
        "print(json.dumps({name: places(spec) for name, spec in found.items() if spec}))"
    )
    for name, places in json.loads(fresh_python(code)).items():
        folder = REPOSITORY / name
        assert all(folder not in (place, place.parent) for place in map(Path, places)), (
            f"{name} is importable by its bare name"
        )


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = set()
    for folder in ("finelip_fast", *MAPPED):
        prefix = ["finelip_fast"] if folder == "finelip_fast" else ["finelip_fast", folder]
        for path in (REPOSITORY / folder).rglob("__init__.py"):
            packages.add(".".join([*prefix, *path.parent.relative_to(REPOSITORY / folder).parts]))
    # Folders of data files, not code.
    data = {"finelip_fast.data.pages", "finelip_fast.data.scenes", "finelip_fast.training.recipes"}
    assert set(settings["packages"]) == packages | data
    assert settings["package-dir"] == {"finelip_fast": "finelip_fast"} | {
        f"finelip_fast.{name}": name for name in MAPPED
    }


@pytest.fixture(scope="module")
def held(wheel: Path) -> list[str]:
    """The names in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_one_package(held: list[str]) -> None:
    tops = {name.split("/")[0] for name in held}
    assert tops == {"finelip_fast", f"finelip_fast-{finelip_fast.__version__}.dist-info"}
    assert not [name for name in held if "stray" in name or name.endswith(".pyc")]


def test_the_wheel_holds_every_file(held: list[str]) -> None:
    expected = set()
    for folder in ("finelip_fast", *MAPPED):
        prefix = "finelip_fast" if folder == "finelip_fast" else f"finelip_fast/{folder}"
        for path in (REPOSITORY / folder).rglob("*"):
            below = path.relative_to(REPOSITORY / folder)
            is_packaged = path.suffix in (".py", ".json") or below.parts[0] in ("py.typed", "data")
            if path.is_file() and is_packaged and "__pycache__" not in below.parts:
                expected.add(f"{prefix}/{below.as_posix()}")
    files = {name for name in held if name.startswith("finelip_fast/") and not name.endswith("/")}
    assert files == expected
    assert {"finelip_fast/py.typed", "finelip_fast/kernels/clim/ops.py", "finelip_fast/training/train.py"} <= files
    assert any(name.startswith("finelip_fast/training/recipes/") and name.endswith(".json") for name in files)
