"""Generation of pictures from long descriptions, and how much of each description its picture shows."""

from __future__ import annotations

import errno
import inspect
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from finelip_fast._arguments import find_device, folder_path, sound_text, whole_number
from finelip_fast._files import write_error, write_whole
from finelip_fast._terminal import printable
from finelip_fast._versions import library_version
from finelip_fast.checkpoint import load
from finelip_fast.checkpoint.building import CLIP_CONTEXT
from finelip_fast.diffusion.extension import Layer, Second, check_choices, extend
from finelip_fast.diffusion.packages import require_packages
from finelip_fast.errors import CheckpointError, InputError
from finelip_fast.explain import explain
from finelip_fast.model import FineLIP

_NAMED = 12  # maximum number of unmatched words to print
_GAP = 8  # pixels between two pictures


@dataclass(frozen=True)
class DrawnPicture:
    """A retriever's comparison of a description with the picture made from it.

    Attributes:
        tokens: Number of tokens of the description that the pipeline was able to read.
        score: The retriever's score of picture and description.
        words: Number of words of the description that the retriever read.
        unmet: Words that add nothing to the score (:attr:`finelip_fast.Explanation.unmet`); None without trained aggregators.
    """

    tokens: int
    score: float
    words: int
    unmet: tuple[str, ...] | None

    def __str__(self) -> str:
        line = f"{self.tokens} tokens: score {self.score:.4f}"
        if self.unmet is None:
            return f"{line}; which words were met is not known: this checkpoint has no trained aggregators"
        line += f", {self.words - len(self.unmet)} of {self.words} words were met"
        if not self.unmet:
            return line
        names = list(dict.fromkeys(self.unmet))
        rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"{line}; nothing met {', '.join(map(printable, names[:_NAMED]))}{rest}"


@dataclass(frozen=True)
class Generation:
    """A file written by :func:`generate`.

    Attributes:
        out: The file.
        settings: Settings of the generation, as in the file's metadata.
        pictures: Its pictures from left to right.
    """

    out: str
    settings: dict[str, str]
    pictures: tuple[DrawnPicture, ...]

    def __str__(self) -> str:
        names = ("seed", "steps", "guidance_scale")
        recipe = ", ".join(f"{name.replace('_', ' ')} {self.settings[name]}" for name in names)
        return "\n".join([f"{printable(self.out)}: {recipe}", *(f"  {picture}" for picture in self.pictures)])

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)


