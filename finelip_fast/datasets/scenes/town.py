"""Painters for static objects in a generated street scene: houses, trees and street furniture.

Every painter works in the object's own coordinates: (0, 0) is the middle of its foot and y grows downwards.
"""

from __future__ import annotations

from random import Random
from typing import Any

from finelip_fast.datasets.scenes.canvas import (
    FLOOR,
    GLASS,
    GROUND_FLOOR,
    INK,
    LAMPLIGHT,
    PALETTE,
    ROOF_HEIGHT,
    Canvas,
    Colour,
    Point,
    darker,
    kind_of,
    lighter,
    wall_height,
)

__all__ = ["paint_building", "paint_furniture", "paint_tree"]

_SNOW, _STEEL, _STONE, _WATER, _BARK = (248, 250, 253), (120, 126, 136), (182, 182, 184), (126, 190, 226), (112, 80, 60)
_LEAVES = {"leafy": (96, 168, 88), "cherry": (250, 180, 206), "autumn": (232, 132, 44), "pine": (40, 104, 82)}

# --- Houses ------------------------------------------------------------------------------------------------------


def paint_building(canvas: Canvas, house: Any, rng: Random) -> None:
    half, height = house.width / 2, wall_height(house)
    wall, roof = PALETTE[house.wall], PALETTE[house.roof_colour]
    _ROOFS[house.roof](canvas, half, height, roof, wall)
    canvas.box(-half, -height, half, 0, wall)
    canvas.box(half - 0.012, -height, half, 0, darker(wall, 0.1))
    canvas.box(-half, -height, half, -height + 0.008, darker(wall, 0.22))
    canvas.box(-half, -0.012, half, 0, darker(wall, 0.3))
    columns = round(house.width / 0.095)
    for floor in range(1, house.storeys):
        top = -GROUND_FLOOR - FLOOR * floor + 0.018
        for column in range(columns):
            _window(canvas, half * (2 * column + 1 - columns) / columns * 0.94, top, 0.019, 0.042, wall, rng)
    for side in (-1, 1):
        _window(canvas, side * (half / 2 + 0.016), -GROUND_FLOOR + 0.03, half / 2 - 0.034, 0.05, wall, rng)
    _door(canvas, PALETTE[house.door], wall)
    if house.awning:
        _awning(canvas, half - 0.008, PALETTE[house.awning])


def _window(canvas: Canvas, x: float, top: float, half: float, height: float, wall: Colour, rng: Random) -> None:
    lit = rng.random() < 0.72 and canvas.night
    canvas.box(x - half - 0.005, top - 0.005, x + half + 0.005, top + height + 0.005, lighter(wall, 0.75))
    canvas.box(x - half, top, x + half, top + height, LAMPLIGHT if lit else GLASS, glow=lit)
    if not lit:
        shine = ((x - half, top + height * 0.7), (x - half, top + height * 0.3), (x, top), (x + half * 0.6, top))
        canvas.shape(*shine, colour=(255, 255, 255), alpha=70)
    canvas.box(x - 0.0015, top, x + 0.002, top + height, lighter(wall, 0.75))
    canvas.box(x - half - 0.008, top + height + 0.003, x + half + 0.008, top + height + 0.01, darker(wall, 0.2))
    if canvas.snowy:
        canvas.box(x - half - 0.008, top + height, x + half + 0.008, top + height + 0.006, _SNOW)


def _door(canvas: Canvas, door: Colour, wall: Colour) -> None:
    canvas.box(-0.035, -0.092, 0.035, 0, lighter(wall, 0.8))
    canvas.box(-0.028, -0.085, 0.028, 0, door)
    canvas.box(-0.020, -0.077, 0.020, -0.052, darker(door, 0.18))
    canvas.box(-0.020, -0.042, 0.020, -0.012, darker(door, 0.18))
    canvas.oval(0.022, -0.046, 0.004, 0.004, (250, 226, 150))
    canvas.box(-0.042, -0.006, 0.042, 0.004, _STONE)


