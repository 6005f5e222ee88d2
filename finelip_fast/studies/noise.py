"""Recall with corrupted captions."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from finelip_fast.datasets.scenes import FAMILY_SIZE, Scenes, ceiling
from finelip_fast.engines import Engine
from finelip_fast.errors import InputError
from finelip_fast.records import Plot, Record, Table
from finelip_fast.studies.setting import Setting, text_to_image
from finelip_fast.tokenizer import SENTENCE_END, encode_batch, expected_truncation

_TYPOS = 0.1  # share of the words


def sentences(caption: str) -> list[str]:
    """Split a caption into its sentences; joined by spaces, they give the caption again."""
    return SENTENCE_END.split(caption.strip())


def typos(caption: str, random: Random) -> str:
    """Swap two adjacent letters that differ, not the first, in a tenth of the words of over three letters."""
    words = caption.split(" ")
    for at, word in enumerate(words):
        unlike = [cut for cut in range(1, len(word) - 1) if word[cut] != word[cut + 1]]
        if len(word) > 3 and unlike and random.random() < _TYPOS:
            cut = random.choice(unlike)
            words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def plain(caption: str, _: Random) -> str:
    """Lower-case a caption and replace punctuation with blanks, so that "two-storey" stays two words."""
    return " ".join(re.sub(r"[^\w\s]|_", " ", caption.lower()).split())


def dropped(caption: str, random: Random) -> str:
    """Drop a quarter of the sentences, at least one if there are two."""
    return " ".join(caption[start:end] for start, end in remaining(caption, random))


def remaining(caption: str, random: Random) -> list[tuple[int, int]]:
    """Character ranges of the sentences that :func:`dropped` keeps."""
    edges = [edge for match in SENTENCE_END.finditer(caption) for edge in match.span()]
    stretches = list(zip([0, *edges[1::2]], [*edges[::2], len(caption)], strict=True))
    left_out = set(random.sample(range(len(stretches)), min(len(stretches) - 1, max(1, round(len(stretches) / 4)))))
    return [stretch for at, stretch in enumerate(stretches) if at not in left_out]


def repeated(caption: str, random: Random) -> str:
    """Repeat a quarter of the sentences, at least one."""
    statements = sentences(caption)
    for sentence in random.sample(statements, max(1, round(len(statements) / 4))):
        statements.insert(random.randrange(len(statements) + 1), sentence)
    return " ".join(statements)


def shuffled(caption: str, random: Random) -> str:
    """Shuffle the sentences."""
    statements = sentences(caption)
    random.shuffle(statements)
    return " ".join(statements)


NOISES: dict[str, Callable[[str, Random], str]] = {
    "clean": lambda caption, _: caption,
    "typos": typos,
    "lower case, no punctuation": plain,
    "a quarter dropped": dropped,
    "a quarter repeated": repeated,
    "shuffled": shuffled,
}


def irrelevant(captions: list[str], owners: list[int], at: int, count: int, random: Random) -> str:
    """Add ``count`` sentences from other pictures' captions to a caption; ``owners`` are the captions' pictures.

    Raises:
        InputError: There is no other picture.
    """
    if len(set(owners)) < 2:
        raise InputError(
            "expected pairs of at least 2 pictures, whose sentences are mixed, got 1; give --data with more"
        )
    statements = sentences(captions[at])
    for _ in range(count):
        while owners[stranger := random.randrange(len(captions))] == owners[at]:
            pass
        statements.insert(random.randrange(len(statements) + 1), random.choice(sentences(captions[stranger])))
    return " ".join(statements)


def noise(engine: Engine, setting: Setting) -> Record:
    """Measure recall with typos, without case and punctuation, and with sentences dropped, repeated, shuffled, added."""
    pairs = setting.embed(engine)
    corrupted = {
        name: [change(caption, Random(f"{name}/{at}")) for at, caption in enumerate(pairs.captions)]
        for name, change in NOISES.items()
    }
    owners = pairs.owners.tolist()
    for count in (1, 2, 4):
        name = f"{count} of other captions added"
        corrupted[name] = [
            irrelevant(pairs.captions, owners, at, count, Random(f"{name}/{at}")) for at in range(len(pairs.captions))
        ]
    rows, measured = [], []
    for name, captions in corrupted.items():
        with expected_truncation():
            cut = encode_batch(captions, engine.config.context_length, tokenizer=engine.tokenizer).n_cut
            result = pairs.measure(engine.embed_texts(captions), engine.alpha)
        measured.append(result)
        rows.append({"captions": name, "cut at the context": cut, **result.row()})
    names = list(corrupted)
    losses = {name: measured[0].recall() - rankings.recall() for name, rankings in zip(names, measured, strict=True)}
    worst = max(losses, key=lambda name: losses[name])
    least = min(names[1:], key=lambda name: losses[name])
    finding = (
        f"{measured[0].main.capitalize()} recall@1 (mean of both directions) is {measured[0].recall():.1f} % with clean "
        f"captions. It loses most with {worst} ({losses[worst]:.1f} points), least with {least} ({losses[least]:.1f})."
    )
    if measured[0].main == "combined":
        gains = [rankings.recall("fine") - rankings.recall("global") for rankings in measured]
        finding += (
            f" Late interaction alone differs from the global cosine alone by {min(gains):+.1f} to {max(gains):+.1f} points, "
            "depending on the row."
        )
    finding += _best_of_dropped(engine, setting)
    plots = (Plot("recall", "", "text to image, recall@1 (%)", text_to_image(names, measured)),)
    about = setting.about(engine, pairs=len(pairs.captions))
    return Record("noise", "How corrupted captions affect recall", (Table("Recall", rows),), plots, about, finding)


def _best_of_dropped(engine: Engine, setting: Setting) -> str:
    """Describe what a perfect reader finds with a quarter dropped, if the pairs are scenes, whose contents are known."""
    pairs = setting.open(engine)
    scenes = getattr(pairs, "scenes", None)
    if not isinstance(scenes, Scenes) or scenes.variant != "clean" or len(scenes) % FAMILY_SIZE:
        return ""
    name = "a quarter dropped"
    stretches = [remaining(scene.caption, Random(f"{name}/{at}")) for at, scene in enumerate(scenes)]
    best = ceiling(list(scenes), stretches)
    return (
        f" With {name}, exact knowledge of all pictures finds {100 * best.i2t:.1f} % (image to text) and "
        f"{100 * best.t2i:.1f} % (text to image): the other captions lack the detail that decides."
    )