def generate(
    text: str,
    *,
    checkpoint: str,
    pipeline: str,
    out: str,
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    layer: Layer | None = None,
    second: Second = "stretch",
    compare_77: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> Generation:
    """Make a picture from a description, write it, and compare the two with the checkpoint's own retriever.

    Args:
        text: Description; weights such as ``(red:1.2)`` are read as text.
        checkpoint: Folder, file or name, as accepted by :func:`finelip_fast.load`.
        pipeline: Folder or hub name of a diffusers pipeline; only safetensors weights are read.
        out: File to write, ``.png``. Its metadata hold the settings of the generation.
        seed: Seed of the noise, the same on all devices; None: a random one.
        steps: Number of denoising steps; None: the pipeline's default.
        guidance_scale: Weight of the description; None: the pipeline's default.
        negative_prompt: Description of what to avoid.
        layer: Layer of the text encoders, as in :func:`extend`.
        second: Method of lengthening the second encoder, as in :func:`extend`.
        compare_77: Whether to put the original pipeline's picture of the first 77 tokens, from the same noise, to the left.
        device: Device to compute on; None: a GPU if there is one. On a GPU, the pipeline runs in half precision.
        progress: Whether to show progress bars.

    Raises:
        InputError: An argument is invalid, or the pipeline is not for text-to-image.
        CheckpointError: The checkpoint or the pipeline cannot be opened.
        WriteError: The file cannot be written.
    """
    path = _checked_out(out)
    if not sound_text("text", text).strip():
        raise InputError("expected a description, got an empty one")
    for name, value in (("checkpoint", checkpoint), ("pipeline", pipeline)):
        if not isinstance(value, str):
            raise InputError(f"expected {name} to be a folder or a name, got {value!r:.80}")
    seed = secrets.randbelow(1 << 32) if seed is None else whole_number("seed", seed, least=0, most=(1 << 63) - 1)
    options: dict[str, Any] = {
        "num_inference_steps": None if steps is None else whole_number("steps", steps),
        "guidance_scale": None if guidance_scale is None else _finite("guidance_scale", guidance_scale),
        "negative_prompt": None if negative_prompt is None else sound_text("negative_prompt", negative_prompt),
    }
    options = {name: value for name, value in options.items() if value is not None}
    check_choices(layer, second)
    where = find_device(device)
    require_packages()
    with messages(progress):
        model = load(checkpoint, where)
        network = open_pipeline(pipeline, where)
        if steps is not None:  # a scheduler divides the steps of its training
            whole_number("steps", steps, most=getattr(network.scheduler.config, "num_train_timesteps", None))
        length = (network.tokenizer or network.tokenizer_2).model_max_length
        if compare_77 and length != CLIP_CONTEXT:
            raise InputError(
                f"expected a pipeline of {CLIP_CONTEXT} tokens to compare with, got {length}; it is already extended, name "
                "the original pipeline"
            )
        network.set_progress_bar_config(disable=not progress, leave=False)
        # Extended after the first picture, which the original pipeline draws.
        pictures = [draw(network, text, seed, options)] if compare_77 else []
        extend(network, model, layer=layer, second=second)
        pictures.append(draw(network, text, seed, options))
    settings = {
        "prompt": text,
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
        "seed": str(seed),
        "steps": str(_default(network, "num_inference_steps") if steps is None else steps),
        "guidance_scale": str(_default(network, "guidance_scale") if guidance_scale is None else guidance_scale),
        "checkpoint": checkpoint,
        "pipeline": pipeline,
        "layer": layer or "the pipeline's own",
        "second": second,
        "context_length": str(model.config.context_length),
        "software": f"finelip-fast {library_version()}",
    }
    _write(path, _side_by_side(pictures), settings)
    lengths = [CLIP_CONTEXT, model.config.context_length][-len(pictures) :]
    drawn = [_compared(model, picture, text, length) for picture, length in zip(pictures, lengths, strict=True)]
    return Generation(out, settings, tuple(drawn))


def _checked_out(out: Any) -> Path:
    path = folder_path("out", out)
    try:
        is_sound = path.suffix.lower() == ".png" and path.parent.is_dir()
        if is_sound and path.exists() and not path.is_file():
            raise InputError(f"expected out to be a file, got {out!r:.200}, which is none; name another")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"expected out to be a .png file, got {out!r:.200}: {error.strerror}") from None
    if not is_sound:
        raise InputError(f"expected out to be a .png file in an existing folder, got {out!r:.200}")
    if not os.access(path.parent, os.W_OK):
        raise write_error(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return path


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"expected {name} to be a finite number, got {value!r:.80}")
    return float(value)


def open_pipeline(name: str, device: torch.device) -> Any:
    """Open a text-to-image pipeline on a device, in half precision on a GPU."""
    from diffusers import AutoPipelineForText2Image  # pyright: ignore[reportPrivateImportUsage]

    # Pipelines that were extended and saved may refer to its classes.
    import finelip_fast.diffusion.text_models  # noqa: F401

    dtype = torch.float32 if device.type == "cpu" else torch.float16
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except Exception as error:  # diffusers, transformers and the hub each raise their own errors
        raise CheckpointError(
            f"{name!r:.200} cannot be opened as a diffusers text-to-image pipeline with weights in safetensors: "
            f"{type(error).__name__}: {error!s:.500}"
        ) from error
    return pipeline.to(device)


def draw(pipeline: Any, text: str, seed: int, options: dict[str, Any]) -> Image.Image:
    # Noise from the CPU, so that a seed gives the same noise everywhere.
    picture: Image.Image = pipeline(text, generator=torch.Generator().manual_seed(seed), **options).images[0]
    return picture


def _default(pipeline: Any, name: str) -> Any:
    """A pipeline's default for an argument."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def _compared(model: FineLIP, picture: Image.Image, text: str, tokens: int) -> DrawnPicture:
    explanation = explain(model, picture, text)
    unmet = tuple(word.bare for word in explanation.unmet) if model.config.trained_aggregators else None
    return DrawnPicture(tokens, explanation.score, len(explanation.words), unmet)


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Put pictures of one size side by side."""
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height), "white")
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * (width + _GAP), 0))
    return row


def _write(path: Path, picture: Image.Image, settings: dict[str, str]) -> None:
    metadata = PngInfo()
    for name, value in settings.items():
        metadata.add_itxt(name, value.encode(errors="replace").decode())  # names of folders may not be UTF-8
    write_whole(path, lambda temporary: picture.save(temporary, "PNG", pnginfo=metadata))


@contextmanager
def messages(progress: bool) -> Iterator[None]:
    """Limit the output of diffusers and transformers to errors, and to progress bars if progress is shown.

    Their notes on cut prompts would repeat the warning that an extended pipeline gives.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        if not progress:
            library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, shows_bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if shows_bars:
                library.enable_progress_bar()
