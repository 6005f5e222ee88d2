"""finelip_fast: search pictures with long descriptions.

FineLIP (CVPR 2025) extends CLIP from 77 text tokens to 256 and compares pictures and captions token by token. Start with
:class:`Retriever`; :func:`load` returns the model itself.
"""

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from finelip_fast import checkpoint as checkpoint
    from finelip_fast import client as client
    from finelip_fast import config as config
    from finelip_fast import datasets as datasets
    from finelip_fast import diffusion as diffusion
    from finelip_fast import distributed as distributed
    from finelip_fast import engines as engines
    from finelip_fast import errors as errors
    from finelip_fast import evaluation as evaluation
    from finelip_fast import explain as explain
    from finelip_fast import hits as hits
    from finelip_fast import index as index
    from finelip_fast import kernels as kernels
    from finelip_fast import metrics as metrics
    from finelip_fast import preprocess as preprocess
    from finelip_fast import reports as reports
    from finelip_fast import retriever as retriever
    from finelip_fast import studies as studies
    from finelip_fast import tokenizer as tokenizer
    from finelip_fast.checkpoint import FineLIP, UntrainedAggregatorsWarning, load, save
    from finelip_fast.client import AsyncClient, Client
    from finelip_fast.config import FineLIPConfig
    from finelip_fast.engines import Engine
    from finelip_fast.errors import (
        CheckpointError,
        ConfigError,
        EngineError,
        FineLIPError,
        ImageError,
        InputError,
        KernelError,
        PartialAnswerWarning,
        ServerError,
        StoreError,
        TrainingError,
        TruncationWarning,
        WriteError,
    )
    from finelip_fast.explain import Explanation
    from finelip_fast.hits import Hit, Hits
    from finelip_fast.index import Index, IndexSpec
    from finelip_fast.preprocess import Preprocess, open_image
    from finelip_fast.reports import AddReport, FolderReport
    from finelip_fast.retriever import Retriever
    from finelip_fast.tokenizer import tokenize

    __version__: str

__all__ = [
    "AddReport",
    "AsyncClient",
    "CheckpointError",
    "Client",
    "ConfigError",
    "Engine",
    "EngineError",
    "Explanation",
    "FineLIP",
    "FineLIPConfig",
    "FineLIPError",
    "FolderReport",
    "Hit",
    "Hits",
    "ImageError",
    "Index",
    "IndexSpec",
    "InputError",
    "KernelError",
    "PartialAnswerWarning",
    "Preprocess",
    "Retriever",
    "ServerError",
    "StoreError",
    "TrainingError",
    "TruncationWarning",
    "UntrainedAggregatorsWarning",
    "WriteError",
    "load",
    "open_image",
    "save",
    "tokenize",
]

# Imported on first access: importing PyTorch takes seconds, in which a command can neither print help nor be interrupted.
_MODULES = {
    "checkpoint": ("FineLIP", "UntrainedAggregatorsWarning", "load", "save"),
    "client": ("AsyncClient", "Client"),
    "config": ("FineLIPConfig",),
    "engines": ("Engine",),
    "errors": (
        *("CheckpointError", "ConfigError", "EngineError", "FineLIPError", "ImageError", "InputError", "KernelError"),
        *("PartialAnswerWarning", "ServerError", "StoreError", "TrainingError", "TruncationWarning", "WriteError"),
    ),
    "explain": ("Explanation",),
    "hits": ("Hit", "Hits"),
    "index": ("Index", "IndexSpec"),
    "preprocess": ("Preprocess", "open_image"),
    "reports": ("AddReport", "FolderReport"),
    "retriever": ("Retriever",),
    "tokenizer": ("tokenize",),
}
# Modules without public names at the top; with those above, what `dir` lists beside the names.
_OTHER_MODULES = ("datasets", "diffusion", "distributed", "evaluation", "kernels", "metrics", "studies")
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Return a public name, the version, or a module of the package."""
        if name == "__version__":
            globals()[name] = value = _importlib.import_module(f"{__name__}._versions").library_version()
            return value
        if name in _MODULE_OF:
            globals()[name] = value = getattr(_importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            return value
        if not name.startswith("__"):
            try:
                return _importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*special, *__all__, *_MODULES, *_OTHER_MODULES, "__version__"})
