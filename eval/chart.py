"""The figure of the verifier study: what a judge costs against how often it errs, as one inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .page_parts import escape
from .stats import Interval

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 62, 150, 44, 58
INK, FAINT, GRID = "#1c2126", "#667079", "#e6e9ec"
DISAGREES, FALSE_PASSES = "#1f4e79", "#a4262c"


@dataclass(frozen=True)
class Point:
    """One judge: its cost, how often it disagrees with the reference, and how often it passes what that fails.

    Attributes:
        name: of the judge.
        cost: US dollars per 1,000 criteria, above 0.
        disagreement: share with another label.
        false_pass: share passed among those that the reference failed; None where it failed none.
    """

    name: str
    cost: float
    disagreement: Interval
    false_pass: Interval | None


def cost_figure(points: Sequence[Point], reference: str, reference_cost: float | None = None) -> str:
    """Cost (logarithmic) against disagreement and false passes, each with its 95 % interval; "" without points.

    Args:
        reference: the judge that the others are held against.
        reference_cost: drawn as a dashed line, where it is known.
    """
    points = [point for point in points if point.cost > 0]
    if not points:
        return ""
    costs = [point.cost for point in points] + ([reference_cost] if reference_cost else [])
    low, high = math.floor(math.log10(min(costs)) - 0.1), math.ceil(math.log10(max(costs)) + 0.1)
    shown = [found for point in points for found in (point.disagreement, point.false_pass) if found]
    top = min(1.0, max(0.05, math.ceil(20 * max(found.high for found in shown)) / 20))

    def x(cost: float) -> float:
        return LEFT + (math.log10(cost) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="Liberation Sans, Arial, sans-serif" font-size="12" fill="{INK}">'
        f"<title>Cost per 1,000 criteria against disagreement with {escape(reference)}</title>"
    ]
    for power in range(low, high + 1):
        parts.append(_line(x(10**power), TOP, x(10**power), HEIGHT - BOTTOM, GRID))
        parts.append(_text(x(10**power), HEIGHT - BOTTOM + 18, f"${10**power:,g}", "middle", FAINT))
    step = 0.25 if top > 0.5 else 0.1 if top > 0.2 else 0.05 if top > 0.05 else 0.01
    for index in range(int(top / step + 1e-9) + 1):
        parts.append(_line(LEFT, y(index * step), WIDTH - RIGHT, y(index * step), GRID))
        parts.append(_text(LEFT - 8, y(index * step) + 4, f"{100 * index * step:g} %", "end", FAINT))
    if reference_cost:
        parts.append(_line(x(reference_cost), TOP, x(reference_cost), HEIGHT - BOTTOM, FAINT, "4 4"))
        parts.append(_text(x(reference_cost) + 6, TOP + 12, f"reference: {reference}", "start", FAINT))
    for point in sorted(points, key=lambda point: point.cost):
        at = x(point.cost)
        if point.false_pass:
            parts += _marked(at + 5, y, point.false_pass, FALSE_PASSES, hollow=True)
        parts += _marked(at - 5, y, point.disagreement, DISAGREES, hollow=False)
        parts.append(_text(at + 13, y(point.disagreement.estimate) - 7, point.name, "start", INK))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        _text(middle, HEIGHT - 14, "US dollars per 1,000 criteria (observed tokens, log scale)", "middle", INK)
    )
    parts.append(f'<circle cx="{LEFT + 8}" cy="{TOP - 26}" r="4.5" fill="{DISAGREES}"/>')
    parts.append(_text(LEFT + 18, TOP - 22, f"disagrees with {reference}", "start", INK))
    parts.append(
        f'<circle cx="{middle + 8}" cy="{TOP - 26}" r="4.5" fill="#fff" stroke="{FALSE_PASSES}" stroke-width="2"/>'
    )
    parts.append(_text(middle + 18, TOP - 22, "passes what it fails", "start", INK))
    return "".join(parts) + "</svg>"


def _marked(at: float, y: Callable[[float], float], found: Interval, colour: str, hollow: bool) -> list[str]:
    fill = f'fill="#fff" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
    return [
        f'<line x1="{at:.1f}" y1="{y(found.high):.1f}" x2="{at:.1f}" y2="{y(found.low):.1f}" stroke="{colour}" '
        'stroke-width="1.5"/>',
        f'<circle cx="{at:.1f}" cy="{y(found.estimate):.1f}" r="4.5" {fill}/>',
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
