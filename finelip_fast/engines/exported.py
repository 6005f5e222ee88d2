"""What the engines on exported files share: whose files they are, and batches that the files take."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast.artefacts.manifest import Export, rebuild_command
from finelip_fast.encoders import caption_lengths
from finelip_fast.engines.base import Engine
from finelip_fast.model import check_ids, check_pixels


class ExportedEngine(Engine):
    """Encoders in files beside a checkpoint.

    Args:
        checkpoint: As :func:`finelip_fast.load` takes it.
        export: The files, checked against the checkpoint before any of them is loaded.
        device: Where they run.
        reason: Why this engine was chosen.
        expected: Options of the manifest that must have these values.

    Attributes:
        export: The files in use.
    """

    # Text is padded to multiples of so many positions, so that few shapes occur where a new shape costs time.
    _positions_at_once = 1
    # Larger batches are encoded in parts.
    _largest_batch: int | None = None

    _image: Callable[[Tensor], Tensor]
    _text: Callable[[Tensor], Tensor]

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None,
        export: Export,
        device: torch.device,
        *,
        reason: str,
        **expected: object,
    ) -> None:
        self._identify(checkpoints.load(checkpoint), checkpoint)
        manifest = export.manifest
        export.check(self.fingerprint, rebuild_command(checkpoint, self.name, manifest.precision), **expected)
        self.export, self.device, self.reason = export, device, reason
        self.precision = manifest.precision

    def encode_image(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self.config)
        return self._in_parts(self._image, pixels.to(torch.float32))

    def encode_text(self, ids: Tensor) -> Tensor:
        check_ids(ids, self.config)
        longest = max(1, int(caption_lengths(ids).max())) if len(ids) else 1
        step = self._positions_at_once
        width = min(-(-longest // step) * step, self.config.context_length)
        ids = torch.nn.functional.pad(ids[:, :width], (0, max(0, width - ids.shape[1])))
        return self._in_parts(self._text, ids.to(torch.int64))

    def _in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if not len(batch):
            return torch.zeros(0, self.config.tokens, self.config.embed_dim, device=self.device)
        parts = [run(part) for part in batch.split(self._largest_batch or len(batch))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
