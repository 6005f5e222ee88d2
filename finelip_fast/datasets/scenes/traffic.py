"""Painters for moving objects in a generated street scene: vehicles, and people with their dogs.

Every painter works in the object's own coordinates: (0, 0) is the middle of its foot and y grows downwards.
Vehicles are painted facing right, and the canvas mirrors those that face left.
"""

from __future__ import annotations

from random import Random
from typing import Any

from finelip_fast.datasets.scenes.canvas import INK, LAMPLIGHT, PALETTE, Canvas, Colour, darker, lighter, mix

__all__ = ["paint_person", "paint_vehicle"]

_STEEL = (120, 126, 136)
_FACES = (  # skin and hair
    ((250, 214, 184), (92, 58, 42)),
    ((250, 214, 184), (214, 160, 84)),
    ((246, 206, 172), (164, 78, 44)),
    ((224, 172, 132), (52, 40, 40)),
    ((176, 122, 88), (44, 34, 36)),
    ((132, 90, 66), (34, 28, 32)),
)

# --- Vehicles ----------------------------------------------------------------------------------------------------


def paint_vehicle(canvas: Canvas, vehicle: Any, rng: Random) -> None:
    left, top, right, ground = vehicle.box
    half = (right - left) / 2
    canvas.shadow(-half, half)
    _VEHICLES[vehicle.kind](canvas, half, ground - top, PALETTE[vehicle.colour])


def _wheel(canvas: Canvas, x: float, radius: float) -> None:
    canvas.oval(x, -radius, radius, radius, INK)
    canvas.oval(x, -radius, radius * 0.5, radius * 0.5, (190, 194, 202))


def _lamps(canvas: Canvas, half: float, y: float) -> None:
    """Paint a headlight at the front, with its beam at night, and a tail light."""
    if canvas.night:
        canvas.shape((half, y), (half + 0.1, y - 0.02), (half + 0.1, y + 0.05), colour=LAMPLIGHT, alpha=70, glow=True)
    canvas.box(half - 0.018, y - 0.010, half, y + 0.012, (255, 240, 180), radius=0.004, glow=True)
    canvas.box(-half, y - 0.010, -half + 0.010, y + 0.012, (196, 44, 44))


