"""Requirements of this subpackage beyond the library's own."""

from __future__ import annotations

import importlib.util

from finelip_fast.errors import InputError


def require_packages() -> None:
    """
    Raises:
        InputError: A package of the extra ``diffusion`` is missing; the message names it.
    """
    missing = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"long prompts for text-to-image need {' and '.join(missing)}: pip install 'finelip-fast[diffusion]'"
        )
