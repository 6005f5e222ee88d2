"""Parts shared by the engines on exported files: verification of the files, and batches that the files take."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from finelip_fast import checkpoint as checkpoints
from finelip_fast.encoders import caption_lengths
from finelip_fast.engines.base import Engine
from finelip_fast.errors import EngineError
from finelip_fast.model import check_ids, check_pixels
from finelip_fast.runtimes.manifest import Export, rebuild_command

# Limits for a file beside a checkpoint, so that none fills the memory: twice the weights in float32, and any other content.
_BYTES_A_WEIGHT = 8
_LARGEST_BESIDE_WEIGHTS = 1 << 28


class ExportedEngine(Engine):
    """Encoders in files beside a checkpoint.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        export: Files to run. Their manifest is compared with the checkpoint before any of them is read, and only bytes with
            the hash that it names are run.
        device: Device to run on.
        reason: Reason why this engine was chosen.
        expected: Options of the manifest that must have these values.
    """

    # Text is padded to multiples of this many positions, so that few shapes occur where a new shape costs time.
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
        # By the weights themselves, not by a hash stored beside them, which whoever made the files could write. This takes
        # two thirds of the time of loading the model, and one copy of the weights less.
        self._identify(*checkpoints.identify(checkpoint), checkpoint)
        manifest = export.manifest
        # Whatever is wrong, without --again files with the right hashes would be left unchanged.
        self._rebuild = rebuild_command(checkpoint, self.name, manifest.precision, ["--again"])
        # Before a byte of the files is read.
        wrong = export.differences(self.fingerprint, **expected)
        exported_config, checkpoint_config = (
            json.loads(json.dumps(config)) for config in (manifest.config, self.config.to_dict())
        )
        wrong += [
            f"config: made for another {name!r:.40}"
            for name, value in exported_config.items()
            if checkpoint_config.get(name) != value
        ]
        if wrong:
            raise export.refused(wrong, self._rebuild)
        self._largest_file = _LARGEST_BESIDE_WEIGHTS + _BYTES_A_WEIGHT * self.config.parameters
        # Another process may have another working directory.
        self._export = Export(export.folder.absolute(), manifest)
        self.device, self.reason = device, reason
        self.precision = manifest.precision

    @property
    def export(self) -> Export:
        """The files in use."""
        return self._export

    def _opened_with(self) -> tuple[Any, ...]:
        return self.source or None, self.export, str(self.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "precision": self.precision}

    def encode_image(self, pixels: Tensor) -> Tensor:
        self._check_process()
        check_pixels(pixels, self.config)
        return self._in_parts(self._image, pixels.to(torch.float32))

    def encode_text(self, ids: Tensor) -> Tensor:
        self._check_process()
        check_ids(ids, self.config)
        longest = max(1, int(caption_lengths(ids, self.config.end_token).max())) if len(ids) else 1
        step = self._positions_at_once
        width = min(-(-longest // step) * step, self.config.context_length)
        ids = torch.nn.functional.pad(ids[:, :width], (0, max(0, width - ids.shape[1])))
        return self._in_parts(self._text, ids.to(torch.int64))

    def _content(self, name: str) -> bytes:
        """Content of a file of the export, verified to be the one that was proven."""
        return self.export.content(name, self._rebuild, max_bytes=self._largest_file)

    def _in_parts(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if not len(batch):
            return torch.zeros(0, self.config.tokens, self.config.embed_dim, device=self.device)
        parts = [run(part) for part in batch.split(self._largest_batch or len(batch))]
        shape = (self.config.tokens, self.config.embed_dim)
        if any(part.shape[1:] != shape for part in parts):
            raise EngineError(
                f"{self.export.folder}: expected embeddings [B, {shape[0]}, {shape[1]}], got {list(parts[0].shape)}; "
                f"export it again: {self._rebuild}"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
