"""Encoding by each engine at ViT-B/16's sizes, with random weights, against open_clip's eager encoders and the same weights.

Captions are those of Scenes' test set, of similar length, or cut to mixed lengths; pictures are noise. open_clip encodes all
256 positions; the plain module and exports encode up to the longest caption of the batch; the PyTorch engine on a CPU encodes
only each caption's own tokens. Embeddings are compared by their global rows, the only ones that open_clip has. The quality
loss of int8 and bfloat16 is measured with trained weights: by the parity gate, with the bundled model (``recall_change``).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baselines import in_open_clip
from contest import Contender, Result, clock, compete
from inputs import DEVICE, ON_GPU
from torch import Tensor

import finelip_fast
from finelip_fast.datasets import Scenes
from finelip_fast.encoders import caption_lengths
from finelip_fast.export import graphs, parity, quantize
from finelip_fast.export.plans import Builder, build_plan
from finelip_fast.export.precision import in_half
from finelip_fast.export.to_trt import input_shapes, profile_batches
from finelip_fast.frozen import freeze, why_not
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.model import FineLIP
from finelip_fast.runtimes import onnx, trt
from finelip_fast.runtimes.onnx import OnnxGraph
from finelip_fast.tokenizer import encode_batch

BATCHES = (1, 32)
ROUNDS = 20 if ON_GPU else 7
BASELINE = "open_clip"
PAIRS = "scenes:test:1000"

# ONNX Runtime and TensorRT by precision, with the largest error of an entry that still counts as right.
PRECISIONS = {"fp32": 1e-4, "int8": 5e-2} if not ON_GPU else {"fp32": 1e-4, "fp16": 5e-3}
PLAIN = "torch float16" if ON_GPU else "plain module"
# The PyTorch engine on a CPU, by precision; on a GPU it runs the plain module.
FROZEN: dict[str, LinearPrecision] = {"torch float32": "fp32", "torch bfloat16": "bf16", "torch int8": "int8"}
FROZEN = {} if ON_GPU else FROZEN
LIMITS = {"fp32": 1e-5, "bf16": 5e-2, "int8": 5e-2}
CONTENDERS = (
    BASELINE,
    PLAIN,
    *FROZEN,
    "torch.compile",
    *(f"{name} {p}" for name in ("onnx", "trt") for p in PRECISIONS),
)


@cache
def model() -> FineLIP:
    torch.manual_seed(0)
    return FineLIP(finelip_fast.FineLIPConfig.preset("ViT-B-16")).eval().requires_grad_(False)


@cache
def open_clip_model() -> Any:
    return in_open_clip(model()).to(DEVICE, torch.float16 if ON_GPU else torch.float32)


@cache
def batch(kind: str, size: int) -> Tensor:
    """Return pixels, ids of captions of medium length, or ids of captions cut to lengths from 4 words to all of them."""
    if kind == "pictures":
        side = model().config.image_size
        return torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(1))
    captions = [scene.caption for scene in Scenes("test", 101)]
    if kind == "mixed captions":
        words = [caption.split() for caption in captions[:size]]
        shares = torch.linspace(0, 1, size + 2)[1:-1].tolist()  # half, for a single caption
        captions = [" ".join(w[: 4 + round(share * (len(w) - 4))]) for w, share in zip(words, shares, strict=True)]
        return encode_batch(captions).ids[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    ids = encode_batch(captions).ids
    order = caption_lengths(ids).argsort()
    return ids[order[50 - size // 2 : 50 - size // 2 + size]]


def up_to_the_longest(encode: Callable[[Tensor], Tensor], step: int = 1) -> Callable[[Tensor], Tensor]:
    """Wrap an encoder so that captions are padded as engines do for exported files."""

    def run(ids: Tensor) -> Tensor:
        longest = int(caption_lengths(ids).max())
        return encode(ids[:, : min(-(-longest // step) * step, ids.shape[1])])

    return run


@cache
def exported(kind: str, runtime: str, precision: str) -> Callable[[Tensor], Tensor]:
    """Export the model's graph and open it in the runtime."""
    name = "image" if kind == "pictures" else "text"
    proto = graphs.build(model(), name)
    proto = quantize.by_rows(proto) if precision == "int8" else proto
    proto = in_half(proto, precision) if precision in ("fp16", "bf16") else proto
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        graphs.write(proto, path)
        if runtime == "onnx":
            encode: Callable[[Tensor], Tensor] = OnnxGraph(path, torch.device(DEVICE))
        else:
            shapes = input_shapes(name, model().config, profile_batches("1,8,32"))
            plan = build_plan(path, shapes, trt.machine(), Builder(), progress=False)
            path.with_suffix(".plan").write_bytes(plan)
            encode = trt.TrtPlan(path.with_suffix(".plan"), torch.device(DEVICE))
    return encode if kind == "pictures" else up_to_the_longest(encode, 32 if ON_GPU else 1)


