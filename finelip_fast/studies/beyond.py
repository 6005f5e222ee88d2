"""Descriptions longer than the context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from finelip_fast._errors import InputError
from finelip_fast.engines import Engine
from finelip_fast.records import Plot, Record, Table
from finelip_fast.studies.setting import Setting, median_ms, text_to_image
from finelip_fast.tokenizer import encode_batch, expected_truncation


def beyond(engine: Engine, setting: Setting) -> Record:
    """Recall and time of captions that are cut at the context, and of those read in windows.

    Raises:
        InputError: No caption is longer than the context.
    """
    own = engine.config.context_length
    pairs = setting.embed(engine)
    tokens = encode_batch(pairs.captions, 100_000).lengths
    longer = int((tokens > own).sum())
    if not longer:
        raise InputError(
            f"expected captions of more than {own} tokens, the longest of {setting.data} has {tokens.max()}"
        )
    ways: list[tuple[str, dict[str, Any], int]] = [
        ("cut at 77", {"context_length": min(77, own)}, min(77, own)),
        (f"cut at {own}", {}, own),
        ("windows", {"overflow": "window"}, int(tokens.max())),
    ]
    rows: list[dict[str, Any]] = []
    measured = []
    for name, options, most in ways:
        with expected_truncation():
            encode: Callable[[list[str]], Tensor] = partial(engine.embed_texts, **options)
            found = pairs.measure(encode(pairs.captions), engine.alpha)
            one = median_ms(partial(encode, pairs.captions[:1]))
        read = float(tokens.clamp(max=most).sum() / tokens.sum())
        measured.append(found)
        rows.append({"captions are": name, "read (%)": round(100 * read, 1), **found.row(), "1 caption (ms)": one})
    names = [name for name, *_ in ways]
    plots = (Plot("recall", "", "text to image, recall@1 (%)", text_to_image(names, measured)),)
    cut, windows = measured[1].recall("combined"), measured[2].recall("combined")
    finding = (
        f"{longer} of {len(tokens)} captions are longer than {own} tokens. Windows read the rest and take "
        f"{rows[2]['1 caption (ms)'] / rows[1]['1 caption (ms)']:.1f} times as long; combined recall@1 (mean of both "
        f"directions) is {windows:.1f} % with windows, {cut:.1f} % with the rest cut off."
    )
    about = {"data": setting.data, "engine": engine.name, "pairs": len(tokens), "alpha": engine.alpha}
    table = Table("Cut or read in windows", rows)
    return Record("beyond", "Descriptions longer than the context", (table,), plots, about, finding)
