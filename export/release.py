"""Releasing an export: only one that is complete and proven takes its place in a folder, where engines look for it."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finelip_fast._arguments import folder_path
from finelip_fast._files import file_hash, write_error
from finelip_fast.errors import EngineError, FineLIPError, InputError
from finelip_fast.export import parity
from finelip_fast.runtimes.manifest import MANIFEST, Manifest

_NAMES = (MANIFEST, *parity.REPORTS)
_GRAPHS = re.compile(r"(image|image_uint8|text|scorer)\.(onnx|onnx\.data|plan)")


def export_path(out: str | os.PathLike[str], *, keep_failed: bool) -> Path:
    """Return the absolute path of a folder that an export may replace, as it may replace ``failed-…`` beside it.

    Raises:
        InputError: Not the name of a folder, there is a file of that name, or a folder that cannot be read or has contents
            that are not an export's and would be lost.
    """
    folder = Path(os.path.realpath(folder_path("out", out)))
    try:
        _check_replaceable(folder, keep_failed)
    except OSError as error:  # such as a name that is too long
        raise InputError(
            f"expected a folder for the export, got {str(out)!r:.200}: {error.strerror}; give another --out (out=)"
        ) from None
    return folder


def _check_replaceable(folder: Path, keep_failed: bool) -> None:
    for path in (folder, _failed(folder)) if keep_failed else (folder,):
        if path.exists() and not path.is_dir():
            raise InputError(f"expected a folder for the export, got the file {str(path)!r}; give another --out (out=)")
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        foreign = [name for name in names if name not in _NAMES and not _GRAPHS.fullmatch(name)]
        if foreign:
            raise InputError(
                f"expected a new folder for the export, an empty one or that of an earlier export, got {str(path)!r}, "
                f"which has other contents ({', '.join(foreign):.80}) and would lose them; move them, or give another --out "
                "(out=)"
            )


def _failed(folder: Path) -> Path:
    """Folder for files that were refused."""
    return folder.with_name(f"failed-{folder.name}")


@contextmanager
def being_written(folder: Path, keep_failed: bool) -> Iterator[Path]:
    """Create a hidden folder that replaces ``folder`` on success; otherwise it is deleted, or kept as ``failed-…``.

    Raises:
        WriteError: The folder cannot be written. Its previous contents are kept.
    """
    # Short, since the folder's own name may have the maximum length.
    partial = folder.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        _take_place(partial, folder)
    except FineLIPError as error:
        if keep_failed and isinstance(error, EngineError):
            shutil.rmtree(_failed(folder), ignore_errors=True)
            with suppress(OSError):
                partial.rename(_failed(folder))
        raise
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _take_place(partial: Path, folder: Path) -> None:
    old = partial.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def finish(partial: Path, report: parity.Report, manifest: Manifest) -> None:
    """Write the report and the manifest.

    Raises:
        EngineError: The report refuses the files; the message gives every reason.
    """
    report.write(partial)
    manifest.write(partial)
    if not report.passed:
        raise EngineError(f"the {manifest.precision} export is refused: {'; '.join(report.failures)}")


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}
