"""Study of whether longer prompts give pictures closer to the described ones: the paper's measure of its second task."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import find_device, whole_number
from finelip_fast._files import remove_unfinished, write_whole
from finelip_fast._json import stated_otherwise
from finelip_fast.checkpoint import UntrainedAggregatorsWarning, fingerprint, load
from finelip_fast.checkpoint.building import CLIP_CONTEXT
from finelip_fast.datasets import open_dataset
from finelip_fast.datasets.survey import survey
from finelip_fast.diffusion.extension import Layer, Second, check_choices, extend
from finelip_fast.diffusion.generation import draw, messages, open_pipeline
from finelip_fast.diffusion.packages import require_packages
from finelip_fast.embed import embed_texts
from finelip_fast.errors import ConfigError, InputError
from finelip_fast.model import FineLIP
from finelip_fast.records import Record, Table

# FineLIP's authors judge with CLIP's ViT-B/32; neither the pipeline nor the checkpoint comes from these weights.
JUDGE = "open_clip:ViT-B-32/laion2b_s34b_b79k"

_BATCH = 32  # pictures judged at once
_MAX_SETTINGS = 1 << 16  # bytes


@dataclass(frozen=True)
class GenerationSetting:
    """Settings of the study: what is drawn, with what, and which model judges.

    Attributes:
        pipeline: Folder or hub name of a diffusers pipeline that has not been extended.
        checkpoint: Checkpoint whose text encoder extends it, as accepted by :func:`finelip_fast.load`.
        data: Pairs, as in :func:`finelip_fast.datasets.open_dataset`; only the first caption of a picture is drawn.
        pictures: Folder of the drawn pictures, which a resumed run does not draw again.
        judge: Checkpoint of the model that judges.
        root: Folder that relative paths start from.
        steps, guidance_scale: Arguments of the pipeline; None: its defaults.
        seed: Seed of the first picture's noise; the following pictures count up from it.
        layer, second: Arguments of :func:`finelip_fast.diffusion.extend`.
        device: Device to compute on; None: a GPU if there is one.
        progress: Whether to show progress bars.
    """

    pipeline: str
    checkpoint: str
    data: str
    pictures: str
    judge: str = JUDGE
    root: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    layer: Layer | None = None
    second: Second = "stretch"
    device: str | None = None
    progress: bool = True


class Moments:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add ``features [n, D]``."""
        rows = features.cpu().double()
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        """Mean ``[D]``."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``[D, D]``."""
        return (self._products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, for two samples of at least two features (FID, arXiv 1706.08500)."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The eigenvalues of C1 C2 are those of the symmetric product below, whose roots are real.
    cross = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp(min=0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * cross
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def generation(setting: GenerationSetting) -> Record:
    """Draw each description with the original pipeline and as FineLIP extends it, and judge both sets of pictures.

    Raises:
        InputError: An argument is invalid, or there are fewer than two pictures.
        CheckpointError: A checkpoint or the pipeline cannot be opened.
        ConfigError: The folder holds pictures of another run.
        WriteError: A file cannot be written; the same run can be resumed.
    """
    check_choices(setting.layer, setting.second)
    whole_number("seed", setting.seed, least=0, most=1 << 62)
    if setting.steps is not None:
        whole_number("steps", setting.steps)
    require_packages()
    device = find_device(setting.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAggregatorsWarning)  # only the encoders matter here
        model, judge = load(setting.checkpoint), _load_judge(setting.judge)
    pairs = open_dataset(setting.data, image_size=judge.config.image_size, root=setting.root)
    known = survey(pairs)
    if len(known.ids) < 2:
        raise InputError(f"expected at least 2 pictures, whose features have a spread, got {len(known.ids)}")
    captions = [known.captions[at] for at in known.first]
    about = {
        "pipeline": setting.pipeline,
        "checkpoint": fingerprint(model)[:12],
        "layer": setting.layer or "the pipeline's own",
        "second": setting.second,
        "steps": "the pipeline's own" if setting.steps is None else setting.steps,
        "guidance_scale": "the pipeline's own" if setting.guidance_scale is None else setting.guidance_scale,
        "seed": setting.seed,
        "data": known.fingerprint[:12],
    }
    folder = Path(setting.pictures)
    _check_folder(folder, about)
    lengths = (CLIP_CONTEXT, model.config.context_length)
    _draw_all(setting, model, captions, [folder / str(length) for length in lengths], device)
    judge = judge.to(device).eval()
    real = _judged(judge, [pairs[at].image for at in known.first], captions, setting.progress)
    rows = [{"pictures": "described", "FID": 0.0, "CLIP score": round(real[1], 2)}]
    for length in lengths:
        drawn = [folder / str(length) / _name(number) for number in range(len(captions))]
        moments, score = _judged(judge, drawn, captions, setting.progress)
        rows.append(
            {
                "pictures": f"drawn from {length} tokens",
                "FID": round(frechet_distance(real[0], moments), 3),
                "CLIP score": round(score, 2),
            }
        )
    width = judge.config.embed_dim
    caveat = f" With no more pictures than a feature's {width} columns the distance is biased." * (
        len(captions) <= width
    )
    finding = (
        f"Of {len(captions)} descriptions, {lengths[1]} tokens instead of {lengths[0]} take the distance to the described "
        f"pictures from {rows[1]['FID']} to {rows[2]['FID']} and the CLIP score from {rows[1]['CLIP score']} to "
        f"{rows[2]['CLIP score']}.{caveat}"
    )
    facts = {**about, "data": setting.data, "judge": Path(setting.judge).name, "pictures": len(captions)}
    return Record("generation", "What longer prompts draw", (Table("Distance and score", rows),), (), facts, finding)


def _load_judge(source: str) -> FineLIP:
    """Load a judge with the context that it was trained with."""
    try:
        return load(source, context_length=CLIP_CONTEXT)
    except ConfigError:  # it has more positions, as Long-CLIP does
        return load(source)


def _name(number: int) -> str:
    return f"{number:06}.png"


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Create the folder, or check that it belongs to the same run."""
    path = folder / "settings.json"
    changed = stated_otherwise(path, about, error=ConfigError, expected="settings of a run", max_bytes=_MAX_SETTINGS)
    if changed:
        raise ConfigError(
            f"{folder} holds pictures of other {', '.join(changed)}: give another --pictures, or remove it"
        )


def _draw_all(
    setting: GenerationSetting, model: FineLIP, captions: Sequence[str], folders: Sequence[Path], device: torch.device
) -> None:
    """Draw missing pictures, first with the original pipeline, then with the extended one."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
        remove_unfinished(folder)
    missing = [
        [number for number in range(len(captions)) if not (folder / _name(number)).exists()] for folder in folders
    ]
    if not any(missing):
        return
    options = {"num_inference_steps": setting.steps, "guidance_scale": setting.guidance_scale}
    options = {name: value for name, value in options.items() if value is not None}
    with (
        messages(setting.progress),
        tqdm(
            total=2 * len(captions),
            initial=2 * len(captions) - sum(map(len, missing)),
            unit="picture",
            disable=not setting.progress,
        ) as bar,
    ):
        network = open_pipeline(setting.pipeline, device)
        network.set_progress_bar_config(disable=True)
        if (length := (network.tokenizer or network.tokenizer_2).model_max_length) != CLIP_CONTEXT:
            raise InputError(
                f"expected a pipeline of {CLIP_CONTEXT} tokens, got {length}: name the one that was not extended"
            )
        for folder, numbers in zip(folders, missing, strict=True):
            for number in numbers:
                picture = draw(network, captions[number], setting.seed + number, options)
                write_whole(folder / _name(number), partial(picture.save, format="PNG"))
                bar.update()
            if folder is folders[0]:
                extend(network, model, layer=setting.layer, second=setting.second)


@torch.inference_mode()
def _judged(judge: FineLIP, pictures: Sequence[Any], captions: Sequence[str], progress: bool) -> tuple[Moments, float]:
    """Moments of the pictures' features, and the mean of 100 times the cosine of each picture and its caption."""
    moments, cosines = Moments(judge.config.embed_dim), 0.0
    for first in tqdm(range(0, len(pictures), _BATCH), unit="batch", desc="judged", disable=not progress):
        pixels = judge.preprocess.batch(pictures[first : first + _BATCH]).to(judge.device)
        features = judge.visual(pixels)[:, 0]
        moments.add(features)
        # A caption longer than the judge's context is read whole, in windows.
        texts = embed_texts(
            lambda ids: judge.encode_text(ids.to(judge.device)),
            captions[first : first + _BATCH],
            context_length=judge.config.context_length,
            overflow="window",
            tokenizer=judge.tokenizer,
        )
        cosines += float((F.normalize(features, dim=-1) * texts[:, 0].to(features)).sum())
    return moments, 100 * cosines / len(pictures)
