"""The score of one picture and one caption, decomposed into words and patches.

Row ``r`` of a caption's embedding is a fixed mixture of its tokens' features: ``t_r = (a_r @ x) / |a_r @ x|``, with ATRM's
weights ``a_r`` over the tokens (row 0: the end token alone). A picture's rows are likewise ``v_s = (b_s @ y) / |b_s @ y|``.
The score is a weighted sum of cosines, with weights ``c`` from the global cosine and the matches of late interaction::

    score = sum_rs c[r,s] <t_r, v_s> = sum_np <x_n, y_p> * sum_rs a[r,n] / |a_r @ x| * c[r,s] * b[s,p] / |b_s @ y|

Each term on the right-hand side belongs to one token ``n`` and one patch ``p``, and nothing is left over.

Without trained aggregators there is only row 0: the score is the cosine of the end token and CLS, to which no word or patch
contributes. Only the similarity of the features of words and patches can then be shown, which is not part of that score.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from finelip_fast._arguments import one_of, whole_number
from finelip_fast._terminal import printable
from finelip_fast.errors import InputError
from finelip_fast.explain import pictures
from finelip_fast.explain.pictures import MAPS
from finelip_fast.kernels.clim.formula import match_weights
from finelip_fast.model import FineLIP, aggregated_lengths
from finelip_fast.preprocess import ImageSource
from finelip_fast.tokenizer import expected_truncation, token_spans, tokenize

_LETTERS = 32  # most characters per token on average, including white space, in any caption that people write


@dataclass(frozen=True)
class Word:
    """A word of the caption, ``caption[start:end]``, with its tokens from ``first`` to before ``last``."""

    text: str
    start: int
    end: int
    first: int
    last: int

    @property
    def bare(self) -> str:
        """The word without surrounding punctuation, for use in a sentence; a word of nothing else is unchanged."""
        letters = [at for at, letter in enumerate(self.text) if not unicodedata.category(letter).startswith("P")]
        return self.text[letters[0] : letters[-1] + 1] if letters else self.text


@dataclass(frozen=True)
class Match:
    """Two embedding rows that late interaction matched: at least one is the other's most similar row.

    Attributes:
        text_row, image_row: Numbers of the rows; 0 is the end token and CLS, respectively.
        similarity: Cosine of the two rows.
        adds: Contribution of the match to the score.
        words: Words that contributed most to the caption's row, with their weights, largest first; none for row 0.
        patches: The same for the patches of the picture's row, by number.
    """

    text_row: int
    image_row: int
    similarity: float
    adds: float
    words: tuple[tuple[Word, float], ...]
    patches: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Explanation:
    """Explanation of the score of a picture and a caption.

    ``N`` is the number of tokens of the caption, including start and end tokens; ``P`` that of patches, row by row; ``L_t``
    and ``L_i`` those of rows of the embeddings.

    Attributes:
        caption: Description as given; words beyond the context do not count.
        words: Words that were read.
        score: ``alpha * global_score + (1 - alpha) * fine_score``.
        global_score, fine_score, alpha: Parts of the score; without trained aggregators, ``fine_score`` is None and alpha 1.
        contributions: float32 ``[N, 1 + P]``, what each token with each patch adds to the score; the last row is the end
            token, column 0 is CLS. The sum is the score.
        text_weights: float32 ``[L_t, N]``, rows 1 and up: ATRM's distribution over the tokens; row 0: the end token.
        image_weights: float32 ``[L_i, 1 + P]``, the same over the patches; row 0: CLS.
        similarity: float32 ``[L_t, L_i]``, cosines of the embeddings' rows.
        pixels: ``[3, H, W]`` in [0, 1], the picture as the model sees it.
        squashed: Whether that is the whole picture, squashed to a square; False: its central square.
    """

    caption: str
    words: tuple[Word, ...]
    score: float
    global_score: float
    fine_score: float | None
    alpha: float
    contributions: Tensor
    text_weights: Tensor
    image_weights: Tensor
    similarity: Tensor
    pixels: Tensor
    squashed: bool
    _features: tuple[Tensor, Tensor]
    _source: ImageSource

    def __repr__(self) -> str:
        fine = "no fine" if self.fine_score is None else f"fine {self.fine_score:.4f}"
        parts = f"global {self.global_score:.4f}, {fine}, alpha {self.alpha:g}"
        sizes = f"{len(self.words)} words, {self.side} x {self.side} patches"
        return f"<Explanation of {self.caption!r:.80}: score {self.score:.4f} ({parts}), {sizes}>"

    @property
    def side(self) -> int:
        """Number of patches in a row, and in a column, of the picture."""
        return math.isqrt(self.contributions.shape[1] - 1)

    @property
    def picture(self) -> Image.Image:
        """The picture itself in upright RGB, shrunk to at most 1024 pixels in width and height; opened on access.

        Raises:
            ImageError: Its file no longer exists.
        """
        return pictures.bounded(self._source)

    @property
    def maps(self) -> tuple[str, ...]:
        """The available kinds of :meth:`heatmap`: only ``"raw"`` without trained aggregators."""
        return MAPS[:1] if self.fine_score is None else MAPS

    @property
    def unmet(self) -> tuple[Word, ...]:
        """The words that nothing in the picture matches: those that add nothing to the score, or lower it.

        Without trained aggregators, that is every word, since none adds to the score.
        """
        return tuple(word for word in self.words if self.added_by(word) <= 0)

    def added_by(self, word: Word) -> float:
        """Return what a word adds to the score: the sum of its contributions, 0 without trained aggregators."""
        return float(self.contributions[word.first : word.last].sum())

    @property
    def text_matches(self) -> Tensor:
        """int64 ``[L_t]``, the row of the picture that late interaction chose for each row of the caption."""
        return self.similarity.argmax(dim=1)

    @property
    def image_matches(self) -> Tensor:
        """int64 ``[L_i]``, the row of the caption that late interaction chose for each row of the picture."""
        return self.similarity.argmax(dim=0)

    def matches(self, k: int = 8, *, parts: int = 3) -> list[Match]:
        """Return the matches that add most to the score, at most ``k``, each with at most ``parts`` words and patches.

        The global cosine is not a match; if its two rows match each other, that match counts here as in the fine score.

        Raises:
            InputError: ``k`` or ``parts`` is not an integer, or is negative.
        """
        k, parts = whole_number("k", k, least=0), whole_number("parts", parts, least=0)
        adds = (1 - self.alpha) * match_weights(self.similarity) * self.similarity
        order = adds.abs().flatten().argsort(descending=True, stable=True)[: min(k, int(adds.count_nonzero()))]
        matches = []
        for text_row, image_row in (divmod(at, adds.shape[1]) for at in order.tolist()):
            shares = [float(self.text_weights[text_row, word.first : word.last].sum()) for word in self.words]
            words = sorted(zip(self.words, shares, strict=True), key=lambda pair: -pair[1]) if text_row else []
            weights, patches = self.image_weights[image_row, 1:].topk(min(parts, self.side**2) if image_row else 0)
            matches.append(
                Match(
                    text_row,
                    image_row,
                    float(self.similarity[text_row, image_row]),
                    float(adds[text_row, image_row]),
                    tuple(words[:parts]),
                    tuple(zip(patches.tolist(), weights.tolist(), strict=True)),
                )
            )
        return matches

    def tokens_of(self, phrase: str | tuple[int, int]) -> tuple[int, int]:
        """Return the tokens ``(first, last + 1)`` of a phrase, extended to whole words.

        Args:
            phrase: Words of the caption in any case and with any white space between them, of which the first occurrence
                counts; or ``(start, end)`` in characters.

        Raises:
            InputError: The caption does not contain the phrase, or not within the context.
        """
        if isinstance(phrase, str):
            # lower() would not do: it can change the length of the text.
            pattern = r"\s+".join(map(re.escape, phrase.split()))
            match = re.search(pattern, self.caption, re.IGNORECASE) if pattern else None
            if match is None:
                raise InputError(
                    f"expected words of the caption, got {phrase!r:.80}; the caption is {self.caption!r:.400}"
                )
            start, end = match.span()
        else:
            try:
                start, end = map(operator.index, phrase)
            except (TypeError, ValueError):
                raise InputError(
                    f"expected words of the caption, or their (start, end) in characters, got {phrase!r:.80}"
                ) from None
            if not 0 <= start < end <= len(self.caption) or not self.caption[start:end].strip():
                raise InputError(f"expected (start, end) around words in 0..{len(self.caption)}, got {phrase!r}")
            end -= len(self.caption[start:end]) - len(self.caption[start:end].rstrip())
        words = [word for word in self.words if word.end > start and word.start < end]
        if not words or words[-1].end < end:
            raise InputError(f"{phrase!r} lies beyond the tokens that the model reads; shorten the caption")
        return words[0].first, words[-1].last

    def heatmap(self, phrase: str | tuple[int, int], *, tokens: str = "raw") -> Tensor:
        """Return a map of where in the picture a phrase is found.

        Args:
            phrase: Words of the caption, or ``(start, end)`` in characters.
            tokens: ``"raw"``: cosines of the phrase's mean feature and the patches, before ATRM. ``"aggregated"``: the
                phrase's share of what all words add to the score with the patch, in [-1, 1].

        Returns:
            float32 ``[side, side]``, not normalised.

        Raises:
            InputError: Unknown words, or an unavailable map, such as ``"aggregated"`` without trained aggregators.

        Where maps peak is learned. With the bundled model, trained to find phrases (``--grounding``), aggregation costs
        localisation, so the raw map is the default. Without that training, neither map is reliable; :func:`pointing_game`
        measures both. Aggregated maps are made of :attr:`contributions`, the parts of the score itself: they show what
        counted, and are 0 throughout if the fine score does not count (``alpha=1``).
        """
        first, last = self.tokens_of(phrase)
        return self.map_of_tokens(first, last, tokens=tokens).reshape(self.side, self.side)

    def map_of_tokens(self, first: int, last: int, *, tokens: str) -> Tensor:
        """Return the heatmap of the tokens from ``first`` to before ``last``, float32 ``[P]``; see :meth:`heatmap`."""
        self._check_map(tokens)
        if tokens == "aggregated":
            # Shares, since some patches add much with every word; without the end token, which stands for the whole caption.
            added = self.contributions[:-1, 1:]
            return added[first:last].sum(dim=0) / added.abs().sum(dim=0).clamp(min=1e-12)
        texts, patches = self._features
        return F.normalize(patches[1:], dim=-1) @ F.normalize(texts[first:last].mean(dim=0), dim=-1)

    def words_at(self, box: tuple[float, float, float, float], *, tokens: str = "raw") -> list[tuple[Word, float]]:
        """Return the words that match a region, best first.

        Args:
            box: ``x0, y0, x1, y1`` in [0, 1], y downwards; patches whose centre is inside count.
            tokens: ``"raw"``: cosine of the mean features of the word and the region; ``"aggregated"``: what both add to the
                score.

        Raises:
            InputError: A box that contains no patch's centre, or an unavailable map.
        """
        self._check_map(tokens)
        try:
            x0, y0, x1, y1 = map(float, box)
            inside = patches_inside((x0, y0, x1, y1), self.side)
        except (TypeError, ValueError, OverflowError):
            inside = torch.zeros(0, dtype=torch.bool)
        if not inside.any():
            raise InputError(f"expected a box (x0, y0, x1, y1) in [0, 1] around a patch's centre, got {box!r:.80}")
        if tokens == "aggregated":
            per_token = self.contributions[:, 1:][:, inside].sum(dim=1)
            values = [float(per_token[word.first : word.last].sum()) for word in self.words]
        else:
            texts, patches = self._features
            region = F.normalize(patches[1:][inside].mean(dim=0), dim=-1)
            values = [
                float(F.normalize(texts[word.first : word.last].mean(dim=0), dim=-1) @ region) for word in self.words
            ]
        return sorted(zip(self.words, values, strict=True), key=lambda pair: -pair[1])

    def overlay(self, phrase: str | tuple[int, int], *, tokens: str = "raw") -> Any:
        """Return the picture beside the map of a phrase as a matplotlib figure; needs matplotlib."""
        return pictures.overlay(self, phrase, tokens=tokens)

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """Return a self-contained page: move over words to see where, over the picture to see what.

        Args:
            path: File that the page is also written to.

        Raises:
            WriteError: A file that cannot be written.
        """
        return pictures.page(self, path)

    def _check_map(self, tokens: str) -> None:
        one_of("tokens", tokens, MAPS)
        if tokens not in self.maps:
            raise InputError(
                f"expected tokens='raw', got {tokens!r}: this checkpoint has no trained aggregators; train them (finelip "
                "adapt)"
            )

    def peak(self, first: int, last: int) -> dict[str, Any]:
        """Return ``row``, ``column`` and ``cosine`` of the patch most like the tokens from ``first`` to before ``last``."""
        cosines = self.map_of_tokens(first, last, tokens="raw")
        at = int(cosines.argmax())
        return {"row": at // self.side, "column": at % self.side, "cosine": float(cosines[at])}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the scores, each word with what it adds and where its map peaks, the first matches,
        and where the map of the whole caption, that of its end token, peaks."""
        words = []
        for word in self.words:
            place = {"text": word.text, "start": word.start, "end": word.end, "adds": self.added_by(word)}
            words.append(place | self.peak(word.first, word.last))
        scores = {name: getattr(self, name) for name in ("score", "global_score", "fine_score", "alpha")}
        end = len(self.contributions)
        matches = [asdict(match) for match in self.matches()]
        return {**scores, "side": self.side, "caption": self.peak(end - 1, end), "words": words, "matches": matches}

    def __str__(self) -> str:
        values = self.to_dict()
        if self.fine_score is None:
            return self._without_parts(values)
        most = sorted(values["words"], key=lambda word: -abs(word["adds"]))[:12]
        lines = [
            f"score {self.score:.4f} = {self.alpha:g} x global {self.global_score:.4f} "
            f"+ {1 - self.alpha:g} x fine {self.fine_score:.4f}",
            f"words that add most (of {len(self.words)}), and which of {self.side} x {self.side} patches is most like each:",
        ]
        lines += [
            f"  {word['adds']:+.4f}  {printable(word['text']):20} row {word['row'] + 1}, column {word['column'] + 1}"
            for word in most
        ]
        ends = float(self.contributions[-1].sum() + self.contributions[0].sum())
        return "\n".join([*lines, f"  {ends:+.4f}  start and end of the caption"])

    def _without_parts(self, values: dict[str, Any]) -> str:
        """Return the printed form of a score that is a single cosine."""
        alike = sorted(values["words"], key=lambda word: -word["cosine"])[:12]
        lines = [
            f"score {self.score:.4f} = global {self.global_score:.4f}, the cosine of the whole picture and the whole caption: "
            "no word adds to it, since this checkpoint has no trained aggregators",
            "cosines of features, which are no part of the score: the caption as a whole and the words that are most like a "
            f"patch (of {len(self.words)}), and which of {self.side} x {self.side} patches that is:",
        ]
        places = [("(the whole caption)", values["caption"]), *((printable(word["text"]), word) for word in alike)]
        lines += [
            f"  {place['cosine']:+.4f}  {name:20} row {place['row'] + 1}, column {place['column'] + 1}"
            for name, place in places
        ]
        return "\n".join(lines)


