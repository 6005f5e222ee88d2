"""Tabulate what our kernels and the peers' need on each GPU: registers, shared memory, spills. No GPU is needed.

``python bench/compile_table.py`` writes ``bench/results/compiled/kernels.json``, and a table of it to ``README.md`` beside it.

Each package's own launcher is called with tensors that have shapes but no data, and its launches are compiled, not run. The
settings are therefore those that it would choose on that GPU; none are copied here. If a package tries several settings on the
GPU and keeps the fastest, all of them are compiled and the best on paper is reported: one that fits and spills nothing and,
among these, lets the most programs run concurrently. The table has no timings.

Recorded rows of the peers are reused while their versions and Triton's are unchanged, because they take most of the time.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import peers
import record
import torch
from ahead_of_time import Compiled, KernelLaunch, recorded_launches
from counted import CARDS, count
from torch import Tensor

from finelip_fast.kernels.atrm import gradient_triton as atrm_gradient
from finelip_fast.kernels.atrm import triton as atrm
from finelip_fast.kernels.atrm.formula import AtrmInputs
from finelip_fast.kernels.clim import gradient_triton as clim_gradient
from finelip_fast.kernels.clim import triton as clim
from finelip_fast.kernels.clim.launches import ClimSettings, Launch, default_settings, describes

OUT = Path(__file__).parent / "results" / "compiled" / "kernels.json"

# By compute capability. Some launchers check the name.
GPUS = {80: "NVIDIA A100", 90: "NVIDIA H100", 100: "NVIDIA B200", 120: "NVIDIA GeForce RTX 5090"}

OURS = "finelip-fast"

BATCH = 512  # of training, on both sides
ITEMS = peers.AT_ONCE  # of a search
IMAGES = 1024  # of an aggregation

Row = dict[str, Any]

PAGE = """# Kernels, compiled

Written by `python bench/compile_table.py`: each package's own launcher is asked what it would launch on that GPU, and that is
compiled. {versions}; commit {commit}. No GPU was needed, and nothing was timed.

Each cell: registers of a thread / KiB of shared memory of a program / bytes of a thread that spill / programs side by side on
one multiprocessor; wgmma: products run on Hopper's tensor cores at their full rate. Programs are of 4 or 8 warps, some of the
peers' of 2. Where a package tries settings on the GPU, the best on paper stands for all; `kernels.json` says how many fit and
spill nothing. The peers' kernels score one direction and are launched twice.

{table}

## Cuts of late interaction

Of 40 x 512. A cut: items and queries of a program, the piece of D, warps, stages, and whether items come by tensor descriptors
(TMA, from compute capability 9.0). KiB from L2: what multiprocessors ask the L2 cache for, for one item. Cells as above, then
the share of the floor that these bytes and the padded products allow **at most**, at the rates of {cards}
([how it is counted](../../counted.py)); **bold**: shipped. `finelip tune` tries these and others on the card.

{cuts}
"""


class Shape(NamedTuple):
    """A model's sizes: ``L`` and ``D`` of its embeddings, and the number of patches of a picture."""

    tokens: int
    width: int
    patches: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.width}"


SHAPES = (Shape(40, 512, 196), Shape(52, 768, 256))  # ViT-B/16, ViT-L/14

# By number of queries and dtype; each is also compiled with tensor descriptors.
CUTS = {
    (1, torch.float16): (
        *((128, 1, 64, 4, 4), (128, 1, 64, 8, 3), (256, 1, 64, 8, 3), (128, 1, 256, 8, 2)),
        *((128, 1, 128, 4, 3), (64, 1, 512, 4, 2), (64, 1, 512, 8, 2)),
    ),
    (1, torch.int8): (
        *((128, 1, 128, 4, 4), (128, 1, 128, 8, 3), (256, 1, 128, 8, 3)),
        *((64, 1, 512, 4, 4), (128, 1, 512, 8, 3)),
    ),
    (8, torch.float16): ((128, 1, 64, 8, 3), (64, 3, 64, 4, 4), (128, 3, 64, 8, 4), (128, 3, 128, 8, 2)),
    (8, torch.int8): (
        *((128, 1, 128, 8, 3), (64, 3, 128, 8, 3), (128, 3, 128, 8, 4)),
        *((64, 3, 512, 4, 4), (128, 3, 512, 8, 2)),
    ),
}


