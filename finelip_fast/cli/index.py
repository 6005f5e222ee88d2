"""``finelip index``: maintenance of an index, from checking its files to moving it between machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from finelip_fast._json import read_json_lines
from finelip_fast._terminal import printable
from finelip_fast.cli.commands import (
    DTYPES,
    Group,
    ModelOptions,
    alpha_option,
    batch_size_option,
    checkpoint_option,
    decode_memory_option,
    dtype_option,
    engine_option,
    index_option,
    model_options,
    precision_option,
    shows_progress,
    standalone_model_options,
)
from finelip_fast.cli.items import absent_field
from finelip_fast.cli.values import Number, Value
from finelip_fast.errors import InputError, StoreError

_MAX_QUERIES = 1 << 28  # bytes

bits_option = click.option(
    "--bits", type=Number(1, 2), default=1, help="Bits of a sketch for each column of a row: 1, 2."
)


class _Count(Value):
    """A number of items, with an optional unit."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number that ``20000``, ``200k``, ``100M`` or ``1B`` stands for."""
        if isinstance(value, int):
            return value
        units = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
        unit = units.get(value[-1:].lower(), 1)
        try:
            return round(float(value.replace(",", "").replace("_", "") if unit == 1 else value[:-1]) * unit)
        except (ValueError, OverflowError):
            self.refuse("to be a number such as 20000, 200k, 100M or 1B", value, param)


class _Part(Value):
    """One of several equal parts."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return the part's number and the number of parts that ``0/4`` stands for."""
        if isinstance(value, tuple):
            return value
        try:
            number, parts = map(int, value.split("/"))
        except ValueError:
            self.refuse("to be I/N such as 0/4", value, param)
        if not 0 <= number < parts:
            self.refuse("to be I/N with I from 0 to N - 1, such as 0/4", value, param)
        return number, parts


