"""``finelip index bulk | check | maintain | repair | snapshot | field | tune | plan | push | pull``: care for an index."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finelip_fast._files import read_bytes
from finelip_fast._json import parse_json
from finelip_fast.errors import InputError

INDEX_COMMANDS = tuple(
    f"index {name}"
    for name in ("bulk", "check", "maintain", "repair", "snapshot", "field", "faiss", "tune", "plan", "push", "pull")
)

_MAX_QUERIES = 1 << 28  # bytes


def add_commands(add: Callable[..., argparse.ArgumentParser], index: argparse.ArgumentParser, model: Any) -> None:
    """Give the ``finelip`` command those of an index.

    Args:
        add: Makes a command of name, function, description and parent parsers.
        index: Parent of the option ``--index``.
        model: Parent of the options of a model.
    """
    bulk = add("index bulk", _bulk, "Add the pictures of a folder to an index by several workers, on Ray.", index)
    bulk.add_argument("folder", help="folder of pictures, searched with its subfolders")
    bulk.add_argument("--checkpoint", help="folder, file, open_clip:MODEL/WEIGHTS or hub name (default: the index's)")
    bulk.add_argument("--engine", default="auto", help="auto (default), torch, onnx or trt")
    bulk.add_argument("--precision", help="of exported files: fp32, fp16, bf16 or int8; default: the fastest there")
    bulk.add_argument("--dtype", help="how a new index keeps embeddings: float16 (default), or int8, half the size")
    bulk.add_argument("--workers", type=int, default=2, help="processes that encode, each with the model (default: 2)")
    bulk.add_argument("--cpus", type=float, default=1, help="cores of each worker (default: 1)")
    bulk.add_argument(
        "--gpus", type=float, default=0, help="GPUs of each worker; 0.5: two share one (default: the CPU)"
    )
    bulk.add_argument("--batch-size", type=int, default=64, help="pictures at once (default: 64)")
    add("index check", _check, "Read all of an index again and say what is damaged.", index)
    add("index maintain", _maintain, "Put an index in order: few files without gaps. Older versions go.", index)
    repair = add(
        "index repair",
        _repair,
        "Take damaged items out of an index, so that the others can be searched, and take lost ones back.",
        index,
    )
    repair.add_argument(
        "--restore",
        action="store_true",
        help="first put the copy of the last upkeep in the place of a damaged catalogue; what was deleted since comes back",
    )
    snapshot = add("index snapshot", _snapshot, "Copy an index as it is now, while others may use it.", index)
    snapshot.add_argument("out", help="folder to write, new or empty")
    field = add("index field", _field, "Make filters fast that compare a field of the metadata.", index)
    field.add_argument("field", help="its name, as in an expression: camera, place.city")

    faiss = add(
        "index faiss", _faiss, "Make the first stage of two fast for many millions of items, with faiss.", index
    )
    faiss.add_argument("--lists", type=int, help="of the inverted file (default: four times the root of the items)")

    tune = add("index tune", _tune, "Measure what a search in two stages loses, and keep the choice.", index, model)
    tune.add_argument(
        "--queries",
        type=Path,
        help='JSON lines of {"text": ..., "id": ...}, the id of the right item optional; default: items of the index, which '
        "search unlike texts do",
    )
    tune.add_argument("--agreement", type=float, default=0.99, help="wanted share of the exact best (default: 0.99)")
    tune.add_argument("-k", type=int, default=10, help="hits to compare (default: 10)")
    tune.add_argument("--samples", type=int, default=200, help="queries (default: 200)")
    tune.add_argument("--alpha", type=float, help="weight of the global score (default: the checkpoint's)")

    plan = add("index plan", _plan, "What an index of so many items takes on this machine, before it is made.", model)
    plan.add_argument("--items", required=True, type=_count, help="how many: 20000, 200k, 100M, 1B")
    plan.add_argument("--dtype", default="float16", help="how embeddings are kept: float16 (default) or int8")
    plan.add_argument("--candidates", type=int, default=400, help="of a search in two stages (default: 400)")

    store = argparse.ArgumentParser(add_help=False)
    store.add_argument("uri", help="of the store, a Lance table: s3://BUCKET/NAME, gs://, az://, or a path")
    store.add_argument(
        "--storage-option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="credentials or endpoint, as Lance takes them; may be given more than once (default: from the environment)",
    )
    push = add(
        "index push", _push, "Make a store on object storage what an index is; sends what differs.", store, index
    )
    push.add_argument("--keep", action="store_true", help="leave in the store what the index lacks")
    pull = add(
        "index pull", _pull, "Make an index what a store is, or a part of it; fetches what differs.", store, index
    )
    pull.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="of N parts the one of number I, from 0"
    )
    pull.add_argument("--version", type=int, help="of the store (default: the newest)")


def _bulk(options: argparse.Namespace) -> Any:
    from finelip_fast.distributed import index_images
    from finelip_fast.known_checkpoints import checkpoint_of

    return index_images(
        options.folder,
        options.index,
        checkpoint=options.checkpoint or checkpoint_of(options.index) or None,
        engine=options.engine,
        precision=options.precision,
        dtype=options.dtype,
        workers=options.workers,
        cpus=options.cpus,
        gpus=options.gpus,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )


def _check(options: argparse.Namespace) -> dict[str, int]:
    from finelip_fast.info import check_index

    return check_index(options.index)


def _maintain(options: argparse.Namespace) -> dict[str, int]:
    from finelip_fast.index import stored_index

    return stored_index(options.index).maintain()


def _repair(options: argparse.Namespace) -> dict[str, Any]:
    from finelip_fast.index import restore, stored_index

    if options.restore:
        restore(options.index)
    index = stored_index(options.index, skip_damaged=True)
    removed = index.repair()
    return {"items": len(index), "removed": removed, "lost": sum(index.lost().values())}


def _snapshot(options: argparse.Namespace) -> str:
    from finelip_fast.index import stored_index

    stored_index(options.index).snapshot(options.out)
    return f"{options.out} is a copy of {options.index}"


def _field(options: argparse.Namespace) -> str:
    from finelip_fast.index import stored_index

    stored_index(options.index).speed_up(options.field)
    return f"filters on {options.field} are fast now"


def _faiss(options: argparse.Namespace) -> str:
    from finelip_fast.index import stored_index

    stored_index(options.index).build_candidates(lists=options.lists, progress=not options.quiet)
    return f"searches of {options.index} in two stages start with faiss now; finelip index tune measures them"


def _tune(options: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from finelip_fast.index import stored_index
    from finelip_fast.index.tune import sample_queries, tune

    answers = None
    if options.queries is None:
        index = stored_index(options.index)
        queries = sample_queries(index, options.samples)
    else:
        from finelip_fast.known_checkpoints import checkpoint_of
        from finelip_fast.retriever import Retriever

        texts, answers = _read_queries(options.queries, options.samples)
        retriever = Retriever(
            options.checkpoint or checkpoint_of(options.index) or None,
            engine=options.engine,
            precision=options.precision,
            device=options.device,
            index=options.index,
        )
        index = retriever.index
        queries = retriever.engine.embed_texts(texts)
    tuning, trials = tune(
        index,
        queries,
        answers=answers,
        agreement=options.agreement,
        k=options.k,
        alpha=options.alpha,
        progress=not options.quiet,
    )
    return {"chosen": asdict(tuning), "tried": {f"{trial.candidates} candidates": trial._asdict() for trial in trials}}


def _read_queries(path: Path, count: int) -> tuple[list[str], list[str] | None]:
    """Texts, and their answers if all have one."""
    texts: list[str] = []
    answers: list[str | None] = []
    try:
        lines = read_bytes(path, error=InputError, max_bytes=_MAX_QUERIES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"cannot read the queries {path}: expected UTF-8, {error.reason} at byte {error.start}"
        ) from None
    for number, line in enumerate(lines, start=1):
        if len(texts) == count:
            break
        where, expected = f"{path}, line {number}", '{"text": ..., "id": ...}'
        query = parse_json(line, where, error=InputError, expected=expected, kind=dict)
        text, answer = query.get("text"), query.get("id")
        if not isinstance(text, str) or not isinstance(answer, (str, type(None))):
            raise InputError(f"{where}: expected {expected}, got {line:.60}")
        texts.append(text)
        answers.append(answer)
    if not texts:
        raise InputError(f"expected queries in {path}, got none")
    known = [answer for answer in answers if answer is not None]
    if known and len(known) < len(answers):
        raise InputError(f"expected an id with every query of {path} or with none, got {len(known)} of {len(answers)}")
    return texts, known or None


def _plan(options: argparse.Namespace) -> Any:
    import torch

    from finelip_fast.engines import open_engine
    from finelip_fast.index.plan import measure, plan

    engine = open_engine(options.engine, options.checkpoint, options.device, precision=options.precision)
    config = engine.config
    batch = torch.zeros(16, 3, config.image_size, config.image_size)

    def encode_batch() -> int:
        engine.encode_image(batch)
        return len(batch)

    rates = measure(
        config.tokens, config.embed_dim, alpha=engine.alpha, device=engine.device, encode_batch=encode_batch
    )
    return plan(
        options.items, config.tokens, config.embed_dim, rates, dtype=options.dtype, candidates=options.candidates
    )


def _push(options: argparse.Namespace) -> dict[str, int]:
    from finelip_fast.index import stored_index
    from finelip_fast.index.remote.lance import LanceStore
    from finelip_fast.index.remote.sync import push

    index = stored_index(options.index)
    store = LanceStore(index.spec, options.uri, source=index.source, storage_options=dict(options.storage_option))
    return push(index, store, remove=not options.keep, progress=not options.quiet)


def _pull(options: argparse.Namespace) -> dict[str, int]:
    from finelip_fast.index.remote.lance import open_store
    from finelip_fast.index.remote.sync import pull

    store = open_store(options.uri, storage_options=dict(options.storage_option), version=options.version)
    return pull(store, options.index, part=options.part, progress=not options.quiet)


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def _part(text: str) -> tuple[int, int]:
    try:
        number, parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N such as 0/4, got {text!r}") from None
    return number, parts


def _count(text: str) -> int:
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    try:
        return round(float(text.replace(",", "").replace("_", "") if unit == 1 else text[:-1]) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 20000, 200k, 100M or 1B, got {text!r}") from None
