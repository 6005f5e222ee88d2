"""Small SigLIPs of open_clip: model, configuration, and tokenizers in the format of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from open_clip.model import CustomTextCLIP
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram

POSITIONS = 16
WORDS = (
    "a an the red blue green house car tree stands drives left right of in front behind two three large small and with"
)


@register_model
def vit_test_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A test-sized timm vision transformer, using the tanh approximation of GELU."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 3.7362}
    options = {name: value for name, value in options.items() if name in ("num_classes", "global_pool")}
    return VisionTransformer(class_token=False, act_layer="gelu_tanh", **sizes, **options)


class OpenClipSigLIP(NamedTuple):
    """A SigLIP of open_clip, and the folder with its files."""

    folder: Path
    model: CustomTextCLIP
    model_cfg: dict[str, Any]


def write(folder: Path, version: int) -> OpenClipSigLIP:
    """Write a SigLIP (1), with T5 pieces and end tokens as padding, or a SigLIP 2, with Gemma pieces and a pad token."""
    tokenizer, about = _pieces() if version == 1 else _byte_pairs()
    tokenizer.save(str(folder / "tokenizer.json"))
    about |= {"model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    text = {
        "context_length": POSITIONS,
        "vocab_size": tokenizer.get_vocab_size(),
        "hf_tokenizer_name": "timm/ViT-Test-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 40,
        "heads": 4,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        **({"act_kwargs": {"approximate": "tanh"}} if version == 2 else {}),
    }
    vision = {
        "image_size": 32,
        "timm_model_name": "vit_test_siglip",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    model_cfg = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(version)
        model = CustomTextCLIP(48, vision, text, init_logit_bias=-10).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # no zero bias, no unit gain
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return OpenClipSigLIP(folder, model, model_cfg)


def _pieces() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, {
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _byte_pairs() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(WORDS.split() + [f" {word}" for word in WORDS.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    about = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>"}
    return tokenizer, {**about, "padding_side": "right", "tokenizer_class": "GemmaTokenizer"}
