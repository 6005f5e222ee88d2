"""Drawing of generated street scenes: where things stand, which colours they have, how they look.

All coordinates are parts of the picture's side, (0, 0) at the top left, so that a scene looks the same at any size.
Pictures are drawn larger than asked and reduced, which smooths every edge.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw

__all__ = ["BACK_ROW", "FOOT_OF_HOUSES", "FRONT_ROW", "FRONT_SLOTS", "LANES", "PALETTE", "box_of", "draw"]

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# --- The plan of every scene, from the back to the front ---------------------------------------------------------

FOOT_OF_HOUSES = 0.53
BACK_ROW = 0.575  # trees and tall street furniture stand here
_ROAD = (0.595, 0.765)
LANES = (0.672, 0.748)  # where wheels touch the road
FRONT_ROW = 0.965  # people and low street furniture stand here
FRONT_SLOTS = (0.075, 0.275, 0.475, 0.675, 0.875)

_GROUND_FLOOR, _FLOOR = 0.11, 0.075
_ROOF = {"flat": 0.035, "pitched": 0.10, "mansard": 0.08, "domed": 0.095, "stepped": 0.10}
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
_CREAM, _INK, _GLASS, _LAMPLIGHT = (250, 240, 218), (40, 42, 54), (168, 206, 226), (255, 221, 134)
_TRUNK, _STONE, _SNOW, _STEEL = (112, 80, 60), (176, 176, 178), (248, 250, 253), (120, 126, 136)
_SKINS = ((248, 212, 180), (226, 176, 136), (164, 112, 80), (112, 76, 56))
_HAIR = ((54, 42, 40), (104, 66, 44), (196, 148, 84), (146, 74, 48))
_LEAVES = {"leafy": (92, 160, 86), "pine": (44, 108, 84), "cherry": (247, 176, 200), "autumn": (232, 136, 50)}

_SKY = {  # top and bottom
    "morning": ((128, 190, 226), (253, 228, 196)),
    "noon": ((84, 164, 226), (200, 230, 246)),
    "sunset": ((98, 84, 156), (255, 168, 108)),
    "night": ((22, 28, 66), (70, 78, 130)),
}
_VEIL = {"clear": 0.0, "cloudy": 0.5, "rain": 0.72, "snow": 0.6, "fog": 0.8}  # how much of the sky is grey
_GREY_SKY = {"cloudy": (176, 188, 202), "rain": (124, 136, 156), "snow": (206, 216, 230), "fog": (226, 228, 230)}
_LIGHT = {"morning": (255, 250, 240), "noon": (255, 255, 255), "sunset": (255, 226, 204), "night": (172, 178, 216)}


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    """``first`` with a ``share`` of ``second`` in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second))


