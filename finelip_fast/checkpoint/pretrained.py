"""Loading, saving and sharing models by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finelip_fast import model
from finelip_fast._arguments import find_device, floating_dtype
from finelip_fast._files import write_whole
from finelip_fast.checkpoint.architecture import Hints, config_from_weights
from finelip_fast.checkpoint.building import Model, build, not_finite, translated
from finelip_fast.checkpoint.foreign import shortened
from finelip_fast.checkpoint.loading import open_checkpoint, warn_of
from finelip_fast.checkpoint.saving import save
from finelip_fast.errors import CheckpointError, InputError

_CARD = "README.md"


class FineLIP(model.FineLIP):
    """Model that turns a picture or a caption into one matrix ``[L, D]`` of unit rows; row 0 is CLIP's own global embedding.

    The network is :class:`finelip_fast.model.FineLIP`; this class adds loading, saving and sharing.

    Args:
        config: Sizes of the model. The weights are initialised randomly; :meth:`from_pretrained` gives a trained model.

    Example:
        >>> model = finelip_fast.FineLIP.from_pretrained("org/name")
        >>> images = model.encode_image(pixels)                           # [B_i, L, D]
        >>> texts = model.encode_text(finelip_fast.tokenize(captions))    # [B_t, L, D]
        >>> model.score(images, texts)                                    # [B_i, B_t]
        >>> model.save_pretrained("checkpoint")
    """

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike[str],
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        context_length: int | None = None,
    ) -> FineLIP:
        """Load a model; arguments, errors and warnings are the same as for :func:`finelip_fast.load`."""
        return _load(cls, checkpoint, device, dtype, context_length)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint folder as :func:`finelip_fast.save` does, with a model card unless there is a ``README.md``.

        Raises:
            InputError, WriteError: Under the same conditions as :func:`finelip_fast.save`.
        """
        save(self, folder, dtype=dtype, metadata=metadata)
        if not (Path(folder) / _CARD).exists():
            self._write_card(Path(folder), "path/to/this/folder")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, Any] | None = None,
        commit_message: str = "Upload FineLIP",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model, with a model card, to a Hugging Face hub repository, which is created if missing.

        Args:
            repo_id: Name of the repository, ``"org/name"``.
            dtype: Precision of the weights on the hub. Default: the model's.
            metadata: JSON values to store with the model.
            commit_message: Message of the commit.
            private: Visibility of a new repository. Default: the organisation's.
            token: Access token. Default: the one from ``hf auth login``.

        Returns:
            URL of the commit.

        Raises:
            InputError: A name that is not a string, or arguments that :func:`finelip_fast.save` rejects.
            CheckpointError: The hub cannot be reached, or refuses the upload.
        """
        from huggingface_hub import HfApi  # slow to import, and needed only here

        if not isinstance(repo_id, str):
            raise InputError(f"expected repo_id as the name of a repository, got {repo_id!r:.80}")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save(self, folder, dtype=dtype, metadata=metadata)
            hub = HfApi(token=token)
            try:
                repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if not hub.file_exists(repo_id, _CARD):
                    self._write_card(folder, repo_id)
                return str(
                    hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message).commit_url
                )
            except Exception as error:  # clients and proxies raise errors of their own
                raise CheckpointError(
                    f"{repo_id!r:.200} cannot be pushed to the hub: {type(error).__name__}: {error!s:.500}. Check the name "
                    "and the network, and log in with hf auth login or pass a token that may write"
                ) from error

    def _write_card(self, folder: Path, name: str) -> None:
        config = self.config
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        base = "SigLIP" if config.family == "siglip" else "CLIP"
        aggregators = "trained" if config.trained_aggregators else "untrained: only the global cosine counts"
        card = f"""---
library_name: finelip-fast
pipeline_tag: zero-shot-image-classification
tags:
- finelip
- {base.lower()}
- image-text-retrieval
---

# FineLIP

FineLIP (CVPR 2025) searches pictures with long descriptions: it extends {base} to {config.context_length} text tokens and
compares pictures and captions token by token.

| | |
|---|---|
| parameters | {millions:.1f} million |
| pictures | {config.image_size} x {config.image_size} pixels, patches of {config.patch_size} |
| captions | {config.context_length} tokens |
| an embedding | {config.tokens} x {config.embed_dim} |
| aggregators | {aggregators} |