class _KeyValue(Value):
    """A pair such as ``region=eu-west-1``."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Return the key and the value."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals:
            self.refuse("to be KEY=VALUE", value, param)
        return key, text


@click.group(
    cls=Group,
    moved={
        **{name: f"finelip {name}" for name in ("add", "search", "list", "remove", "serve")},
        **dict.fromkeys(("delete", "rm"), "finelip remove"),
        "info": "finelip info --index FOLDER",
        "verify": "finelip index check",
        "ls": "finelip list",
    },
    otherwise="To add the pictures of a folder: finelip add {}",
)
def index() -> None:
    """Check, repair, maintain, tune, copy and move an index."""


@index.command("check")
@index_option
def _check(index: str) -> dict[str, int]:
    """Read a whole index and report any damage."""
    from finelip_fast.info import check_index

    return check_index(index)


@dataclass(frozen=True)
class _Repair:
    """Result of ``finelip index repair``."""

    items: int
    removed: dict[str, str]
    lost: int

    def __str__(self) -> str:
        lines = [f"{self.items:,} items, {len(self.removed):,} removed as damaged"]
        if self.lost:
            lines[0] += f", {self.lost:,} lost"
        return "\n".join([*lines, *(f"  {printable(item)}: {printable(why)}" for item, why in self.removed.items())])


@index.command("repair")
@index_option
@click.option(
    "--restore",
    is_flag=True,
    help="First replace a damaged catalogue with the copy made by the last maintenance; items removed since "
    "then come back.",
)
def _repair(index: str, restore: bool) -> _Repair:
    """Remove damaged items from an index, so that the others can be searched, and recover lost ones."""
    from finelip_fast.index import restore as restore_catalogue
    from finelip_fast.index import stored_index

    if restore:
        restore_catalogue(index)
    opened = stored_index(index, skip_damaged=True)
    removed = opened.repair()
    return _Repair(len(opened), removed, sum(opened.lost().values()))


@dataclass(frozen=True)
class _Maintenance:
    """Result of ``finelip index maintain``."""

    segments_before: int
    segments_after: int
    unreferenced_segments: int
    bytes_freed: int

    def __str__(self) -> str:
        text = f"segments: {self.segments_after:,} (before: {self.segments_before:,})"
        if self.bytes_freed > 0:
            text += f", {self.bytes_freed:,} bytes freed"
        if self.unreferenced_segments:
            remedy = "finelip index repair recovers what only they hold, and removes them"
            text += f"\nsegments that are not in the catalogue: {self.unreferenced_segments:,}; {remedy}"
        return text


@index.command("maintain")
@index_option
def _maintain(index: str) -> _Maintenance:
    """Merge the files of an index into a few without gaps, and delete older versions."""
    from finelip_fast.index import stored_index

    return _Maintenance(**stored_index(index).maintain())


@index.command("snapshot")
@click.argument("out", metavar="OUT")
@index_option
def _snapshot(out: str, index: str) -> str:
    """Copy an index to OUT, a new or empty folder; it can be in use meanwhile."""
    from finelip_fast.index import stored_index

    stored_index(index).snapshot(out)
    return f"{out} is a copy of {index}"


@index.command("move-root")
@click.argument("folder", metavar="FOLDER")
@index_option
def _move_root(folder: str, index: str) -> str:
    """Tell an index where its pictures are now: the ids of its items are relative to FOLDER."""
    from finelip_fast.index import stored_index

    opened = stored_index(index)
    if not os.path.isdir(folder):
        raise InputError(f"expected the folder of the pictures, got {folder!r}: no such folder")
    before = None
    with suppress(StoreError):  # an unreadable root is replaced
        before = opened.root
    opened.root = Path(folder)
    note = "" if before is None else " (unchanged)" if before == opened.root else f" (was {before})"
    return f"root: {opened.root}{note}"


@index.command("field")
@click.argument("field")
@index_option
def _field(field: str, index: str) -> str:
    """Speed up filters on FIELD of the metadata, such as camera or place.city."""
    from finelip_fast.index import stored_index

    opened = stored_index(index)
    opened.speed_up(field)
    note = absent_field(opened, field)
    return f"filters on {field} are fast now" + (f", but {note}" if note else "")


@index.command("faiss")
@index_option
@click.option(
    "--lists", type=int, help="Number of inverted lists.  [default: four times the square root of the number of items]"
)
def _faiss(index: str, lists: int | None) -> str:
    """Speed up the first stage of two-stage search over many millions of items, with faiss."""
    from finelip_fast.index import stored_index

    stored_index(index).build_candidates(lists=lists, progress=shows_progress())
    return f"searches of {index} in two stages start with faiss now; finelip index tune measures them"


@index.command("sketch")
@index_option
@bits_option
def _sketch(index: str, bits: int) -> str:
    """Build a first stage that compares all tokens, at one or two bits per column, and keep it with the index.

    Searches with --mode sketch start with it. Items added later are included.
    """
    from finelip_fast.index import stored_index

    size = stored_index(index).build_sketches(bits=bits)
    return f"{size:,} bytes; searches of {index} with --mode sketch start with them, finelip index tune measures them"


@index.command("tune")
@index_option
@click.option(
    "--queries",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSON Lines of {"text": ..., "id": ...}; the id of the right item is optional.  [default: items of the'
    " index, which rank differently from texts]",
)
@click.option("--agreement", type=float, default=0.99, help="Share of an exact search's best hits to reach.")
@click.option("-k", "k", type=int, default=10, help="Number of hits to compare.")
@click.option("--samples", type=int, default=200, help="Number of queries.")
@alpha_option
@model_options
def _tune(
    index: str,
    queries: Path | None,
    agreement: float,
    k: int,
    samples: int,
    alpha: float | None,
    model: ModelOptions,
) -> dict[str, Any]:
    """Measure what two-stage search loses, with sketches too if there are any, and keep the best choice."""
    from finelip_fast.index import stored_index
    from finelip_fast.index.tune import sample_queries, tune

    answers = None
    if queries is None:
        opened = stored_index(index)
        embeddings = sample_queries(opened, samples)
    else:
        texts, answers = _read_queries(queries, samples)
        retriever = model.open_retriever(index)
        opened, embeddings = retriever.index, retriever.engine.embed_texts(texts)
    tuning, trials = tune(
        opened,
        embeddings,
        answers=answers,
        agreement=agreement,
        k=k,
        alpha=alpha,
        progress=shows_progress(),
    )
    names = {"two-stage": "{} candidates", "sketch": "{} candidates by sketch"}
    tried = {names[trial.mode].format(trial.candidates): trial._asdict() for trial in trials}
    return {"chosen": asdict(tuning), "tried": tried}


@index.command("plan")
@click.option("--items", required=True, type=_Count(), metavar="COUNT", help="Number of items: 20000, 200k, 100M, 1B.")
@click.option("--dtype", type=DTYPES, default="float16", help="Number type to store: float16, int8.")
@click.option("--candidates", type=int, default=400, help="Candidates of a two-stage search.")
@bits_option
@standalone_model_options
def _plan(items: int, dtype: str, candidates: int, bits: int, model: ModelOptions) -> Any:
    """Estimate what an index of a given size takes on this machine."""
    import torch

    from finelip_fast.index.plan import check_plan, measure, plan

    check_plan(items, dtype=dtype, candidates=candidates, bits=bits)
    engine = model.open_engine()
    config = engine.config
    batch = torch.zeros(16, 3, config.image_size, config.image_size)

    def encode_batch() -> int:
        engine.encode_image(batch)
        return len(batch)

    rates = measure(
        config.tokens, config.embed_dim, alpha=engine.alpha, device=engine.device, encode_batch=encode_batch, bits=bits
    )
    return plan(items, config.tokens, config.embed_dim, rates, dtype=dtype, candidates=candidates, bits=bits)


def _store_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add to a command the address of a store and the options to reach it."""
    function = click.option(
        "--storage-option",
        "storage_options",
        type=_KeyValue(),
        multiple=True,
        metavar="KEY=VALUE",
        help="Credential or endpoint, as Lance expects it; can be repeated.  [default: from the environment]",
    )(function)
    return click.argument("uri")(function)


