"""Present recorded results as tables and plots.

``python bench/report.py`` writes, for each folder ``bench/results/MACHINE/``, a ``README.md`` with a table per group of
contenders, and ``roofline.png``; the plots of the studies; and the tables between these marks in the README and ``docs/``::

    <!-- bench MACHINE/FILE.json: GROUP -->
    <!-- /bench -->

    <!-- recall MACHINE/FILE.json -->
    <!-- /recall -->

A contender table covers one group of one file, and therefore one run, whose contenders were timed in turns. A recall table
covers a file with ``rows``, one per context and score.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_report

from finelip_fast.records import redraw

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"

Run = dict[str, Any]  # a file written by pytest-benchmark
Row = dict[str, Any]  # a contender of a run, as recorded by ``contest.py``

# Packages whose versions a record may hold.
PEERS = (
    "late-interaction-kernels",
    "flash-maxsim",
    "open-clip-torch",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "pylance",
    "fast-plaid",
    "infinity-emb",
    "lancedb",
    "qdrant-client",
    "qdrant-edge-py",
    "sentence-transformers",
    "usearch",
)

_DIRECTIONS = (("i2t", "image→text"), ("t2i", "text→image"))

_RECALL_MARK = re.compile(r"(<!-- recall (?P<file>[^\s:]+) -->\n).*?(<!-- /recall -->)", re.DOTALL)
_MARK = re.compile(r"(<!-- bench (?P<file>[^\s:]+): (?P<group>.+?) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def machines() -> list[Path]:
    """Return the folders that contain runs."""
    return sorted(path for path in RESULTS.iterdir() if any(runs(path)))


def runs(folder: Path) -> Iterator[tuple[str, Run]]:
    """Yield a machine's recorded runs by file name, including its GPU days."""
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in run:
            yield path.name, run
    days = gpu_report.days(folder)
    for name, lines in days.items():
        yield name, gpu_report.as_run(lines, gpu_report.peaks(days.values()))


def groups(run: Run) -> dict[str, list[Row]]:
    """Return each group's contenders, fastest first; times are in seconds, ``speedup`` is relative to the baseline."""
    rows_by_group: dict[str, list[Row]] = {}
    for benchmark in run["benchmarks"]:
        row = benchmark["extra_info"] | {"group": benchmark["group"]}
        rows_by_group.setdefault(benchmark["group"], []).append({"p50": benchmark["stats"]["median"]} | row)
    for rows in rows_by_group.values():
        rows.sort(key=lambda row: row["p50"])
        baseline = next((row["p50"] for row in rows if row["contender"] == row["baseline"]), None)
        for row in rows:
            row["speedup"] = None if baseline is None else baseline / row["p50"]
    return rows_by_group


