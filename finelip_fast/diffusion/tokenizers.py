"""Tokenizers of pipelines for another length, which report what they cut."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

from finelip_fast.config import EOT_TOKEN, START_TOKEN
from finelip_fast.errors import InputError, TruncationWarning
from finelip_fast.tokenizer import encode_batch

_PROBE = "A red house, 3 storeys high; isn't it?"


def long_tokenizer(tokenizer: Any, length: int) -> Any:
    """Copy a pipeline's tokenizer for texts of ``length`` tokens; the copy warns of those that it cuts.

    The copy is saved like the original, so a saved pipeline opens without this library.

    Raises:
        InputError: The tokenizer does not give CLIP's ids, or has tokens beyond CLIP's.
    """
    kind = next((base for base in type(tokenizer).__mro__ if not issubclass(base, _Reporting)), type(tokenizer))
    expected = encode_batch(_PROBE)
    if tokenizer(_PROBE).input_ids != expected.ids[0, : int(expected.lengths[0])].tolist():
        raise InputError(
            f"expected a pipeline with CLIP's tokenizer, whose start and end token are {START_TOKEN} and {EOT_TOKEN}, got a "
            f"{kind.__name__} of {len(tokenizer)} tokens that tokenizes {_PROBE!r} differently"
        )
    if len(tokenizer) > EOT_TOKEN + 1:
        raise InputError(
            f"expected CLIP's {EOT_TOKEN + 1} tokens, got {len(tokenizer)}; a textual inversion is loaded: extend "
            "the pipeline first, then load_textual_inversion"
        )
    # transformers and diffusers save the names of classes, so these are the parent's.
    reporting = type(kind.__name__, (_Reporting, kind), {"__module__": kind.__module__})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return reporting.from_pretrained(folder, model_max_length=length)  # type: ignore[attr-defined]  # of its parent


class _Reporting:
    """Mixin that warns of texts that are cut."""

    def __call__(self, text: Any = None, *args: Any, truncation: Any = None, **options: Any) -> Any:
        encoded = super().__call__(text, *args, truncation=truncation, **options)  # type: ignore[misc]  # of its parent
        max_length = options.get("max_length")
        if truncation is True and max_length is not None and isinstance(text, (str, list)):
            texts = [text] if isinstance(text, str) else text
            lengths = [len(ids) for ids in super().__call__(texts, verbose=False).input_ids]  # type: ignore[misc]
            losses = [length - max_length for length in lengths if length > max_length]
            if losses:
                were, most = ("was", "it") if len(losses) == 1 else ("were", "the longest")
                warnings.warn(
                    f"{len(losses)} of {len(lengths)} prompts {were} cut to {max_length} tokens; {most} lost {max(losses)}. "
                    "Shorten them, or extend the pipeline with a larger context_length.",
                    TruncationWarning,
                    stacklevel=2,
                )
        return encoded
