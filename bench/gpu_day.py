"""Check on a GPU, within minutes, that everything is right, how fast it is, and which launch settings are faster.

``python bench/gpu_day.py --minutes 12 --out DIR`` runs from a checkout with PyTorch and Triton; the package need not be
installed. Each step is a group of processes with a time limit, so that an illegal access, a hang or a compiler crash ends only
that step. Steps run in order of importance; those that no longer fit are skipped and reported. DIR receives ``results.jsonl``,
with a line for each result as soon as it is known; ``log.txt``, the output of the steps; and ``settings.json``, the fastest
settings.

``--tiny`` rehearses all of it on a CPU with small sizes; its figures are meaningless.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from contest import Result

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
TESTS = ROOT / "tests" / "kernels"
RESULTS, LOG, SETTINGS = "results.jsonl", "log.txt", "settings.json"

# The limits below assume this many minutes; they grow if there are more.
MINUTES = 12
# Seconds reserved for ending a step that ran out of time.
ENDING = 3


class Step(NamedTuple):
    """One step of the run.

    Args:
        run: Function that runs in a process of its own.
        most: Seconds after which the step is ended.
        least: Seconds that must be left for the step to start.
        tuned: Whether the step uses the settings that the sweep found.
    """

    run: Callable[[], None]
    most: float
    least: float
    tuned: bool = True


# The run: no package is needed here -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of what is found")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long all of it may take (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=[*STEPS], metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        if TINY:
            rehearse()
        STEPS[options.step].run()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with package() as folder:
        spend(options.out.resolve(), folder, 60 * options.minutes, options.only, tiny=options.tiny)


@contextmanager
def package() -> Iterator[Path]:
    """Yield a folder to import the package from: links in the layout of a wheel, and metadata with the version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "finelip_fast").mkdir()
        for path in (*(ROOT / "finelip_fast").iterdir(), *(ROOT / part for part in ("kernels", "training", "export"))):
            (folder / "finelip_fast" / path.name).symlink_to(path)
        (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        metadata = folder / f"finelip_fast-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: finelip-fast\nVersion: {version}\n")
        yield folder


def spend(out: Path, folder: Path, seconds: float, names: Sequence[str], *, tiny: bool) -> None:
    """Run the steps in order while time remains."""
    end = time.monotonic() + seconds
    growth = max(1.0, seconds / (60 * MINUTES))
    with (out / LOG).open("ab") as log:
        for name in STEPS:
            if name not in names:
                continue
            step, left = STEPS[name], end - time.monotonic() - ENDING
            if left < step.least and not tiny:
                note(out, name, skipped=f"{max(0.0, left):.0f} s left, {step.least} needed")
                continue
            begun = time.monotonic()
            command = [sys.executable, str(HERE), "--step", name, "--out", str(out)]
            environment = surroundings(out, folder, tuned=step.tuned, tiny=tiny)
            log.write(f"\n===== {name}\n".encode())
            log.flush()
            ended = run_group(command, min(growth * step.most, left), log, environment, folder)
            note(out, name, ended=ended, seconds=round(time.monotonic() - begun, 1))


def surroundings(out: Path, folder: Path, *, tuned: bool, tiny: bool) -> dict[str, str]:
    """Return the environment variables of a step."""
    paths = [str(folder), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GPU_DAY_OUT": str(out),
        "GPU_DAY_TINY": "1" if tiny else "",
        "FINELIP_CACHE": str(out if tuned else folder / "cache"),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(folder / "triton")),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic, as the tests require
        "LIK_SUPPRESS_NORM_WARN": "1",  # disables a peer's check of all norms
    }
    if tiny:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"FINELIP_BENCH_ITEMS": "64", "FINELIP_BENCH_BATCH": "64", "FINELIP_BENCH_SCENES": "16"}
        environment |= {"FINELIP_BENCH_WITHOUT": "torch float32;torch bfloat16;torch int8;onnx;trt"}
    return environment


def run_group(
    command: Sequence[str], limit: float, log: Any, environment: Mapping[str, str], folder: Path
) -> int | str:
    """Run a command; return its exit code, or the limit that it exceeded. Every process it started is ended.

    It does not run in the repository, whose ``kernels`` folder would hide another project's package.
    """
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return "time limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def note(out: Path, step: str, **values: Any) -> None:
    """Append a line to the results and print it."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")
    words = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())
    print(step, *words, flush=True)


# Steps: each in its own process ---------------------------------------------------------------------------------------

OUT = Path(os.environ.get("GPU_DAY_OUT", "."))
TINY = bool(os.environ.get("GPU_DAY_TINY"))


def rehearse() -> None:
    """Skip what takes long and is not part of this script: measuring the machine, and PyTorch's compiler."""
    import torch

    from finelip_fast.kernels import floor

    setattr(floor, "peaks", lambda: {"bytes/s": 1e10, "flops/s": {}})  # noqa: B010
    setattr(torch, "compile", lambda block, **_: block)  # noqa: B010