def _car(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    canvas.shape((-0.118, -0.06), (-0.094, -height), (0.000, -height), (0.052, -0.06), colour=darker(paint, 0.1))
    top = -height + 0.01
    canvas.pane((-0.101, -0.064), (-0.085, top), (-0.048, top), (-0.048, -0.064))
    canvas.pane((-0.038, -0.064), (-0.038, top), (-0.004, top), (0.035, -0.064))
    canvas.box(-half, -0.068, half, -0.018, paint, radius=0.018)
    canvas.box(-half + 0.01, -0.032, half - 0.01, -0.018, darker(paint, 0.18))
    canvas.box(-0.054, -0.056, -0.034, -0.051, darker(paint, 0.35))
    _lamps(canvas, half, -0.05)
    for x in (-0.082, 0.082):
        _wheel(canvas, x, 0.026)


def _van(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    canvas.box(-half, -height, half * 0.55, -0.018, paint, radius=0.014)
    canvas.shape(
        (half * 0.4, -height), (half * 0.66, -height), (half * 0.94, -0.075), (half * 0.4, -0.075), colour=paint
    )
    canvas.box(half * 0.2, -0.078, half, -0.018, paint, radius=0.012)
    canvas.pane(
        (half * 0.44, -0.078), (half * 0.44, -height + 0.016), (half * 0.62, -height + 0.016), (half * 0.84, -0.078)
    )
    canvas.box(-half + 0.006, -0.034, half - 0.006, -0.018, darker(paint, 0.18))
    canvas.box(half * 0.33, -height + 0.012, half * 0.35, -0.03, darker(paint, 0.25))
    _lamps(canvas, half, -0.05)
    for x in (-0.085, 0.085):
        _wheel(canvas, x, 0.027)


def _bus(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    canvas.box(-half, -height, half, -0.018, paint, radius=0.018)
    canvas.box(-half + 0.008, -0.052, half - 0.008, -0.044, lighter(paint, 0.75))
    canvas.box(-half, -0.034, half, -0.018, darker(paint, 0.18), radius=0.006)
    for pane in range(5):
        x = -half + 0.016 + pane * 0.056
        canvas.pane((x, -height + 0.022), (x + 0.046, -height + 0.022), (x + 0.046, -0.075), (x, -0.075))
    canvas.pane(
        (half - 0.064, -height + 0.022), (half - 0.012, -height + 0.022), (half - 0.012, -0.034), (half - 0.064, -0.034)
    )
    canvas.box(half - 0.040, -height + 0.022, half - 0.036, -0.034, darker(paint, 0.2))
    _lamps(canvas, half, -0.042)
    for x in (-0.115, 0.105):
        _wheel(canvas, x, 0.029)


def _truck(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    canvas.box(-half, -0.038, half, -0.02, INK)
    canvas.box(-half, -height, half * 0.34, -0.034, paint)
    for x in (-0.12, -0.06, 0.0):
        canvas.box(x, -height + 0.012, x + 0.004, -0.046, darker(paint, 0.14))
    canvas.box(-half, -height, half * 0.34, -height + 0.008, lighter(paint, 0.35))
    canvas.box(half * 0.42, -0.118, half, -0.022, mix(paint, (238, 238, 240), 0.6), radius=0.014)
    canvas.pane((half * 0.58, -0.072), (half * 0.58, -0.106), (half * 0.9, -0.106), (half * 0.97, -0.072))
    _lamps(canvas, half, -0.042)
    for x in (-0.13, -0.07, 0.125):
        _wheel(canvas, x, 0.028)


def _tram(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    canvas.line((-0.03, -height + 0.024), (0.01, -height + 0.002), (0.05, -height + 0.024), colour=INK, width=0.005)
    body = -height + 0.022
    nose = ((half - 0.052, body), (half, -0.07), (half, -0.016))
    canvas.shape((-half, -0.016), (-half, body + 0.02), (-half + 0.018, body), *nose, colour=paint)
    canvas.box(-half, -0.060, half, -0.042, PALETTE["white"] if paint != PALETTE["white"] else _STEEL)
    for pane in range(5):
        x = -half + 0.022 + pane * 0.062
        canvas.pane((x, body + 0.022), (x + 0.050, body + 0.022), (x + 0.050, -0.074), (x, -0.074))
    canvas.pane(
        (half - 0.066, body + 0.014), (half - 0.052, body + 0.014), (half - 0.010, -0.074), (half - 0.066, -0.074)
    )
    canvas.box(-0.006, body + 0.006, 0.006, -0.016, darker(paint, 0.4))
    canvas.box(-half + 0.03, -0.018, half - 0.03, -0.004, INK)
    for x in (-0.13, -0.085, 0.085, 0.13):
        canvas.oval(x, -0.012, 0.012, 0.012, _STEEL)
    _lamps(canvas, half, -0.034)


def _scooter(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    for x in (-0.072, 0.076):
        _wheel(canvas, x, 0.031)
    canvas.line((0.078, -0.034), (0.044, -height + 0.012), colour=_STEEL, width=0.010)
    canvas.line((0.024, -height + 0.008), (0.054, -height + 0.006), colour=INK, width=0.010)
    canvas.shape((0.03, -0.022), (0.066, -0.022), (0.066, -0.105), (0.046, -0.112), colour=paint)
    canvas.box(-0.03, -0.036, 0.06, -0.018, paint, radius=0.008)
    canvas.shape((-half + 0.006, -0.04), (-0.1, -0.078), (-0.02, -0.08), (-0.012, -0.02), (-0.05, -0.03), colour=paint)
    canvas.box(-0.1, -0.094, -0.012, -0.076, INK, radius=0.008)
    canvas.shape((0.05, -0.05), (0.098, -0.066), (half, -0.04), (0.08, -0.056), colour=darker(paint, 0.2))
    canvas.oval(0.064, -0.098, 0.010, 0.010, (255, 240, 180), glow=True)


def _bicycle(canvas: Canvas, half: float, height: float, paint: Colour) -> None:
    for x in (-0.075, 0.075):
        canvas.ring(x, -0.046, 0.046, INK, 0.008)
        canvas.oval(x, -0.046, 0.008, 0.008, _STEEL)
    seat, pedals, head = (-0.036, -0.104), (-0.008, -0.044), (0.05, -0.108)
    for points in (((-0.075, -0.046), pedals, seat, (-0.075, -0.046)), (seat, head, pedals), (head, (0.075, -0.046))):
        canvas.line(*points, colour=paint, width=0.016)
    canvas.line(head, (0.043, -0.128), (0.066, -0.131), colour=INK, width=0.009)
    canvas.box(0.056, -0.124, 0.098, -0.092, (196, 150, 96), radius=0.006)
    canvas.box(-0.062, -0.117, -0.014, -0.104, INK, radius=0.006)
    canvas.oval(*pedals, 0.013, 0.013, _STEEL)


_VEHICLES = {
    "car": _car,
    "van": _van,
    "bus": _bus,
    "truck": _truck,
    "tram": _tram,
    "scooter": _scooter,
    "bicycle": _bicycle,
}

# --- People ------------------------------------------------------------------------------------------------------


def paint_person(canvas: Canvas, person: Any, rng: Random) -> None:
    skin, hair = rng.choice(_FACES)
    coat = PALETTE[person.coat]
    canvas.shadow(-0.052, 0.125 if person.dog else 0.052)
    if person.dog:
        _dog(canvas, 0.082, PALETTE[person.dog])
    if person.umbrella:
        canvas.line((0.044, -0.11), (0.044, -0.36), colour=INK, width=0.006)
    _body(canvas, coat, skin, person.who == "woman")
    _head(canvas, skin, hair, person.who == "woman")
    if person.hat:
        colour, kind = person.hat.split(" ", 1)
        _HATS[kind](canvas, PALETTE[colour])
    if person.umbrella:
        _umbrella(canvas, PALETTE[person.umbrella])


def _body(canvas: Canvas, coat: Colour, skin: Colour, woman: bool) -> None:
    for x in (-0.017, 0.017):
        canvas.box(x - 0.010, -0.07, x + 0.010, 0, skin if woman else (66, 70, 92))
        canvas.box(x - 0.012, -0.014, x + 0.015, 0, INK, radius=0.005)
    hem, waist = (0.050, 0.026) if woman else (0.036, 0.036)
    canvas.shape(
        (-0.028, -0.182), (0.028, -0.182), (waist, -0.13), (hem, -0.052), (-hem, -0.052), (-waist, -0.13), colour=coat
    )
    canvas.line((-0.026, -0.172), (-0.044, -0.098), colour=darker(coat, 0.14), width=0.020)
    canvas.line((0.026, -0.172), (0.043, -0.12), colour=darker(coat, 0.14), width=0.020)
    for x, y in ((-0.045, -0.088), (0.044, -0.11)):
        canvas.oval(x, y, 0.009, 0.009, skin)
    canvas.box(-0.0015, -0.178, 0.0025, -0.054, darker(coat, 0.25))
    canvas.shape((-0.020, -0.184), (0.020, -0.184), (0.0, -0.158), colour=lighter(coat, 0.45))


def _head(canvas: Canvas, skin: Colour, hair: Colour, woman: bool) -> None:
    if woman:
        canvas.box(-0.036, -0.236, 0.036, -0.166, hair, radius=0.02)
    canvas.oval(0, -0.216, 0.034, 0.036, hair)
    canvas.oval(0, -0.208, 0.028, 0.030, skin)
    canvas.pie(0, -0.216, 0.031, 0.033, 180, 360, hair)
    for x in (-0.010, 0.012):
        canvas.oval(x, -0.207, 0.0034, 0.0044, INK)
    canvas.line((-0.006, -0.193), (0.002, -0.190), (0.010, -0.193), colour=darker(skin, 0.4), width=0.003)


def _cap(canvas: Canvas, colour: Colour) -> None:
    canvas.pie(0, -0.220, 0.042, 0.056, 180, 360, colour)
    canvas.box(0.0, -0.232, 0.066, -0.218, darker(colour, 0.2), radius=0.005)
    canvas.oval(0, -0.276, 0.006, 0.005, darker(colour, 0.2))


def _top_hat(canvas: Canvas, colour: Colour) -> None:
    canvas.box(-0.029, -0.300, 0.029, -0.226, colour, radius=0.004)
    canvas.box(-0.029, -0.248, 0.029, -0.236, lighter(colour, 0.6) if sum(colour) < 600 else _STEEL)
    canvas.box(-0.050, -0.236, 0.050, -0.224, darker(colour, 0.12), radius=0.005)


def _bobble_hat(canvas: Canvas, colour: Colour) -> None:
    canvas.oval(0, -0.286, 0.019, 0.019, lighter(colour, 0.65))
    canvas.pie(0, -0.226, 0.038, 0.052, 180, 360, colour)
    canvas.box(-0.040, -0.236, 0.040, -0.218, darker(colour, 0.16), radius=0.008)


_HATS = {"cap": _cap, "top hat": _top_hat, "bobble hat": _bobble_hat}


def _umbrella(canvas: Canvas, colour: Colour) -> None:
    x, rim = 0.0, -0.296
    canvas.pie(x, rim, 0.0675, 0.066, 180, 360, darker(colour, 0.4))
    canvas.pie(x, rim, 0.064, 0.062, 180, 360, colour)
    canvas.pie(x, rim, 0.029, 0.062, 180, 360, lighter(colour, 0.18))
    for scallop in range(3):
        canvas.pie(x + (scallop - 1) * 0.044, rim, 0.022, 0.010, 180, 360, darker(colour, 0.3))
    canvas.line((x, rim - 0.062), (x, rim - 0.068), colour=INK, width=0.006)


def _dog(canvas: Canvas, x: float, colour: Colour) -> None:
    dark = darker(colour, 0.22)
    canvas.line((0.044, -0.11), (x + 0.012, -0.052), colour=INK, width=0.004)
    canvas.line((x - 0.028, -0.050), (x - 0.038, -0.082), colour=dark, width=0.010)
    for leg in (-0.022, -0.006, 0.010, 0.020):
        canvas.box(x + leg - 0.005, -0.03, x + leg + 0.005, 0, dark if leg in (-0.006, 0.020) else colour)
    canvas.box(x - 0.034, -0.062, x + 0.026, -0.022, colour, radius=0.015)
    canvas.oval(x + 0.021, -0.069, 0.021, 0.020, colour)
    canvas.oval(x + 0.034, -0.062, 0.009, 0.008, lighter(colour, 0.3))
    canvas.oval(x + 0.041, -0.064, 0.003, 0.003, INK)
    canvas.oval(x + 0.008, -0.070, 0.008, 0.016, dark)
    canvas.oval(x + 0.026, -0.073, 0.003, 0.003, INK)
