"""Convert results of ``gpu_day.py`` to the form of the other records: races as contenders, the rest as separate tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# Steps by the content of their lines: contenders that are all ours, verdicts, settings, tests.
_OURS = ("headline", "headline-tuned", "search")
_VERDICTS, _SWEEP, _TESTS = "kernels", "sweep", ("tests", "index-of-60-gb")


def days(folder: Path) -> dict[str, list[Line]]:
    """Return the GPU days recorded in a folder, by file name."""
    lines_by_name = {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }
    return {name: lines for name, lines in lines_by_name.items() if lines and lines[0].get("step") == "machine"}


def peaks(all_days: Iterable[Sequence[Line]]) -> dict[str, Any]:
    """Return the highest rates measured on the machine on any day."""
    bytes_per_second, flops = 0.0, dict[str, float]()
    for lines in all_days:
        for line in lines:
            bytes_per_second = max(bytes_per_second, line.get("bytes/s", 0.0))
            for dtype, rate in line.get("flops/s", {}).items():
                flops[dtype] = max(flops.get(dtype, 0.0), rate)
    return {"bytes/s": bytes_per_second, "flops/s": flops}


def as_run(lines: Sequence[Line], rates: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a day to the format of pytest-benchmark, with shares of the floor at these rates.

    Args:
        lines: The lines of ``results.jsonl``.
        rates: Rates from :func:`peaks`.
    """
    machine = lines[0]
    benchmarks = []
    for line in lines:
        if "p50" not in line:
            continue
        info = {name: value for name, value in line.items() if name not in ("step", "race")}
        if "bytes" in info:
            floor = max(info["bytes"] / rates["bytes/s"], info["flops"] / rates["flops/s"][info["work_dtype"]])
            info["share_of_floor"] = floor / info["p50"]
        if line["step"] in _OURS:
            info["contender"] = f"finelip_fast, {info['contender']}"
        group = f"{line['step']}: {line['race']}"
        benchmarks.append({"group": group, "stats": {"median": line["p50"]}, "extra_info": {"baseline": "", **info}})
    return {
        "machine_info": {**machine, "machine": "", "gpus": [machine.get("gpu", "no GPU")], "peaks": rates},
        "commit_info": machine["commit"],
        "datetime": machine.get("date", ""),
        "benchmarks": benchmarks,
    }


def tables(lines: Sequence[Line]) -> str:
    """Format verdicts, tests and the sweep as Markdown."""
    parts = []
    verdicts = [line for line in lines if line["step"] == _VERDICTS and "kernel" in line]
    if verdicts:
        rows = [[v["kernel"], f"{v['error']:.1e}", f"{v['allowed']:.1e}", v["wrong"] or "right"] for v in verdicts]
        parts.append("### Kernels against float64\n\n" + _table(["kernel", "error", "allowed", "verdict"], rows))
    for line in lines:
        if line["step"] in _TESTS and "summary" in line:
            failed = "".join(f"- `{name}`\n" for name in line["failed"])
            parts.append(
                f"### {line['step'].capitalize()}\n\n{line['summary'].strip('= ')}\n"
                + (f"\n{failed}" if failed else "")
            )
    swept = [line for line in lines if line["step"] == _SWEEP and "case" in line]
    if swept:
        rows = [
            [
                line["case"],
                ", ".join(f"{name} {value}" for name, value in line["settings"].items()),
                f"{line['speedup']:.2f}x",
            ]
            for line in swept
        ]
        parts.append(
            "### Sweep of launch settings\n\n" + _table(["case", "fastest", "speed relative to the defaults"], rows)
        )
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"|{'|'.join(row)}|\n" for row in (head, ["---"] * len(head), *rows))
