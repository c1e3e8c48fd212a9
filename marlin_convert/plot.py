"""Curves over the blocks of a model as SVG: no script, so that a page can carry them anywhere.

Every point says what it is when a pointer rests on it, and every line is named at its end.
"""

import html as markup
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 900, 340
LEFT, RIGHT, TOP, BOTTOM = 76, 170, 14, 46
BETWEEN = 16  # the names of lines, at the least
STEPS = 4  # of the axis

# Told apart by the colour-blind too (Okabe and Ito), on white and on black; the page defines them.
COLOURS = 8


@dataclass(frozen=True)
class Point:
    """A value of a block, and what is said of it."""

    block: int
    value: float
    said: str


def curves(lines: Mapping[str, Sequence[Point]], axis: str) -> str:
    """An SVG element with a line for every name, values on an axis that begins at 0 and is called `axis`."""
    last = max(point.block for points in lines.values() for point in points)
    step = _step(max(point.value for points in lines.values() for point in points))
    top = STEPS * step

    def x(block: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * block / (last or 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)

    parts = []
    for value in (number * step for number in range(STEPS + 1)):
        parts.append(f"<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1={y(value):.1f} y2={y(value):.1f} />")
        parts.append(_text(LEFT - 8, y(value), f"{value:.3g}", "end"))
    for block in sorted({round(last * sixth / 6) for sixth in range(7)}):
        parts.append(_text(x(block), HEIGHT - BOTTOM + 20, str(block), "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "block", "middle"))
    turned = f'transform="rotate(-90 14 {middle})"'
    parts.append(_text(14, middle, axis, "middle", turned))
    ends = _apart([y(points[-1].value) for points in lines.values()])
    for number, ((name, points), end) in enumerate(zip(lines.items(), ends, strict=True)):
        colour = f"var(--line-{number % COLOURS})"
        path = " ".join(f"{x(point.block):.1f},{y(point.value):.1f}" for point in points)
        dots = "".join(
            f"<circle cx={x(point.block):.1f} cy={y(point.value):.1f} r=6>"
            f"<title>{markup.escape(point.said)}</title></circle>"
            for point in points
        )
        parts.append(
            f'<g style="--colour:{colour}"><polyline points="{path}" />{dots}'
            f"{_text(WIDTH - RIGHT + 12, end, name, 'start')}</g>"
        )
    said = markup.escape(f"{axis} over blocks 0 to {last}: {', '.join(lines)}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{said}">{"".join(parts)}</svg>'


def _step(largest: float) -> float:
    """The smallest round step of which STEPS reach the largest value."""
    least = largest / STEPS or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(one * power for one in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if one * power >= least * 0.9999)


def _text(x: float, y: float, said: str, anchor: str, more: str = "") -> str:
    place = f"x={x:.1f} y={y:.1f} text-anchor={anchor} dominant-baseline=middle {more}"
    return f"<text {place}>{markup.escape(said)}</text>"


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights, moved as little as it takes for names not to lie on one another, inside of the picture."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + BETWEEN)
    lowest = float(HEIGHT - BOTTOM)
    for one in reversed(order):
        moved[one] = min(moved[one], lowest)
        lowest = moved[one] - BETWEEN
    return moved