def table(rows: list[Row]) -> str:
    """Format a group as Markdown."""
    columns = {
        "": lambda row: row["contender"],
        "finds the best": lambda row: row.get("answers", ""),
        "median": lambda row: _time(row["p50"]),
        "20th to 80th percentile": lambda row: f"{_time(row['p20'])} to {_time(row['p80'])}" if "p20" in row else "",
        f"speed relative to {rows[0]['baseline']}".removesuffix(" relative to "): lambda row: (
            "" if row["speedup"] is None else f"{row['speedup']:.3g}x"
        ),
        "95th percentile": lambda row: _time(row["p95"]) if "p95" in row else "",
        "99th percentile": lambda row: _time(row["p99"]) if "p99" in row else "",
        "requests a second": lambda row: f"{row['requests_per_second']:.3g}" if "requests_per_second" in row else "",
        "times as long as alone": lambda row: f"{row['loss']:.2f}x" if "loss" in row else "",
        "of the floor": lambda row: f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "",
        "largest error": lambda row: f"{row['max_error']:.1e}" if "max_error" in row else "",
        "recall@1 changes by": lambda row: f"{100 * row['recall_change']:.2g} points" if "recall_change" in row else "",
        "agrees with exact": lambda row: f"{row['agreement']:.1%}" if "agreement" in row else "",
        "agrees with exact, one way": lambda row: (
            f"{row['agreement_one_way']:.1%}" if "agreement_one_way" in row else ""
        ),
        "setting": lambda row: row.get("setting", ""),
        "candidates": lambda row: f"{row['candidates']:,}" if "candidates" in row else "",
        "bytes an item": lambda row: f"{row['item_bytes']:,}" if "item_bytes" in row else "",
        "items a second": lambda row: f"{row['items_per_second']:,.0f}" if "items_per_second" in row else "",
        "scored again": lambda row: f"{row['rescored']:.0f}" if "rescored" in row else "",
        "on disk": lambda row: f"{row['disk_mib']:,.0f} MiB" if "disk_mib" in row else "",
        "in memory": lambda row: f"{row['memory_mib']:,.0f} MiB" if "memory_mib" in row else "",
        "built in": lambda row: _time(row["build_seconds"]) if "build_seconds" in row else "",
        "more memory": lambda row: f"{row['peak_mib']:,.0f} MiB" if "peak_mib" in row else "",
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    lines = ["|".join(filled), "|".join("---" for _ in filled), *map("|".join, zip(*filled.values(), strict=True))]
    return "".join(f"|{line}|\n" for line in lines)


def left_out(run: Run, group: str) -> str:
    """Return the contenders of a group that have no result, and why; empty if there are none."""
    reasons = run.get("left_out", {}).get(group, {})
    return f"\nLeft out: {'; '.join(f'{name} ({reason})' for name, reason in reasons.items())}.\n" if reasons else ""


def recall_table(rows: list[Row]) -> str:
    """Format recall in % by context and score, in both directions, as Markdown."""
    names = {f"{way}_recall@{k}": f"{title} R@{k}" for way, title in _DIRECTIONS for k in (1, 5, 10)}
    lines = [
        ["tokens read", "score", *names.values()],
        ["---"] * (2 + len(names)),
        *([str(row["context_length"]), row["score"], *(f"{100 * row[name]:.1f}" for name in names)] for row in rows),
    ]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def source(run: Run) -> str:
    """Describe where a run was made: hardware, versions, commit."""
    machine, commit = run["machine_info"], run["commit_info"]
    processor = machine.get("cpu", {}).get("brand_raw", machine["machine"])
    hardware = ", ".join(machine["gpus"]) or f"{processor}, {machine['threads']} threads"
    packages = {"PyTorch": "torch", "Triton": "triton"} | {name: name for name in PEERS}
    versions = ", ".join(f"{title} {machine[name]}" for title, name in packages.items() if machine.get(name))
    dirty = " with changes" if commit["dirty"] else ""
    return f"{hardware}; {versions}; commit {commit['id'][:10]}{dirty}, {run['datetime'][:10]}."


def page(folder: Path) -> str:
    """Format all tables of a machine."""
    parts = [f"# {folder.name}\n\nWritten by `python bench/report.py` from the files beside it.\n"]
    if any(_points(run) for _, run in runs(folder)):
        parts.append("![Achieved operations a second over operations a byte](roofline.png)\n")
    days = gpu_report.days(folder)
    for name, run in runs(folder):
        parts.append(f"## {name}\n\n{source(run)}\n")
        parts += [f"### {group}\n\n{table(rows)}{left_out(run, group)}" for group, rows in groups(run).items()]
        parts += [gpu_report.tables(days[name])] if name in days else []
    return "\n".join(parts)


def marked() -> list[Path]:
    """Return the pages that may contain marks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, results: Path = RESULTS) -> str:
    """Return a text with the tables that its marks name.

    Raises:
        KeyError: A mark names a group that its file does not have.
    """

    def read(mark: re.Match[str]) -> Run:
        path = results / mark["file"]
        if path.suffix == ".jsonl":
            return dict(runs(path.parent))[path.name]
        run: Run = json.loads(path.read_text(encoding="utf-8"))
        return run

    def fill(mark: re.Match[str]) -> str:
        run = read(mark)
        group = mark["group"]
        return f"{mark[1]}\n{table(groups(run)[group])}{left_out(run, group)}\n{source(run)}\n\n{mark[4]}"

    def fill_recall(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{recall_table(read(mark)['rows'])}\n{mark[3]}"

    return _RECALL_MARK.sub(fill_recall, _MARK.sub(fill, text))


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


# Roofline ------------------------------------------------------------------------------------------------------------


def _points(run: Run) -> list[Row]:
    return [row for rows in groups(run).values() for row in rows if "flops" in row]


def roofline(folder: Path) -> None:
    """Write ``roofline.png``: each counted contender under the roofs measured on its machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = [(name, run, _points(run)) for name, run in runs(folder)]
    counted = [(name, run, points) for name, run, points in counted if points]
    if not counted:
        return
    figure, panels = pyplot.subplots(1, len(counted), figsize=(6.4 * len(counted), 5), squeeze=False)
    for axes, (name, run, points) in zip(panels[0], counted, strict=True):
        _draw(axes, run, points)
        axes.set_title(name, fontsize="medium")
    figure.suptitle(
        f"{folder.name}: speed beside what the machine can do\nlines: as measured, stars: finelip_fast, dots: the others"
    )
    figure.tight_layout()
    figure.savefig(folder / "roofline.png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Any, run: Run, points: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    peaks = run["machine_info"]["peaks"]
    intensities = [row["flops"] / row["bytes"] for row in points]
    low, high = min(intensities) / 2, max(intensities) * 2
    dtypes = {row["work_dtype"] for row in points}
    for number, (dtype, peak) in enumerate(sorted(peaks["flops/s"].items())):
        if dtype not in dtypes:
            continue
        colour, ridge = f"C{number}", peak / peaks["bytes/s"]
        roof = [(x, min(peak, x * peaks["bytes/s"])) for x in sorted({low, min(max(low, ridge), high), high})]
        axes.plot(*_billions(roof), color=colour, label=dtype)
        for of_ours, marker in ((True, "*"), (False, ".")):
            group_points = [
                (row["flops"] / row["bytes"], row["flops"] / row["p50"])
                for row in points
                if row["work_dtype"] == dtype and row["contender"].startswith("finelip_fast") == of_ours
            ]
            if group_points:
                axes.plot(*_billions(group_points), marker, color=colour, markersize=12 if of_ours else 6, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="billions of operations a second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_formatter(NullFormatter())
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(dtypes), frameon=False)


def _billions(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Convert to operations per byte, and billions of operations per second."""
    return [x for x, _ in points], [y / 1e9 for _, y in points]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and pictures of the recorded runs.")
    parser.parse_args()
    for folder in machines():
        (folder / "README.md").write_text(page(folder), encoding="utf-8")
        roofline(folder)
    for data in sorted((RESULTS / "studies").rglob("*.json")):
        redraw(data)
    for path in marked():
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            path.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
