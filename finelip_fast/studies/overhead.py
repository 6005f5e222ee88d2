"""What ATRM and CLIM add to CLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finelip_fast._errors import EngineError
from finelip_fast.checkpoint import load
from finelip_fast.engines import Engine, open_engine
from finelip_fast.kernels import clim_scores
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.studies.setting import Setting, median_ms, medians_ms, peak_memory
from finelip_fast.tokenizer import encode_batch, expected_truncation

_BATCH = 64
_CLIP_CONTEXT = 77
_EXPORTED = (("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"), ("trt", "fp32"), ("trt", "fp16"), ("trt", "int8"))


def overhead(engine: Engine, setting: Setting) -> Record:
    """Plain CLIP at 77 tokens, at the whole context, with ATRM, and scores by CLIM, on every engine that is there.

    CLIP is the same model's towers with the pictures' and captions' global features alone.
    """
    model = load(engine.source or None, engine.device)
    pairs = setting.open(engine)
    examples = [pairs[at] for at in range(min(_BATCH, len(pairs)))]
    pixels = engine.preprocess.batch([example.image for example in examples])
    captions = [example.caption for example in examples]

    def ids(context: int) -> Tensor:
        with expected_truncation():
            batch = encode_batch(captions, context)
        return batch.ids

    def clip_image(batch: Tensor) -> Tensor:
        return model.visual(batch.to(model.device))[:, 0]

    def clip_text(batch: Tensor) -> Tensor:
        tokens, lengths = model.text_tokens(batch.to(model.device))
        return tokens[torch.arange(len(batch)), lengths - 1]

    own = model.config.context_length
    towers = _count(model.visual) + _count(model.text)
    positions = model.text.positional_embedding.shape[1]
    aggregators = _count(model.image_aggregator) + _count(model.text_aggregator)
    stages: list[tuple[str, int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]] = [
        ("CLIP", towers - (own - _CLIP_CONTEXT) * positions, clip_image, clip_text, min(own, _CLIP_CONTEXT)),
        ("CLIP", towers, clip_image, clip_text, own),
        ("CLIP + ATRM", towers + aggregators, model.encode_image, model.encode_text, own),
    ]
    rows: list[dict[str, Any]] = []
    runs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = []
    with torch.inference_mode():
        for name, parameters, encode_image, encode_text, context in stages:
            rows.append(
                {"model": name, "tokens": context, "engine": "torch fp32", "parameters (M)": round(parameters / 1e6, 3)}
                | _memory(encode_image, encode_text, pixels, ids(context))
            )
            runs.append((encode_image, encode_text, ids(context)))
    for name, precision in _EXPORTED:
        try:
            other = open_engine(name, engine.source or None, engine.device, precision=precision)
        except EngineError:
            continue
        rows.append(
            {"model": "CLIP + ATRM", "tokens": own, "engine": f"{name} {precision}"}
            | {"parameters (M)": round((towers + aggregators) / 1e6, 3)}
            | _memory(other.encode_image, other.encode_text, pixels, ids(own))
        )
        runs.append((other.encode_image, other.encode_text, ids(own)))
    with torch.inference_mode():
        for row, times in zip(rows, _times(runs, pixels), strict=True):
            row |= times

    scores = [_score(model.device, count, model.config.tokens, model.config.embed_dim) for count in (1_000, 10_000)]
    labels = [f"{row['model']}, {row['tokens']} tokens, {row['engine']}" for row in rows]
    plots = (
        Plot(
            "throughput",
            "",
            "items/s in batches of 64",
            (
                Series("captions", labels, [row["captions/s"] for row in rows]),
                Series("pictures", labels, [row["pictures/s"] for row in rows]),
            ),
        ),
    )
    text, image = ([row[f"{kind}/s"] for row in rows] for kind in ("captions", "pictures"))
    finding = (
        f"ATRM adds {100 * aggregators / towers:.2f} % of parameters and takes encoding from {text[1]:.0f} to "
        f"{text[2]:.0f} captions a second, from {image[1]:.0f} to {image[2]:.0f} pictures; reading {own} tokens in "
        f"place of {_CLIP_CONTEXT} takes CLIP from {text[0]:.0f} to {text[1]:.0f} captions. One caption against "
        f"10,000 pictures takes {scores[1]['CLIM (ms)']:.1f} ms by CLIM, {scores[1]['global (ms)']:.2f} ms by the cosine."
    )
    tables = (Table("Encoding", rows), Table("Scores of one caption", scores))
    about = setting.about(engine, batch=len(captions))
    return Record("overhead", "What FineLIP adds to CLIP", tables, plots, about, finding)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _memory(
    encode_image: Callable[[Tensor], Tensor], encode_text: Callable[[Tensor], Tensor], pixels: Tensor, ids: Tensor
) -> dict[str, float]:
    encode_image(pixels[:1])
    encode_text(ids[:1])
    with peak_memory() as memory:
        encode_image(pixels)
        encode_text(ids)
    return {"memory of a batch (MiB)": round(memory[0], 1)}


def _times(
    runs: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]], pixels: Tensor
) -> list[dict[str, float]]:
    """Of encoders of pictures and of captions with their ids, all in turns."""
    images = [partial(encode, pixels) for encode, _, _ in runs]
    texts = [partial(encode, ids) for _, encode, ids in runs]
    image = medians_ms([partial(encode, pixels[:1]) for encode, _, _ in runs])
    text = medians_ms([partial(encode, ids[:1]) for _, encode, ids in runs])
    return [
        {"1 picture (ms)": one_image, "1 caption (ms)": one_text}
        | {"pictures/s": 1e3 * len(pixels) / all_images, "captions/s": 1e3 * len(pixels) / all_texts}
        for one_image, one_text, all_images, all_texts in zip(
            image, text, medians_ms(images, 9), medians_ms(texts, 9), strict=True
        )
    ]


def _score(device: torch.device, pictures: int, tokens: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    items, query = (
        nn.functional.normalize(torch.randn(count, tokens, width, generator=generator), dim=-1).to(device)
        for count in (pictures, 1)
    )
    first = items[:, 0].contiguous()
    return {
        "pictures": pictures,
        "global (ms)": median_ms(lambda: query[:, 0] @ first.T),
        "CLIM (ms)": median_ms(lambda: clim_scores(query, items)),
        "global (bytes an item)": 4 * width,
        "CLIM (bytes an item)": 4 * width * tokens,
    }
