"""Sizes of a FineLIP model: one frozen dataclass, read from and written to ``config.json``."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from finelip_fast._arguments import share
from finelip_fast.errors import ConfigError, InputError

# CLIP's own vocabulary size and special tokens; the padding is zero.
VOCAB_SIZE = 49_408
START_TOKEN = 49_406
EOT_TOKEN = 49_407

# Rows of CLIP's text positions that are well trained: kept as they are when the table is stretched, frozen in training.
KEEP_POSITIONS = 20

# SigLIP's towers normalise with a smaller epsilon.
SIGLIP_EPSILON = 1e-6
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Attention heads of the published CLIPs, OpenAI's and open_clip's, by width: the weights do not reveal them.
VISION_HEADS = {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
TEXT_HEADS = {256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20}

_DERIVED = ("aggregated_tokens", "aggregator_hidden")
# Ids, and the rows of a table that CLIP does not have.
_MAY_BE_ZERO = (*_DERIVED, "text_positions", "pad_token", "end_token")
# Fields omitted from a configuration if they have CLIP's values, so that it reads, and is identified, as before they existed.
_SIGLIP_FIELDS = (
    "family",
    "vision_tanh_gelu",
    "text_tanh_gelu",
    "text_positions",
    "pad_token",
    "end_token",
    "tokenizer",
    "logit_bias",
)
_SHA256 = re.compile("[0-9a-f]{64}")

# FineLIP's weight of the global cosine (arXiv 2504.01916).
ALPHA = 0.8

# Several times the values of the largest CLIP. A configuration may come from anyone, and building its model must terminate.
_LIMITS = {
    "embed_dim": 16_384,
    "image_size": 16_384,
    "patch_size": 16_384,
    "vision_width": 16_384,
    "vision_layers": 256,
    "vision_heads": 1_024,
    "text_width": 16_384,
    "text_layers": 256,
    "text_heads": 1_024,
    "context_length": 8_192,
    "vocab_size": 1_048_576,
    "text_positions": 8_192,
    "pad_token": 1_048_575,
    "end_token": 1_048_575,
    "aggregated_tokens": 16_384,
    "aggregator_hidden": 16_384,
}
_MAX_PATCHES = 16_384
_MAX_RATIO = 64
_MAX_PIXEL = 65_536


@dataclass(frozen=True, kw_only=True)
class FineLIPConfig:
    """Sizes of the two encoders and the two aggregators.

    Args:
        embed_dim: Width ``D`` of the joint embedding.
        image_size: Side of the square input picture, in pixels.
        patch_size: Side of a patch, in pixels; divides ``image_size``.
        vision_width, vision_layers, vision_heads: Sizes of the vision transformer.
        text_width, text_layers, text_heads: Sizes of the text transformer.
        context_length: Longest caption in tokens, including start and end token.
        vocab_size: Number of rows of the token embedding.
        vision_mlp_ratio, text_mlp_ratio: Ratio of an MLP's hidden width to its input width.
        quick_gelu: Whether to use CLIP's sigmoid approximation of GELU, which must be the one the weights were trained with.
        aggregated_tokens: Number ``K`` of tokens that an aggregator makes of a picture or a caption. Default: 20 % of the
            patches, ``int(0.4 * 0.5 * P)``.
        aggregator_hidden: Hidden width ``h`` of an aggregator. Default: ``int(0.2 * D)``.
        trained_aggregators: False for weights from plain CLIP or Long-CLIP: the aggregators are then randomly initialised, yet
            to be trained, and not part of an embedding, which is the global row alone.
        alpha: Weight of the global cosine in the score, as chosen for these weights; always 1 if the aggregators are
            untrained.
        image_mean, image_std: Normalisation of the three colour channels, on values in [0, 1].
        resize_mode: ``"shortest"`` scales the shorter side and crops the centre (CLIP); ``"squash"`` ignores the aspect ratio.
        family: ``"clip"``: a class token; causal text attention, read at the end token. ``"siglip"``: pictures pooled by
            attention; full text attention, read at the last position (:mod:`finelip_fast.encoders`).
        vision_tanh_gelu, text_tanh_gelu: Whether the picture or caption encoder uses the tanh approximation of GELU.
        text_positions: Number of rows of SigLIP's table of text positions, which stays as trained whatever the context length:
            shorter captions are padded to this length, longer ones are spread over the table. 0 for CLIP, whose table has a
            row for each token of the context.
        pad_token: Id of the padding after a caption's end; SigLIP attends to it, CLIP does not.
        end_token: Id that ends a caption.
        logit_bias: Bias that SigLIP's loss adds to the scaled cosine before the sigmoid
            (:meth:`finelip_fast.FineLIP.probability`); None if there is none, or if further training has shifted the cosines.
        tokenizer: SHA-256 in hex of the ``tokenizer.json`` beside the weights; empty: CLIP's byte-level BPE.

    Raises:
        ConfigError: Values are out of range or do not fit together.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 256
    vocab_size: int = VOCAB_SIZE
    vision_mlp_ratio: float = 4.0
    text_mlp_ratio: float = 4.0
    quick_gelu: bool = True
    aggregated_tokens: int = 0
    aggregator_hidden: int = 0
    trained_aggregators: bool = True
    alpha: float = ALPHA
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    resize_mode: Literal["shortest", "squash"] = "shortest"
    family: Literal["clip", "siglip"] = "clip"
    vision_tanh_gelu: bool = False
    text_tanh_gelu: bool = False
    text_positions: int = 0
    pad_token: int = 0
    end_token: int = EOT_TOKEN
    tokenizer: str = ""
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            least = 0 if name in _MAY_BE_ZERO else 1
            _require(
                type(value) is int and least <= value <= most,
                f"{name} to be an int from {'0 (the default)' if name in _DERIVED else least} to {most}",
                value,
            )
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            value = getattr(self, name)
            _require(
                type(value) in (int, float) and 0 < value <= _MAX_RATIO,
                f"{name} above 0 and up to {_MAX_RATIO}",
                value,
            )
        for name in ("quick_gelu", "trained_aggregators", "vision_tanh_gelu", "text_tanh_gelu"):
            _require(type(getattr(self, name)) is bool, f"{name} to be True or False", getattr(self, name))
        _require(type(self.alpha) in (int, float) and 0 <= self.alpha <= 1, "alpha in [0, 1]", self.alpha)
        for name, least in {"image_mean": -_MAX_PIXEL, "image_std": 0}.items():
            value = getattr(self, name)
            _require(
                isinstance(value, (list, tuple))
                and len(value) == 3
                and all(type(part) in (int, float) and least < part < _MAX_PIXEL for part in value),
                f"{name} to be three numbers between {least} and {_MAX_PIXEL}",
                value,
            )
        _require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        _require(self.patches <= _MAX_PATCHES, f"at most {_MAX_PATCHES} patches of a picture", self.patches)
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            _require_multiple(f"{tower}_width", width, f"{tower}_heads", heads)
            ratio = getattr(self, f"{tower}_mlp_ratio")
            _require(width * ratio >= 1, f"{tower}_mlp_ratio to leave a hidden width of at least 1", ratio)
        _require(self.context_length >= 3, "context_length of at least 3", self.context_length)
        _require(
            self.resize_mode in ["shortest", "squash"], "resize_mode to be 'shortest' or 'squash'", self.resize_mode
        )
        self._check_family()
        for name, default in self._derived().items():
            object.__setattr__(self, name, getattr(self, name) or default)
        object.__setattr__(self, "alpha", float(self.alpha) if self.trained_aggregators else 1.0)
        object.__setattr__(self, "image_mean", tuple(self.image_mean))  # lists, when read from JSON
        object.__setattr__(self, "image_std", tuple(self.image_std))

    def _check_family(self) -> None:
        _require(self.family in ["clip", "siglip"], "family to be 'clip' or 'siglip'", self.family)
        tokenizer = self.tokenizer
        is_hash = isinstance(tokenizer, str) and (tokenizer == "" or _SHA256.fullmatch(tokenizer) is not None)
        _require(is_hash, "tokenizer to be a SHA-256 in hex, or empty", tokenizer)
        bias = self.logit_bias
        _require(
            bias is None or (type(bias) in (int, float) and abs(bias) < _MAX_PIXEL),
            "logit_bias to be a number or None",
            bias,
        )
        if self.quick_gelu and (self.vision_tanh_gelu or self.text_tanh_gelu):
            raise ConfigError(
                "quick_gelu and vision_tanh_gelu/text_tanh_gelu exclude each other; set one of them to False"
            )
        for name in ("pad_token", "end_token") if self.family == "siglip" else ():
            token = getattr(self, name)
            _require(token < self.vocab_size, f"{name} to be below vocab_size ({self.vocab_size})", token)
        if self.family == "siglip":
            rows = self.text_positions
            most = f"text_positions to be from 2 to context_length ({self.context_length})"
            _require(2 <= rows <= self.context_length, most, rows)
            _require(
                self.vision_width == self.embed_dim,
                f"vision_width to equal embed_dim ({self.embed_dim})",
                self.vision_width,
            )
        else:
            clips = {"text_positions": 0, "pad_token": 0, "end_token": EOT_TOKEN, "tokenizer": ""}
            for name, value in clips.items():
                own_value = getattr(self, name)
                _require(own_value == value, f"{name} to be {value!r} in the family 'clip'", own_value)

    @property
    def word_token(self) -> int:
        """An id other than the end token, for captions whose words do not matter."""
        return 2 if self.end_token == 1 else 1

    @property
    def patches(self) -> int:
        """Number ``P`` of patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Number ``L`` of rows of an embedding: ``K + 1``, or 1 if the aggregators are untrained."""
        return self.aggregated_tokens + 1 if self.trained_aggregators else 1

    def choose_alpha(self, alpha: float | None) -> float:
        """Return the requested weight of the global cosine; None: :attr:`alpha`.

        Raises:
            InputError: It is not a number in [0, 1], or is below 1 although the aggregators are untrained and give no other
                score.
        """
        if alpha is None:
            return self.alpha
        alpha = share("alpha", alpha)
        if alpha < 1 and not self.trained_aggregators:
            raise InputError(
                f"expected alpha=1, got {alpha:g}: without trained aggregators, this checkpoint has only the global score; "
                "leave alpha out, or train the aggregators (finelip adapt)"
            )
        return alpha

    @property
    def parameters(self) -> int:
        """Number of parameters of a model of these sizes, which is not built to count them."""
        towers = 0
        for name in ("vision", "text"):
            width, layers = getattr(self, f"{name}_width"), getattr(self, f"{name}_layers")
            hidden = int(width * getattr(self, f"{name}_mlp_ratio"))
            block = 4 * width * (width + 1) + 2 * 2 * width + hidden * (width + 1) + width * (hidden + 1)
            towers += layers * block + 2 * width
        width, text_width = self.vision_width, self.text_width
        hidden = int(width * self.vision_mlp_ratio)
        vision = width * (3 * self.patch_size**2 + self.patches)
        text = text_width * (self.vocab_size + (self.text_positions or self.context_length) + self.embed_dim)
        if self.family == "siglip":  # the patches' bias, and the pool; the bias of the text projection
            vision += width + 4 * width * (width + 1) + 3 * width + hidden * (width + 1) + width * (hidden + 1)
            text += self.embed_dim
        else:  # class token, its position, a first norm and the projection
            vision += 4 * width + width * self.embed_dim
        hidden, aggregated = self.aggregator_hidden, self.aggregated_tokens
        aggregator = 1 + 2 * self.embed_dim + hidden * (self.embed_dim + 1) + aggregated * (hidden + 1)
        return towers + vision + text + 2 * aggregator + 1

    def _derived(self) -> dict[str, int]:
        """Default sizes that depend on other sizes."""
        return {
            "aggregated_tokens": max(1, int(self.patches * 0.4 * 0.5)),
            "aggregator_hidden": max(1, int(self.embed_dim * 0.2)),
        }

    def replace(self, **changes: Any) -> FineLIPConfig:
        """Return a copy with some fields changed; defaults that depend on them are computed again."""
        following: dict[str, Any] = {
            name: 0 for name, default in self._derived().items() if getattr(self, name) == default
        }
        if not self.trained_aggregators:
            following["alpha"] = ALPHA
        return dataclasses.replace(self, **{**following, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; fields that only SigLIP needs are left out if they have CLIP's values."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _SIGLIP_FIELDS or value != defaults[name]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FineLIPConfig:
        """Create a configuration from the values that :meth:`to_dict` returns.

        Raises:
            ConfigError: ``values`` is not a dictionary, or fields are unknown or missing; the message names them.
        """
        _require(isinstance(values, dict), "the values of a model configuration in a dictionary", values)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(f"{name!s:.40}" for name in set(values) - set(fields))[:10]
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            faults = [f"missing fields {', '.join(missing)}"] if missing else []
            if unknown:
                faults = [
                    f"unknown fields {', '.join(map(repr, unknown))}",
                    *faults,
                    f"the known fields are {', '.join(sorted(fields))}",
                ]
            raise ConfigError(f"model configuration: {'; '.join(faults)}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FineLIPConfig:
        """Return a configuration by CLIP's model name, or by ``"scenes"``, the size of the bundled model.

        Raises:
            ConfigError: The name is unknown.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"expected the preset to be one of {', '.join(sorted(PRESETS))}, got {name!r:.80}")
        return PRESETS[name].replace(**changes)


def mlp_ratio(hidden: int, width: int) -> float:
    """Ratio of hidden width to width, such that truncating ``width * ratio`` gives the hidden width again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"expected {expected}, got {got!r:.80}")


def _require_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    if value % unit:
        raise ConfigError(f"expected {name} to be a multiple of {unit_name}, got {value} and {unit}")


def _vit(patch: int, width: int, layers: int, embed_dim: int, text_width: int, image_size: int = 224) -> FineLIPConfig:
    return FineLIPConfig(
        embed_dim=embed_dim,
        image_size=image_size,
        patch_size=patch,
        vision_width=width,
        vision_layers=layers,
        vision_heads=VISION_HEADS[width],
        text_width=text_width,
        text_layers=12,
        text_heads=TEXT_HEADS[text_width],
    )


PRESETS = {
    "ViT-B-32": _vit(32, 768, 12, 512, 512),
    "ViT-B-16": _vit(16, 768, 12, 512, 512),
    "ViT-L-14": _vit(14, 1024, 24, 768, 768),
    "ViT-L-14-336": _vit(14, 1024, 24, 768, 768, image_size=336),
    "scenes": FineLIPConfig(
        embed_dim=128,
        image_size=128,
        patch_size=16,
        vision_width=192,
        vision_layers=4,
        vision_heads=3,
        text_width=128,
        text_layers=4,
        text_heads=2,
        quick_gelu=False,
    ),
}