def patches_inside(box: tuple[float, float, float, float], side: int) -> Tensor:
    """Return bool ``[P]``, row by row: which of ``side x side`` patches have their centre in ``x0, y0, x1, y1``, in [0, 1]."""
    along = (torch.arange(side) + 0.5) / side
    across, down = ((along >= box[at]) & (along < box[at + 2]) for at in (0, 1))
    return (down[:, None] & across).flatten()


def explain(model: FineLIP, image: Any, caption: str, *, alpha: float | None = None) -> Explanation:
    """Explain the score of a picture and a caption.

    Args:
        model: Model of any precision; the explanation is computed in float32.
        image: Anything that :func:`finelip_fast.preprocess.open_image` takes.
        caption: Caption, cut at the context.
        alpha: Weight of the global cosine; None: the model's own.

    Raises:
        ImageError: A picture that cannot be read.
        InputError: A caption that is not text, or an alpha outside [0, 1], or below 1 without trained aggregators.
    """
    return explain_pairs(model, [image], [caption], alpha=alpha)[0]


@torch.inference_mode()
def explain_pairs(
    model: FineLIP, images: Sequence[Any], captions: Sequence[str], *, alpha: float | None = None
) -> list[Explanation]:
    """Explain pairs as :func:`explain` does, encoded as one batch."""
    alpha = model.config.choose_alpha(alpha)
    with expected_truncation():
        ids = tokenize(captions, model.config.context_length, tokenizer=model.tokenizer)
    pixels = model.preprocess.batch(images)
    patches = model.visual(pixels.to(model.device, model.dtype)).float()
    tokens, lengths = model.text_tokens(ids.to(model.device))
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.config.image_mean, model.config.image_std))
    plain_pixels = (pixels * std + mean).clamp(0, 1)
    return [
        _explain(model, source, caption, own_patches, own_tokens[:length].float(), own_pixels, alpha)
        for source, caption, own_patches, own_tokens, length, own_pixels in zip(
            images, captions, patches, tokens, lengths.tolist(), plain_pixels, strict=True
        )
    ]