def _awning(canvas: Canvas, half: float, colour: Colour) -> None:
    stripes = 2 * round(half / 0.028) + 1
    width = 2 * half / stripes
    for stripe in range(stripes):
        x, ink = -half + stripe * width, PALETTE["white"] if stripe % 2 else colour
        canvas.box(x, -0.118, x + width, -0.088, ink)
        canvas.pie(x + width / 2, -0.089, width / 2, 0.012, 0, 180, darker(ink, 0.08))
    canvas.box(-half, -0.122, half, -0.116, darker(colour, 0.25))


def _flat(canvas: Canvas, half: float, height: float, roof: Colour, wall: Colour) -> None:
    top = -height - ROOF_HEIGHT["flat"]
    canvas.box(-half, top, half, -height, roof)
    canvas.box(-half, -height - 0.009, half, -height, darker(roof, 0.25))
    _snow_cap(canvas, (-half, top), (half, top), (half, top + 0.011), (-half, top + 0.011))


def _pitched(canvas: Canvas, half: float, height: float, roof: Colour, wall: Colour) -> None:
    top = -height - ROOF_HEIGHT["pitched"]
    canvas.shape((-half, -height), (0, top), (half, -height), colour=roof)
    canvas.shape((0, top), (half, -height), (half * 0.72, -height), colour=darker(roof, 0.14))
    canvas.oval(0, -height - 0.036, 0.016, 0.016, lighter(wall, 0.75))
    canvas.oval(0, -height - 0.036, 0.011, 0.011, LAMPLIGHT if canvas.night else GLASS, glow=canvas.night)
    _snow_cap(canvas, (0, top), (half * 0.42, top + 0.042), (0.0, top + 0.03), (-half * 0.42, top + 0.042))


def _mansard(canvas: Canvas, half: float, height: float, roof: Colour, wall: Colour) -> None:
    top, inner = -height - ROOF_HEIGHT["mansard"], half * 0.74
    canvas.shape((-half, -height), (-inner, top), (inner, top), (half, -height), colour=roof)
    canvas.shape((inner, top), (half, -height), (half * 0.8, -height), (inner * 0.86, top), colour=darker(roof, 0.14))
    for x in (-half * 0.38, half * 0.38):
        canvas.box(x - 0.02, -height - 0.05, x + 0.02, -height - 0.01, lighter(wall, 0.75))
        canvas.box(
            x - 0.014,
            -height - 0.044,
            x + 0.014,
            -height - 0.01,
            LAMPLIGHT if canvas.night else GLASS,
            glow=canvas.night,
        )
    canvas.box(-inner, top, inner, top + 0.008, darker(roof, 0.3))
    _snow_cap(canvas, (-inner, top), (inner, top), (inner + 0.012, top + 0.016), (-inner - 0.012, top + 0.016))


def _domed(canvas: Canvas, half: float, height: float, roof: Colour, wall: Colour) -> None:
    rise = ROOF_HEIGHT["domed"] - 0.015
    canvas.line((0, -height - rise), (0, -height - rise - 0.015), colour=INK, width=0.005)
    wide = half * 0.82
    canvas.pie(0, -height, wide, rise, 180, 360, roof)
    canvas.pie(0, -height, wide * 0.5, rise, 180, 360, lighter(roof, 0.14))
    canvas.box(-half, -height - 0.012, half, -height, darker(roof, 0.25))
    if canvas.snowy:
        canvas.pie(0, -height - rise * 0.42, wide * 0.72, rise * 0.58, 180, 360, _SNOW)


def _stepped(canvas: Canvas, half: float, height: float, roof: Colour, wall: Colour) -> None:
    rise = ROOF_HEIGHT["stepped"] / 4
    for step, share in enumerate((0.98, 0.74, 0.5, 0.26)):
        bottom = -height - rise * step
        canvas.box(-half * share, bottom - rise, half * share, bottom, roof)
        canvas.box(
            -half * share,
            bottom - rise,
            half * share,
            bottom - rise + 0.006,
            _SNOW if canvas.snowy else lighter(roof, 0.4),
        )
    canvas.box(
        -0.013,
        -height - 0.058,
        0.013,
        -height - 0.026,
        LAMPLIGHT if canvas.night else darker(roof, 0.5),
        glow=canvas.night,
    )


