"""Small random pipelines of diffusers' own classes, saved in folders; nothing comes from a hub."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from open_clip.tokenizer import SimpleTokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

TEXT_WIDTH, SECOND_WIDTH, POOLED = 64, 32, 32

# transformers requires these names; open_clip spells them differently.
_SPELLED = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


@functools.cache
def _vocabulary() -> tuple[str, str]:
    """Return CLIP's tokens and merges as ``vocab.json`` and ``merges.txt``."""
    bpe = SimpleTokenizer()
    vocabulary = {_SPELLED.get(token, token): index for token, index in bpe.encoder.items()}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    return json.dumps(vocabulary), "\n".join(["#version: 0.2", *map(" ".join, merges), ""])


def tokenizer(**options: Any) -> CLIPTokenizer:
    """CLIP's tokenizer of 77 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in zip(("vocab.json", "merges.txt"), _vocabulary(), strict=True):
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **options)


def text_config(width: int, **changes: Any) -> CLIPTextConfig:
    """Return a small CLIP text encoder's configuration, with ``eos_token_id`` as in Stable Diffusion's configurations."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPTextConfig(**{**sizes, "projection_dim": POOLED, "eos_token_id": 2, "bos_token_id": 0, **changes})


def unet(cross: int, *, xl: bool, pooled: int = POOLED, times: int = 6, channels: int = 4) -> UNet2DConditionModel:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8} if xl else {}
    if xl:
        added["projection_class_embeddings_input_dim"] = 8 * times + pooled
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=8,
        norm_num_groups=4,
        **added,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        shift_factor=0.1,
        norm_num_groups=4,
        sample_size=32,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def xl(text_encoder: Any = None, *, width: int = TEXT_WIDTH) -> StableDiffusionXLPipeline:
    """Return Stable Diffusion XL: two encoders, the first of variable width, the second padded with ``!``."""
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder or CLIPTextModel(text_config(width)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH, hidden_act="gelu")).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        unet=unet(width + SECOND_WIDTH, xl=True),
        scheduler=scheduler(),
        add_watermarker=False,
    )


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    """Return the refiner, which has only the second encoder."""
    torch.manual_seed(1)
    return StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH, hidden_act="gelu")).eval(),
        tokenizer=None,
        tokenizer_2=tokenizer(pad_token="!"),
        unet=unet(SECOND_WIDTH, xl=True, times=5),
        scheduler=scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def sd15(text_encoder: Any = None) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5, which has only CLIP-L."""
    torch.manual_seed(2)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder or CLIPTextModel(text_config(TEXT_WIDTH)).eval(),
        tokenizer=tokenizer(),
        unet=unet(TEXT_WIDTH, xl=False),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def controlnet(pipeline: Any) -> ControlNetModel:
    """A ControlNet for a pipeline's U-Net."""
    return ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 without T5."""
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=32,
        pooled_projection_dim=48 + POOLED,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(TEXT_WIDTH, projection_dim=48)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH, hidden_act="gelu")).eval(),
        text_encoder_3=None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(pad_token="!"),
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def flux() -> FluxPipeline:
    """Return FLUX: CLIP-L's pooled embedding and T5, with CLIP's tokenizer here."""
    torch.manual_seed(5)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    t5 = T5Config(vocab_size=49408, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return FluxPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(TEXT_WIDTH)).eval(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
