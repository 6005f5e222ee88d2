"""Text encoders that offer what those of transformers do not: another layer, and windows.

They are transformers models with the same weights and names, so LoRA, offloading and saving work on them. A saved pipeline
refers to them; diffusers can open it once this module is imported (``import finelip_fast.diffusion.text_models``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from finelip_fast.errors import InputError
from finelip_fast.tokenizer import even_spans

__all__ = [
    "LastLayerTextModel",
    "LastLayerTextModelWithProjection",
    "PenultimateLayerTextModel",
    "PreTrainedModel",  # to open a class of this module, diffusers looks here for the parent that says how
    "WindowedLastLayerTextModelWithProjection",
    "WindowedTextModelWithProjection",
]


class _LastLayer:
    """Mixin that puts the last layer, after the final LayerNorm, in the penultimate one's place, ``hidden_states[-2]``."""

    def forward(self, *args: Any, return_dict: bool | None = None, **options: Any) -> Any:
        output = super().forward(*args, return_dict=True, **options)  # type: ignore[misc]  # of the class beside it
        if output.hidden_states is not None:
            *below, last = output.hidden_states
            output.hidden_states = (*below, output.last_hidden_state, last)
        return output.to_tuple() if return_dict is False else output


class LastLayerTextModel(_LastLayer, CLIPTextModel):
    """``CLIPTextModel`` whose ``hidden_states[-2]`` is the last layer after the final LayerNorm."""


class LastLayerTextModelWithProjection(_LastLayer, CLIPTextModelWithProjection):
    """``CLIPTextModelWithProjection`` whose ``hidden_states[-2]`` is the last layer after the final LayerNorm."""


class PenultimateLayerTextModel(CLIPTextModel):
    """``CLIPTextModel`` whose ``last_hidden_state`` is the penultimate layer after the final LayerNorm."""

    def forward(
        self, *args: Any, output_hidden_states: bool | None = None, return_dict: bool | None = None, **options: Any
    ) -> Any:
        """Compute features as the parent class does, named as in transformers."""
        options |= {"output_hidden_states": True, "return_dict": True}
        output: Any = super().forward(*args, **options)
        normalize = getattr(self, "text_model", self).final_layer_norm  # only some versions have the attribute
        output.last_hidden_state = normalize(output.hidden_states[-2])
        if not output_hidden_states:
            output.hidden_states = None
        return output.to_tuple() if return_dict is False else output


class WindowedTextModelWithProjection(CLIPTextModelWithProjection):
    """``CLIPTextModelWithProjection`` that reads rows beyond its positions in windows.

    A window holds a start token, text, an end token and padding, as a short prompt does. There are as few windows as the
    sentences allow, of about equal length, and each ends with a sentence; a sentence longer than a window is split into its
    clauses, and a clause longer than a window into even parts. Each token keeps its place in the row and has the features that
    its window gives it; padding beyond the last window repeats that window's last row. The pooled embedding is the mean of
    those of the windows. For a row of one window, the result is that of the model itself.

    ``config.windows`` holds the ids ``end`` and ``padding``, and the lists of ids ``sentence_ends`` and ``clause_ends``.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Compute features of ids ``[B, T]`` of any length ``T``, named as in transformers."""
        size, length = self.config.max_position_embeddings, 0 if input_ids is None else input_ids.shape[1]
        if input_ids is None or length <= size:
            return super().forward(input_ids, attention_mask, position_ids, **options)
        if attention_mask is not None or position_ids is not None:
            raise InputError(
                f"expected no attention_mask and no position_ids with {length} tokens, which are read in windows of {size}"
            )
        returns_tuple = options.pop("return_dict", None) is False
        ids = self.config.windows
        ends = (ids["sentence_ends"], ids["clause_ends"])
        windows: list[list[int]] = []
        counts: list[int] = []
        places: list[list[int]] = []  # places of the row's tokens among those of all windows
        for row in input_ids.tolist():
            end = row.index(ids["end"])
            spans = window_spans(row[1:end], size - 2, ends)
            first = len(windows) * size
            windows += [
                _padded([row[0], *row[1 + start : 1 + stop], row[end]], size, ids["padding"]) for start, stop in spans
            ]
            counts.append(len(spans))
            places.append([first, *_places(spans, first, size, length - 1)])
        output: Any = super().forward(torch.tensor(windows, device=input_ids.device), **options)
        index = torch.tensor(places, device=input_ids.device)

        def gathered(features: Tensor) -> Tensor:
            return features.flatten(0, 1)[index]  # [W, S, D] -> [B, T, D]

        layers = output.hidden_states
        output = CLIPTextModelOutput(
            text_embeds=torch.stack([part.mean(dim=0) for part in output.text_embeds.split(counts)]),
            last_hidden_state=gathered(output.last_hidden_state),
            hidden_states=None if layers is None else tuple(map(gathered, layers)),
        )
        return output.to_tuple() if returns_tuple else output


class WindowedLastLayerTextModelWithProjection(_LastLayer, WindowedTextModelWithProjection):
    """:class:`WindowedTextModelWithProjection` whose ``hidden_states[-2]`` is the last layer after the final LayerNorm."""


def window_spans(tokens: Sequence[int], room: int, ends: Sequence[Collection[int]]) -> list[tuple[int, int]]:
    """Start and stop of each window of a text, at least one: as few as sentences allow, and as even as possible.

    Args:
        tokens: Ids of the text, without start and end tokens.
        room: Number of tokens that fit into a window.
        ends: Ids that end a sentence, and ids that end its parts, into which a sentence that does not fit is split.
    """
    if len(tokens) <= room:
        return [(0, len(tokens))]
    parts = [list(tokens)]
    for kind in ends:
        parts = [piece for part in parts for piece in (_split(part, kind) if len(part) > room else [part])]
    return even_spans([len(part) for part in parts], room)


def _split(tokens: list[int], ends: Collection[int]) -> list[list[int]]:
    """Split tokens into pieces that each end with one of the ids, except for the last."""
    edges = [0, *(at for at in range(1, len(tokens)) if tokens[at - 1] in ends), len(tokens)]
    return [tokens[start:stop] for start, stop in pairwise(edges)]


def _padded(row: list[int], size: int, padding: int) -> list[int]:
    return row + [padding] * (size - len(row))


def _places(spans: Sequence[tuple[int, int]], first: int, size: int, length: int) -> list[int]:
    """Places in the flattened windows of the ``length`` tokens after the start token, with the first window at ``first``."""
    starts = accumulate([first] + [size] * (len(spans) - 1))
    places = [
        window + 1 + at for window, (start, stop) in zip(starts, spans, strict=True) for at in range(stop - start)
    ]
    last = first + len(spans) * size - 1
    behind = first + (len(spans) - 1) * size + 1 + spans[-1][1] - spans[-1][0]  # the end token
    return places + [min(behind + at, last) for at in range(length - len(places))]