@lru_cache(maxsize=4096)
def _lit(colour: Colour, light: Colour) -> Colour:
    return tuple(channel * lamp // 255 for channel, lamp in zip(colour, light))


def _darker(colour: Colour, share: float = 0.16) -> Colour:
    return _mix(colour, (24, 20, 44), share)


def _lighter(colour: Colour, share: float = 0.22) -> Colour:
    return _mix(colour, (255, 252, 244), share)


# --- Where things are --------------------------------------------------------------------------------------------


def box_of(placed) -> Box:
    """The box in which an object is drawn, ``(x0, y0, x1, y1)`` in [0, 1]."""
    left, height, right = _EXTENTS[placed.what](placed)
    x0, x1 = max(0.0, placed.x - left), min(1.0, placed.x + right)
    return (round(x0, 4), round(placed.ground - height, 4), round(x1, 4), round(placed.ground, 4))


def _wall_height(house) -> float:
    return _GROUND_FLOOR + _FLOOR * (house.storeys - 1)


def _building_extent(house):
    return house.width / 2, _wall_height(house) + _ROOF[house.roof], house.width / 2


def _person_extent(person):
    side = 0.066 if person.umbrella else 0.052
    height = 0.365 if person.umbrella else 0.305 if person.hat else 0.252
    return side, height, 0.125 if person.dog else side


def _centred(size: tuple[float, float]):
    width, height = size
    return width / 2, height, width / 2


def _kind_of(furniture) -> str:
    return furniture.name.split(" ", 1)[1]


_EXTENTS = {
    "building": _building_extent,
    "vehicle": lambda vehicle: _centred(_VEHICLE[vehicle.kind]),
    "person": _person_extent,
    "tree": lambda tree: _centred(_TREE[tree.size]),
    "furniture": lambda furniture: _centred(_FURNITURE[_kind_of(furniture)]),
}


# --- The canvas --------------------------------------------------------------------------------------------------


class _Canvas:
    """A square picture that takes coordinates in [0, 1] and paints colours in the light of the hour.

    ``origin`` and ``flip`` move and mirror what is painted, so that a painter works in its own coordinates.
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
        return (*(colour if glow else _lit(colour, self.light)), alpha)

    def _corners(self, x0, y0, x1, y1) -> tuple[float, float, float, float]:
        (x, y), side = self.origin, self.pixels
        left, right = sorted((x + self.flip * x0, x + self.flip * x1))
        return left * side, (y + y0) * side, max(right * side - 1, left * side), max((y + y1) * side - 1, (y + y0) * side)

    def _points(self, points):
        (x, y), side, flip = self.origin, self.pixels, self.flip
        return [((x + flip * px) * side, (y + py) * side) for px, py in points]

    def box(self, x0, y0, x1, y1, colour, *, radius=0.0, alpha=255, glow=False) -> None:
        ink = self._ink(colour, alpha, glow)
        if radius:
            self._draw.rounded_rectangle(self._corners(x0, y0, x1, y1), radius * self.pixels, ink)
        else:
            self._draw.rectangle(self._corners(x0, y0, x1, y1), ink)

    def oval(self, x, y, rx, ry, colour, *, alpha=255, glow=False) -> None:
        self._draw.ellipse(self._corners(x - rx, y - ry, x + rx, y + ry), self._ink(colour, alpha, glow))

    def pie(self, x, y, rx, ry, start, end, colour) -> None:
        self._draw.pieslice(self._corners(x - rx, y - ry, x + rx, y + ry), start, end, self._ink(colour, 255, False))

    def shape(self, *points, colour, alpha=255, glow=False) -> None:
        self._draw.polygon(self._points(points), self._ink(colour, alpha, glow))

    def line(self, *points, colour, width, alpha=255, glow=False) -> None:
        pixels = max(1, round(width * self.pixels))
        self._draw.line(self._points(points), self._ink(colour, alpha, glow), pixels, joint="curve")

    def ring(self, x, y, radius, colour, width) -> None:
        pixels = max(1, round(width * self.pixels))
        corners = self._corners(x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse(corners, None, self._ink(colour, 255, False), pixels)

    def shadow(self, x0, x1, *, depth=0.012) -> None:
        """A soft shadow on the ground, between ``x0`` and ``x1``."""
        self.oval((x0 + x1) / 2, 0.0, (x1 - x0) / 2, depth, (20, 22, 50), alpha=54, glow=True)


# --- The whole picture -------------------------------------------------------------------------------------------


def draw(content, size: int, scenery: str) -> Image.Image:
    """The picture of a content, RGB, ``size x size``; ``scenery`` seeds whatever no description mentions."""
    times = 3 if size <= 160 else 2
    canvas = _Canvas(size * times, content.time, content.weather)
    _sky(canvas, Random(scenery + "/sky"))
    _street(canvas, Random(scenery + "/street"))
    faces = Random(scenery + "/faces")
    for placed in sorted(content.objects, key=_nearness):
        canvas.at(placed.x, placed.ground, -1 if getattr(placed, "facing", "") == "left" else 1)
        _PAINTERS[placed.what](canvas, placed, faces)
    canvas.at(0, 0)
    _air(canvas, Random(scenery + "/air"))
    return canvas.image.reduce(times)


def _nearness(placed) -> tuple[bool, float]:
    return placed.what != "building", placed.ground


def _sky(canvas: _Canvas, rng: Random) -> None:
    top, bottom = _sky_colours(canvas)
    height = round(canvas.pixels * FOOT_OF_HOUSES) + 1
    steps = Image.new("RGB", (1, 2))
    steps.putpixel((0, 0), top)
    steps.putpixel((0, 1), bottom)
    middle = (0, 0.5, 1, 1.4)  # starts and ends inside the two pixels, so that there is no flat band
    canvas.image.paste(steps.resize((canvas.pixels, height), Image.Resampling.BILINEAR, middle), (0, 0))
    if canvas.weather in ("clear", "cloudy"):
        _lights_of_the_sky(canvas, rng)
    _skyline(canvas, _mix(bottom, _mix(top, (60, 70, 110), 0.35), 0.55), rng)
    _clouds(canvas, rng)


def _sky_colours(canvas: _Canvas) -> tuple[Colour, Colour]:
    veil = _VEIL[canvas.weather]
    grey = _lit(_GREY_SKY.get(canvas.weather, (0, 0, 0)), (112, 118, 150) if canvas.night else canvas.light)
    top, bottom = _SKY[canvas.time]
    return _mix(top, _darker(grey, 0.1), veil), _mix(bottom, grey, veil * 0.8)


def _lights_of_the_sky(canvas: _Canvas, rng: Random) -> None:
    if canvas.night:
        for _ in range(26):
            canvas.oval(rng.random(), rng.uniform(0.0, 0.3), *(rng.choice((0.0024, 0.0036)),) * 2, _CREAM, glow=True)
        x = rng.uniform(0.12, 0.88)
        canvas.oval(x, 0.075, 0.075, 0.075, _CREAM, alpha=26, glow=True)
        canvas.oval(x, 0.075, 0.042, 0.042, (250, 244, 214), glow=True)
        canvas.oval(x + 0.018, 0.066, 0.035, 0.035, _mix(*_sky_colours(canvas), 0.12), glow=True)
        return
    height, radius, colour = {
        "morning": (0.105, 0.042, (255, 240, 190)),
        "noon": (0.07, 0.045, (255, 232, 120)),
        "sunset": (0.13, 0.06, (255, 196, 92)),
    }[canvas.time]
    x = rng.uniform(0.12, 0.88)
    for halo in (2.3, 1.6):
        canvas.oval(x, height, radius * halo, radius * halo, colour, alpha=46, glow=True)
    canvas.oval(x, height, radius, radius, colour, glow=True)


def _skyline(canvas: _Canvas, colour: Colour, rng: Random) -> None:
    """A far town in one pale colour, behind the houses."""
    x = -0.03
    while x < 1.0:
        width, top = rng.uniform(0.05, 0.12), rng.uniform(0.22, 0.36)
        canvas.box(x, top, x + width, 0.54, colour, glow=True)
        if rng.random() < 0.4:
            canvas.shape((x, top), (x + width / 2, top - 0.035), (x + width, top), colour=colour, glow=True)
        x += width


def _clouds(canvas: _Canvas, rng: Random) -> None:
    number = {"clear": 1, "cloudy": 6, "rain": 7, "snow": 5, "fog": 0}[canvas.weather]
    white = {"rain": (150, 160, 178), "cloudy": (240, 243, 247)}.get(canvas.weather, (255, 255, 255))
    colour = _mix(_lit(white, canvas.light), _sky_colours(canvas)[1], 0.55 if canvas.night else 0.12)
    for place in range(number):
        x, y = (place + rng.random()) / number, rng.uniform(0.035, 0.16)
        size = rng.uniform(0.04, 0.06)
        for offset, scale in ((-1.1, 0.65), (0.0, 1.0), (1.1, 0.75)):
            canvas.oval(x + offset * size, y - scale * size * 0.25, size * scale, size * scale * 0.7, colour, glow=True)
        canvas.box(x - 1.7 * size, y, x + 1.8 * size, y + size * 0.42, colour, radius=size * 0.2, glow=True)


def _street(canvas: _Canvas, rng: Random) -> None:
    far, road, near = (206, 198, 186), (98, 102, 114), (220, 210, 194)
    if canvas.snowy:
        far, road, near = (230, 235, 242), (134, 140, 152), (238, 242, 248)
    elif canvas.weather == "rain":
        far, road, near = _darker(far, 0.14), _darker(road, 0.2), _darker(near, 0.14)
    top, bottom = _ROAD
    canvas.box(0, FOOT_OF_HOUSES, 1, top, far)
    canvas.box(0, top - 0.008, 1, top, _darker(far))
    canvas.box(0, top, 1, bottom, road)
    for step in range(7):
        canvas.box(step / 6 - 0.05, 0.676, step / 6 + 0.04, 0.684, (236, 232, 220))
    canvas.box(0, bottom, 1, 1, near)
    canvas.box(0, bottom, 1, bottom + 0.014, _lighter(near, 0.5))
    canvas.box(0, bottom + 0.014, 1, bottom + 0.02, _darker(near))
    _paving(canvas, near, bottom, rng)


def _paving(canvas: _Canvas, near: Colour, bottom: float, rng: Random) -> None:
    rows = 4
    depth = (1 - bottom - 0.02) / rows
    joint = _darker(near, 0.07)
    for row in range(rows):
        y = bottom + 0.02 + row * depth
        canvas.box(0, y, 1, y + 0.003, joint)
        for column in range(8):
            x = (column + (row % 2) / 2) / 7.5
            canvas.box(x, y, x + 0.003, y + depth, joint)
    if canvas.weather == "rain":
        for _ in range(5):
            x, y, wide = rng.random(), rng.choice((0.625, 0.70, 0.80, 0.88, 0.985)), rng.uniform(0.05, 0.09)
            canvas.oval(x, y, wide, 0.012, (168, 194, 220))
            canvas.oval(x - 0.01, y - 0.002, wide * 0.5, 0.004, (212, 228, 242))


def _air(canvas: _Canvas, rng: Random) -> None:
    """What falls or hangs between the scene and the eye."""
    if canvas.weather == "rain":
        for _ in range(70):
            x, y, length = rng.random(), rng.uniform(-0.02, 1), rng.uniform(0.025, 0.045)
            canvas.line((x, y), (x - length * 0.35, y + length), colour=(222, 236, 250), width=0.004, alpha=150, glow=True)
    elif canvas.weather == "snow":
        for _ in range(80):
            radius = rng.uniform(0.004, 0.0085)
            canvas.oval(rng.random(), rng.random(), radius, radius, (255, 255, 255), alpha=235, glow=True)
    elif canvas.weather == "fog":
        mist = (150, 156, 182) if canvas.night else _lit((240, 242, 244), canvas.light)
        for y, thick, alpha in ((0.0, 0.28, 110), (0.2, 0.4, 46), (0.42, 0.16, 70), (0.56, 0.1, 46), (0.86, 0.14, 40)):
            shift = rng.uniform(-0.1, 0.1)
            canvas.box(-0.2 + shift, y, 1.2 + shift, y + thick, mist, radius=0.05, alpha=alpha, glow=True)


from ._scene_objects import PAINTERS as _PAINTERS  # noqa: E402
