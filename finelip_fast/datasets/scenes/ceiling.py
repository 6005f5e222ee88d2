"""The best retrieval possible from partial descriptions, even with perfect knowledge of every picture.

Scenes in a family differ in one or two details. If the sentence that mentions them is left out, a description matches
several scenes, and the best possible answer is a guess among these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from finelip_fast.datasets.scenes import words
from finelip_fast.datasets.scenes.content import FAMILY_SIZE
from finelip_fast.datasets.scenes.scenes import Phrase, Scene

__all__ = ["Ceiling", "ceiling"]

Stretch = tuple[int, int]  # span of a caption, from its first character to one past its last
Detail = tuple[int, str, Any]  # the object's number, or -1 for the scene; the name and the value


class Ceiling(NamedTuple):
    """Expected recall@1 of a perfect reader, in [0, 1]."""

    i2t: float
    t2i: float


def ceiling(scenes: Sequence[Scene], remaining: Sequence[Sequence[Stretch]]) -> Ceiling:
    """Expected recall@1 of a random choice among the pictures that match a description, or descriptions that match a picture.

    An absent detail, such as a missing awning, counts as mentioned with its house, so the true ceiling is no higher.

    Args:
        scenes: Whole families, in order, with clean captions.
        remaining: Spans of each caption that are left.
    """
    i2t = t2i = 0.0
    for first in range(0, len(scenes), FAMILY_SIZE):
        members = slice(first, first + FAMILY_SIZE)
        family, parts = scenes[members], remaining[members]
        contents = [_details(scene) for scene in family]
        statements = [set(_mentioned_details(scene, stretches)) for scene, stretches in zip(family, parts, strict=True)]
        suits = [[details <= content for content in contents] for details in statements]
        t2i += sum(1 / sum(row) for row in suits)
        i2t += sum(1 / sum(column) for column in zip(*suits, strict=True))
    return Ceiling(i2t / len(scenes), t2i / len(scenes))


def _details(scene: Scene) -> set[Detail]:
    """Return everything that a scene shows."""
    objects = {(number, *item) for number, placed in enumerate(scene.objects) for item in vars(placed).items()}
    return objects | {(-1, "time", scene.time), (-1, "weather", scene.weather)}


def _mentioned_details(scene: Scene, stretches: Sequence[Stretch]) -> Iterator[Detail]:
    """Yield the details that the given spans of a scene's caption mention."""

    def remains(place: int) -> bool:
        return any(start <= place < end for start, end in stretches)

    caption = scene.caption.lower()
    for name, phrasings in (("time", words.TIMES[scene.time]), ("weather", words.WEATHERS[scene.weather])):
        if any(remains(caption.find(text)) for text in phrasings if text in caption):
            yield -1, name, getattr(scene, name)
    for part in scene.parts:
        number = scene.objects.index(part.object)
        yield from ((number, *item) for item in vars(part.object).items() if remains(_place(part, *item)))


def _place(part: Phrase, name: str, value: Any) -> int:
    """Position at which a phrase mentions a detail; if the value is not a word in it, its beginning, near enough."""
    word = words.NUMBERS[value] if name == "storeys" else str(value)
    at = part.text.rfind(word) if name == "awning" else part.text.find(word)
    return part.start + max(at, 0)