@dataclass(frozen=True)
class Case:
    """An operation that launches kernels, on the ``meta`` device."""

    name: str
    package: str
    shape: Shape
    run: Callable[[], object]
    dtype: torch.dtype = torch.float16


# The cases ------------------------------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a tensor that has a shape but no data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def our_cases(capability: int) -> Iterator[Case]:
    for shape in SHAPES:
        for n_queries in (1, 8):
            for dtype in (torch.float16, torch.int8):
                yield Case(f"clim, Q={n_queries}", OURS, shape, partial(search, shape, n_queries, dtype), dtype)
        yield Case("clim, training", OURS, shape, partial(train, shape))
        yield Case("atrm", OURS, shape, partial(aggregate, shape, capability))
        yield Case("atrm, training", OURS, shape, partial(aggregate_backward, shape, capability), torch.float32)


def search(shape: Shape, n_queries: int, dtype: torch.dtype, settings: ClimSettings | None = None) -> None:
    queries, items = (empty(count, shape.tokens, shape.width, dtype=dtype) for count in (n_queries, ITEMS))
    scales = {}
    if dtype == torch.int8:
        scales["query_scales"] = empty(n_queries, shape.tokens, dtype=torch.float32)
        scales["item_scales"] = empty(ITEMS, shape.tokens, dtype=torch.float32)
    clim.scores(queries, items, alpha=0.8, settings=settings, **scales)


def train(shape: Shape) -> None:
    queries, items = (empty(BATCH, shape.tokens, shape.width) for _ in range(2))
    scores, *winners = clim_gradient.scores_with_winners(queries, items, alpha=0.8)
    clim_gradient.gradient(scores, queries, items, *winners, alpha=0.8)


def aggregate(shape: Shape, capability: int) -> None:
    hidden, aggregated, width = shape.width // 5, shape.tokens - 1, shape.width
    parameters = [(width,), (width,), (hidden, width), (hidden,), (aggregated, hidden), (aggregated,), ()]
    launch = atrm.Launch(capability, width, aggregated, torch.float16, IMAGES)
    inputs = AtrmInputs(
        empty(IMAGES, shape.patches, width),
        *(empty(*sizes) for sizes in parameters),
        lengths=empty(IMAGES, dtype=torch.int64),
        anchor=empty(IMAGES, width),
    )
    atrm.aggregate(inputs, settings=atrm.settings_for(launch))


def aggregate_backward(shape: Shape, capability: int) -> None:
    """Launch only the two kernels; the rest of the gradient is PyTorch's."""
    aggregated, width = shape.tokens - 1, shape.width
    atrm_gradient._through_softmax(
        empty(IMAGES, aggregated + 1, width),
        empty(IMAGES, shape.patches, width, dtype=torch.float32),
        empty(IMAGES, shape.patches, aggregated, dtype=torch.float32),
        empty(IMAGES, dtype=torch.int64),
        atrm_gradient.settings_for(atrm_gradient.Launch(capability, width, aggregated)),
    )


def peer_cases() -> Iterator[Case]:
    with patch.object(peers, "ON_GPU", True):
        searching, training = peers.maxsims(), peers.maxsims(gradient=True)
    for package in searching:
        for shape in SHAPES:
            yield Case("maxsim, Q=8", package, shape, partial(peer_search, searching[package], shape))
            yield Case("maxsim, training", package, shape, partial(peer_train, training[package], shape))


def peer_search(maxsim: peers.MaxSim, shape: Shape) -> None:
    maxsim(empty(8, shape.tokens, shape.width), empty(ITEMS, shape.tokens, shape.width))


def peer_train(maxsim: peers.MaxSim, shape: Shape) -> None:
    queries, items = (empty(BATCH, shape.tokens, shape.width).requires_grad_() for _ in range(2))
    maxsim(queries, items).sum().backward()


# Compiling ------------------------------------------------------------------------------------------------------------


