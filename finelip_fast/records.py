"""Records of studies: tables and plots, with the command, commit and machine that they come from."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finelip_fast._files import write_error, write_text_whole, write_whole
from finelip_fast._markup import in_markdown
from finelip_fast._terminal import printable
from finelip_fast._versions import installed
from finelip_fast.errors import InputError

# An absolute path, at the start of a word or after the colon or equals sign of an option: /home/me/photos
_ABSOLUTE = re.compile(r"""(?<![^\s:='"])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'"]+[/\\])*([^\s/\\:'"]+)[/\\]?""")

_PACKAGES = ("finelip-fast", "torch", "triton", "open_clip_torch", "onnxruntime", "tensorrt", "tensorrt-rtx")

# Distinguishable without colour as well.
_MARKERS, _LINES = "osD^vPX", ("-", "--", "-.", ":")
_MOST_TICKS = 12  # measured values beyond which an axis has round ones instead


def markdown_table(lines: Iterable[list[str]]) -> str:
    """Format the header and the rows as a Markdown table; empty if there are no lines."""
    cells = [[in_markdown(cell) for cell in line] for line in lines]
    cells[1:1] = [["---"] * len(line) for line in cells[:1]]
    return "\n".join("|" + "|".join(line) + "|" for line in cells)


@dataclass(frozen=True)
class Table:
    """Rows with equal keys, which are the columns; a column's name states its unit. There may be no rows."""

    title: str
    rows: list[dict[str, Any]]

    def lines(self) -> Iterator[list[str]]:
        """Yield the header, then each row, as strings; nothing if there are no rows."""
        yield from (list(row) for row in self.rows[:1])
        yield from ([_cell(value) for value in row.values()] for row in self.rows)

    def __str__(self) -> str:
        lines = [[printable(cell) for cell in line] for line in self.lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def markdown(self) -> str:
        return markdown_table(self.lines())


@dataclass(frozen=True)
class Series:
    """One line of a plot: ``y`` over ``x`` (numbers or names), and the interval from ``low`` to ``high`` around it."""

    label: str
    x: list[Any]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Plot:
    """Series over one axis, drawn from zero; names on ``x`` become categories, strings of numbers become numbers."""

    name: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False

    @property
    def alt(self) -> str:
        """Text that stands for the picture."""
        return f"{self.y} by {self.x}" if self.x else f"{self.y}, for each row of the table"


@dataclass(frozen=True)
class Record:
    """The result of a study.

    Attributes:
        name: Stem of the saved files.
        title: Question of the study.
        tables, plots: Measurements.
        settings: Settings of the measurements, as plain values.
        finding: Conclusion in a few sentences.
    """

    name: str
    title: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    settings: dict[str, Any]
    finding: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{table.title}\n{table}" for table in self.tables]
        return "\n\n".join([self.title, *parts, *([self.finding] if self.finding else [])])

    def save(self, folder: str | Path, *, command: str) -> list[Path]:
        """Write ``NAME.json``, ``NAME.md`` and a picture of each plot.

        Args:
            folder: Folder to write to; created if missing.
            command: Command that repeats the study. Of absolute paths, here and in the settings, only the last part is
                written.

        Returns:
            The files.

        Raises:
            InputError: There are plots, but matplotlib is not installed.
            WriteError: A file cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(folder, error) from error
        pictures = _draw_all(self.plots, self.title, folder / self.name)
        source = {
            "command": _without_folders(command),
            **commit(),
            "machine": _machine(),
            "versions": installed(*_PACKAGES),
        }
        source["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        data, page = folder / f"{self.name}.json", folder / f"{self.name}.md"
        settings = {
            name: _without_folders(value) if isinstance(value, str) else value for name, value in self.settings.items()
        }
        values = {**source, **self.to_dict(), "settings": settings}
        _write(data, json.dumps(values, indent=2) + "\n")
        _write(page, self._page(source, settings, pictures))
        return [data, page, *pictures]

    def _page(self, source: dict[str, Any], settings: dict[str, Any], pictures: list[Path]) -> str:
        machine = source["machine"]
        on = ", ".join([*machine["gpus"], machine["cpu"], f"{machine['threads']} threads"])
        state = ", with changes" if source["dirty"] else ""
        commit = f"commit {source['commit'][:10]}{state}, " if source["commit"] else ""
        command = printable(source["command"]).replace("`", "'")
        parts = [
            f"# {in_markdown(self.title)}",
            in_markdown(self.finding),
            f"`{command}` on {on}; PyTorch {source['versions']['torch']}; {commit}{source['date']}. With "
            + "; ".join(in_markdown(f"{name} {value}") for name, value in settings.items())
            + ".",
            *(f"## {in_markdown(table.title)}\n\n{table.markdown()}" for table in self.tables),
            *(f"![{plot.alt}]({path.name})" for plot, path in zip(self.plots, pictures, strict=True)),
        ]  # fmt: skip
        return "\n\n".join(part for part in parts if part) + "\n"


def _write(path: Path, text: str) -> None:
    write_text_whole(path, text)


def _without_folders(text: str) -> str:
    """A command or a setting without the folders of this machine."""
    return _ABSOLUTE.sub(r"\1", text)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def redraw(data: str | Path) -> list[Path]:
    """Draw the pictures of a saved record again, beside it.

    Args:
        data: ``NAME.json`` file that :meth:`Record.save` wrote.

    Returns:
        The pictures.

    Raises:
        InputError: There are plots, but matplotlib is not installed.
        WriteError: A picture cannot be written.
    """
    data = Path(data)
    stored = json.loads(data.read_text(encoding="utf-8"))
    plots = [
        Plot(**values | {"series": tuple(Series(**series) for series in values["series"])})
        for values in stored["plots"]
    ]
    return _draw_all(plots, stored["title"], data.with_suffix(""))


def _draw_all(plots: Iterable[Plot], title: str, stem: Path) -> list[Path]:
    return [_draw(plot, title, stem.with_name(f"{stem.name}-{plot.name}.png")) for plot in plots]


def _draw(plot: Plot, title: str, path: Path) -> Path:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'finelip-fast[plots]'") from None
    points = [_numbers(series.x) for series in plot.series]
    has_names = None in points
    figure = Figure(figsize=(7, 0.5 * len(plot.series[0].x) + 1.5 if has_names else 4.5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    for number, (series, x) in enumerate(zip(plot.series, points, strict=True)):
        error = None
        if series.low is not None and series.high is not None:
            error = [
                [y - low for y, low in zip(series.y, series.low, strict=True)],
                [high - y for y, high in zip(series.y, series.high, strict=True)],
            ]
        style: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "label": series.label, "capsize": 3}
        if has_names or x is None:  # names read from left to right, so they go on the vertical axis
            axes.errorbar(series.y, list(map(str, series.x)), xerr=error, linestyle="none", **style)
        else:
            axes.errorbar(x, series.y, yerr=error, linestyle=_LINES[number % len(_LINES)], **style)
    across, up = (plot.y, plot.x) if has_names else (plot.x, plot.y)
    axes.set(title=title, xlabel=across, ylabel=up)
    # Zero is in sight, so that differences are not exaggerated.
    axes.update_datalim([(0, 0)], updatex=has_names or not plot.log_x, updatey=not has_names)
    axes.autoscale_view()
    if has_names:
        axes.invert_yaxis()
    else:
        values = sorted({0.0, *(value for x in points for value in x or ())})
        if plot.log_x:  # a plain logarithmic axis would leave out zero
            axes.set_xscale("symlog", base=2, linthresh=min((value for value in values if value > 0), default=1))
        if len(values) <= _MOST_TICKS:
            axes.set_xticks(values, labels=[f"{value:g}" for value in values])
    axes.grid(alpha=0.3)
    if any(series.label for series in plot.series):
        axes.legend()
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _numbers(values: list[Any]) -> list[float] | None:
    """Values of an axis as numbers; None if one is a name."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def commit() -> dict[str, Any]:
    """Return the commit of the checkout that contains this file, and whether it has changes; None if there is none."""
    head, status = (
        _git("rev-parse", "HEAD"),
        _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"),
    )
    return {"commit": head, "dirty": bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "python": platform.python_version(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
