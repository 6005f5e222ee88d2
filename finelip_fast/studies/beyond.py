"""Descriptions longer than the context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from finelip_fast.engines import Engine
from finelip_fast.errors import InputError
from finelip_fast.records import Plot, Record, Table
from finelip_fast.studies.setting import Setting, medians_ms, text_to_image
from finelip_fast.tokenizer import encode_batch, expected_truncation


def beyond(engine: Engine, setting: Setting) -> Record:
    """Compare recall and time of captions cut at the context with those of captions read in windows.

    Raises:
        InputError: No caption is longer than the context.
    """
    context = engine.config.context_length
    pairs = setting.embed(engine)
    tokens = encode_batch(pairs.captions, 100_000, tokenizer=engine.tokenizer).lengths
    longer = int((tokens > context).sum())
    if not longer:
        raise InputError(
            f"expected captions of more than {context} tokens, the longest of {setting.data} has {tokens.max()}"
        )
    ways: list[tuple[str, dict[str, Any], int]] = [
        ("cut at 77", {"context_length": min(77, context)}, min(77, context)),
        (f"cut at {context}", {}, context),
        ("windows", {"overflow": "window"}, int(tokens.max())),
    ]
    rows: list[dict[str, Any]] = []
    measured = []
    encoders: list[Callable[[], Tensor]] = []
    longest = [pairs.captions[int(tokens.argmax())]]
    for name, options, most in ways:
        with expected_truncation():
            encode: Callable[[list[str]], Tensor] = partial(engine.embed_texts, **options)
            summary = pairs.measure(encode(pairs.captions), engine.alpha)
        encoders.append(partial(encode, longest))
        share_read = float(tokens.clamp(max=most).sum() / tokens.sum())
        measured.append(summary)
        rows.append({"captions are": name, "read (%)": round(100 * share_read, 1), **summary.row()})
    with expected_truncation():
        for row, milliseconds in zip(rows, medians_ms(encoders), strict=True):
            row["longest caption (ms)"] = milliseconds
    names = [name for name, *_ in ways]
    plots = (Plot("recall", "", "text to image, recall@1 (%)", text_to_image(names, measured)),)
    cut, windows = measured[1].recall(), measured[2].recall()
    finding = (
        f"{longer} of {len(tokens)} captions are longer than {context} tokens. Windows read the rest and take "
        f"{rows[2]['longest caption (ms)'] / rows[1]['longest caption (ms)']:.1f} times as long for the longest; "
        f"{measured[1].main} recall@1 (mean of both "
        f"directions) is {windows:.1f} % with windows, {cut:.1f} % with the rest cut off."
    )
    about = setting.about(engine, pairs=len(tokens))
    table = Table("Cut or read in windows", rows)
    return Record("beyond", "Descriptions longer than the context", (table,), plots, about, finding)
