"""Checkpoints: our own folder, and other projects' files.

Our format is one folder, read without pickle::

    config.json          {"format": "finelip_fast/1", the fields of FineLIPConfig, "weights_sha256": ..., "metadata": {...}}
    model.safetensors    the model's state dict, float32 or half precision

All other formats are translated as they are read (:mod:`finelip_fast.checkpoint.foreign`).
"""

from finelip_fast.checkpoint.architecture import config_from_open_clip
from finelip_fast.checkpoint.loading import AveragedWeightsWarning, UntrainedAggregatorsWarning
from finelip_fast.checkpoint.pretrained import FineLIP, import_state_dict, load
from finelip_fast.checkpoint.saving import Identity, convert, describe, fingerprint, identify, save, verify
from finelip_fast.encoders import stretch_positions

__all__ = [
    "AveragedWeightsWarning",
    "FineLIP",
    "Identity",
    "UntrainedAggregatorsWarning",
    "config_from_open_clip",
    "convert",
    "describe",
    "fingerprint",
    "identify",
    "import_state_dict",
    "load",
    "save",
    "stretch_positions",
    "verify",
]