def rows_of(capability: int, with_peers: bool = True) -> list[Row]:
    """Return all rows of one GPU. Runs in a process of its own: peers check the GPU once, on import."""
    # Use the shipped settings, not those that this user's tuning found.
    os.environ["FINELIP_CACHE"] = os.devnull
    # Skip a check of the norms, once per process, that would read the data.
    os.environ["LIK_SUPPRESS_NORM_WARN"] = "1"
    rows: list[Row] = []
    with recorded_launches(capability, GPUS[capability]) as launches:
        for case in (*our_cases(capability), *(peer_cases() if with_peers else ())):
            row = {
                "package": case.package,
                "shape": str(case.shape),
                "dtype": str(case.dtype).removeprefix("torch."),
                "capability": capability,
            }
            launches.clear()
            try:
                case.run()
            except Exception as error:  # a peer may change, or refuse; the row reports it
                rows.append({"kernel": case.name, **row, "error": brief(error)})
            for candidates in launches:
                kernel = f"{case.name}: {candidates[0].kernel.__name__}"
                row_of_kernel = {"kernel": kernel, **row, **compile_best(candidates, capability)}
                if row_of_kernel not in rows:  # a gradient kernel runs once per side
                    rows.append(row_of_kernel)
    return rows


def cuts_of(capability: int) -> list[Row]:
    """Return what each of :data:`CUTS` needs on one GPU, and how many bytes it moves."""
    os.environ["FINELIP_CACHE"] = os.devnull
    shape, *_ = SHAPES
    rows: list[Row] = []
    for (n_queries, dtype), cuts in CUTS.items():
        shipped = default_settings(**Launch(capability, dtype, shape.width, n_queries, shape.tokens)._asdict())
        for cut, descriptor in itertools.product((ClimSettings(*numbers) for numbers in cuts), (False, True)):
            settings = replace(cut, descriptor=descriptor)
            if descriptor and not describes(settings, capability, shape.width):
                continue
            with recorded_launches(capability) as launches:
                search(shape, n_queries, dtype, settings)
            counts = count(launches[0][0].constants, n_queries, dtype)
            rows.append(
                {
                    "queries": n_queries,
                    "dtype": str(dtype).removeprefix("torch."),
                    "cut": asdict(settings),
                    "capability": capability,
                    "shipped": settings == shipped,
                    "l2_bytes": counts.l2,
                    "share_of_floor": counts.share_of_floor(CARDS[capability], dtype),
                    **{
                        name: value
                        for name, value in compile_best(launches[0], capability).items()
                        if name != "settings"
                    },
                }
            )
    return rows


