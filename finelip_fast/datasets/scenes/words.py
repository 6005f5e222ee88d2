"""The wording of generated street scenes: descriptions that mention everything that may differ, phrased in many ways.

A description is a shuffled list of statements. A statement joins one or two clauses, and a clause describes one object
(or the time of day and the weather). Clauses are sentences without the initial capital and the full stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

__all__ = ["NUMBERS", "TIMES", "VARIANTS", "WEATHERS", "Statement", "locate", "tell", "vary"]

Choose = Callable[[Sequence[str]], str]  # picks one of several phrasings

VARIANTS = ("clean", "typos", "plain", "dropped", "repeated", "reordered")

# Bounds on the estimated number of tokens, which is within a few of the CLIP tokenizer's count.
_FEWEST, _MOST, _DETAILED = 115, 186, 310


_PIECES = re.compile(r"awn|dom|man(?=s)|scoo|hydr|[a-z]+|[^a-z\s]")  # the tokenizer splits a few words in two


class Clause(NamedTuple):
    """A piece of a sentence and the placed object that it describes, if any."""

    text: str
    placed: Any = None


class Statement(NamedTuple):
    """One or two clauses and the text that joins them."""

    clauses: tuple[Clause, ...]
    joint: str = ", and "

    @property
    def text(self) -> str:
        """The statement as a sentence, with a capital first and a full stop last."""
        text = self.joint.join(clause.text for clause in self.clauses)
        return text[0].upper() + text[1:] + "."


# --- Phrasings. The first two of each list are the shortest. -------------------------------------------------------

_OPENINGS = (
    "{when} {weather}",
    "the picture shows a street {when}: {weather}",
    "this is a street {when}, and {weather}",
    "{when}, when {weather}, the street looks like this",
    "we see a street in a small town {when}; {weather}",
)
TIMES = {
    "morning": ("in the morning", "early in the morning"),
    "noon": ("at noon", "at midday"),
    "sunset": ("at sunset", "in the evening at sunset"),
    "night": ("at night", "late at night"),
}
WEATHERS = {
    "clear": ("the sky is clear", "the weather is clear"),
    "cloudy": ("the sky is cloudy", "clouds fill the sky"),
    "rain": ("it is raining", "rain is falling"),
    "snow": ("it is snowing", "snow is falling"),
    "fog": ("it is foggy", "fog fills the air"),
}
_HOUSES = (
    "a {storeys} {wall} house {place} has a {roof_colour} {roof} roof{with_awning} and a {door} door",
    "{place} stands a {wall} {home} with {floors}, a {roof_colour} {roof} roof{with_awning} and a {door} door",
    "the {home} {place} is {wall}, with {floors}, a {door} door and a {roof} roof in {roof_colour}{awning_too}",
    "a {roof_colour} {roof} roof covers the {storeys} {wall} {home} {place}, whose door is {door}{awning_too}",
    "behind its {door} door the {wall} {home} {place} rises {floors} to a {roof_colour} {roof} roof{awning_too}",
    "there is a {storeys} {home} {place}. It is {wall}, its {roof} roof is {roof_colour}, its door {door}{awning_too}",
)
_AWNINGS = (
    ". A {awning} striped awning shades its windows",
    ". Its awning has {awning} and white stripes",
    ". It has a {awning} awning",
)
_HOMES = ("house", "building", "town house")
_VEHICLES = (
    "a {colour} {kind} faces {facing} {place}",
    "{place} there is a {colour} {kind} facing {facing}",
    "the {kind} {place} is {colour} and heads to the {facing}",
    "a {kind} painted {colour} {place} points to the {facing}",
    "turned to the {facing}, a {colour} {kind} can be seen {place}",
)
_PEOPLE = (
    "a {who} {place} wears a {coat} coat{with_hat}{with_umbrella}{with_dog}",
    "{place} there is a {who} in a {coat} coat{with_hat}{with_umbrella}{with_dog}",
    "the {who} who stands {place} has on a {coat} coat{with_hat}{with_umbrella}{with_dog}",
    "dressed in a {coat} coat{with_hat}, a {who} waits {place}{with_umbrella}{with_dog}",
)
_HATS = (" and a {}", " with a {}")
_UMBRELLAS = (", under a {} umbrella", ", holding up a {} umbrella", ", carrying a {} umbrella")
_DOGS = (", with a {} dog", ", walking a {} dog", ", and keeps a {} dog on a lead")
_TREES = (
    "a {size} {tree} grows {place}",
    "{place} there is a {size} {tree}",
    "the tree {place} is a {size} {tree}",
    "a {size} {tree} can be seen {place}",
)
_SIZES = {"small": ("small", "little"), "tall": ("tall", "big")}
_TREE_KINDS = {
    "leafy": ("green leafy tree", "tree full of green leaves"),
    "pine": ("pine tree", "dark green pine"),
    "bare": ("bare tree", "tree without leaves"),
    "cherry": ("cherry tree in pink blossom", "tree in pink blossom"),
    "autumn": ("tree with orange autumn leaves", "tree in orange autumn colours"),
}
_FURNITURE = (
    "a {name} stands {place}",
    "{place} there is a {name}",
    "you can see a {name} {place}",
    "a {name} can be found {place}",
)
# Clauses of a detailed description, one per detail; an absent detail (such as a hat) has no clause.
_DETAILS = {
    "building": (
        (
            "the {home} {place} has {wall} walls and {floors}",
            "{place} there is a {storeys} {home} with {wall} walls",
        ),
        (
            "the roof of the {home} {place} is {roof} and {roof_colour}",
            "a {roof_colour} {roof} roof ends the {home} {place}",
        ),
        ("one enters the {home} {place} by a {door} door", "the front door of the {home} {place} is painted {door}"),
        ("the awning of the {home} {place} has {awning} and white stripes",),
    ),
    "vehicle": (
        ("{place} there is a {kind} and its colour is {colour}", "the {kind} that is {place} is {colour}"),
        ("the {kind} {place} points to the {facing}, in the lane {lane}",),
    ),
    "person": (
        ("the {who} who stands {place} is dressed in a {coat} coat", "{place} there is a {who} in a {coat} coat"),
        ("the {who} {place} has a {hat} on", "on the head of the {who} {place} sits a {hat}"),
        ("the {who} {place} holds up a {umbrella} umbrella", "a {umbrella} umbrella is open over the {who} {place}"),
        ("a {dog} dog is out with the {who} {place}", "the {who} {place} has a {dog} dog on a lead"),
    ),
    "tree": (
        ("the tree {place} on the far pavement is a {tree}", "beyond the road, {place}, there is a {tree}"),
        ("next to the houses the tree {place} looks {size}", "the tree {place} is {size} for its kind"),
    ),
    "furniture": (
        ("on the {side} pavement, {place}, there is a {name}", "the {name} {place} is on the {side} pavement"),
    ),
}
_SUBJECTS = {"vehicle": "the {kind} {place}", "person": "the {who} {place}", "furniture": "the {thing} {place}"}
_RELATIONS = (
    "{subject} is in front of the {home} {place}",
    "behind {subject} is the {home} {place}",
    "looking past {subject} one sees the {home} {place}",
)
_PHRASINGS = {"building": _HOUSES, "vehicle": _VEHICLES, "person": _PEOPLE, "tree": _TREES, "furniture": _FURNITURE}
_FILLERS = (
    "a dashed white line runs along the middle of the road",
    "the road crosses the picture from the left edge to the right edge",
    "the houses stand side by side, wall to wall, along the far pavement",
    "behind the roofs the far town is no more than a pale shape",
    "the near pavement is laid with large stones and ends in a kerb",
)
_JOINTS = (", and ", ", while ", "; ")

# Positions, by columns of a fifth of the picture's width.
_COLUMNS = (
    ("on the far left", "at the left edge"),
    ("left of the middle", "a little to the left"),
    ("in the centre", "in the middle"),
    ("right of the middle", "a little to the right"),
    ("on the far right", "at the right edge"),
)
_ROWS = {
    2: (("on the left",), ("on the right",)),
    3: (("on the left",), ("in the middle", "in the centre"), ("on the right",)),
    4: (("on the far left",), ("left of the middle",), ("right of the middle",), ("on the far right",)),
}
_SIDES = (
    ("on the left of the road", "on the road to the left"),
    ("in the middle of the road",),
    ("on the right of the road", "on the road to the right"),
)
NUMBERS = ("no", "one", "two", "three", "four")


# --- Descriptions ------------------------------------------------------------------------------------------------


def tell(content: Any, rng: Random, *, detailed: bool = False) -> list[Statement]:
    """Write the statements of a description, in reading order.

    Args:
        content: time of day, weather and placed objects.
        rng: random generator that chooses phrasings and order.
        detailed: whether to describe every object in several statements, and where it stands; more than 300 tokens.
    """
    teller = _Teller(content, rng)
    if detailed:
        clauses = [teller.opening(), *(clause for placed in content.objects for clause in teller.details(placed))]
        _lengthen(clauses, _DETAILED, [*_FILLERS, *teller.relations()], rng)
    else:
        clauses = [teller.opening(), *(teller.clause(placed) for placed in content.objects)]
        _shorten(clauses, teller)
        _lengthen(clauses, rng.choice((_FEWEST, 160)), teller.relations()[:2], rng)
    rng.shuffle(clauses)
    return _joined(clauses, rng)


def _shorten(clauses: list[Clause], teller: _Teller) -> None:
    """Replace clauses, in random order, by their shortest phrasing until the description is short enough."""
    excess = sum(map(_tokens, clauses)) - _MOST
    for place in teller.rng.sample(range(1, len(clauses)), len(clauses) - 1):
        if excess <= 0:
            return
        brief = teller.clause(clauses[place].placed, brief=True)
        excess -= _tokens(clauses[place]) - _tokens(brief)
        clauses[place] = brief


def _lengthen(clauses: list[Clause], fewest: int, additions: Sequence[str], rng: Random) -> None:
    """Add general statements until the description is long enough."""
    missing = fewest - sum(map(_tokens, clauses))
    for text in rng.sample(additions, len(additions)):
        if missing <= 0:
            return
        clauses.append(Clause(text))
        missing -= _tokens(clauses[-1])


def _tokens(clause: Clause) -> int:
    """Estimate how many tokens a clause takes, including its full stop or joint."""
    return len(_PIECES.findall(clause.text)) + 1


def _joined(clauses: list[Clause], rng: Random) -> list[Statement]:
    statements: list[Statement] = []
    place = 0
    while place < len(clauses):
        pair = clauses[place : place + 2]
        take = 2 if len(pair) == 2 and ". " not in pair[0].text and rng.random() < 0.22 else 1
        statements.append(Statement(tuple(pair[:take]), rng.choice(_JOINTS)))
        place += take
    return statements


class _Teller:
    """Describes the objects of one scene, with its own choice of phrasings."""

    def __init__(self, content: Any, rng: Random) -> None:
        self.content, self.rng = content, rng
        self.houses = [placed for placed in content.objects if placed.what == "building"]

    def opening(self) -> Clause:
        rng = self.rng
        when, weather = rng.choice(TIMES[self.content.time]), rng.choice(WEATHERS[self.content.weather])
        return Clause(rng.choice(_OPENINGS).format(when=when, weather=weather))

    def clause(self, placed: Any, *, brief: bool = False) -> Clause:
        """Describe an object completely in one clause."""
        choose: Choose = self._short if brief else self.rng.choice
        return Clause(_articles(choose(_PHRASINGS[placed.what]).format(**self._terms(placed, choose))), placed)

    def details(self, placed: Any) -> Iterator[Clause]:
        """Describe an object in several clauses, each with some of its details."""
        absent = [f"{{{name}}}" for name, value in vars(placed).items() if value is None]
        for options in _DETAILS[placed.what]:
            if not any(name in options[0] for name in absent):
                text = self.rng.choice(options).format(**self._terms(placed, self.rng.choice))
                yield Clause(_articles(text), placed)

    def _short(self, options: Sequence[str]) -> str:
        return self.rng.choice(options[:2])

    def _terms(self, placed: Any, choose: Choose) -> dict[str, Any]:
        describe: Callable[[Any, Choose], dict[str, str]] = getattr(self, f"_{placed.what}")
        terms: dict[str, Any] = vars(placed) | describe(placed, choose)
        return terms

    def _building(self, house: Any, choose: Choose) -> dict[str, str]:
        number = NUMBERS[house.storeys]
        return {
            "place": choose(_ROWS[len(self.houses)][self.houses.index(house)]),
            "home": choose(_HOMES),
            "storeys": f"{number}-storey",
            "floors": f"{number} floor{'s' if house.storeys > 1 else ''}",
            "with_awning": f", a {house.awning} awning" if house.awning else "",
            "awning_too": choose(_AWNINGS).format(awning=house.awning) if house.awning else "",
        }

    def _vehicle(self, vehicle: Any, choose: Choose) -> dict[str, str]:
        lane = "near the houses" if vehicle.ground < 0.7 else "near us"
        return {"place": choose(_SIDES[int(vehicle.x * 3)]), "lane": lane}

    def _person(self, person: Any, choose: Choose) -> dict[str, str]:
        return {
            "place": choose(_column(person)),
            "with_hat": choose(_HATS).format(person.hat) if person.hat else "",
            "with_umbrella": choose(_UMBRELLAS).format(person.umbrella) if person.umbrella else "",
            "with_dog": choose(_DOGS).format(person.dog) if person.dog else "",
        }

    def _tree(self, tree: Any, choose: Choose) -> dict[str, str]:
        return {
            "size": choose(_SIZES[tree.size]),
            "tree": choose(_TREE_KINDS[tree.kind]),
            "place": choose(_column(tree)),
        }

    def _furniture(self, furniture: Any, choose: Choose) -> dict[str, str]:
        return {
            "place": choose(_column(furniture)),
            "side": "far" if furniture.ground < 0.7 else "near",
            "thing": furniture.name.split(" ", 1)[1],
        }

    def relations(self) -> list[str]:
        """Say which house is behind each object that is clearly in front of one."""
        choose, relations = self.rng.choice, []
        for placed in self.content.objects:
            for house in self.houses:
                if placed.what in _SUBJECTS and abs(placed.x - house.x) < house.width / 2 - 0.05:
                    subject = _SUBJECTS[placed.what].format(**self._terms(placed, choose))
                    relations.append(choose(_RELATIONS).format(subject=subject, **self._building(house, choose)))
        return relations


def _column(placed: Any) -> tuple[str, ...]:
    return _COLUMNS[min(int(placed.x * 5 + 1e-6), 4)]


def _articles(text: str) -> str:
    """Change "a" before a vowel to "an", except before words that begin with "one", which sound like a consonant."""
    return re.sub(r"\b([Aa]) (?=[aeiou])(?!one\b)", r"\1n ", text)


# --- From statements to captions ---------------------------------------------------------------------------------


def locate(statements: list[Statement]) -> Iterator[tuple[str, int, Any]]:
    """Yield each clause that describes a placed object: its text, its start in the clean caption, and the object."""
    caption, start = " ".join(statement.text for statement in statements), 0
    for statement in statements:
        for clause in statement.clauses:
            end = start + len(clause.text)
            if clause.placed is not None:
                yield caption[start:end], start, clause.placed
            start = end + len(statement.joint)
        start += len(". ") - len(statement.joint)


def vary(statements: list[Statement], variant: str, rng: Random) -> str:
    """Make the caption of a list of statements, in one of ``VARIANTS``."""
    texts = [statement.text for statement in statements]
    if variant == "dropped":
        dropped = set(rng.sample(range(len(texts)), max(1, round(len(texts) / 4))))
        texts = [text for place, text in enumerate(texts) if place not in dropped]
    elif variant == "repeated":
        for text in rng.sample(texts, max(1, round(len(texts) / 4))):
            texts.insert(rng.randrange(len(texts) + 1), text)
    elif variant == "reordered":
        turn = rng.randrange(1, len(texts))
        first, rest = texts[turn], texts[:turn] + texts[turn + 1 :]
        rng.shuffle(rest)
        texts = [first, *rest]
    caption = " ".join(texts)
    if variant == "plain":
        return " ".join(re.sub(r"[^a-z ]", " ", caption.lower()).split())
    return _mistyped(caption, rng) if variant == "typos" else caption


def _mistyped(caption: str, rng: Random) -> str:
    """Return the caption with a typo in about one word in twelve, and in at least one word."""
    words = caption.split(" ")
    long = [place for place, word in enumerate(words) if re.match(r"[a-z]{4}", word)]
    for place in rng.sample(long, min(len(long), max(1, round(len(words) / 12)))):
        words[place] = _slip(words[place], rng)
    return " ".join(words)


def _slip(word: str, rng: Random) -> str:
    """Swap two letters, drop one or double one, but never the first."""
    at = rng.randrange(1, 3)
    slips = (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[: at + 1] + word[at:],
    )
    return rng.choice([slip for slip in slips if slip != word])
