"""Caption augmentation that imitates how people write: words and sentences left out, typos, sentences of other pictures.

HyFL-CLIP drops words and captions in training and loses half as much as FineLIP on incomplete captions; the other two changes
address what the study of spoilt captions shows (``finelip study noise``). Pictures are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from finelip_fast.datasets.base import Example, Region
from finelip_fast.errors import ConfigError
from finelip_fast.tokenizer import SENTENCE_END

# Upper limits of the changes: shares of sentences, words and typos, and number of foreign sentences.
_SENTENCES, _WORDS, _TYPOS, _STRANGERS = 0.5, 0.5, 0.2, 4

_WORD = re.compile(r"\S+")

_FOREIGN = -1  # origin of a character that was not in the caption


class Draft:
    """A caption being changed, with the position of each of its characters in the original."""

    def __init__(self, caption: str) -> None:
        self.text = caption
        self.origins = list(range(len(caption)))

    def sentences(self) -> list[slice]:
        """Slices of the sentences, each with the blanks after it."""
        ends = [match.end() for match in SENTENCE_END.finditer(self.text)]
        return [slice(first, last) for first, last in zip([0, *ends], [*ends, len(self.text)], strict=True)]

    def words(self) -> list[slice]:
        """Slices of the words, each with the blanks after it."""
        starts = [match.start() for match in _WORD.finditer(self.text)]
        return [slice(first, last) for first, last in zip(starts, [*starts[1:], len(self.text)], strict=True)]

    def keep(self, parts: Sequence[slice]) -> None:
        """Keep only the given parts."""
        self.text = "".join(self.text[part] for part in parts).rstrip()
        self.origins = [origin for part in parts for origin in self.origins[part]][: len(self.text)]

    def insert(self, at: int, text: str) -> None:
        self.text = self.text[:at] + text + self.text[at:]
        self.origins[at:at] = [_FOREIGN] * len(text)

    def swap(self, at: int) -> None:
        """Swap a character with the next one."""
        self.text = self.text[:at] + self.text[at + 1] + self.text[at] + self.text[at + 2 :]
        self.origins[at], self.origins[at + 1] = self.origins[at + 1], self.origins[at]

    def regions(self, regions: Sequence[Region]) -> tuple[Region, ...]:
        """Regions whose words are unchanged, at their new positions."""
        places = {origin: at for at, origin in enumerate(self.origins)}
        moved = []
        for region in regions:
            start = places.get(region.start, _FOREIGN)
            end = start + region.end - region.start
            if start != _FOREIGN and self.origins[start:end] == list(range(region.start, region.end)):
                moved.append(region._replace(start=start, end=end))
        return tuple(moved)


def drop_sentences(draft: Draft, random: Random, _: Callable[[], str]) -> None:
    """Leave out up to half of the sentences, at least one if there are two."""
    parts = draft.sentences()
    most = int(_SENTENCES * len(parts))
    if most:
        left_out = set(random.sample(range(len(parts)), random.randint(1, most)))
        draft.keep([part for at, part in enumerate(parts) if at not in left_out])


def drop_words(draft: Draft, random: Random, _: Callable[[], str]) -> None:
    """Leave out each word with a probability that is drawn first, up to one half; at least one word stays."""
    parts, chance = draft.words(), _WORDS * random.random()
    remaining = [part for part in parts if random.random() >= chance]
    if parts:
        draft.keep(remaining or [random.choice(parts)])


def mistype(draft: Draft, random: Random, _: Callable[[], str]) -> None:
    """Swap two adjacent letters, not the first, in words of over three letters, with a probability up to a fifth."""
    chance = _TYPOS * random.random()
    for part in draft.words():
        word = draft.text[part].rstrip()
        unlike = [cut for cut in range(1, len(word) - 1) if word[cut] != word[cut + 1]]
        if len(word) > 3 and unlike and random.random() < chance:
            draft.swap(part.start + random.choice(unlike))


def add_strangers(draft: Draft, random: Random, draw_stranger: Callable[[], str]) -> None:
    """Insert up to four sentences from other pictures' captions between the sentences."""
    for _ in range(random.randint(1, _STRANGERS)):
        stranger = Draft(draw_stranger())
        sentence = stranger.text[random.choice(stranger.sentences())].strip()
        at = random.choice([*(part.start for part in draft.sentences()), len(draft.text)])
        draft.insert(at, f" {sentence}" if at == len(draft.text) else f"{sentence} ")


CHANGES: dict[str, Callable[[Draft, Random, Callable[[], str]], None]] = {
    "sentences": drop_sentences,
    "words": drop_words,
    "foreign": add_strangers,
    "typos": mistype,
}


@dataclass(frozen=True)
class Augmentation:
    """Random changes to captions.

    Args:
        chances: Probability of each of :data:`CHANGES`, in (0, 1]; drawn independently, so a caption may undergo several.
    """

    chances: dict[str, float]

    @classmethod
    def parse(cls, terms: Sequence[str]) -> Augmentation:
        """Parse terms ``CHANGE:CHANCE``.

        Raises:
            ConfigError: A change is unknown or repeated, or a chance lies outside (0, 1].
        """
        chances: dict[str, float] = {}
        for term in terms:
            name, _, text = term.partition(":")
            try:
                chance = float(text)
            except ValueError:
                chance = 0.0
            if name not in CHANGES or name in chances or not 0 < chance <= 1:
                raise ConfigError(
                    f"expected terms CHANGE:CHANCE, each of {', '.join(CHANGES)} at most once, with chances in (0, 1], got "
                    f"{term!r:.80}"
                )
            chances[name] = chance
        return cls(chances)

    def __call__(self, example: Example, random: Random, draw_stranger: Callable[[], str]) -> Example:
        """Augment a pair, keeping the regions that its caption still describes.

        Args:
            example: The pair.
            random: Source of all draws.
            draw_stranger: Function that returns another picture's caption at each call.
        """
        draft = Draft(example.caption)
        for name, change in CHANGES.items():
            if random.random() < self.chances.get(name, 0.0):
                change(draft, random, draw_stranger)
        return example._replace(caption=draft.text, regions=draft.regions(example.regions))
