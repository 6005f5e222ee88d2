"""``finelip export onnx`` and ``finelip export trt``: encoders as files for other runtimes."""

from __future__ import annotations

from typing import Any

import click

from finelip_fast.cli.commands import PRECISIONS, Group, Several, is_quiet
from finelip_fast.cli.values import OneOf

_RENAMED = {"--pairs": "--data"}

_checkpoint_argument = click.argument("checkpoint", required=False)
_out_option = click.option(
    "--out", metavar="FOLDER", help="Folder to write.  [default: beside the checkpoint, where engines look]"
)
_data_option = click.option(
    "--data",
    help="Pairs to compare the files with the model on.  [default: those of an existing export, or scenes:test:200]",
)
_keep_failed_option = click.option(
    "--keep-failed", is_flag=True, help="Keep files that fail the comparison, in a folder named failed-… beside it."
)
_again_option = click.option(
    "--again", is_flag=True, help="Export again even if a proven export with these options exists."
)


@click.group(cls=Group)
def export() -> None:
    """Export the encoders of a checkpoint to another runtime, and compare them with the model."""


@export.command("onnx", renamed=_RENAMED)
@_checkpoint_argument
@click.option(
    "--precision",
    cls=Several,
    type=PRECISIONS,
    default=("fp32",),
    help="Precisions to export: fp32, fp16, bf16, int8, int8-calibrated.",
)
@_out_option
@click.option("--opset", type=int, default=20, help="Version of the ONNX operator set.")
@click.option("--uint8", is_flag=True, help="Also write a graph that takes uint8 pixels and normalises them itself.")
@click.option("--scorer", is_flag=True, help="Also write a graph from embeddings to scores.")
@_data_option
@click.option(
    "--calibration",
    metavar="DATA",
    help="Pairs to calibrate int8-calibrated on.  [default: those of an existing export, or scenes:val:64]",
)
@_keep_failed_option
@_again_option
def _onnx(checkpoint: str | None, **options: Any) -> Any:
    """Write image.onnx and text.onnx for ONNX Runtime.

    CHECKPOINT is a folder, a file, open_clip:MODEL/WEIGHTS or a hub name; without it, the bundled one.
    """
    from finelip_fast.export.to_onnx import run

    return run(checkpoint, **options, progress=not is_quiet())


@export.command("trt", renamed=_RENAMED)
@_checkpoint_argument
@click.option(
    "--precision",
    type=OneOf("fp16", "bf16", "fp32", "int8"),
    default="fp16",
    help="Precision of the plans: fp16, bf16, fp32, int8.",
)
@click.option(
    "--profile",
    type=OneOf("latency", "throughput", closed=False),
    default="latency",
    help="Batch sizes to build for: latency, throughput, or 1,OPT,MAX.",
)
@click.option(
    "--compute-capability", metavar="8.9", help="Compute capability of the GPU to build for.  [default: the GPU here]"
)
@_out_option
@click.option(
    "--workspace", type=int, metavar="MIB", help="Maximum workspace memory of a layer.  [default: all there is]"
)
@click.option("--version-compatible", is_flag=True, help="Build plans that later versions of TensorRT can read, too.")
@click.option(
    "--hardware-compatible", is_flag=True, help="Build plans for every GPU of capability 8.0 or newer; slower."
)
@click.option("--refittable", is_flag=True, help="Build plans that --refit can fill with another checkpoint's weights.")
@click.option("--strip", is_flag=True, help="Build plans without weights, to be filled by --refit.")
@click.option(
    "--refit", metavar="FOLDER", help="Folder of plans to fill with the checkpoint's weights, without building."
)
@click.option(
    "--prove",
    is_flag=True,
    help="Build nothing: compare plans built elsewhere with the model, on the GPU they are for.",
)
@_data_option
@_keep_failed_option
@_again_option
def _trt(checkpoint: str | None, **options: Any) -> Any:
    """Build image.plan and text.plan for TensorRT.

    CHECKPOINT is a folder, a file, open_clip:MODEL/WEIGHTS or a hub name; without it, the bundled one.
    """
    from finelip_fast.export.to_trt import run

    return run(checkpoint, **options, progress=not is_quiet())
