"""Configuration of a training run: one frozen dataclass, read from a recipe and the command line, saved with the result."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_fast._json import read_json
from finelip_fast.config import KEEP_POSITIONS, PRESETS, FineLIPConfig
from finelip_fast.errors import ConfigError
from finelip_fast.training.fields import check_fields, option, require

if TYPE_CHECKING:
    from finelip_fast.training.augment import Augmentation
    from finelip_fast.training.losses import Criterion

RECIPES = Path(__file__).parent / "recipes"

_MAX_TERMS = 64
_MAX_RECIPE = 1 << 20  # bytes

_UNFREEZE = re.compile(r"all|none|last:[1-9]\d{0,3}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Each field is a command-line option. Some bounds are only beyond what any machine can handle."""

    out: str = option("folder of the run: checkpoints, log, state to resume from")
    train: str = option("pairs to train on: scenes:SPLIT:SIZE, jsonl:FILE, sharegpt4v:FILE or webdataset:PATTERN")
    validation: str = option("pairs to choose the best checkpoint on, in the same forms without webdataset")
    root: str = option("folder that relative picture paths start from", "")
    alpha: str = option(
        "weight of the global score to store in the checkpoint: a number from 0 to 1, or validation, the one with the best "
        "recall at each validation",
        "validation",
    )
    init: str = option("checkpoint to start from; empty: train from scratch, with --preset", "")
    preset: str = option(f"sizes of a model from nothing: {', '.join(PRESETS)}", "scenes", words=PRESETS)
    context_length: int = option("longest caption in tokens", 256, least=3, most=1 << 16)
    loss: tuple[str, ...] = option(
        "terms LOSS:SCORE[:WEIGHT], such as contrastive:global triplet:fine",
        ("contrastive:global", "contrastive:fine", "contrastive:combined"),
    )
    grounding: float = option(
        "weight of the loss that matches phrases to their places in the picture; needs boxes, as Scenes has",
        0.0,
        least=0,
    )
    contextual: float = option(
        "weight of the loss that matches captions, sentences and phrases to what they attend to in the picture",
        0.0,
        least=0,
    )
    beta: float = option("with --contextual: weight of a caption's other parts as positives", 0.5, least=0, most=1)
    augment: tuple[str, ...] = option(
        "augmentations of captions with their probabilities, such as sentences:0.5 typos:0.2: sentences or words left out, "
        "typos, foreign sentences",
        (),
    )
    margin: float = option("margin of the triplet losses", 0.2)
    gamma: float = option("weight of the adaptive margins", 0.5)
    label_smoothing: float = option("label smoothing of the contrastive loss", 0.0, least=0, most=1)
    batch_size: int = option("pairs per process in one pass", 128, least=2, most=1 << 20)
    accumulation_steps: int = option("passes per optimizer step", 1, least=1, most=1 << 20)
    accumulation: str = option(
        "negatives of a pair: cached, those of the whole step, at the cost of another forward pass; separate, those of its "
        "own pass, as FineLIP's authors trained",
        "cached",
        words=("cached", "separate"),
    )
    steps: int = option("optimizer steps; a finished run can go on with more", 1000, least=1)
    stop_at: int = option(
        "stop at this step of the schedule, so that another run can start from there; 0: run to the end", 0, least=0
    )
    encoder_lr: float = option("peak learning rate of the CLIP encoders", 1e-6, least=0)
    aggregator_lr: float = option("peak learning rate of the aggregators", 2e-4, least=0)
    weight_decay: float = option("weight decay, except of norms, biases, positions and scales", 1e-2, least=0)
    warmup_steps: int = option("steps of linear warm-up, followed by a cosine to zero", 200, least=0)
    clip_norm: float = option("maximum norm of the gradient; 0: no clipping", 1.0, least=0)
    unfreeze: str = option(
        "blocks of the CLIP encoders to train: all, none, or last:N, the last N of both; the aggregators are always trained",
        "all",
    )
    features: str = option(
        "with --unfreeze none: folder for the token features of all pairs, so that the encoders run only once", ""
    )
    feature_precision: str = option(
        "precision of the encoders that compute features: fp32, bf16 or, on a CPU, int8",
        "fp32",
        words=("fp32", "bf16", "int8"),
    )
    freeze_positions: int = option(
        "number of first text positions to freeze; give 0 when training from scratch; SigLIP's are all trained",
        KEEP_POSITIONS,
        least=0,
    )
    gradient_checkpointing: bool = option("recompute activations: less memory, more time", False)
    ema_decay: float = option("decay of an exponential moving average of the weights; 0: none", 0.0, least=0, below=1)
    precision: str = option(
        "precision to train in: bf16 (autocast), fp32, or auto, bf16 if the device has the instructions",
        "auto",
        words=("auto", "bf16", "fp32"),
    )
    compile: bool = option("compile the model with torch.compile", False)
    group: int = option("number of neighbouring examples to keep in one batch (Scenes: 4, a family)", 1, least=1)
    remote_data: bool = option("allow webdataset shards from the network; a recipe cannot set this", False)
    epoch_batches: int = option("batches per epoch and process; required with webdataset", 0, least=0)
    workers: int = option("data loading processes", 2, least=0, most=1024)
    max_broken_share: float = option("share of unreadable pairs above which the run stops", 0.01, least=0, most=1)
    eval_every: int = option("steps between validations", 500, least=1)
    save_every: int = option("steps between saved states", 500, least=1)
    log_every: int = option("steps between lines of the log", 10, least=1)
    tensorboard: bool = option("write TensorBoard events beside the log", True)
    threads: int = option("CPU threads of each process; 0: torch's choice", 0, least=0, most=1024)
    device: str = option("device to train on: auto, cpu, cuda", "auto", words=("auto", "cpu", "cuda"))
    seed: int = option("seed of initial weights and of the order of pairs", 0)

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

        check_fields(self)
        require(bool(self.out), "out, a folder", self.out)
        require(bool(self.loss), "at least one loss term", self.loss)
        require(len(self.loss) <= _MAX_TERMS, f"at most {_MAX_TERMS} loss terms", len(self.loss))
        for term in self.loss:
            LossTerm.parse(term)
        Augmentation.parse(self.augment)
        require(self.alpha == "validation" or _is_share(self.alpha), "alpha in [0, 1] or validation", self.alpha)
        require(bool(_UNFREEZE.fullmatch(self.unfreeze)), "unfreeze all, none or last:N", self.unfreeze)
        require(self.batch_size % self.group == 0, f"batch_size a multiple of group {self.group}", self.batch_size)
        require(not self.validation.startswith("webdataset:"), "validation of map-style data", self.validation)
        if self.features:
            require(self.unfreeze == "none", "unfreeze none with features", self.unfreeze)
            require(not self.augment, "no augment with features, which are of captions as they are", self.augment)
            require(not self.train.startswith("webdataset:"), "train of map-style data with features", self.train)
        if self.grounding:
            place = "train=scenes:SPLIT[:SIZE] with grounding, whose phrases have boxes"
            require(self.train.startswith("scenes:") and self.train.count(":") < 3, place, self.train)
        if self.grounding or self.contextual:
            cached = self.accumulation_steps > 1 and self.accumulation == "cached"
            require(not cached, "accumulation separate with grounding or contextual", self.accumulation)
        if self.train.startswith("webdataset:"):
            require(self.epoch_batches > 0, "epoch_batches with webdataset", self.epoch_batches)
            require(self.group == 1, "group 1 with webdataset", self.group)
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


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _needs(package: str, purpose: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{purpose} needs the package {package!r}: pip install 'finelip-fast[train]'")
