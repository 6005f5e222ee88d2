"""Building models from exactly the weights of a checkpoint, another project's or our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from finelip_fast.checkpoint.foreign import LAYOUTS, Translation, initial_aggregators, shortened, translate
from finelip_fast.config import FineLIPConfig
from finelip_fast.encoders import TextEncoder, stretch_positions
from finelip_fast.errors import CheckpointError, ConfigError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import CLIP_BPE, Tokenizer

CLIP_CONTEXT = 77
LONG_CONTEXT = 256

_POSITIONS = "text.positional_embedding"

# Number of parameters that a model may have beyond its weights before it is refused without being built.
_SMALL = 1 << 24

Model = TypeVar("Model", bound=FineLIP)
Describe = Callable[[Translation], FineLIPConfig]


class Contents(NamedTuple):
    """The contents of a checkpoint: the sizes of a model, its weights as stored in the file, and its tokenizer."""

    config: FineLIPConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer = CLIP_BPE


def translated(
    entries: Mapping[str, Any], describe: Describe, source: str, context_length: int | None, key: str | None = None
) -> tuple[Contents, Translation]:
    """Translate another project's entries into our contents; also return the translation itself."""
    try:
        translation = translate(entries, key)
        calibration = None if translation.has_aggregators else translation.logit_bias
        config = describe(translation).replace(trained_aggregators=translation.has_aggregators, logit_bias=calibration)
        tensors = translation.tensors
        logits = tensors.get("image_aggregator.logits.weight")
        if translation.has_aggregators and logits is not None and logits.dim() == 2:
            config = config.replace(aggregated_tokens=logits.shape[0], aggregator_hidden=logits.shape[1])
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{source}: {error}") from error
    check_room(config, tensors, source)
    if not translation.has_aggregators:
        tensors = {**tensors, **initial_aggregators(config)}
    check_weights(config, tensors, source, translation.names)
    longer = LONG_CONTEXT if config.context_length <= CLIP_CONTEXT else config.context_length
    return lengthen(Contents(config, tensors), context_length or longer, source), translation


def check_room(config: FineLIPConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse sizes far beyond the weights before anything is built; missing weights are reported by the model."""
    held = sum(tensor.numel() for tensor in tensors.values())
    if config.parameters > 2 * held + _SMALL:
        raise CheckpointError(
            f"{source}: expected the weights of the configured model, {config.parameters} parameters, found {held}"
        )


def check_weights(
    config: FineLIPConfig, tensors: Mapping[str, Tensor], source: str, names: Mapping[str, str] | None = None
) -> None:
    """Refuse weights that are not finite or do not exactly fit a model of these sizes; ``names`` are their original names."""
    expected = _outline(config, FineLIP).state_dict()
    misshapen = [
        f"{name} {list(tensor.shape)} {tensor.dtype}, expected {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and (tensor.shape != expected[name].shape or not tensor.is_floating_point())
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [(names or {}).get(name, name) for name in tensors if name not in expected],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        listing = "; ".join(f"{problem}: {shortened(entries)}" for problem, entries in problems.items() if entries)
        raise CheckpointError(f"{source}: expected the {len(expected)} weights of {LAYOUTS}; {listing}")
    if broken := not_finite(tensors):
        listing = shortened((names or {}).get(name, name) for name in broken)
        raise CheckpointError(
            f"{source}: expected finite numbers, found NaN or infinity in {listing}; the training diverged, or the file is "
            "damaged: get it again, or use an earlier checkpoint"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the names of tensors that contain NaN, infinity or values beyond float32's range."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    # A sum takes one pass at memory speed, and is not finite if any number is not. A sum of finite numbers may overflow;
    # then minimum and maximum decide, at a third of that speed. isfinite() takes forty times as long.
    tensor = tensor if tensor.itemsize in (2, 4) else tensor.to(torch.float32)
    return bool(tensor.sum().isfinite()) or bool(torch.stack(tensor.aminmax()).isfinite().all())


def lengthen(contents: Contents, length: int, source: str) -> Contents:
    """Stretch the context to ``length`` tokens.

    SigLIP's table of positions stays as it is: its encoder spreads it (:func:`finelip_fast.encoders.spread_positions`).

    Raises:
        ConfigError: It is already longer.
    """
    config, tensors = contents.config, contents.tensors
    rows = config.context_length
    if length < rows:
        raise ConfigError(
            f"expected context_length of at least {rows}, the positions of {source}, got {length}; "
            "to read fewer tokens, pass context_length to tokenize instead"
        )
    if length == rows:
        return contents
    config = config.replace(context_length=length)  # refuses a length beyond bounds
    if config.family == "clip":
        table = stretch_positions(tensors[_POSITIONS].to(torch.float32), length)
        tensors = {**tensors, _POSITIONS: table}
    return contents._replace(config=config, tensors=tensors)


def build(contents: Contents, kind: type[Model]) -> Model:
    """Build a float32 model of a given class, on the CPU and in eval mode, with copies of exactly these weights."""
    model = _outline(contents.config, kind)
    model.tokenizer = contents.tokenizer
    model.load_state_dict(
        {
            name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in contents.tensors.items()
        },
        assign=True,
    )
    if isinstance(model.text, TextEncoder):  # the mask is not in any state dict
        model.text.register_buffer("attn_mask", model.text.build_causal_mask(), persistent=False)
    return model.eval()


def _outline(config: FineLIPConfig, kind: type[Model]) -> Model:
    """Make a model without allocating weights: this is quick, and leaves the caller's random state untouched."""
    with torch.device("meta"), _NothingFilled():
        return kind(config)


class _NothingFilled(TorchFunctionMode):
    """Skip what fills tensors without memory: to do nothing in these ways, PyTorch imports its compiler for a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.normal_, Tensor.triu_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
