"""The contents of generated street scenes, and families of scenes that differ in one or two details."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any, ClassVar, NamedTuple

from finelip_fast.datasets.scenes import canvas as plan

__all__ = ["FAMILY_SIZE", "Building", "Content", "Furniture", "Person", "Placed", "Tree", "Vehicle", "family"]

FAMILY_SIZE = 4

# --- Choices. Each kind of object has only colours that are easy to tell apart on it. ----------------------------

TIMES = ("morning", "noon", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog")
ROOFS = ("flat", "pitched", "mansard", "domed", "stepped")
HATS = ("cap", "top hat", "bobble hat")
FACINGS = ("left", "right")

_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "scene": {"time": TIMES, "weather": WEATHERS},
    "building": {
        "wall": (*_BRIGHT, "white", "brown", "grey"),
        "storeys": (1, 2, 3, 4),
        "roof": ROOFS,
        "roof_colour": ("red", "orange", "green", "blue", "purple", "brown", "black", "grey"),
        "door": (*_BRIGHT, "white", "brown", "black"),
        "awning": (None, "red", "yellow", "green", "blue", "purple", "pink"),
    },
    "vehicle": {
        "kind": ("car", "van", "bus", "truck", "tram", "scooter", "bicycle"),
        "colour": (*_BRIGHT, "white", "black"),
        "facing": FACINGS,
    },
    "person": {
        "coat": (*_BRIGHT, "white", "black", "brown"),
        "hat": (None, *(f"{colour} {hat}" for hat in HATS for colour in (*_BRIGHT, "black", "white"))),
        "umbrella": (None, *_BRIGHT, "white", "black"),
        "dog": (None, "brown", "white", "black", "grey"),
    },
    "tree": {"kind": ("leafy", "pine", "bare", "cherry", "autumn"), "size": ("small", "tall")},
}
_BACK_FURNITURE = (
    *(f"{colour} post box" for colour in ("red", "yellow", "blue", "green")),
    *(f"{colour} phone box" for colour in ("red", "blue", "green")),
    *(f"{colour} bus stop sign" for colour in ("red", "yellow", "blue")),
    "black street lamp",
)
_FRONT_FURNITURE = (
    *(f"{colour} bench" for colour in ("red", "green", "blue", "brown")),
    *(f"{colour} bin" for colour in ("green", "blue", "orange", "grey")),
    *(f"{colour} hydrant" for colour in ("red", "yellow", "blue")),
    "stone fountain",
)
_ABSENT = 0.45  # how often something optional (hat, umbrella, dog, awning) is left out


# --- Parts of a scene --------------------------------------------------------------------------------------------


class _Placed:
    """An object in a scene; ``(x, ground)`` is the middle of its foot, as fractions of the picture's side."""

    what: ClassVar[str]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Bounding box of the drawing: ``(x0, y0, x1, y1)`` in [0, 1], y downwards."""
        return plan.box_of(self)


@dataclass(frozen=True)
class Building(_Placed):
    """A house in the row; ``awning`` is the colour of its stripes, or None."""

    what: ClassVar[str] = "building"
    x: float
    width: float
    wall: str
    storeys: int
    roof: str
    roof_colour: str
    door: str
    awning: str | None
    ground: float = plan.FOOT_OF_HOUSES


@dataclass(frozen=True)
class Vehicle(_Placed):
    """A vehicle on the road; ``ground`` is its lane."""

    what: ClassVar[str] = "vehicle"
    x: float
    ground: float
    kind: str
    colour: str
    facing: str


@dataclass(frozen=True)
class Person(_Placed):
    """A person on the near pavement; ``hat`` is a colour and a kind, as in "red cap", or None for no hat."""

    what: ClassVar[str] = "person"
    x: float
    who: str
    coat: str
    hat: str | None
    umbrella: str | None
    dog: str | None
    ground: float = plan.FRONT_ROW


@dataclass(frozen=True)
class Tree(_Placed):
    """A tree on the far pavement."""

    what: ClassVar[str] = "tree"
    x: float
    kind: str
    size: str
    ground: float = plan.BACK_ROW


@dataclass(frozen=True)
class Furniture(_Placed):
    """A piece of street furniture; ``name`` is a colour (or a material) and a kind, as in "red post box"."""

    what: ClassVar[str] = "furniture"
    x: float
    ground: float
    name: str


Placed = Building | Vehicle | Person | Tree | Furniture


class Content(NamedTuple):
    """Everything that a scene shows and its description mentions, independent of the wording."""

    time: str
    weather: str
    objects: tuple[Placed, ...]


# --- Making contents ---------------------------------------------------------------------------------------------


def family(key: str) -> list[Content]:
    """Make the contents of one family: ``FAMILY_SIZE`` different scenes, each one or two details away from a base."""
    rng = Random(key)
    base = _base(rng)
    members: list[Content] = []
    while len(members) < FAMILY_SIZE:
        member = base
        for _ in range(rng.choice((1, 2))):
            member = _redraw(member, rng)
        if member != base and member not in members:
            members.append(member)
    return members


def _redraw(content: Content, rng: Random) -> Content:
    """Return the content with one detail redrawn, always to a different value."""
    place = rng.randrange(-1, len(content.objects))
    if place < 0:
        name = rng.choice(Content._fields[:2])
        return content._replace(**{name: _different_value(getattr(content, name), _CHOICES["scene"][name], rng)})
    old = content.objects[place]
    while True:
        name, choices = rng.choice(_details(old))
        new = replace(old, **{name: _different_value(getattr(old, name), choices, rng)})
        if _is_legible(new):
            return content._replace(objects=(*content.objects[:place], new, *content.objects[place + 1 :]))


def _details(placed: Placed) -> list[tuple[str, tuple[Any, ...]]]:
    """List the details of an object that may be redrawn, each with its choices."""
    if isinstance(placed, Furniture):
        return [("name", _FRONT_FURNITURE if placed.ground == plan.FRONT_ROW else _BACK_FURNITURE)]
    return list(_CHOICES[placed.what].items())


def _different_value(value: Any, choices: tuple[Any, ...], rng: Random) -> Any:
    """Choose a value other than ``value``; an optional detail may become absent."""
    if None in choices and value is not None and rng.random() < _ABSENT:
        return None
    return rng.choice([choice for choice in choices if choice != value and choice is not None])


def _is_legible(placed: Placed) -> bool:
    """Tell whether every named colour stands out from its background."""
    if isinstance(placed, Building):
        return placed.wall not in (placed.roof_colour, placed.door)
    return True


def _base(rng: Random) -> Content:
    houses, vehicles, people, trees, back, front = _counts(rng)
    edges = _edges(houses, rng)
    front_slots = rng.sample(plan.FRONT_SLOTS, people + front)
    back_slots = rng.sample(_back_slots(edges), trees + back)
    objects: tuple[Placed, ...] = (
        *(_building(left, right, rng) for left, right in pairwise(edges)),
        *(Vehicle(x, rng.choice(plan.LANES), **_pick("vehicle", rng)) for x in _vehicle_slots(vehicles, rng)),
        *(Person(x, rng.choice(("man", "woman")), **_pick("person", rng)) for x in sorted(front_slots[:people])),
        *(Tree(x, **_pick("tree", rng)) for x in sorted(back_slots[:trees])),
        *(Furniture(x, plan.BACK_ROW, rng.choice(_BACK_FURNITURE)) for x in back_slots[trees:]),
        *(Furniture(x, plan.FRONT_ROW, rng.choice(_FRONT_FURNITURE)) for x in front_slots[people:]),
    )
    return Content(**_pick("scene", rng), objects=objects)


def _counts(rng: Random) -> tuple[int, int, int, int, int, int]:
    """Choose the numbers of houses, vehicles, people, trees, and pieces of furniture behind and in front: 8 to 11 objects.

    Houses and people take twice as many words as the others, and a description must not become too long.
    """
    while True:
        counts = (rng.choice((2, 2, 3, 3, 4)), rng.choice((1, 2)), rng.choice((1, 2, 2, 3)), rng.choice((1, 2)))
        back, front = rng.choice(((1, 0), (0, 1), (1, 1)))
        total = sum(counts) + back + front
        if 8 <= total <= 11 and total + counts[0] + counts[2] <= 16:
            return *counts, back, front


def _edges(houses: int, rng: Random) -> list[float]:
    """Choose the edges of the houses, left to right: almost, but not quite, equal widths."""
    inner = [round(number / houses + rng.uniform(-0.015, 0.015), 4) for number in range(1, houses)]
    return [0.0, *inner, 1.0]


def _back_slots(edges: list[float]) -> list[float]:
    """List the free places on the far pavement: between the doors, so that no door is hidden."""
    corners = [] if len(edges) > 4 else [0.075, 0.925]
    return [*edges[1:-1], *corners]


def _vehicle_slots(vehicles: int, rng: Random) -> list[float]:
    if vehicles == 1:
        return [rng.choice((0.25, 0.5, 0.75))]
    return [0.25, 0.75]


def _building(left: float, right: float, rng: Random) -> Building:
    while True:
        house = Building(round((left + right) / 2, 4), round(right - left, 4), **_pick("building", rng))
        if _is_legible(house):
            return house


def _pick(kind: str, rng: Random) -> dict[str, Any]:
    """Choose a value for every detail of a kind of object."""
    return {name: _first(choices, rng) for name, choices in _CHOICES[kind].items()}


def _first(choices: tuple[Any, ...], rng: Random) -> Any:
    if choices[0] is not None:
        return rng.choice(choices)
    return None if rng.random() < _ABSENT else rng.choice(choices[1:])
