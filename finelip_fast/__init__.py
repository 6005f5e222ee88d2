"""finelip_fast: search pictures with long descriptions.

FineLIP (CVPR 2025) extends CLIP from 77 text tokens to 256 and compares pictures and captions token by token. Begin with
:class:`Retriever`; :func:`load` gives the model itself.
"""

import importlib.metadata
import typing

if typing.TYPE_CHECKING:
    from finelip_fast.checkpoint import load, save
    from finelip_fast.config import FineLIPConfig
    from finelip_fast.errors import FineLIPError
    from finelip_fast.model import FineLIP
    from finelip_fast.preprocess import Preprocess, open_image
    from finelip_fast.retriever import AddReport, Hit, Retriever
    from finelip_fast.tokenizer import tokenize

__version__ = importlib.metadata.version("finelip-fast")

__all__ = [
    "AddReport",
    "FineLIP",
    "FineLIPConfig",
    "FineLIPError",
    "Hit",
    "Preprocess",
    "Retriever",
    "load",
    "open_image",
    "save",
    "tokenize",
]

# Each comes when it is first asked for: PyTorch takes seconds, in which a command can neither help nor be interrupted.
_MODULES = {
    "errors": ("FineLIPError",),
    "checkpoint": ("load", "save"),
    "config": ("FineLIPConfig",),
    "model": ("FineLIP",),
    "preprocess": ("Preprocess", "open_image"),
    "retriever": ("AddReport", "Hit", "Retriever"),
    "tokenizer": ("tokenize",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package."""
        if name in _MODULE_OF:
            globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            return value
        if not name.startswith("__"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
