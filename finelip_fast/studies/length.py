"""Recall and encoding cost by how much of a description is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from finelip_fast.engines import Engine
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.setting import Measured, Setting, medians_ms, peak_memory, text_to_image
from finelip_fast.tokenizer import encode_batch, expected_truncation

_CONTEXTS = (77, 128, 192, 256)
_BATCH = 64


def length(engine: Engine, setting: Setting) -> Record:
    """Measure recall at 77, 128, 192 and 256 tokens, at the model's context, and in windows if captions are longer."""
    full_context = engine.config.context_length
    pairs = setting.embed(engine)
    tokens = encode_batch(pairs.captions, 100_000, tokenizer=engine.tokenizer).lengths
    settings: list[tuple[str, dict[str, Any]]] = [
        (str(context), {"context_length": context})
        for context in sorted({*_CONTEXTS, full_context})
        if context <= full_context
    ]
    if (tokens > full_context).any():
        settings.append(("windows", {"overflow": "window"}))
    rows: list[dict[str, Any]] = []
    measured: list[Measured] = []
    encoders: list[Callable[[list[str]], Tensor]] = []
    batch_captions = pairs.captions[:_BATCH]
    middling = [pairs.captions[int(tokens.argsort()[len(tokens) // 2])]]  # of median length
    for name, options in settings:
        with expected_truncation():
            summary = pairs.measure(engine.embed_texts(pairs.captions, batch_size=_BATCH, **options), engine.alpha)
            encode: Callable[[list[str]], Tensor] = partial(engine.embed_texts, batch_size=_BATCH, **options)
            with peak_memory() as memory:
                encode(batch_captions)
        encoders.append(encode)
        tokens_read = tokens.clamp(max=options.get("context_length", int(tokens.max())))
        measured.append(summary)
        rows.append(
            {"tokens": name, "read (%)": round(100 * float(tokens_read.sum() / tokens.sum()), 1), **summary.row()}
            | {"memory of 64 (MiB)": round(memory[0], 1)}
        )
    with expected_truncation():
        ones = medians_ms([partial(encode, middling) for encode in encoders])
        batches = medians_ms([partial(encode, batch_captions) for encode in encoders], 9)
    for row, milliseconds, batch in zip(rows, ones, batches, strict=True):
        row |= {"1 caption (ms)": milliseconds, "captions/s": 1e3 * len(batch_captions) / batch}
    names = [name for name, _ in settings]
    speed = Series("batches of 64", names, [row["captions/s"] for row in rows])
    plots = (
        Plot("recall", "tokens read", "text to image, recall@1 (%)", text_to_image(names, measured)),
        Plot("speed", "tokens read", "captions/s", (speed,)),
    )
    first, last = measured[0], measured[-1]
    finding = (
        f"Reading {names[-1]} instead of {names[0]} tokens takes {last.main} recall@1 (mean of both directions) "
        f"from {first.recall():.1f} to {last.recall():.1f} %, and encodes {rows[-1]['captions/s']:.0f} "
        f"instead of {rows[0]['captions/s']:.0f} captions a second. {_better(last)}"
    )
    about = setting.about(engine, pairs=len(pairs.captions))
    return Record("length", "What more tokens are worth", (Table("Recall and cost", rows),), plots, about, finding)


def _better(measured: Measured) -> str:
    if measured.main == "global":
        return "The aggregators of this checkpoint are untrained: there is no late interaction."
    fine, combined = measured.recall("fine"), measured.recall("combined")
    return (
        f"At the longest, late interaction alone reaches {fine:.1f} %, "
        f"the global cosine alone {measured.recall('global'):.1f} %"
        + (": the combined score is not the best of the three." if fine > combined else ".")
    )
