"""A small text-to-image model of drawn scenes that reads a checkpoint's text tokens: ``finelip study generator``.

Drawn scenes show what more tokens are worth to a generator, since everything that a caption describes is known: the model is
trained twice, on captions cut at 77 and at 256 tokens, and ``finelip study drawing`` compares the pictures with the
renderer's own. The model is a diffusers U-Net on pixels; the text encoder comes from a checkpoint and stays frozen, as in
Stable Diffusion. The same command resumes a stopped run, with bit-identical results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from finelip_fast._arguments import find_device
from finelip_fast._files import write_whole
from finelip_fast._json import read_json, stated_otherwise
from finelip_fast._typed import typed
from finelip_fast.checkpoint import load
from finelip_fast.checkpoint.weight_files import read_weights
from finelip_fast.datasets.scenes import Scene, Scenes
from finelip_fast.errors import ConfigError, InputError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch, expected_truncation
from finelip_fast.training.generator_config import GROUPS, SQUARE, GeneratorConfig
from finelip_fast.training.start import autocast

_MAX_BYTES = 1 << 20
_EXPECTED = "the configuration of a run"
_FREE_TO_CHANGE = ("out", "save_every", "device")  # when a run is resumed
_NOISE_STEPS = 1_000


class Condition:
    """Encoder of captions for the U-Net, which reads the checkpoint's features of their tokens.

    Args:
        model: Checkpoint whose text encoder reads the captions, on its device.
        context_length: Longest caption in tokens.
    """

    def __init__(self, model: FineLIP, context_length: int) -> None:
        if not 3 <= context_length <= model.config.context_length:
            raise ConfigError(f"expected context_length in 3..{model.config.context_length}, got {context_length}")
        self._model, self.context_length = model.eval(), context_length
        self.width = model.config.embed_dim

    @torch.inference_mode()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Compute features ``[B, T, D]`` of about unit variance, and a mask of the tokens, bool ``[B, T]``."""
        with expected_truncation():
            ids = encode_batch(captions, self.context_length, tokenizer=self._model.tokenizer).ids
        features, lengths = self._model.text_tokens(ids.to(self._model.device))
        mask = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        return F.normalize(features.float(), dim=-1) * self.width**0.5, mask


class Generator:
    """Text-to-image generator.

    Args:
        unet: U-Net from :func:`make_unet`.
        condition: Encoder of captions.
    """

    def __init__(self, unet: Any, condition: Condition) -> None:
        self.unet, self.condition = unet.eval(), condition

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Generator:
        """Load what a run has trained so far, with averaged weights.

        Raises:
            ConfigError: The folder holds no run of this kind, or one that has not saved a state yet.
            EngineError: This machine has no such device.
        """
        config = read_config(Path(folder))
        chosen = _device(device)
        condition = Condition(load(config.checkpoint or None).to(chosen), config.context_length)
        unet = make_unet(config, condition.width).to(chosen)
        average = AveragedModel(unet)
        if not (Path(folder) / "state.pt").exists():
            raise ConfigError(f"{folder} holds a run that has kept no state yet: train it up to --save-every steps")
        average.load_state_dict(read_weights(Path(folder) / "state.pt")["average"])
        return cls(average.module, condition)

    @torch.inference_mode()
    def draw(self, captions: Sequence[str], *, seed: int = 0, steps: int = 30, guidance_scale: float = 3.0) -> Tensor:
        """Draw pictures of captions.

        Args:
            captions: Captions, one per picture.
            seed: Seed of the noise; a caption's noise does not depend on the other captions.
            steps: Number of denoising steps.
            guidance_scale: Weight of the caption relative to no caption.

        Returns:
            ``[B, 3, S, S]`` in [0, 1].
        """
        from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

        scheduler: Any = DDIMScheduler(**_SCHEDULE, clip_sample=True)
        scheduler.set_timesteps(steps)
        shape = self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size
        noise = [torch.randn(shape, generator=_generator(seed, at)) for at in range(len(captions))]
        pictures = torch.stack(noise).to(self.unet.device)
        tokens, mask = self.condition([*captions, *[""] * len(captions)])
        for step in scheduler.timesteps:
            velocities = self.unet(torch.cat([pictures, pictures]), step, tokens, encoder_attention_mask=mask).sample
            conditional, unconditional = velocities.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
            pictures = scheduler.step(velocity, step, pictures).prev_sample
        return (F.pixel_shuffle(pictures, SQUARE) / 2 + 0.5).clamp(0, 1).cpu()


_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": _NOISE_STEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}


