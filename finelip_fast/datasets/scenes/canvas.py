"""The ground plan, the colours and the canvas of generated street scenes.

All coordinates are fractions of the picture's side, with (0, 0) at the top left, so a scene looks the same at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

__all__ = ["BACK_ROW", "FOOT_OF_HOUSES", "FRONT_ROW", "FRONT_SLOTS", "LANES", "PALETTE", "Canvas", "box_of"]

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Point = tuple[float, float]
Extent = tuple[float, float, float]  # from the object's position: to the left, up, to the right

# --- The plan of every scene, from back to front -----------------------------------------------------------------

FOOT_OF_HOUSES = 0.53
BACK_ROW = 0.575  # trees and tall street furniture stand here
ROAD = (0.595, 0.765)
LANES = (0.672, 0.748)  # where wheels touch the road
FRONT_ROW = 0.965  # people and low street furniture stand here
FRONT_SLOTS = (0.07, 0.268, 0.466, 0.664, 0.862)

GROUND_FLOOR, FLOOR = 0.11, 0.075
ROOF_HEIGHT = {"flat": 0.035, "pitched": 0.10, "mansard": 0.08, "domed": 0.095, "stepped": 0.10}
_VEHICLE = {
    "car": (0.27, 0.115),
    "van": (0.28, 0.145),
    "bus": (0.38, 0.165),
    "truck": (0.36, 0.15),
    "tram": (0.40, 0.17),
    "scooter": (0.22, 0.135),
    "bicycle": (0.25, 0.135),
}
_TREE = {"small": (0.125, 0.20), "tall": (0.15, 0.32)}
_FURNITURE = {
    "post box": (0.055, 0.115),
    "phone box": (0.07, 0.17),
    "bus stop sign": (0.07, 0.19),
    "street lamp": (0.06, 0.27),
    "bench": (0.15, 0.10),
    "bin": (0.075, 0.115),
    "hydrant": (0.08, 0.11),
    "fountain": (0.15, 0.15),
}

# --- Colours -----------------------------------------------------------------------------------------------------

PALETTE: dict[str, Colour] = {
    "red": (207, 62, 58),
    "orange": (238, 138, 52),
    "yellow": (247, 208, 84),
    "green": (82, 158, 94),
    "blue": (66, 122, 200),
    "purple": (128, 84, 172),
    "pink": (240, 152, 182),
    "brown": (136, 92, 62),
    "white": (247, 245, 239),
    "grey": (146, 150, 158),
    "black": (46, 48, 56),
}
INK, GLASS, LAMPLIGHT = (40, 42, 54), (164, 204, 226), (255, 221, 134)
_LIGHT = {"morning": (255, 241, 214), "noon": (255, 255, 255), "sunset": (250, 224, 202), "night": (184, 190, 226)}


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Mix a ``share`` of ``second`` into ``first``."""
    (r, g, b), (s, h, c) = first, second
    return round(r + (s - r) * share), round(g + (h - g) * share), round(b + (c - b) * share)


@lru_cache(maxsize=4096)
def lit(colour: Colour, light: Colour) -> Colour:
    """Return a colour as it looks under a coloured light."""
    (r, g, b), (red, green, blue) = colour, light
    return r * red // 255, g * green // 255, b * blue // 255


def darker(colour: Colour, share: float = 0.16) -> Colour:
    return mix(colour, (24, 20, 44), share)


def lighter(colour: Colour, share: float = 0.22) -> Colour:
    return mix(colour, (255, 252, 244), share)


# --- Positions ---------------------------------------------------------------------------------------------------


def box_of(placed: Any) -> Box:
    """Return the box in which an object is drawn, ``(x0, y0, x1, y1)`` in [0, 1]."""
    left, height, right = _EXTENTS[placed.what](placed)
    x0, x1 = max(0.0, placed.x - left), min(1.0, placed.x + right)
    return (round(x0, 4), round(placed.ground - height, 4), round(x1, 4), round(placed.ground, 4))


def wall_height(house: Any) -> float:
    return GROUND_FLOOR + FLOOR * float(house.storeys - 1)


def _building_extent(house: Any) -> Extent:
    return house.width / 2, wall_height(house) + ROOF_HEIGHT[house.roof], house.width / 2


def _person_extent(person: Any) -> Extent:
    side = 0.068 if person.umbrella or person.hat else 0.052
    height = 0.365 if person.umbrella else 0.305 if person.hat else 0.252
    return side, height, 0.125 if person.dog else side


