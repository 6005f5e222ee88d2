"""finelip_fast: search pictures with long descriptions.

FineLIP (CVPR 2025) extends CLIP from 77 text tokens to 256 and compares pictures and captions token by token. Begin with
:class:`Retriever`; :func:`load` gives the model itself.
"""

from importlib.metadata import version

from finelip_fast._errors import FineLIPError
from finelip_fast.checkpoint import load, save
from finelip_fast.config import FineLIPConfig
from finelip_fast.model import FineLIP
from finelip_fast.preprocess import Preprocess, open_image
from finelip_fast.retriever import AddReport, Hit, Retriever
from finelip_fast.tokenizer import tokenize

__version__ = version("finelip-fast")

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
