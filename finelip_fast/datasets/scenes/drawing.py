"""The whole picture of a generated street scene: sky, street, objects from back to front, weather.

Pictures are drawn larger than requested and then reduced, which smooths every edge.
"""

from __future__ import annotations

from random import Random
from typing import Any

from PIL import Image

from finelip_fast.datasets.scenes.canvas import FOOT_OF_HOUSES, ROAD, Canvas, Colour, darker, lighter, lit, mix
from finelip_fast.datasets.scenes.town import paint_building, paint_furniture, paint_tree
from finelip_fast.datasets.scenes.traffic import paint_person, paint_vehicle

__all__ = ["draw"]

_CREAM = (250, 240, 218)
_SKY = {  # top and bottom
    "morning": ((146, 196, 232), (255, 216, 186)),
    "noon": ((84, 164, 226), (200, 230, 246)),
    "sunset": ((98, 84, 156), (255, 168, 108)),
    "night": ((22, 28, 66), (70, 78, 130)),
}
_VEIL = {"clear": 0.0, "cloudy": 0.45, "rain": 0.64, "snow": 0.5, "fog": 0.66}  # how much of the sky is grey
_GREY_SKY = {"cloudy": (176, 188, 202), "rain": (124, 136, 156), "snow": (206, 216, 230), "fog": (226, 228, 230)}


_PAINTERS = {
    "building": paint_building,
    "vehicle": paint_vehicle,
    "person": paint_person,
    "tree": paint_tree,
    "furniture": paint_furniture,
}


def draw(content: Any, size: int, scenery: str) -> Image.Image:
    """Draw a scene as an RGB picture, ``size x size``; ``scenery`` seeds everything that no description mentions."""
    times = 3 if size <= 160 else 2
    canvas = Canvas(size * times, content.time, content.weather)
    _sky(canvas, Random(scenery + "/sky"))
    _street(canvas, Random(scenery + "/street"))
    for placed in sorted(content.objects, key=_nearness):
        canvas.at(placed.x, placed.ground, -1 if getattr(placed, "facing", "") == "left" else 1)
        _PAINTERS[placed.what](canvas, placed, Random(f"{scenery}/{placed.x}"))
    canvas.at(0, 0)
    _air(canvas, Random(scenery + "/air"))
    return canvas.image.reduce(times)


def _nearness(placed: Any) -> tuple[bool, float]:
    return placed.what != "building", placed.ground


def _sky(canvas: Canvas, rng: Random) -> None:
    top, bottom = _sky_colours(canvas)
    height = round(canvas.pixels * FOOT_OF_HOUSES) + 1
    steps = Image.new("RGB", (1, 2))
    steps.putpixel((0, 0), top)
    steps.putpixel((0, 1), bottom)
    middle = (0, 0.5, 1, 1.4)  # starts and ends inside the two pixels, to avoid a flat band
    canvas.image.paste(steps.resize((canvas.pixels, height), Image.Resampling.BILINEAR, middle), (0, 0))
    if canvas.weather in ("clear", "cloudy"):
        _lights_of_the_sky(canvas, rng)
    _skyline(canvas, mix(bottom, mix(top, (60, 70, 110), 0.35), 0.55), rng)
    _clouds(canvas, rng)


def _sky_colours(canvas: Canvas) -> tuple[Colour, Colour]:
    veil = _VEIL[canvas.weather]
    grey = lit(_GREY_SKY.get(canvas.weather, (0, 0, 0)), (112, 118, 150) if canvas.night else canvas.light)
    top, bottom = _SKY[canvas.time]
    return mix(top, darker(grey, 0.1), veil), mix(bottom, grey, veil * 0.6)


def _lights_of_the_sky(canvas: Canvas, rng: Random) -> None:
    if canvas.night:
        for _ in range(26):
            x, y, radius = rng.random(), rng.uniform(0.0, 0.3), rng.choice((0.0024, 0.0036))
            canvas.oval(x, y, radius, radius, _CREAM, glow=True)
        x = rng.uniform(0.12, 0.88)
        canvas.oval(x, 0.075, 0.075, 0.075, _CREAM, alpha=26, glow=True)
        canvas.oval(x, 0.075, 0.042, 0.042, (250, 244, 214), glow=True)
        canvas.oval(x + 0.018, 0.066, 0.035, 0.035, mix(*_sky_colours(canvas), 0.12), glow=True)
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


