"""Recall when descriptions are spoilt."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from finelip_fast.engines import Engine
from finelip_fast.records import Plot, Record, Table
from finelip_fast.studies.setting import Setting, text_to_image
from finelip_fast.tokenizer import encode_batch, expected_truncation

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_TYPOS = 0.1  # share of the words


def sentences(caption: str) -> list[str]:
    """The sentences of a caption; joined by spaces, the caption."""
    return _SENTENCE.split(caption.strip())


def typos(caption: str, random: Random) -> str:
    """Two neighbouring letters change places in a tenth of the words."""
    words = caption.split(" ")
    for at in range(len(words)):
        if len(words[at]) > 3 and random.random() < _TYPOS:
            cut = random.randrange(len(words[at]) - 2)
            words[at] = words[at][:cut] + words[at][cut + 1] + words[at][cut] + words[at][cut + 2 :]
    return " ".join(words)


def plain(caption: str, _: Random) -> str:
    """Lower case, no punctuation."""
    return re.sub(r"[^\w\s]", "", caption.lower())


def dropped(caption: str, random: Random) -> str:
    """A quarter of the sentences is missing, at least one where there are two."""
    said = sentences(caption)
    gone = set(random.sample(range(len(said)), min(len(said) - 1, max(1, round(len(said) / 4)))))
    return " ".join(sentence for at, sentence in enumerate(said) if at not in gone)


def repeated(caption: str, random: Random) -> str:
    """A quarter of the sentences is said twice, at least one."""
    said = sentences(caption)
    for sentence in random.sample(said, max(1, round(len(said) / 4))):
        said.insert(random.randrange(len(said) + 1), sentence)
    return " ".join(said)


def shuffled(caption: str, random: Random) -> str:
    """Sentences in another order."""
    said = sentences(caption)
    random.shuffle(said)
    return " ".join(said)


NOISES: dict[str, Callable[[str, Random], str]] = {
    "clean": lambda caption, _: caption,
    "typos": typos,
    "lower case, no punctuation": plain,
    "a quarter dropped": dropped,
    "a quarter repeated": repeated,
    "shuffled": shuffled,
}


def irrelevant(captions: list[str], at: int, count: int, random: Random) -> str:
    """A caption with ``count`` sentences of other captions among its own."""
    said = sentences(captions[at])
    for _ in range(count):
        other = captions[(at + random.randrange(1, len(captions))) % len(captions)] if len(captions) > 1 else ""
        said.insert(random.randrange(len(said) + 1), random.choice(sentences(other)))
    return " ".join(said)


def noise(engine: Engine, setting: Setting) -> Record:
    """Recall of captions with typos, without case and punctuation, with sentences dropped, repeated, shuffled, added."""
    pairs = setting.embed(engine)
    spoilt = {
        name: [change(caption, Random(f"{name}/{at}")) for at, caption in enumerate(pairs.captions)]
        for name, change in NOISES.items()
    }
    for count in (1, 2, 4):
        name = f"{count} of other captions added"
        spoilt[name] = [
            irrelevant(pairs.captions, at, count, Random(f"{name}/{at}")) for at in range(len(pairs.captions))
        ]
    rows, measured = [], []
    for name, captions in spoilt.items():
        with expected_truncation():
            cut = encode_batch(captions, engine.config.context_length).n_cut
            found = pairs.measure(engine.embed_texts(captions), engine.alpha)
        measured.append(found)
        rows.append({"captions": name, "cut at the context": cut, **found.row()})
    names = list(spoilt)
    losses = {
        name: measured[0].recall("combined") - one.recall("combined") for name, one in zip(names, measured, strict=True)
    }
    worst = max(losses, key=lambda name: losses[name])
    least = min(names[1:], key=lambda name: losses[name])
    gains = [one.recall("fine") - one.recall("global") for one in measured]
    finding = (
        f"Combined recall@1 (mean of both directions) is {measured[0].recall('combined'):.1f} % with clean captions. It loses "
        f"most with {worst} ({losses[worst]:.1f} points), least with {least} ({losses[least]:.1f}). Late interaction alone is "
        f"ahead of the global cosine alone by {min(gains):.1f} to {max(gains):.1f} points."
    )
    plots = (Plot("recall", "", "text to image, recall@1 (%)", text_to_image(names, measured)),)
    about = {"data": setting.data, "engine": engine.name, "pairs": len(pairs.captions), "alpha": engine.alpha}
    return Record("noise", "What spoilt descriptions lose", (Table("Recall", rows),), plots, about, finding)