def machine() -> None:
    import record
    import torch

    from finelip_fast.kernels import floor

    os.chdir(ROOT)  # for the commit
    values: dict[str, Any] = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": record.commit(),
    }
    values |= record.versions("triton", "late-interaction-kernels", "flash-maxsim")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        driver = query_smi("driver_version,clocks.max.sm,clocks.max.memory,power.limit")
        values |= {"gpu": card.name, "capability": f"{card.major}.{card.minor}", "memory": card.total_memory}
        values |= {"multiprocessors": card.multi_processor_count, "l2": card.L2_cache_size, "driver": driver}
    note(OUT, "machine", **values)
    note(OUT, "machine", **floor.peaks())


def query_smi(names: str) -> str:
    """Return the output of ``nvidia-smi``, or an empty string if it is missing. It asks the driver and opens no context."""
    try:
        command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return lines[0] if lines else ""


def compile_ahead() -> None:
    """Compile what later steps launch into Triton's cache, on all cores; the GPU stays unopened."""
    os.environ.pop("TRITON_INTERPRET", None)  # for the workers
    capability = int(query_smi("compute_cap").replace(".", "") or 90)
    begun, failed = time.monotonic(), 0
    with ProcessPoolExecutor(1 if TINY else os.cpu_count(), get_context("spawn")) as pool:
        count = 1 if TINY else pool.submit(count_launches, capability).result()
        futures = {pool.submit(compile_launch, capability, number): number for number in range(count)}
        for future in as_completed(futures):
            try:
                future.result()
            except Exception as error:  # a candidate of the sweep that does not fit this kind of GPU
                failed += 1
                print(futures[future], type(error).__name__, str(error)[-200:])
    seconds = time.monotonic() - begun
    note(OUT, "compile", capability=capability, compiled=count - failed, failed=failed, seconds=seconds)


def count_launches(capability: int) -> int:
    return len(launches_of(capability))


def compile_launch(capability: int, number: int) -> None:
    launches_of(capability)[number].compile_into_cache(capability)