def make_unet(config: GeneratorConfig, width: int) -> Any:
    """Make a run's U-Net, with random weights; ``width`` is that of the text features.

    Raises:
        InputError: The package diffusers is missing.
    """
    try:
        from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    except ImportError:
        raise InputError("drawing scenes needs diffusers: pip install 'finelip-fast[diffusion]'") from None
    looking = len(config.channels) - 1
    return UNet2DConditionModel(
        sample_size=config.image_size // SQUARE,
        in_channels=3 * SQUARE**2,
        out_channels=3 * SQUARE**2,
        layers_per_block=1,
        block_out_channels=config.channels,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * looking),
        up_block_types=(*["CrossAttnUpBlock2D"] * looking, "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=max(1, config.channels[-1] // 48),
        norm_num_groups=GROUPS,
    )


def as_pixels(scenes: Sequence[Scene], size: int) -> Tensor:
    """Render scenes as pictures ``[B, 3, S, S]`` in [0, 1]."""
    drawn = np.stack([np.asarray(scene.draw(size)) for scene in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255


def train_generator(config: GeneratorConfig, *, progress: bool = True) -> None:
    """Start or resume a training run.

    Raises:
        ConfigError: The folder holds a run with another configuration, or the checkpoint reads fewer tokens.
        EngineError: This machine has no such device.
        InputError: The package diffusers is missing.
        WriteError: The disk is full; the same command resumes the run.
    """
    folder, device = Path(config.out), _device(config.device)
    torch.manual_seed(config.seed)
    condition = Condition(load(config.checkpoint or None).to(device), config.context_length)
    unet = make_unet(config, condition.width).to(device).train()
    from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]
    from diffusers.optimization import get_cosine_schedule_with_warmup

    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=0.01)
    rates = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    scheduler: Any = DDPMScheduler(**_SCHEDULE)
    scenes = Scenes("train", config.scenes, image_size=config.image_size)
    first = _resume(folder, config, unet, average, optimizer, rates)
    steps = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step", disable=not progress)
    for step in steps:
        random, generator = Random(f"{config.seed}/{step}"), _generator(config.seed, step)
        batch = [scenes[random.randrange(len(scenes))] for _ in range(config.batch_size)]
        captions = [scene.caption if random.random() >= config.unconditional else "" for scene in batch]
        pixels = F.pixel_unshuffle(2 * as_pixels(batch, config.image_size) - 1, SQUARE).to(device)
        tokens, mask = (tensor.clone() for tensor in condition(captions))  # copies that are not inference tensors
        noise = torch.randn(pixels.shape, generator=generator).to(device)
        at = torch.randint(_NOISE_STEPS, (len(batch),), generator=generator).to(device)
        with autocast(device, "auto"):
            predicted = unet(scheduler.add_noise(pixels, noise, at), at, tokens, encoder_attention_mask=mask).sample
        loss = F.mse_loss(predicted.float(), scheduler.get_velocity(pixels, noise, at))
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.update_parameters(unet)
        steps.set_postfix(loss=f"{loss.item():.3f}")
        if step + 1 == config.steps or (step + 1) % config.save_every == 0:
            _save(folder, step + 1, unet, average, optimizer, rates)


def read_config(folder: Path) -> GeneratorConfig:
    """Read the configuration of a run.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    path = folder / "config.json"
    values = read_json(path, error=ConfigError, expected=_EXPECTED, kind=dict, max_bytes=_MAX_BYTES)
    free = {name: getattr(GeneratorConfig(out=str(folder)), name) for name in _FREE_TO_CHANGE}
    try:
        config: GeneratorConfig = typed({**values, **free}, GeneratorConfig, "config")
    except ValueError as error:
        raise ConfigError(f"{path}: expected {_EXPECTED} ({error})") from None
    return config


def _device(name: str) -> torch.device:
    return find_device(None if name == "auto" else name)


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(Random(f"{seeds}").getrandbits(63))


def _resume(folder: Path, config: GeneratorConfig, *parts: Any) -> int:
    """Restore the folder's state, if it has one, and return the step to resume from."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_TO_CHANGE}
    about = {**values, "channels": list(config.channels)}
    path, state_path = folder / "config.json", folder / "state.pt"
    if path.exists() and not state_path.exists():
        path.unlink()  # of a run that stopped before there was anything to resume
    changed = stated_otherwise(path, about, error=ConfigError, expected=_EXPECTED, max_bytes=_MAX_BYTES)
    if changed:
        raise ConfigError(f"{folder} holds a run of other {', '.join(changed)}: give another --out, or remove it")
    if not state_path.exists():
        return 0
    state = read_weights(state_path)
    for name, part in zip(_PARTS, parts, strict=True):
        part.load_state_dict(state[name])
    return int(state["step"])


_PARTS = ("weights", "average", "optimizer", "rates")


def _save(folder: Path, step: int, *parts: Any) -> None:
    state = {"step": step, **{name: part.state_dict() for name, part in zip(_PARTS, parts, strict=True)}}
    write_whole(folder / "state.pt", lambda path: torch.save(state, path))