def _skyline(canvas: Canvas, colour: Colour, rng: Random) -> None:
    """Draw a distant town in one pale colour, behind the houses."""
    x = -0.03
    while x < 1.0:
        width, top = rng.uniform(0.05, 0.12), rng.uniform(0.22, 0.36)
        canvas.box(x, top, x + width, 0.54, colour, glow=True)
        if rng.random() < 0.4:
            canvas.shape((x, top), (x + width / 2, top - 0.035), (x + width, top), colour=colour, glow=True)
        x += width


def _clouds(canvas: Canvas, rng: Random) -> None:
    number = {"clear": 1, "cloudy": 6, "rain": 7, "snow": 5, "fog": 0}[canvas.weather]
    white = {"rain": (150, 160, 178), "cloudy": (240, 243, 247)}.get(canvas.weather, (255, 255, 255))
    colour = mix(lit(white, canvas.light), _sky_colours(canvas)[1], 0.55 if canvas.night else 0.12)
    for place in range(number):
        x, y = (place + rng.random()) / number, rng.uniform(0.035, 0.16)
        size = rng.uniform(0.04, 0.06)
        for offset, scale in ((-1.1, 0.65), (0.0, 1.0), (1.1, 0.75)):
            canvas.oval(x + offset * size, y - scale * size * 0.25, size * scale, size * scale * 0.7, colour, glow=True)
        canvas.box(x - 1.7 * size, y, x + 1.8 * size, y + size * 0.42, colour, radius=size * 0.2, glow=True)


def _street(canvas: Canvas, rng: Random) -> None:
    far, road, near = (206, 198, 186), (98, 102, 114), (220, 210, 194)
    if canvas.snowy:
        far, road, near = (230, 235, 242), (134, 140, 152), (238, 242, 248)
    elif canvas.weather == "rain":
        far, road, near = darker(far, 0.14), darker(road, 0.2), darker(near, 0.14)
    top, bottom = ROAD
    canvas.box(0, FOOT_OF_HOUSES, 1, top, far)
    canvas.box(0, top - 0.008, 1, top, darker(far))
    canvas.box(0, top, 1, bottom, road)
    for step in range(7):
        canvas.box(step / 6 - 0.05, 0.676, step / 6 + 0.04, 0.684, (236, 232, 220))
    canvas.box(0, bottom, 1, 1, near)
    canvas.box(0, bottom, 1, bottom + 0.014, lighter(near, 0.5))
    canvas.box(0, bottom + 0.014, 1, bottom + 0.02, darker(near))
    _paving(canvas, near, bottom, rng)


def _paving(canvas: Canvas, near: Colour, bottom: float, rng: Random) -> None:
    rows = 4
    depth = (1 - bottom - 0.02) / rows
    joint = darker(near, 0.07)
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


def _air(canvas: Canvas, rng: Random) -> None:
    """Draw the rain, snow or fog between the scene and the viewer."""
    if canvas.weather == "rain":
        for _ in range(70):
            x, y, length = rng.random(), rng.uniform(-0.02, 1), rng.uniform(0.025, 0.045)
            canvas.line(
                (x, y), (x - length * 0.35, y + length), colour=(222, 236, 250), width=0.004, alpha=150, glow=True
            )
    elif canvas.weather == "snow":
        for _ in range(80):
            radius = rng.uniform(0.004, 0.0085)
            canvas.oval(rng.random(), rng.random(), radius, radius, (255, 255, 255), alpha=235, glow=True)
    elif canvas.weather == "fog":
        mist = mix((172, 178, 206) if canvas.night else (242, 243, 245), _sky_colours(canvas)[1], 0.35)
        for y, thick, alpha in (
            (0.0, 0.18, 64),
            (0.12, 0.14, 36),
            (0.3, 0.1, 24),
            (0.535, 0.05, 110),
            (0.6, 0.13, 44),
            (0.77, 0.05, 64),
            (0.86, 0.06, 44),
        ):
            shift = rng.uniform(-0.1, 0.1)
            canvas.box(-0.2 + shift, y, 1.2 + shift, y + thick, mist, radius=0.05, alpha=alpha, glow=True)
