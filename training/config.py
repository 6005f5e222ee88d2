"""Configuration of a training run: one frozen dataclass, read from a recipe and the command line, saved with the result."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from finelip_fast._json import read_json
from finelip_fast.config import KEEP_POSITIONS, PRESETS, FineLIPConfig
from finelip_fast.errors import ConfigError

if TYPE_CHECKING:
    from finelip_fast.training.augment import Augmentation
    from finelip_fast.training.losses import Criterion

RECIPES = Path(__file__).parent / "recipes"

# Limits beyond what any machine can handle: processes, threads, pairs per pass, passes per step and tokens.
_AT_MOST = {
    "workers": 1024,
    "threads": 1024,
    "batch_size": 1 << 20,
    "accumulation_steps": 1 << 20,
    "context_length": 1 << 16,
}
_LARGEST = (1 << 63) - 1
_MAX_TERMS = 64
_MAX_TEXT = 4096
_MAX_RECIPE = 1 << 20  # bytes

_UNFREEZE = re.compile(r"all|none|last:[1-9]\d{0,3}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Each field is a command-line option, with its help text in the metadata."""

    out: str = field(metadata={"help": "folder of the run: checkpoints, log, state to resume from"})
    train: str = field(
        metadata={"help": "pairs to train on: scenes:SPLIT:SIZE, jsonl:FILE, sharegpt4v:FILE or webdataset:PATTERN"}
    )
    validation: str = field(
        metadata={"help": "pairs to choose the best checkpoint on, in the same forms without webdataset"}
    )
    root: str = field(default="", metadata={"help": "folder that relative picture paths start from"})
    alpha: str = field(
        default="validation",
        metadata={
            "help": "weight of the global score to store in the checkpoint: a number from 0 to 1, or "
            "validation, the one with the best recall at each validation"
        },
    )
    init: str = field(
        default="", metadata={"help": "checkpoint to start from; empty: train from scratch, with --preset"}
    )
    preset: str = field(default="scenes", metadata={"help": f"sizes of a model from nothing: {', '.join(PRESETS)}"})
    context_length: int = field(default=256, metadata={"help": "longest caption in tokens"})
    loss: tuple[str, ...] = field(
        default=("contrastive:global", "contrastive:fine", "contrastive:combined"),
        metadata={"help": "terms LOSS:SCORE[:WEIGHT], such as contrastive:global triplet:fine"},
    )
    grounding: float = field(
        default=0.0,
        metadata={
            "help": "weight of the loss that matches phrases to their places in the picture; needs boxes, as Scenes has"
        },
    )
    contextual: float = field(
        default=0.0,
        metadata={
            "help": "weight of the loss that matches captions, sentences and phrases to what they attend "
            "to in the picture"
        },
    )
    beta: float = field(
        default=0.5, metadata={"help": "with --contextual: weight of a caption's other parts as positives"}
    )
    augment: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "augmentations of captions with their probabilities, such as sentences:0.5 typos:0.2: "
            "sentences or words left out, typos, foreign sentences"
        },
    )
    margin: float = field(default=0.2, metadata={"help": "margin of the triplet losses"})
    gamma: float = field(default=0.5, metadata={"help": "weight of the adaptive margins"})
    label_smoothing: float = field(default=0.0, metadata={"help": "label smoothing of the contrastive loss"})
    batch_size: int = field(default=128, metadata={"help": "pairs per process in one pass"})
    accumulation_steps: int = field(default=1, metadata={"help": "passes per optimizer step"})
    accumulation: str = field(
        default="cached",
        metadata={
            "help": "negatives of a pair: cached, those of the whole step, at the cost of another forward pass; "
            "separate, those of its own pass, as FineLIP's authors trained"
        },
    )
    steps: int = field(default=1000, metadata={"help": "optimizer steps; a finished run can go on with more"})
    stop_at: int = field(
        default=0,
        metadata={
            "help": "stop at this step of the schedule, so that another run can start from there; 0: run to the end"
        },
    )
    encoder_lr: float = field(default=1e-6, metadata={"help": "peak learning rate of the CLIP encoders"})
    aggregator_lr: float = field(default=2e-4, metadata={"help": "peak learning rate of the aggregators"})
    weight_decay: float = field(
        default=1e-2, metadata={"help": "weight decay, except of norms, biases, positions and scales"}
    )
    warmup_steps: int = field(default=200, metadata={"help": "steps of linear warm-up, followed by a cosine to zero"})
    clip_norm: float = field(default=1.0, metadata={"help": "maximum norm of the gradient; 0: no clipping"})
    unfreeze: str = field(
        default="all",
        metadata={
            "help": "blocks of the CLIP encoders to train: all, none, or last:N, the last N of both; the "
            "aggregators are always trained"
        },
    )
    features: str = field(
        default="",
        metadata={
            "help": "with --unfreeze none: folder for the token features of all pairs, so that the encoders run"
            " only once"
        },
    )
    feature_precision: str = field(
        default="fp32",
        metadata={"help": "precision of the encoders that compute features: fp32, bf16 or, on a CPU, int8"},
    )
    freeze_positions: int = field(
        default=KEEP_POSITIONS,
        metadata={
            "help": "number of first text positions to freeze; give 0 when training from scratch; SigLIP's are "
            "all trained"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations: less memory, more time"}
    )
    ema_decay: float = field(
        default=0.0, metadata={"help": "decay of an exponential moving average of the weights; 0: none"}
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "precision to train in: bf16 (autocast), fp32, or auto, bf16 if the device has the instructions"
        },
    )
    compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})
    group: int = field(
        default=1, metadata={"help": "number of neighbouring examples to keep in one batch (Scenes: 4, a family)"}
    )
    remote_data: bool = field(
        default=False, metadata={"help": "allow webdataset shards from the network; a recipe cannot set this"}
    )
    epoch_batches: int = field(default=0, metadata={"help": "batches per epoch and process; required with webdataset"})
    workers: int = field(default=2, metadata={"help": "data loading processes"})
    max_broken_share: float = field(
        default=0.01, metadata={"help": "share of unreadable pairs above which the run stops"}
    )
    eval_every: int = field(default=500, metadata={"help": "steps between validations"})
    save_every: int = field(default=500, metadata={"help": "steps between saved states"})
    log_every: int = field(default=10, metadata={"help": "steps between lines of the log"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard events beside the log"})
    threads: int = field(default=0, metadata={"help": "CPU threads of each process; 0: torch's choice"})
    device: str = field(default="auto", metadata={"help": "device to train on: auto, cpu, cuda"})
    seed: int = field(default=0, metadata={"help": "seed of initial weights and of the order of pairs"})

    def __post_init__(self) -> None:
        """Check all fields before any data is read.

        Raises:
            ConfigError: A field is invalid; the message gives the field, the expected value and the actual one.
        """
        # Imported late: the command line builds its options from the fields, and importing PyTorch takes seconds.
        import torch

        from finelip_fast.training.augment import Augmentation
        from finelip_fast.training.losses import LossTerm
        from finelip_fast.training.shards import shard_names

        for name, kind in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if kind in (bool, int, float, str):
                fits = isinstance(value, (int, float) if kind is float else kind)
                fits = fits and isinstance(value, bool) == (kind is bool)
                _require(fits, f"{name} of type {kind.__name__}", value)
                if kind is str:
                    fits = "\0" not in value and len(value) <= _MAX_TEXT
                    _require(fits, f"{name} of at most {_MAX_TEXT} characters without NUL", value)
            else:
                fits = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
                _require(fits, f"{name} as a list of texts", value)
        object.__setattr__(self, "loss", tuple(self.loss))
        object.__setattr__(self, "augment", tuple(self.augment))
        _require(bool(self.out), "out, a folder", self.out)
        at_least = {
            "batch_size": 2,
            "accumulation_steps": 1,
            "steps": 1,
            "context_length": 3,
            "seed": -_LARGEST,
            "warmup_steps": 0,
            "group": 1,
            "workers": 0,
        }
        at_least |= {"eval_every": 1, "save_every": 1, "log_every": 1, "freeze_positions": 0, "clip_norm": 0}
        at_least |= {
            "encoder_lr": 0,
            "aggregator_lr": 0,
            "weight_decay": 0,
            "epoch_batches": 0,
            "threads": 0,
            "stop_at": 0,
            "grounding": 0,
            "contextual": 0,
        }
        for name, minimum in at_least.items():
            _require(getattr(self, name) >= minimum, f"{name} of at least {minimum}", getattr(self, name))
        for name, kind in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if kind is int:
                most = _AT_MOST.get(name, _LARGEST)
                _require(value <= most, f"{name} of at most {most}", value)
            elif kind is float:
                _require(math.isfinite(value), f"{name} as a finite number", value)
        _require(bool(self.loss), "at least one loss term", self.loss)
        _require(len(self.loss) <= _MAX_TERMS, f"at most {_MAX_TERMS} loss terms", len(self.loss))
        for term in self.loss:
            LossTerm.parse(term)
        Augmentation.parse(self.augment)
        _require(self.alpha == "validation" or _is_share(self.alpha), "alpha in [0, 1] or validation", self.alpha)
        _require(bool(_UNFREEZE.fullmatch(self.unfreeze)), "unfreeze all, none or last:N", self.unfreeze)
        _require(self.precision in ("auto", "bf16", "fp32"), "precision auto, bf16 or fp32", self.precision)
        has_precision = self.feature_precision in ("fp32", "bf16", "int8")
        _require(has_precision, "feature_precision fp32, bf16 or int8", self.feature_precision)
        _require(self.accumulation in ("cached", "separate"), "accumulation cached or separate", self.accumulation)
        _require(0 <= self.ema_decay < 1, "ema_decay in [0, 1)", self.ema_decay)
        _require(0 <= self.max_broken_share <= 1, "max_broken_share in [0, 1]", self.max_broken_share)
        _require(0 <= self.label_smoothing <= 1, "label_smoothing in [0, 1]", self.label_smoothing)
        _require(self.device in ("auto", "cpu", "cuda"), "device auto, cpu or cuda", self.device)
        _require(bool(self.init) or self.preset in PRESETS, f"preset of {', '.join(sorted(PRESETS))}", self.preset)
        _require(self.batch_size % self.group == 0, f"batch_size a multiple of group {self.group}", self.batch_size)
        _require(not self.validation.startswith("webdataset:"), "validation of map-style data", self.validation)
        if self.features:
            _require(self.unfreeze == "none", "unfreeze none with features", self.unfreeze)
            _require(not self.augment, "no augment with features, which are of captions as they are", self.augment)
            _require(not self.train.startswith("webdataset:"), "train of map-style data with features", self.train)
        if self.grounding:
            place = "train=scenes:SPLIT[:SIZE] with grounding, whose phrases have boxes"
            _require(self.train.startswith("scenes:") and self.train.count(":") < 3, place, self.train)
        _require(0 <= self.beta <= 1, "beta in [0, 1]", self.beta)
        if self.grounding or self.contextual:
            cached = self.accumulation_steps > 1 and self.accumulation == "cached"
            _require(not cached, "accumulation separate with grounding or contextual", self.accumulation)
        if self.train.startswith("webdataset:"):
            _require(self.epoch_batches > 0, "epoch_batches with webdataset", self.epoch_batches)
            _require(self.group == 1, "group 1 with webdataset", self.group)
            _needs("webdataset", "webdataset shards")
            shard_names(self.train.removeprefix("webdataset:"), remote=self.remote_data)
        if self.tensorboard:
            _needs("tensorboard", "TensorBoard (or pass --no-tensorboard)")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("expected a CUDA device for device=cuda, found none; use --device cpu")

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return min(self.steps, self.stop_at or self.steps)

    @property
    def alphas(self) -> tuple[float, ...]:
        """Weights of the global cosine to choose from."""
        from finelip_fast.metrics import ALPHAS

        return ALPHAS if self.alpha == "validation" else (float(self.alpha),)

    @property
    def criterion(self) -> Criterion:
        from finelip_fast.training.losses import Criterion, LossTerm

        return Criterion(
            terms=tuple(LossTerm.parse(term) for term in self.loss),
            margin=self.margin,
            gamma=self.gamma,
            label_smoothing=self.label_smoothing,
        )

    @property
    def augmentation(self) -> Augmentation | None:
        """Caption augmentation, or None to train on the original captions."""
        from finelip_fast.training.augment import Augmentation

        return Augmentation.parse(self.augment) if self.augment else None

    @property
    def model_config(self) -> FineLIPConfig:
        """Sizes of a model trained from scratch."""
        return FineLIPConfig.preset(self.preset, context_length=self.context_length)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# Former names of fields, from before one thing had one name: see CONTRIBUTING.
RENAMED = {"val": "validation", "image_root": "root", "accumulate": "accumulation_steps"}


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def configure(recipe: str | None, options: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from a recipe's values, overridden by options.

    Args:
        recipe: Recipe, as in :func:`load_recipe`; None: the options provide everything.
        options: Field values; None and an empty tuple count as not given.

    Raises:
        ConfigError: The recipe is unknown, or the configuration cannot be honoured.
    """
    overrides = {name: value for name, value in options.items() if value not in (None, ())}
    recipe_values = (
        load_recipe(recipe, out=overrides.get("out"), remote=bool(overrides.get("remote_data")))
        if recipe is not None
        else {}
    )
    values = {**recipe_values, **overrides}
    missing = [name for name in ("out", "train", "validation") if name not in values]
    if missing:
        raise ConfigError(
            f"expected {', '.join('--' + name for name in missing)}, or a recipe that gives them: {', '.join(recipe_names())}"
        )
    return TrainConfig(**values)


def load_recipe(name: str, *, out: str | None = None, remote: bool = False) -> dict[str, Any]:
    """Read the values of a shipped recipe or of a JSON file.

    Args:
        name: Name of a shipped recipe, or a path that ends in ``.json``.
        out: Folder of the run, instead of the recipe's.
        remote: Whether the recipe may request ``remote_data``.

    Raises:
        ConfigError: There is no such recipe, it has unknown fields, or its run folder lies outside the current directory: a
            recipe from someone else must not choose what gets overwritten.
    """
    shipped = {path.stem: path for path in RECIPES.glob("*.json")}
    if not name.endswith(".json") and name not in shipped:
        raise ConfigError(f"expected one of the recipes {', '.join(sorted(shipped))}, or a JSON file, got {name!r:.80}")
    path = shipped.get(name, Path(name))
    values: dict[str, Any] = read_json(path, error=ConfigError, expected="a recipe", kind=dict, max_bytes=_MAX_RECIPE)
    for old, name in RENAMED.items():
        if old in values:
            raise ConfigError(f"{path}: the field {old!r} is called {name!r} now")
    unknown = sorted(set(values) - {option.name for option in dataclasses.fields(TrainConfig)})
    if unknown:
        raise ConfigError(f"{path}: expected fields of a recipe, found {str(unknown)[:200]}; see --help")
    if values.pop("remote_data", False) and not remote:  # only whoever runs the recipe may allow it
        raise ConfigError(f"{path} asks for remote_data; give --remote-data on the command line if you trust it")
    if out is not None:
        return values | {"out": out}
    folder = values.get("out")
    if isinstance(folder, str) and not Path(os.path.abspath(folder)).is_relative_to(os.getcwd()):
        raise ConfigError(
            f"{path}: expected 'out' within {os.getcwd()}, found {folder!r:.80}; give --out to write there"
        )
    return values


def _require(condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"expected {expected}, got {got!r:.80}")


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _needs(package: str, purpose: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{purpose} needs the package {package!r}: pip install 'finelip-fast[train]'")
