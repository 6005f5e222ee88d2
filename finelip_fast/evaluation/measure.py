"""Recall of a checkpoint on pairs of pictures and captions."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._arguments import listed, whole_number
from finelip_fast._versions import library_version
from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.survey import Survey, hash_of, survey
from finelip_fast.engines import Engine
from finelip_fast.errors import InputError
from finelip_fast.evaluation.cache import PartFolder, StoredRows, embed_in_parts
from finelip_fast.evaluation.result import Evaluation, Row, Sweep
from finelip_fast.metrics import ALPHAS, SCORES, WAYS, pair_summary
from finelip_fast.ranking import tiled_ranks
from finelip_fast.tokenizer import expected_truncation


def evaluate(
    engine: Engine,
    pairs: PairDataset,
    *,
    context_lengths: Sequence[int] = (),
    alpha: float | None = None,
    validation: PairDataset | None = None,
    cache: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    progress: bool = True,
    data: str = "",
    validation_name: str = "",
) -> Evaluation:
    """Rank all pictures for each caption and all captions for each picture.

    Args:
        engine: Engine that encodes.
        pairs: Matching pictures and captions; pairs with the same ``image_id`` share a picture, which is found at ``k`` if
            any of its captions is.
        context_lengths: Caption lengths in tokens to cut at; empty: the model's own.
        alpha: Weight of the global cosine in the combined score; None: the model's own.
        validation: Other pairs, on which the weight is chosen instead of ``alpha``: the one of 0, 0.05 .. 1 with the best
            mean recall@1 of both directions at the longest context; ties go to the best mean reciprocal rank.
        cache: Folder for embeddings, so that an interrupted evaluation can resume and embeddings need not fit in memory: they
            are memory-mapped from files. They are identified by the checkpoint's weights, engine, precision, kind of device
            and context, by captions and ``image_id``, and for picture files by size and time of modification. None: keep
            them in memory, on the engine's device and in its precision (float32 on a CPU), and write nothing.
        batch_size: Number of pictures or captions encoded at once.
        progress: Whether to show progress bars.
        data, validation_name: Names of both sets of pairs, used only in the result.

    Returns:
        Ranks and metrics with the global cosine alone, late interaction alone, and both; without trained aggregators, only
        with the global cosine. Ties count against the model. The scores are never all in memory.

    Raises:
        InputError: No engine or no opened pairs, a context below 3 or longer than the model's, an alpha outside [0, 1], a
            batch size below 1, both ``alpha`` and ``validation``, or validation pairs that are the measured ones. Without
            trained aggregators: an alpha below 1, or validation pairs.
        ImageError: A picture that cannot be read.
        WriteError: A cache that cannot be written; embeddings already in it are reused.
    """
    if not hasattr(engine, "embed_texts"):
        raise InputError(f"expected an engine, got {engine!r:.80}; pass retriever.engine, or open one with open_engine")
    lengths = {
        whole_number("context_lengths", length, least=None) for length in listed("context_lengths", context_lengths)
    }
    context_lengths = sorted(lengths) or [engine.config.context_length]
    longest = engine.config.context_length
    if context_lengths[0] < 3 or context_lengths[-1] > longest:
        raise InputError(f"expected context_lengths from 3 to the model's {longest} tokens, got {context_lengths}")
    if alpha is not None and validation is not None:
        raise InputError("expected alpha or validation pairs to choose it on, got both")
    is_fine = engine.config.trained_aggregators
    if validation is not None and not is_fine:
        raise InputError(
            "validation pairs choose alpha, which only a checkpoint with trained aggregators has; omit them"
        )
    alpha = engine.config.choose_alpha(alpha)
    batch_size = whole_number("batch_size", batch_size)
    encoder = _Encoder(engine, Path(cache) if cache is not None else None, batch_size, progress)
    known, sweep = survey(pairs, stamps=cache is not None), None
    if validation is not None:
        validation_survey = survey(validation, stamps=cache is not None)
        if validation_survey.fingerprint == known.fingerprint:
            raise InputError(
                "expected validation pairs other than the measured ones, got the same; alpha must not be chosen on test pairs"
            )
        sweep = _sweep(encoder, validation, validation_survey, context_lengths[-1], validation_name)
        alpha = sweep.best
    started = time.perf_counter()
    images, picture_of = encoder.images(pairs, known), torch.tensor(known.picture_of)
    image_seconds, text_seconds, rows = time.perf_counter() - started, 0.0, []
    for context_length in context_lengths:
        started = time.perf_counter()
        texts = encoder.texts(known, context_length)
        text_seconds = time.perf_counter() - started
        weights = (1.0, 0.0, alpha) if is_fine else (1.0,)
        measured = tiled_ranks(images, texts, picture_of, weights, device=engine.device, progress=progress)
        for score, ranks in zip(SCORES, measured, strict=is_fine):
            rows.append(Row.of(context_length, score, dict(zip(WAYS, ranks, strict=True)), picture_of))
    return Evaluation(
        data=data,
        checkpoint=engine.source or "bundled",
        checkpoint_fingerprint=engine.fingerprint,
        engine=engine.name,
        precision=engine.precision,
        device=engine.device.type,
        version=library_version(),
        pairs_fingerprint=known.fingerprint,
        pictures=len(known.ids),
        pairs=len(known.captions),
        picture_of=known.picture_of,
        alpha=alpha,
        sweep=sweep,
        rows=rows,
        image_seconds=image_seconds,
        text_seconds=text_seconds,
    )


def _sweep(encoder: _Encoder, pairs: PairDataset, known: Survey, context_length: int, data: str) -> Sweep:
    images, texts, picture_of = encoder.images(pairs, known), encoder.texts(known, context_length), known.picture_of
    swept = tiled_ranks(
        images, texts, torch.tensor(picture_of), ALPHAS, device=encoder.engine.device, progress=encoder.progress
    )
    tried = []
    for alpha, ranks in zip(ALPHAS, swept, strict=True):
        metrics = pair_summary(ranks)
        names = (f"{way}_{name}" for way in WAYS for name in ("recall@1", "mrr"))
        tried.append({"alpha": alpha, **{name: metrics[name] for name in names}})
    return Sweep(data, known.fingerprint, len(known.captions), context_length, tried)


@dataclass(frozen=True)
class _Encoder:
    """An engine with or without a cache."""

    engine: Engine
    cache: Path | None
    batch_size: int
    progress: bool

    def images(self, pairs: PairDataset, known: Survey) -> StoredRows:
        """Return the embeddings of the pictures, by index."""

        def embed(first: int, last: int) -> Tensor:
            blocks = []
            for start in range(first, last, self.batch_size):
                numbers = known.first[start : min(start + self.batch_size, last)]
                batch = [pairs[number].image for number in numbers]
                blocks.append(self.engine.embed_images(batch, batch_size=self.batch_size))
                bar.update(len(batch))
            return torch.cat(blocks)

        identity = {"images": hash_of([*known.ids, *map(str, known.stamps)]), "pixels": repr(self.engine.preprocess)}
        with self._bar(len(known.ids), "image") as bar:
            return embed_in_parts(len(known.ids), embed, self._folder(identity), bar.update)

    def texts(self, known: Survey, context_length: int) -> StoredRows:
        """Return the embeddings of the captions, cut at ``context_length`` tokens."""

        def embed(first: int, last: int) -> Tensor:
            with expected_truncation():
                rows = self.engine.embed_texts(
                    known.captions[first:last], batch_size=self.batch_size, context_length=context_length
                )
            bar.update(last - first)
            return rows

        identity = {"captions": hash_of(known.captions), "context_length": context_length}
        with self._bar(len(known.captions), "caption") as bar:
            return embed_in_parts(len(known.captions), embed, self._folder(identity), bar.update)

    def _folder(self, identity: dict[str, Any]) -> PartFolder | None:
        if self.cache is None:
            return None
        engine = self.engine
        return PartFolder(
            self.cache,
            {
                **identity,
                "checkpoint": engine.fingerprint,
                "engine": engine.name,
                "precision": engine.precision,
                "rows": engine.config.tokens,
                "device": engine.device.type,
                # Files of the same precision may have been made differently.
                "files": sorted(engine.export.manifest.files.values()) if engine.export else [],
                "version": library_version(),
            },
        )

    def _bar(self, total: int, unit: str) -> tqdm[Any]:
        return tqdm(total=total, unit=unit, disable=not self.progress, mininterval=0.5)