def _centred(size: tuple[float, float]) -> Extent:
    width, height = size
    return width / 2, height, width / 2


def kind_of(furniture: Any) -> str:
    return str(furniture.name).split(" ", 1)[1]


_EXTENTS: dict[str, Callable[[Any], Extent]] = {
    "building": _building_extent,
    "vehicle": lambda vehicle: _centred(_VEHICLE[vehicle.kind]),
    "person": _person_extent,
    "tree": lambda tree: _centred(_TREE[tree.size]),
    "furniture": lambda furniture: _centred(_FURNITURE[kind_of(furniture)]),
}


# --- The canvas --------------------------------------------------------------------------------------------------


class Canvas:
    """A square picture that takes coordinates in [0, 1] and paints colours in the light of the time of day.

    ``origin`` and ``flip`` move and mirror the painting, so that each painter can work in its own coordinates.
    """

    def __init__(self, pixels: int, time: str, weather: str) -> None:
        self.image = Image.new("RGB", (pixels, pixels))
        self.pixels, self.time, self.weather = pixels, time, weather
        self.light = _LIGHT[time]
        self.origin, self.flip = (0.0, 0.0), 1
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    @property
    def night(self) -> bool:
        return self.time == "night"

    @property
    def snowy(self) -> bool:
        return self.weather == "snow"

    def at(self, x: float, y: float, flip: int = 1) -> None:
        self.origin, self.flip = (x, y), flip

    def _ink(self, colour: Colour, alpha: int, glow: bool) -> tuple[int, ...]:
        return (*(colour if glow else lit(colour, self.light)), alpha)

    def _corners(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (x, y), side = self.origin, self.pixels
        left, right = sorted((x + self.flip * x0, x + self.flip * x1))
        return (
            left * side,
            (y + y0) * side,
            max(right * side - 1, left * side),
            max((y + y1) * side - 1, (y + y0) * side),
        )

    def _points(self, points: tuple[Point, ...]) -> list[Point]:
        (x, y), side, flip = self.origin, self.pixels, self.flip
        return [((x + flip * px) * side, (y + py) * side) for px, py in points]

    def box(
        self,
        x0: float,
        y0: float,
        x1: float,
        y1: float,
        colour: Colour,
        *,
        radius: float = 0.0,
        alpha: int = 255,
        glow: bool = False,
    ) -> None:
        ink = self._ink(colour, alpha, glow)
        if radius:
            self._draw.rounded_rectangle(self._corners(x0, y0, x1, y1), radius * self.pixels, ink)
        else:
            self._draw.rectangle(self._corners(x0, y0, x1, y1), ink)

    def oval(
        self, x: float, y: float, rx: float, ry: float, colour: Colour, *, alpha: int = 255, glow: bool = False
    ) -> None:
        self._draw.ellipse(self._corners(x - rx, y - ry, x + rx, y + ry), self._ink(colour, alpha, glow))

    def pie(self, x: float, y: float, rx: float, ry: float, start: float, end: float, colour: Colour) -> None:
        self._draw.pieslice(self._corners(x - rx, y - ry, x + rx, y + ry), start, end, self._ink(colour, 255, False))

    def shape(self, *points: Point, colour: Colour, alpha: int = 255, glow: bool = False) -> None:
        self._draw.polygon(self._points(points), self._ink(colour, alpha, glow))

    def pane(self, *points: Point) -> None:
        """Paint a window's glass, lit from within at night."""
        self.shape(*points, colour=LAMPLIGHT if self.night else GLASS, glow=self.night)

    def line(self, *points: Point, colour: Colour, width: float, alpha: int = 255, glow: bool = False) -> None:
        pixels = max(1, round(width * self.pixels))
        self._draw.line(self._points(points), self._ink(colour, alpha, glow), pixels, joint="curve")

    def ring(self, x: float, y: float, radius: float, colour: Colour, width: float) -> None:
        pixels = max(1, round(width * self.pixels))
        corners = self._corners(x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(corners, None, self._ink(colour, 255, False), pixels)

    def shadow(self, x0: float, x1: float, *, depth: float = 0.012) -> None:
        """Paint a soft shadow on the ground, between ``x0`` and ``x1``."""
        self.oval((x0 + x1) / 2, 0.0, (x1 - x0) / 2, depth, (20, 22, 50), alpha=54, glow=True)
