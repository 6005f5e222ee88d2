"""Study of what ATRM and CLIM add to CLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finelip_fast.checkpoint import load
from finelip_fast.encoders import caption_lengths
from finelip_fast.engines import Engine, EngineName, open_engine
from finelip_fast.engines.onnx import OnnxEngine
from finelip_fast.errors import EngineError
from finelip_fast.kernels import clim_scores
from finelip_fast.records import Plot, Record, Series, Table
from finelip_fast.runtimes.manifest import Precision
from finelip_fast.runtimes.onnx import OnnxGraph
from finelip_fast.studies.setting import Setting, median_ms, medians_ms, peak_memory
from finelip_fast.tokenizer import encode_batch, expected_truncation

_BATCH = 64
_CLIP_CONTEXT = 77
_FINELIP = "CLIP + ATRM"
_SIDES = ("image", "text")
_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_RUNTIMES: tuple[EngineName, ...] = ("onnx", "trt")
_EXPORTED: list[tuple[EngineName, Precision]] = [
    (runtime, precision) for runtime in _RUNTIMES for precision in _PRECISIONS
]
_BUILT: tuple[tuple[EngineName, Precision], ...] = (("onnx", "fp32"), ("onnx", "int8"))

Encoder = Callable[[Tensor], Tensor]


class _Run(NamedTuple):
    """A row of the table: a model on an engine, reading ids ``[B, T]``."""

    model: str
    engine: str
    parameters: int
    encode_image: Encoder
    encode_text: Encoder
    ids: Tensor


def overhead(engine: Engine, setting: Setting) -> Record:
    """Measure plain CLIP at 77 tokens and at the full context, and with ATRM, on every available engine, and scores by CLIM.

    Plain CLIP is the same model's towers with only the global features of pictures and captions; there is none for TensorRT,
    whose engines cannot be cut. Memory of an exported engine is the growth of its allocator for the first large batch.

    Raises:
        InputError: The checkpoint has no trained aggregators.
    """
    setting.refuse_untrained(engine)
    model = load(engine.source or None, engine.device)
    pairs = setting.open(engine)
    examples = [pairs[at] for at in range(min(_BATCH, len(pairs)))]
    pixels = engine.preprocess.batch([example.image for example in examples])
    captions = [example.caption for example in examples]

    def ids(context_length: int) -> Tensor:
        with expected_truncation():
            batch = encode_batch(captions, context_length, tokenizer=engine.tokenizer)
        return batch.ids[:, : int(batch.lengths.max())]

    def clip_image(batch: Tensor) -> Tensor:
        tokens: Tensor = model.visual(batch.to(model.device))
        return tokens[:, 0]

    def clip_text(batch: Tensor) -> Tensor:
        tokens, lengths = model.text_tokens(batch.to(model.device))
        return tokens[torch.arange(len(batch)), lengths - 1]

    full_context = model.config.context_length
    short, long = ids(min(full_context, _CLIP_CONTEXT)), ids(full_context)
    towers = _count(model.visual) + _count(model.text)
    aggregators = _count(model.image_aggregator) + _count(model.text_aggregator)
    positions, width = model.text.positional_embedding.shape
    at_77 = towers - max(0, positions - _CLIP_CONTEXT) * width

    def rows_of(name: str, image: Encoder, text: Encoder) -> list[_Run]:
        return [_Run("CLIP", name, at_77, image, text, short), _Run("CLIP", name, towers, image, text, long)]

    runs = rows_of("torch fp32", clip_image, clip_text)
    runs.append(_Run(_FINELIP, "torch fp32", towers + aggregators, model.encode_image, model.encode_text, long))
    for name, precision in _EXPORTED:
        build = setting.build and (name, precision) in _BUILT
        try:
            exported = open_engine(name, engine.source or None, engine.device, precision=precision, build=build)
        except EngineError:
            if build and precision == "fp32":  # int8 cannot run on every processor, nor on a GPU
                raise
            continue
        if isinstance(exported, OnnxEngine):
            graphs = [
                OnnxGraph(clip_alone(exported.export.folder / f"{side}.onnx"), exported.device) for side in _SIDES
            ]
            runs += rows_of(f"{name} {precision}", *graphs)
        runs.append(
            _Run(
                _FINELIP, f"{name} {precision}", towers + aggregators, exported.encode_image, exported.encode_text, long
            )
        )
    with torch.inference_mode():
        memories = [_memory(run, pixels) for run in runs]
        times = _times(runs, pixels, model.config.end_token)
    rows: list[dict[str, Any]] = [
        {
            "model": run.model,
            "tokens": full_context if run.ids is long else min(full_context, _CLIP_CONTEXT),
            "engine": run.engine,
        }
        | {"parameters (M)": round(run.parameters / 1e6, 3), "memory of a batch (MiB)": memory}
        | time
        for run, memory, time in zip(runs, memories, times, strict=True)
    ]
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
        f"{text[2]:.0f} captions a second, from {image[1]:.0f} to {image[2]:.0f} pictures; reading {full_context} tokens in "
        f"place of {_CLIP_CONTEXT} takes CLIP from {text[0]:.0f} to {text[1]:.0f} captions. One caption against "
        f"10,000 pictures takes {scores[1]['CLIM (ms)']:.1f} ms by CLIM, {scores[1]['global (ms)']:.2f} ms by the cosine."
    )
    tables = (Table("Encoding", rows), Table("Scores of one caption", scores))
    about = setting.about(engine, batch=len(captions))
    del about["engine"]  # each row names its own
    return Record("overhead", "What FineLIP adds to CLIP", tables, plots, about, finding)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def clip_alone(path: Path) -> bytes:
    """Cut an exported graph at the global feature: the first of the rows that it concatenates before scaling them."""
    import onnx

    from finelip_fast.runtimes.graph import parse

    graph = onnx.shape_inference.infer_shapes(parse(path.read_bytes(), path.name))
    made_by = {name: node for node in graph.graph.node for name in node.output}
    node = made_by[graph.graph.output[0].name]
    while node.op_type != "Concat":
        node = made_by[node.input[0]]
    feature = node.input[0]
    if feature not in {value.name for value in graph.graph.value_info}:
        # Shapes are not inferred past quantised products, whose results are float32.
        graph.graph.value_info.append(onnx.helper.make_tensor_value_info(feature, onnx.TensorProto.FLOAT, None))
    inputs = [value.name for value in graph.graph.input]
    alone: bytes = onnx.utils.Extractor(graph).extract_model(inputs, [feature]).SerializeToString()
    return alone


def _first(ids: Tensor, end_token: int) -> Tensor:
    """The first caption without padding."""
    return ids[:1, : int(caption_lengths(ids[:1], end_token))]


def _memory(run: _Run, pixels: Tensor) -> float:
    run.encode_image(pixels[:1])
    run.encode_text(run.ids[:1])
    with peak_memory() as memory:
        run.encode_image(pixels)
        run.encode_text(run.ids)
    return round(memory[0], 1)


def _times(runs: list[_Run], pixels: Tensor, end_token: int) -> list[dict[str, float]]:
    """Time all runs, in turns."""
    image = medians_ms([partial(run.encode_image, pixels[:1]) for run in runs])
    text = medians_ms([partial(run.encode_text, _first(run.ids, end_token)) for run in runs])
    images = medians_ms([partial(run.encode_image, pixels) for run in runs], 9)
    texts = medians_ms([partial(run.encode_text, run.ids) for run in runs], 9)
    return [
        {"1 picture (ms)": one_image, "1 caption (ms)": one_text}
        | {"pictures/s": 1e3 * len(pixels) / all_images, "captions/s": 1e3 * len(pixels) / all_texts}
        for one_image, one_text, all_images, all_texts in zip(image, text, images, texts, strict=True)
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