def _snow_cap(canvas: Canvas, *points: Point) -> None:
    if canvas.snowy:
        canvas.shape(*points, colour=_SNOW)


_ROOFS = {"flat": _flat, "pitched": _pitched, "mansard": _mansard, "domed": _domed, "stepped": _stepped}

# --- Trees and street furniture ----------------------------------------------------------------------------------


def paint_tree(canvas: Canvas, tree: Any, rng: Random) -> None:
    left, top, right, ground = tree.box
    half, height = (right - left) / 2, ground - top
    canvas.shadow(-half * 0.7, half * 0.7, depth=0.009)
    canvas.box(-0.010, -height * 0.5, 0.010, 0, _BARK)
    if tree.kind == "bare":
        _branches(canvas, half, height)
    elif tree.kind == "pine":
        _needles(canvas, half, height)
    else:
        _crown(canvas, half, height, _LEAVES[tree.kind])


def _branches(canvas: Canvas, half: float, height: float) -> None:
    for side in (-1, 1):
        for start, reach, end in ((0.3, 0.8, 0.62), (0.42, 0.98, 0.8), (0.5, 0.55, 0.96)):
            tip, fork = (side * half * reach, -height * end), (side * half * reach * 0.5, -height * (start + end) / 2)
            canvas.line((0, -height * start), fork, tip, colour=_BARK, width=0.009)
            canvas.line(fork, (side * half * reach * 0.45, -height * end), colour=_BARK, width=0.006)
    canvas.line((0, -height * 0.4), (0, -height), colour=_BARK, width=0.009)


def _needles(canvas: Canvas, half: float, height: float) -> None:
    green = _LEAVES["pine"]
    for bottom, top, wide in ((0.16, 0.56, 1.0), (0.4, 0.8, 0.78), (0.62, 1.0, 0.56)):
        y, tip, reach = -height * bottom, -height * top, half * wide
        canvas.shape((-reach, y), (0, tip), (reach, y), colour=green)
        canvas.shape((0, tip), (reach, y), (reach * 0.2, y), colour=darker(green, 0.2))
        _snow_cap(
            canvas,
            (0, tip),
            (reach * 0.4, tip + (y - tip) * 0.4),
            (0, tip + (y - tip) * 0.3),
            (-reach * 0.4, tip + (y - tip) * 0.4),
        )


def _crown(canvas: Canvas, half: float, height: float, leaves: Colour) -> None:
    balls = ((0.0, 0.74, 0.8, 0.26), (-0.46, 0.54, 0.54, 0.21), (0.46, 0.54, 0.54, 0.21), (0.0, 0.5, 0.66, 0.22))
    for x, y, rx, ry in balls:
        canvas.oval(half * x, -height * y, half * rx, height * ry, leaves)
    canvas.oval(half * 0.28, -height * 0.46, half * 0.5, height * 0.15, darker(leaves, 0.14))
    canvas.oval(-half * 0.24, -height * 0.76, half * 0.36, height * 0.12, lighter(leaves, 0.25))
    if canvas.snowy:
        canvas.oval(0, -height * 0.93, half * 0.5, height * 0.07, _SNOW)


def paint_furniture(canvas: Canvas, furniture: Any, rng: Random) -> None:
    left, _, right, _ = furniture.box
    canvas.shadow(left - furniture.x, right - furniture.x, depth=0.008)
    _FURNITURE[kind_of(furniture)](canvas, PALETTE.get(furniture.name.split(" ", 1)[0], _STONE))


def _post_box(canvas: Canvas, paint: Colour) -> None:
    canvas.box(-0.024, -0.105, 0.024, 0, paint)
    canvas.pie(0, -0.100, 0.0275, 0.016, 180, 360, darker(paint, 0.14))
    canvas.box(-0.016, -0.086, 0.016, -0.076, INK)
    canvas.box(-0.012, -0.064, 0.012, -0.044, PALETTE["white"])
    canvas.box(-0.0275, -0.010, 0.0275, 0, darker(paint, 0.4))