def _explain(
    model: FineLIP,
    source: ImageSource,
    caption: str,
    patches: Tensor,
    tokens: Tensor,
    pixels: Tensor,
    alpha: float,
) -> Explanation:
    """Explain projected features: patches ``[1 + P, D]`` with CLS, tokens ``[N, D]`` up to the end token, float32."""
    image_weights = F.one_hot(torch.tensor([0]), len(patches)).to(patches)
    text_weights = F.one_hot(torch.tensor([len(tokens) - 1]), len(tokens)).to(tokens)
    is_fine = model.config.trained_aggregators
    if is_fine:
        # A picture's rows mix only its patches, a caption's rows all tokens before the end token.
        aggregated = F.pad(model.image_aggregator.weights(patches[None, 1:], patches[:1])[0], (1, 0))
        image_weights = torch.cat([image_weights, aggregated])
        count = int(aggregated_lengths(torch.tensor(len(tokens)), model.config))
        aggregated = model.text_aggregator.weights(tokens[None, :count], tokens[-1:])[0]
        aggregated = F.pad(aggregated, (0, len(tokens) - count))
        text_weights = torch.cat([text_weights, aggregated])

    image_rows, text_rows = image_weights @ patches, text_weights @ tokens
    image_norms, text_norms = (rows.norm(dim=1).clamp(min=1e-12) for rows in (image_rows, text_rows))
    similarity = (text_rows / text_norms[:, None]) @ (image_rows / image_norms[:, None]).T

    fine = match_weights(similarity)
    weights = (1 - alpha) * fine
    weights[0, 0] += alpha
    spread = (text_weights / text_norms[:, None]).T @ weights @ (image_weights / image_norms[:, None])

    # A word has at least one token, and a token few characters: anything further is beyond the context.
    start = caption[: _LETTERS * len(tokens)]
    spans = [match.span() for match in islice(re.finditer(r"\S+", start), 2 * len(tokens))]
    placed_spans = zip(spans, token_spans(start, spans, model.tokenizer), strict=True)
    words = (Word(caption[slice(*span)], *span, *place) for span, place in placed_spans)
    return Explanation(
        caption,
        tuple(word for word in words if word.first < word.last < len(tokens)),
        float((weights * similarity).sum()),
        float(similarity[0, 0]),
        float((fine * similarity).sum()) if is_fine else None,
        alpha,
        (tokens @ patches.T * spread).cpu(),
        text_weights.cpu(),
        image_weights.cpu(),
        similarity.cpu(),
        pixels,
        model.config.resize_mode == "squash",
        (tokens.cpu(), patches.cpu()),
        source,
    )