@cache
def launches_of(capability: int) -> list[Any]:
    """Return the launches with the shipped settings, then all that a sweep would try."""
    from unittest.mock import patch

    import compile_table
    import torch
    from ahead_of_time import recorded_launches
    from torch.overrides import TorchFunctionMode

    from finelip_fast.kernels import tune

    class WithoutNumbers(TorchFunctionMode):
        """Replace tensors that would be created on the GPU with tensors that have a shape but no data."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            return function(*args, **(kwargs | {"device": "meta"} if "device" in kwargs else kwargs))

    with (
        recorded_launches(capability) as launches,
        patch.object(tune, "_items_that_fit", lambda *_: tune._ITEMS),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # does not support tensors without data
    ):
        for case in compile_table.our_cases(capability):
            case.run()
        with WithoutNumbers():
            for swept in tune.cases_for():
                run = swept.prepare().run
                for settings in (swept.default, *swept.candidates):
                    run(settings)
    return [launch for launch, *_ in launches]


def kernels() -> None:
    """Check each kernel against float64, in its own process, several at a time."""
    from finelip_fast.verify import KERNELS

    names = ["clim-int8"] if TINY else list(KERNELS)
    if TINY:
        os.environ["FINELIP_KERNELS"] = "triton"  # use the interpreter
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: note(OUT, "kernels", **verify_alone(kernel)), names))


def verify_alone(kernel: str, command: Sequence[str] = ()) -> dict[str, Any]:
    """Return the verdict of ``finelip verify``, optionally run through another command."""
    words = ["-m", "finelip_fast.cli", "verify", "--kernels", kernel, "--untimed", "--json"]
    process = subprocess.run([*command, sys.executable, *words], capture_output=True, text=True)
    print(kernel, process.stdout, process.stderr[-2_000:])
    documents = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if documents:
        (verdict,) = json.loads(documents[0])["verdicts"]
    else:
        verdict = {"kernel": kernel, "wrong": process.stderr.strip()[-300:] or "it printed nothing"}
    return {"exit_code": process.returncode, **verdict}


def headline() -> None:
    race_of_scores("headline")


def headline_tuned() -> None:
    race_of_scores("headline-tuned")


def race_of_scores(step: str) -> None:
    """Race the scores of a million items of 40 x 512, in float16 and in int8."""
    import torch
    from baselines import exact_scores
    from contest import Contender, compete
    from inputs import TOKENS, WIDTH, unit_rows
    from test_clim import CHECKED, EXACT, QUANTISED

    from finelip_fast.kernels import clim_scores, floor, quantize

    items = unit_rows(items_that_fit(1_000_000), dtype=torch.float16, seed=1)
    parts = [quantize(part) for part in items.split(5_000)]
    item_values, item_scales = (torch.cat(rows) for rows in zip(*parts, strict=True))
    del parts
    for n_queries in (1, 8) if TINY else (1, 8, 64):
        queries = unit_rows(n_queries, dtype=torch.float16, seed=0)
        values, scales = quantize(queries)
        runs = {
            torch.float16: (partial(clim_scores, queries, items), EXACT),
            torch.int8: (
                partial(clim_scores, values, item_values, query_scales=scales, item_scales=item_scales),
                QUANTISED,
            ),
        }
        contenders = {
            floor.name(dtype): Contender(
                run,
                tolerance,
                work=floor.clim(n_queries, len(items), TOKENS, WIDTH, dtype),
                answer=lambda scores: scores[:, :CHECKED],
            )
            for dtype, (run, tolerance) in runs.items()
        }
        results = compete(contenders, exact_scores(items[:CHECKED], queries).T, rounds=rounds())
        note_race(step, f"{n_queries} x {len(items)}", results)


def items_that_fit(count: int) -> int:
    """Limit ``count`` so that 40 x 512 float16 items fit 2.5 times; a multiple of 16, as kernels were compiled for."""
    import torch

    if TINY:
        return 64
    if torch.cuda.is_available():
        count = min(count, int(torch.cuda.mem_get_info()[0] / (2.5 * 2 * 40 * 512)))
    return count // 16 * 16


def rounds() -> int:
    return 1 if TINY else 11


def note_race(step: str, race: str, results: dict[str, Result]) -> None:
    for name, result in results.items():
        refused = {"refused": result.refusal} if result.refusal else {}
        note(OUT, step, race=race, contender=name, **result.info, **refused)


def tests() -> None:
    """Run the tests that need a GPU; the 60 GB tests have a step of their own."""
    files = [TESTS / "test_on_gpu.py"] if TINY else [TESTS, *files_with_gpu_tests()]
    options = ["-m", "gpu", "-k", "not 60_gb", "-v", "--maxfail", "60", "-rfE", "--tb", "short", "--durations", "15"]
    options += ["--continue-on-collection-errors"]  # for files whose packages are not installed
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "90"]
    run_tests("tests", [*map(str, files), *options])


def files_with_gpu_tests() -> list[Path]:
    """Return test files with GPU tests outside the kernels' folder, which has nearly all of them."""
    paths = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if TESTS not in path.parents)
    return [path for path in paths if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def index_of_60_gb() -> None:
    run_tests("index-of-60-gb", [f"{TESTS}/test_on_gpu.py", "-m", "gpu", "-k", "60_gb", "-q", "-rs"])


def run_tests(step: str, options: Sequence[str]) -> None:
    # Do not treat warnings as errors: other versions of PyTorch and Python have other warnings.
    options = ["-c", str(ROOT / "pyproject.toml"), *options, "-W", "default", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout or ():  # logged even if time runs out
        print(line, end="")
        lines.append(line.strip())
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note(OUT, step, exit_code=process.wait(), summary=lines[-1] if lines else "", failed=failed)


def sweep() -> None:
    """Tune launch settings; each case is saved as soon as it is decided."""
    from finelip_fast.kernels import tune

    if TINY:
        import torch

        def run(cut: Cut) -> tuple[torch.Tensor, ...]:
            return (torch.ones(cut.block)[:1],)

        cases = [tune.Case(("rehearsal",), Cut(1), (Cut(2),), lambda: tune.Prepared(run, (), 0.0))]
        measure: Any = lambda run: float(run.args[-1].block)  # noqa: E731
    else:
        cases, measure = tune.cases_for(), None
    for case in cases:
        for tuned in tune.tune([case], measure=measure, settings=OUT / SETTINGS, progress=False):
            note(
                OUT, "sweep", case=tuned.name, settings=vars(tuned.settings), speedup=tuned.speedup, failed=tuned.failed
            )


def peers() -> None:
    """Time tuned PyTorch and installed peers in turns with ours."""
    import test_clim

    for n_queries in test_clim.QUERIES[: 1 if TINY else None]:
        race = f"{n_queries} x {test_clim.ITEMS}"
        note_race("peers", race, test_clim.scores_race(n_queries))


def search() -> None:
    """Time whole searches: the cost of pieces, gaps and transfers from host memory on top of the scan."""
    import torch
    from baselines import exact_scores
    from contest import Contender, compete
    from inputs import ON_GPU, TOKENS, WIDTH, unit_rows
    from test_clim import EXACT

    from finelip_fast.kernels import clim_topk, floor

    items = unit_rows(items_that_fit(1_000_000), dtype=torch.float16, seed=1)
    queries = unit_rows(1, dtype=torch.float16, seed=0)
    n_items = len(items)
    scores = torch.cat([exact_scores(part, queries).T for part in items.split(10_000)], dim=1)
    remaining = (
        (torch.rand(n_items, generator=torch.Generator().manual_seed(0)) >= 0.01).nonzero()[:, 0].to(items.device)
    )
    pieces = list(items.split(-(-n_items // 77)))
    host = items[: max(10, n_items // 10)].cpu()
    searches: dict[str, tuple[Callable[[], Any], torch.Tensor]] = {
        "one piece": (lambda: clim_topk(queries, items, 10), scores),
        "77 pieces": (lambda: clim_topk(queries, pieces, 10), scores),
        "host memory": (lambda: clim_topk(queries, host, 10), scores[:, : len(host)]),
        "1 % deleted": (lambda: clim_topk(queries, items, 10, among=remaining), scores[:, remaining]),
    }
    if ON_GPU:
        pinned = host.pin_memory()
        searches["pinned memory"] = (lambda: clim_topk(queries, pinned, 10), scores[:, : len(host)])
    for name, (run, reached) in searches.items():
        work = floor.clim(1, reached.shape[1], TOKENS, WIDTH, torch.float16)
        contender = Contender(run, EXACT, work=work, answer=lambda result: result[0])
        results = compete({name: contender}, reached.topk(10).values, rounds=1 if TINY else 3)
        note_race("search", f"1 x {reached.shape[1]}", results)


def training() -> None:
    import test_training

    for batch in test_training.BATCHES:
        dtype = test_training.DTYPES[0]
        note_race("training", f"{batch}, {dtype}", test_training.gradients_race(batch, dtype))


def aggregation() -> None:
    import test_atrm

    for batch in test_atrm.BATCHES[: 1 if TINY else None]:
        for with_gradient in (False, True):
            race = f"{batch}, {'forward and backward' if with_gradient else 'forward'}"
            note_race("aggregation", race, test_atrm.aggregation_race(batch, with_gradient))


def encoders() -> None:
    """Race ViT-B/16 in half precision against open_clip."""
    import test_engines

    for kind, size in product(("pictures", "captions"), test_engines.BATCHES[: 1 if TINY else None]):
        note_race("encoders", f"{size} {kind}", test_engines.race(kind, size))


def retrieval() -> None:
    """Race retrieval from captions to the best pictures, end to end."""
    import test_search

    for n_captions in test_search.CAPTIONS[: 1 if TINY else None]:
        race = f"{n_captions} captions among {test_search.ITEMS}"
        note_race("retrieval", race, test_search.search_race("scenes" if TINY else "ViT-B-16", n_captions))


def sanitizer() -> None:
    """Run small launches with every memory access checked."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    memcheck = (tool, "--tool", "memcheck", "--error-exitcode", "99")
    kernels = ("clim-float16", "clim-int8", "clim-gradient-float16", "atrm-float16", "atrm-gradient-float16")
    if TINY:
        memcheck, kernels = ("env",), kernels[-2:-1]
    elif not Path(tool).exists():
        note(OUT, "sanitizer", skipped="compute-sanitizer is not installed")
        return
    for kernel in kernels:
        note(OUT, "sanitizer", **verify_alone(kernel, memcheck))


@dataclass(frozen=True)
class Cut:
    """Launch settings of a rehearsal."""

    block: int


STEPS = {
    "machine": Step(machine, 30, 10, tuned=False),
    "compile": Step(compile_ahead, 90, 30, tuned=False),
    "kernels": Step(kernels, 90, 30, tuned=False),
    "headline": Step(headline, 60, 25, tuned=False),
    "tests": Step(tests, 150, 60, tuned=False),
    "sweep": Step(sweep, 120, 30, tuned=False),
    "headline-tuned": Step(headline_tuned, 45, 25),
    "peers": Step(peers, 150, 40),
    "search": Step(search, 45, 20),
    "training": Step(training, 120, 40),
    "aggregation": Step(aggregation, 45, 15),
    "encoders": Step(encoders, 60, 20),
    "retrieval": Step(retrieval, 60, 20),
    "sanitizer": Step(sanitizer, 60, 30),
    "index-of-60-gb": Step(index_of_60_gb, 60, 30),
}

if __name__ == "__main__":
    main()