def in_export(kind: str, runtime: str, precision: str, x: Tensor) -> Tensor:
    return exported(kind, runtime, precision)(x)


@cache
def frozen(precision: LinearPrecision) -> FineLIP:
    return freeze(copy.deepcopy(model()), precision)


def in_frozen(kind: str, precision: LinearPrecision, x: Tensor) -> Tensor:
    encoders = frozen(precision)
    return (encoders.encode_image if kind == "pictures" else encoders.encode_text)(x)


def in_torch(kind: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    eager = in_eager()
    encode = eager.encode_image if kind == "pictures" else eager.encode_text
    if compiled:
        encode = torch.compile(encode, dynamic=False)
        encode = encode if kind == "pictures" else up_to_the_longest(encode)
    return lambda x: encode(x.to(DEVICE, eager.dtype if kind == "pictures" else None))


@cache
def in_eager() -> FineLIP:
    return copy.deepcopy(model()).to(DEVICE, torch.float16 if ON_GPU else torch.float32)


@cache
def race(kind: str, size: int) -> dict[str, Result]:
    x = batch(kind, size)
    reference = open_clip_model()
    encode = reference.encode_image if kind == "pictures" else reference.encode_text
    dtype = next(reference.parameters()).dtype
    ways: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        BASELINE: (
            lambda x: encode(x.to(DEVICE, dtype if kind == "pictures" else None), normalize=True)[:, None],
            1e-4,
        ),
        PLAIN: (in_torch(kind, compiled=False), 1e-4),
        "torch.compile": (in_torch(kind, compiled=True), 1e-4),
    }
    for name, precision in FROZEN.items():
        if why_not(precision) is None:
            ways[name] = partial(in_frozen, kind, precision), LIMITS[precision]
    if ON_GPU:
        ways = {name: (way, PRECISIONS["fp16"]) for name, (way, _) in ways.items()}
    for runtime, why in (("onnx", onnx.why_not()), ("trt", trt.why_not())):
        if why is None and (runtime == "trt" or not ON_GPU or onnx.has_cuda()):
            ways |= {f"{runtime} {p}": (partial(in_export, kind, runtime, p), limit) for p, limit in PRECISIONS.items()}
    judge = model()
    with torch.inference_mode():
        expected = (judge.encode_image if kind == "pictures" else judge.encode_text)(x)[:, 0].double()
        # Results are moved back to the CPU; the first row of each embedding is compared.
        contenders = {
            name: Contender(partial(way, x), limit, answer=lambda rows: F.normalize(rows[:, 0].float().cpu(), dim=-1))
            for name, (way, limit) in ways.items()
        }
        results = compete(contenders, expected, rounds=ROUNDS)
    for name, result in results.items():
        if name.startswith("onnx") and not ON_GPU:
            result.info["recall_change"] = recall_change(name.split()[1])
        if FROZEN.get(name, "fp32") != "fp32":
            result.info["recall_change"] = frozen_recall_change(FROZEN[name])
    return results


@cache
def frozen_recall_change(precision: LinearPrecision) -> float:
    bundled = freeze(finelip_fast.load(), precision)
    return proven(parity.Encoders(bundled.encode_image, bundled.encode_text), precision)


@cache
def recall_change(precision: str) -> float:
    bundled = finelip_fast.load()
    run, protos = {}, {}
    for name in ("image", "text"):
        proto = graphs.build(bundled, name)
        protos[name] = quantize.by_rows(proto) if precision == "int8" else proto
        run[name] = OnnxGraph(protos[name].SerializeToString(), torch.device("cpu"))
    return proven(parity.Encoders(run["image"], run["text"], graphs=protos), precision)


def proven(encoders: parity.Encoders, precision: str) -> float:
    """Return the change of the bundled model's recall@1, the larger of both directions, on all of Scenes' test set."""
    report = parity.prove(parity.Reference(finelip_fast.load(), PAIRS, progress=False), encoders, precision)
    assert report.passed, report.failures
    return next(check.value for check in report.checks if check.name == "ranking: recall@1")


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("kind", ["pictures", "captions", "mixed captions"])
def test_encoding(benchmark: Any, kind: str, size: int, contender: str) -> None:
    benchmark.extra_info.update(model="ViT-B-16", batch=size)
    if kind != "pictures":
        lengths = caption_lengths(batch(kind, size))
        benchmark.extra_info |= {"tokens": int(lengths.max()), "all_tokens": int(lengths.sum())}
    group = f"{size} {kind if size > 1 else kind[:-1]}, ViT-B/16"
    clock.into(benchmark, race(kind, size), contender, group=group, baseline=BASELINE)