```python
import finelip_fast

retriever = finelip_fast.Retriever("{name}")
retriever.add_images("photos/")
retriever.search("A red house with two floors stands on the left", k=3)

model = finelip_fast.FineLIP.from_pretrained("{name}")
```
"""
        write_whole(folder / _CARD, lambda path: path.write_text(card, encoding="utf-8"))


def load(
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
) -> FineLIP:
    """Load a model from our format or from another project's.

    ===========================  =====================================================================================
    ``checkpoint``               what is read
    ===========================  =====================================================================================
    None                         the model that comes with the library
    a folder                     ours, an open_clip hub folder, transformers' ``CLIPModel``, or one with one weight file
    a file                       a state dict (``.pt``, ``.pth``, ``.bin``, ``.safetensors``), OpenAI's TorchScript archive
                                 or an index of shards; recognised by its content. Details missing from both the file and
                                 any configuration beside it must be given: see :func:`finelip_fast.checkpoint.convert`
    ``open_clip:MODEL/TAG``      open_clip's weights by name, ``open_clip:ViT-B-16/laion2b_s34b_b88k``
    ``open_clip:MODEL/FILE``     a weight file for an open_clip model; for SigLIP with its ``tokenizer.json`` and
                                 ``tokenizer_config.json`` beside it, or else those on the hub that open_clip names
    ``org/name``                 a Hugging Face hub repository with one of the folders above, or with one weight file;
                                 also ``hf-hub:org/name``, and ``hf-hub:org/name/FILE`` if there are several files
    ===========================  =====================================================================================

    Args:
        checkpoint: Folder, file or name; see the table above.
        device: Device for the model. Default: the CPU.
        dtype: Precision of the loaded model.
        context_length: Longest caption in tokens. Default: the checkpoint's own, or 256 for plain CLIP with
            its 77 and SigLIP with its 64. A larger value stretches the existing table of positions
            (:func:`stretch_positions`), except for SigLIP's, which stays as it is; a smaller value is refused.

    Returns:
        The model in eval mode, with parameters that require gradients.

    Raises:
        CheckpointError: Nothing found, not reachable, not a checkpoint, one that this library cannot run, or one with NaN
            or infinity in its weights.
        ConfigError: A ``context_length`` below the checkpoint's number of positions.
        EngineError: A device that is not available.
        InputError: An argument of the wrong type.

    Warns:
        UntrainedAggregatorsWarning: The checkpoint has no trained aggregators; the model scores by its global cosine.
        AveragedWeightsWarning: The checkpoint also contains averaged weights, which are not used.
    """
    return _load(FineLIP, checkpoint, device, dtype, context_length)


def _load(
    kind: type[Model],
    checkpoint: str | os.PathLike[str] | None,
    device: torch.device | str | None,
    dtype: torch.dtype,
    context_length: int | None,
) -> Model:
    place, dtype = find_device("cpu" if device is None else device), floating_dtype("dtype", dtype)
    opened = open_checkpoint(checkpoint, context_length)
    warn_of(checkpoint, opened, stacklevel=4)
    model = build(opened.contents, kind).to(device=place, dtype=dtype)
    if dtype == torch.float16 and (beyond := not_finite(model.state_dict())):
        raise CheckpointError(
            f"{checkpoint}: {shortened(beyond)} has numbers beyond float16's range: load it with dtype=torch.bfloat16, or "
            "in float32"
        )
    return model


def import_state_dict(
    state_dict: Mapping[str, Any],
    *,
    context_length: int | None = None,
    activation: str | None = None,
    heads: int | tuple[int, int] | None = None,
    key: str | None = None,
) -> FineLIP:
    """Build a model from another project's state dict.

    The layouts are those of OpenAI CLIP, open_clip, Long-CLIP, FineLIP's authors, transformers' ``CLIPModel`` and our
    own, but not SigLIP's, which needs its configuration and its tokenizer (:func:`load`). All sizes come from the tensors.
    Without a ``cross_net`` (FineLIP), the aggregators have a fixed random initialisation and ``config.trained_aggregators``
    is False.

    Args:
        state_dict: Names to tensors of any float dtype, possibly inside a training script's dictionary. Prefixes of wrappers
            and entries without weights are ignored.
        context_length: Longest caption in tokens, as in :func:`load`.
        activation: ``"quick_gelu"``, as in OpenAI's weights and all weights trained from them, or ``"gelu"``. Default: the
            activation that the layout implies, for OpenAI's archive, Long-CLIP and FineLIP.
        heads: Attention heads of both transformers, or of the vision and the text transformer. Default: those of published
            CLIPs with these widths.
        key: Key of a training script's dictionary under which the weights are stored. Default: ``state_dict``,
            ``model_state_dict``, ``model`` or ``module``, and a running average only if none of these is present.

    Returns:
        A float32 model in eval mode on the CPU, sharing no memory with ``state_dict``.

    Raises:
        CheckpointError: Missing, unknown or misshapen weights, by name; NaN or infinity in them; an activation or heads that
            must be given.
        ConfigError: Heads that do not divide the width, or a ``context_length`` below the table's number of rows.
        InputError: An unknown activation, or an argument of the wrong type.
    """
    hints = Hints.checked(activation, heads, key)
    describe = partial(config_from_weights, hints=hints)
    contents, _ = translated(state_dict, describe, "the state dict", context_length, hints.key)
    return build(contents, FineLIP)
