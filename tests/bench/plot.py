"""CPU of each server in each workload, as an SVG: a dot at the median of the rounds, a line from the least to the most.

The scale is logarithmic: from the floor to a process for each connection it is a factor of a hundred. Ours is the darker dot.
"""

import math
import statistics
from collections.abc import Mapping
from xml.sax.saxutils import escape

from tests.bench.report import number
from tests.bench.workloads import Compared

COLUMNS = 2
NAMES, PLOT, VALUES, ROW, TITLE, AXIS, GAP = 84, 320, 64, 18, 46, 22, 28
OURS, OTHERS, GRID, INK, PALE = "#0b5fa5", "#8a8f98", "#e3e5e8", "#1d2025", "#6b7078"


def svg(compared: Mapping[str, tuple[str, Compared]], caption: str) -> str:
    """A panel for each workload; ``caption`` stands under them."""
    panels = [_panel(name, what, result) for name, (what, result) in compared.items() if any(result.turns.values())]
    width = COLUMNS * (NAMES + PLOT + VALUES + GAP) + GAP
    parts, top = [], GAP
    for first in range(0, len(panels), COLUMNS):
        row = panels[first : first + COLUMNS]
        for place, (_, body) in enumerate(row):
            left = GAP + place * (NAMES + PLOT + VALUES + GAP)
            parts.append(f'<g transform="translate({left} {top})">{body}</g>')
        top += max(height for height, _ in row) + GAP
    parts.append(_text(GAP, top, caption, PALE))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top + GAP}" viewBox="0 0 {width} {top + GAP}" '
        'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _panel(title: str, what: str, result: Compared) -> tuple[int, str]:
    """Its height and what is in it."""
    used = {name: [turn.cpu_us for turn in turns] for name, turns in result.turns.items() if turns}
    order = sorted(used, key=lambda name: statistics.median(used[name]))
    values = [max(value, 1e-3) for turns in used.values() for value in turns]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    span = max(1, high - low)

    def place(value: float) -> float:
        return NAMES + (math.log10(max(value, 1e-3)) - low) / span * PLOT

    bottom = TITLE + ROW * len(order)
    parts = [_text(0, 8, f"{title}: us of CPU for each {result.unit}", INK, weight="600"), _text(0, 24, what, PALE)]
    for power in range(low, low + span + 1):
        at = place(10.0**power)
        parts.append(f'<path d="M{at:.1f} {TITLE - 6}V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(at, bottom + 14, f"{10.0**power:,g}", PALE, anchor="middle"))
    for number_of_row, name in enumerate(order):
        y, colour = TITLE + ROW * number_of_row + ROW / 2, OURS if name == "prefork" else OTHERS
        middle = statistics.median(used[name])
        parts.append(_text(NAMES - 8, y + 4, name, colour if name == "prefork" else INK, anchor="end"))
        left, right = place(min(used[name])), place(max(used[name]))
        parts.append(f'<path d="M{left:.1f} {y}H{right:.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{place(middle):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
        parts.append(_text(NAMES + PLOT + VALUES, y + 4, number(middle), INK, anchor="end"))
    return bottom + AXIS, "".join(parts)


def _text(x: float, y: float, text: str, colour: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
