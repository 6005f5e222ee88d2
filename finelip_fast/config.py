"""Sizes of a FineLIP model: one frozen dataclass, read from and written to ``config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from finelip_fast.errors import ConfigError, InputError

# CLIP's own vocabulary and special tokens; zero pads.
VOCAB_SIZE = 49_408
START_TOKEN = 49_406
EOT_TOKEN = 49_407

# Rows of CLIP's text positions that are well trained: kept as they are when the table is stretched, frozen in training.
KEEP_POSITIONS = 20

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Attention heads of the published CLIPs, OpenAI's and open_clip's, by width: weights do not show them.
VISION_HEADS = {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
TEXT_HEADS = {256: 4, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1280: 20}

_DERIVED = ("aggregated_tokens", "aggregator_hidden")

# FineLIP's weight of the global cosine (arXiv 2504.01916).
ALPHA = 0.8

# Several times what the largest CLIP has. A configuration may come from anyone, and building what it says must end.
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
        vision_width, vision_layers, vision_heads: The vision transformer.
        text_width, text_layers, text_heads: The text transformer.
        context_length: Longest caption in tokens, start and end token included.
        vocab_size: Rows of the token embedding.
        vision_mlp_ratio, text_mlp_ratio: Hidden width of an MLP over its input width.
        quick_gelu: CLIP's sigmoid approximation of GELU; weights remember which one they were trained with.
        aggregated_tokens: ``K``, tokens that an aggregator makes of a picture or a caption. Default: 20 % of the patches,
            ``int(0.4 * 0.5 * P)``.
        aggregator_hidden: Hidden width ``h`` of an aggregator. Default: ``int(0.2 * D)``.
        trained_aggregators: False for weights that come from plain CLIP or Long-CLIP: the aggregators are then at their
            random start, wait to be trained, and take no part in an embedding, which is the global row alone.
        alpha: Weight of the global cosine in the score, as it was chosen for these weights; 1 where the aggregators are
            untrained, whatever is given.
        image_mean, image_std: Normalisation of the three colour channels, on values in [0, 1].
        resize_mode: ``"shortest"`` scales the shorter side and crops the centre (CLIP); ``"squash"`` ignores the aspect.

    Raises:
        ConfigError: Sizes that do not fit together.
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

    def __post_init__(self) -> None:
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            derived = name in _DERIVED
            _require(
                type(value) is int and (not derived) <= value <= most,
                f"{name} as an int of {'0 (the default)' if derived else '1'} to {most}",
                value,
            )
        for name in ("vision_mlp_ratio", "text_mlp_ratio"):
            value = getattr(self, name)
            _require(type(value) in (int, float) and 0 < value <= _MAX_RATIO, f"{name} above 0, to {_MAX_RATIO}", value)
        for name in ("quick_gelu", "trained_aggregators"):
            _require(type(getattr(self, name)) is bool, f"{name} as True or False", getattr(self, name))
        _require(type(self.alpha) in (int, float) and 0 <= self.alpha <= 1, "alpha in [0, 1]", self.alpha)
        for name, least in {"image_mean": -_MAX_PIXEL, "image_std": 0}.items():
            value = getattr(self, name)
            _require(
                isinstance(value, (list, tuple))
                and len(value) == 3
                and all(type(part) in (int, float) and least < part < _MAX_PIXEL for part in value),
                f"{name} as three numbers between {least} and {_MAX_PIXEL}",
                value,
            )
        _require(self.image_size % self.patch_size == 0, "image_size a multiple of patch_size", self.image_size)
        _require(self.patches <= _MAX_PATCHES, f"at most {_MAX_PATCHES} patches of a picture", self.patches)
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            _require(width % heads == 0, f"{tower}_width a multiple of {tower}_heads", width)
            ratio = getattr(self, f"{tower}_mlp_ratio")
            _require(width * ratio >= 1, f"{tower}_mlp_ratio that leaves a hidden width", ratio)
        _require(self.context_length >= 3, "context_length of at least 3", self.context_length)
        _require(self.resize_mode in ["shortest", "squash"], "resize_mode 'shortest' or 'squash'", self.resize_mode)
        for name, default in self._derived().items():
            object.__setattr__(self, name, getattr(self, name) or default)
        object.__setattr__(self, "alpha", float(self.alpha) if self.trained_aggregators else 1.0)
        object.__setattr__(self, "image_mean", tuple(self.image_mean))  # lists, when read from JSON
        object.__setattr__(self, "image_std", tuple(self.image_std))

    @property
    def patches(self) -> int:
        """``P``, patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """``L``, rows of an embedding: ``K + 1``, or 1 where the aggregators are untrained."""
        return self.aggregated_tokens + 1 if self.trained_aggregators else 1

    def choose_alpha(self, alpha: float | None) -> float:
        """The weight of the global cosine that was asked for; None: :attr:`alpha`.

        Raises:
            InputError: It is outside [0, 1], or below 1 where the aggregators are untrained: there is no other score.
        """
        if alpha is None:
            return self.alpha
        if not 0 <= alpha <= 1:
            raise InputError(f"expected alpha in [0, 1], got {alpha!r:.80}")
        if alpha < 1 and not self.trained_aggregators:
            raise InputError(
                f"expected alpha=1, got {alpha:g}: this checkpoint has no trained aggregators, so the global score is its "
                "only one; leave alpha out, or train the aggregators (finelip adapt)"
            )
        return alpha

    @property
    def parameters(self) -> int:
        """Numbers in a model of these sizes; nothing is built to count them."""
        towers = 0
        for name in ("vision", "text"):
            width, layers = getattr(self, f"{name}_width"), getattr(self, f"{name}_layers")
            hidden = int(width * getattr(self, f"{name}_mlp_ratio"))
            block = 4 * width * (width + 1) + 2 * 2 * width + hidden * (width + 1) + width * (hidden + 1)
            towers += layers * block + width * self.embed_dim + 2 * width
        vision = self.vision_width * (3 * self.patch_size**2 + self.patches + 1 + 1 + 2)
        text = self.text_width * (self.vocab_size + self.context_length)
        hidden, aggregated = self.aggregator_hidden, self.aggregated_tokens
        aggregator = 1 + 2 * self.embed_dim + hidden * (self.embed_dim + 1) + aggregated * (hidden + 1)
        return towers + vision + text + 2 * aggregator + 1

    def _derived(self) -> dict[str, int]:
        """Sizes that follow from others where none is given."""
        return {
            "aggregated_tokens": max(1, int(self.patches * 0.4 * 0.5)),
            "aggregator_hidden": max(1, int(self.embed_dim * 0.2)),
        }

    def replace(self, **changes: Any) -> FineLIPConfig:
        """A copy with some fields changed; what was at its default and depends on them follows."""
        following: dict[str, Any] = {
            name: 0 for name, default in self._derived().items() if getattr(self, name) == default
        }
        if not self.trained_aggregators:
            following["alpha"] = ALPHA
        return dataclasses.replace(self, **{**following, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FineLIPConfig:
        """The configuration that :meth:`to_dict` wrote.

        Raises:
            ConfigError: Unknown or missing fields, by name.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(name[:40] for name in set(values) - set(fields))[:10]
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            raise ConfigError(
                f"model configuration: unknown fields {unknown}, missing fields {missing}; known are {sorted(fields)}"
            )
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> FineLIPConfig:
        """A configuration by CLIP's model name, or ``"scenes"``, the size of the bundled model.

        Raises:
            ConfigError: An unknown name.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"expected a preset of {sorted(PRESETS)}, got {name!r:.80}")
        return PRESETS[name].replace(**changes)


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"expected {expected}, got {got!r:.80}")


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