def _phone_box(canvas: Canvas, paint: Colour) -> None:
    canvas.box(-0.034, -0.160, 0.034, 0, paint)
    canvas.pie(0, -0.158, 0.034, 0.012, 180, 360, darker(paint, 0.1))
    canvas.box(-0.026, -0.152, 0.026, -0.140, PALETTE["white"])
    for row in range(4):
        for column in (-1, 0, 1):
            x, y = column * 0.0165, -0.130 + row * 0.029
            canvas.pane((x - 0.0065, y), (x + 0.0065, y), (x + 0.0065, y + 0.022), (x - 0.0065, y + 0.022))


def _bus_stop_sign(canvas: Canvas, paint: Colour) -> None:
    canvas.box(-0.005, -0.16, 0.005, 0, _STEEL)
    canvas.oval(0, -0.155, 0.035, 0.035, paint)
    canvas.oval(0, -0.155, 0.026, 0.026, PALETTE["white"])
    canvas.box(-0.017, -0.168, 0.017, -0.146, paint, radius=0.004)
    canvas.box(-0.020, -0.105, 0.020, -0.075, paint)


def _street_lamp(canvas: Canvas, paint: Colour) -> None:
    if canvas.night:
        canvas.oval(0, -0.238, 0.075, 0.075, LAMPLIGHT, alpha=50, glow=True)
    canvas.box(-0.005, -0.21, 0.006, 0, paint)
    canvas.box(-0.014, -0.022, 0.014, 0, paint, radius=0.004)
    canvas.shape(
        (-0.014, -0.208), (0.014, -0.208), (0.023, -0.250), (-0.023, -0.250), colour=LAMPLIGHT, glow=canvas.night
    )
    canvas.shape((-0.030, -0.248), (0.030, -0.248), (0, -0.270), colour=paint)


def _bench(canvas: Canvas, paint: Colour) -> None:
    for x in (-0.055, 0.055):
        canvas.box(x - 0.005, -0.095, x + 0.005, 0, INK)
    for y in (-0.098, -0.077, -0.052):
        canvas.box(-0.075, y, 0.075, y + 0.016, paint, radius=0.003)
    canvas.box(-0.075, -0.041, 0.075, -0.034, darker(paint, 0.3))


def _bin(canvas: Canvas, paint: Colour) -> None:
    canvas.shape((-0.034, -0.096), (0.034, -0.096), (0.027, 0), (-0.027, 0), colour=paint)
    for x in (-0.018, 0.0, 0.018):
        canvas.box(x - 0.002, -0.085, x + 0.002, -0.012, darker(paint, 0.3))
    canvas.box(-0.0375, -0.112, 0.0375, -0.094, darker(paint, 0.22), radius=0.007)


def _hydrant(canvas: Canvas, paint: Colour) -> None:
    canvas.box(-0.024, -0.084, 0.024, -0.008, paint)
    canvas.pie(0, -0.084, 0.024, 0.024, 180, 360, lighter(paint, 0.2))
    canvas.box(-0.040, -0.064, 0.040, -0.042, darker(paint, 0.16), radius=0.004)
    canvas.oval(0, -0.053, 0.012, 0.012, _STEEL)
    canvas.box(-0.034, -0.012, 0.034, 0, darker(paint, 0.3), radius=0.003)


def _fountain(canvas: Canvas, paint: Colour) -> None:
    for reach in (-0.052, -0.03, 0.03, 0.052):
        canvas.line((0, -0.122), (reach * 0.55, -0.146), (reach, -0.062), colour=_WATER, width=0.007)
    canvas.box(-0.010, -0.122, 0.010, -0.03, paint)
    canvas.oval(0, -0.056, 0.075, 0.012, _WATER)
    canvas.shape((-0.075, -0.056), (0.075, -0.056), (0.058, 0), (-0.058, 0), colour=paint)
    canvas.oval(0, -0.056, 0.064, 0.008, _WATER)
    canvas.box(-0.062, -0.014, 0.062, 0, darker(paint, 0.16), radius=0.004)


_FURNITURE = {
    "post box": _post_box,
    "phone box": _phone_box,
    "bus stop sign": _bus_stop_sign,
    "street lamp": _street_lamp,
    "bench": _bench,
    "bin": _bin,
    "hydrant": _hydrant,
    "fountain": _fountain,
}