@index.command("push")
@_store_options
@index_option
@click.option("--keep", is_flag=True, help="Keep items in the store that the index lacks.")
def _push(uri: str, storage_options: tuple[tuple[str, str], ...], index: str, keep: bool) -> dict[str, int]:
    """Bring a store on object storage up to date with an index; only differences are sent.

    URI is a Lance table: s3://BUCKET/NAME, gs://, az://, or a path.
    """
    from finelip_fast.index import stored_index
    from finelip_fast.index.remote.lance import LanceStore
    from finelip_fast.index.remote.sync import push

    opened = stored_index(index)
    store = LanceStore(opened.spec, uri, source=opened.source, storage_options=dict(storage_options))
    return push(opened, store, remove=not keep, progress=shows_progress())


@index.command("pull")
@_store_options
@index_option
@click.option("--part", type=_Part(), default="0/1", metavar="I/N", help="Part number I, from 0, of N parts.")
@click.option("--version", type=int, help="Version of the store.  [default: the newest]")
def _pull(
    uri: str,
    storage_options: tuple[tuple[str, str], ...],
    index: str,
    part: tuple[int, int],
    version: int | None,
) -> dict[str, int]:
    """Bring an index up to date with a store or with a part of it; only differences are fetched.

    URI is a Lance table: s3://BUCKET/NAME, gs://, az://, or a path.
    """
    from finelip_fast.index.remote.lance import open_store
    from finelip_fast.index.remote.sync import pull

    store = open_store(uri, storage_options=dict(storage_options), version=version)
    return pull(store, index, part=part, progress=shows_progress())


@index.command("bulk")
@click.argument("folder")
@index_option
@checkpoint_option
@engine_option
@precision_option
@dtype_option
@click.option("--workers", type=int, default=2, help="Number of encoding processes; each loads the model.")
@click.option("--cpus", type=float, default=1, help="CPU cores per worker.")
@click.option("--gpus", type=float, default=0, help="GPUs per worker; at 0.5, two workers share one.")
@batch_size_option
@decode_memory_option
def _bulk(folder: str, index: str, checkpoint: str | None, **options: Any) -> Any:
    """Add the pictures in FOLDER to an index with several workers on Ray."""
    from finelip_fast.distributed import index_images
    from finelip_fast.known_checkpoints import checkpoint_of

    checkpoint = checkpoint or checkpoint_of(index)
    return index_images(folder, index, checkpoint=checkpoint, progress=shows_progress(), **options)


def _read_queries(path: Path, count: int) -> tuple[list[str], list[str] | None]:
    """Read texts, and their answers if all have one."""
    texts: list[str] = []
    answers: list[str | None] = []
    expected = '{"text": ..., "id": ...}'
    for where, query in read_json_lines(path, error=InputError, expected=expected, max_bytes=_MAX_QUERIES):
        if len(texts) == count:
            break
        text, answer = query.get("text"), query.get("id")
        if not isinstance(text, str) or not isinstance(answer, (str, type(None))):
            raise InputError(f"{where}: expected {expected}, got {query!r:.60}")
        texts.append(text)
        answers.append(answer)
    if not texts:
        raise InputError(f"expected queries in {path}, got none")
    known = [answer for answer in answers if answer is not None]
    if known and len(known) < len(answers):
        raise InputError(f"expected an id with every query of {path} or with none, got {len(known)} of {len(answers)}")
    return texts, known or None