def compile_best(candidates: Sequence[KernelLaunch], capability: int) -> Row:
    """Describe a launch; if there are several candidates, the best one."""
    compiled: list[tuple[KernelLaunch, Compiled]] = []
    error = ""
    for candidate in candidates:
        try:
            compiled.append((candidate, candidate.compile(capability)))
        except Exception as failure:  # Triton raises many types; an autotuner skips it, too
            error = brief(failure)
    if not compiled:
        return {"error": error}
    launch, best = min(compiled, key=lambda of: (not of[1].fits, of[1].spilled_bytes, -of[1].programs_per_sm))
    settings = {name: plain(value) for name, value in launch.constants.items()}
    settings |= {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if len(candidates) > 1:
        fitting = [result for _, result in compiled if result.fits]
        unspilled = sum(result.spilled_bytes == 0 for result in fitting)
        wgmma = sum(result.uses_wgmma for result in fitting)
        settings["note"] = (
            f"best of {len(candidates)} that the package would try: "
            f"{len(fitting)} fit, {unspilled} of these spill nothing, {wgmma} use wgmma"
        )
    return {
        "settings": settings,
        "registers": best.registers,
        "shared_kib": round(best.shared_bytes / 1024, 1),
        "spilled_bytes": best.spilled_bytes,
        "wgmma": best.uses_wgmma,
        "fits": best.fits,
        "programs_per_sm": best.programs_per_sm,
    }


def plain(value: object) -> object:
    """Return a value that JSON supports; a Triton dtype becomes its name."""
    return value if isinstance(value, int | float | str | None) else str(value)


def brief(error: Exception) -> str:
    """Shorten an error to its last line, where compilers state the cause."""
    *_, last = ["", *str(error).strip().splitlines()]
    return f"{type(error).__name__}: {last}"[:200]


def missing() -> list[Row]:
    """Return a row for each peer that is not installed."""
    return [
        {"kernel": "all", "package": package, "shape": "", "error": f"not installed: pip install {package}"}
        for package in (peers.LATE, peers.FLASH)
        if importlib.util.find_spec(package.replace("-", "_")) is None
    ]


# The table ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return GitHub Markdown with a row for each kernel, package and shape, and a column for each GPU.

    A cell holds registers / shared KiB / spilled bytes / programs that run concurrently on one multiprocessor.
    """
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        columns = [row["capability"]] if "capability" in row else GPUS
        line = cells.setdefault((row["kernel"], row["package"], row["shape"], row.get("dtype", "")), {})
        line.update(dict.fromkeys(columns, cell(row)))
    head = ["kernel", "package", "L x D", "dtype", *(f"sm_{capability}" for capability in GPUS)]
    lines = [head, ["---"] * len(head)]
    lines += [[*names, *(line.get(capability, "") for capability in GPUS)] for names, line in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cuts_table(rows: Sequence[Row]) -> str:
    """Return a table with a row for each cut and a column for each GPU."""
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in sorted(rows, key=lambda row: (row["queries"], row["dtype"], [*row["cut"].values()])):
        items, queries, width, warps, stages, descriptor = row["cut"].values()
        cut = f"{items} x {queries}, {width}, {warps}, {stages}{', TMA' if descriptor else ''}"
        names = str(row["queries"]), row["dtype"], cut, f"{row['l2_bytes'] / 1024:.1f}"
        text = cell(row) if "error" in row or not row["fits"] else f"{cell(row)}, {row['share_of_floor']:.0%}"
        cells.setdefault(names, {})[row["capability"]] = f"**{text}**" if row["shipped"] else text
    head = ["queries", "dtype", "cut", "KiB from L2", *(f"sm_{capability}" for capability in GPUS)]
    lines = [head, ["---"] * len(head)]
    lines += [[*names, *(line.get(capability, "") for capability in GPUS)] for names, line in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(row: Row) -> str:
    if "error" in row:
        return str(row["error"]).replace("|", "\\|")
    numbers = " / ".join(str(row[name]) for name in ("registers", "shared_kib", "spilled_bytes", "programs_per_sm"))
    return numbers + (" wgmma" if row["wgmma"] else "") + ("" if row["fits"] else " does not fit")


def page(record: dict[str, Any]) -> str:
    """Format a record as Markdown."""
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items() if version)
    dirty = " with changes" if record["commit"]["dirty"] else ""
    return PAGE.format(
        versions=versions,
        commit=record["commit"]["id"][:10] + dirty,
        table=table(record["rows"]),
        cards=", ".join(card.name for card in CARDS.values()),
        cuts=cuts_table(record["cuts"]),
    )


def recorded_rows(versions: dict[str, str | None]) -> dict[int, list[Row]]:
    """Return the peers' recorded rows by GPU, if the same versions produced them."""
    rows: dict[int, list[Row]] = {}
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    if before.get("versions") == versions and None not in versions.values():
        for row in before["rows"]:
            if row["package"] != OURS:
                rows.setdefault(row["capability"], []).append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compile the peers' kernels again, too")
    options = parser.parse_args()
    versions = record.versions("torch", "triton", peers.LATE, peers.FLASH)
    known = {} if options.again else recorded_rows(versions)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        arguments = [(capability, capability not in known) for capability in GPUS]
        compiled_rows = dict(zip(GPUS, pool.starmap(rows_of, arguments, chunksize=1), strict=True))
        cuts = [row for rows in pool.map(cuts_of, GPUS, chunksize=1) for row in rows]
    rows = [row for capability in GPUS for row in compiled_rows[capability] + known.get(capability, [])]
    compiled = {"commit": record.commit(), "versions": versions, "rows": rows + missing(), "cuts": cuts}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(compiled, indent=1) + "\n", encoding="utf-8")
    OUT.with_name("README.md").write_text(page(compiled), encoding="utf-8")


if __name__ == "__main__":
    main()
