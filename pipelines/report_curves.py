"""Loss curves as inline SVG: one picture for each group of loss terms, stages marked under the axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Text": {"text": "text answers, audio understanding"},
    "Vision": {"vision": "answers about pictures and video"},
    "Words of speech": {"audio_text": "words beside codec rows"},
    "Codec": {"audio_0": "semantic", "audio_1": "acoustic 1", "audio_2": "acoustic 2", "audio_3": "acoustic 3"},
}
"""Title -> loss term -> what it is."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 230, 40, 8, 8, 34
MOST_POINTS = 240
WINDOW = 15
"""Steps of the running mean."""

Point = tuple[int, float]
"""(step, loss)."""


def loss_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A card for each group of terms that was ever trained; empty without steps."""
    if not metrics:
        return ""
    stages = stage_spans(metrics)
    cards = []
    for title, terms in GROUPS.items():
        curves = {name: points_of(metrics, term) for term, name in terms.items()}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            cards.append(_card(title, curves, stages))
    return "".join(cards)


def stage_spans(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """(stage, first step, last step) in order."""
    spans: list[tuple[str, int, int]] = []
    for line in metrics:
        stage, step = str(line.get("stage", "")), int(line["step"])
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], step)
        else:
            spans.append((stage, step, step))
    return spans


def points_of(metrics: Sequence[Mapping[str, Any]], term: str) -> list[Point]:
    """Steps that carried the term; values that are no number are left out."""
    found = [(int(line["step"]), line.get(f"loss/{term}")) for line in metrics]
    return [(step, float(v)) for step, v in found if isinstance(v, int | float) and math.isfinite(v)]


def running_mean(points: Sequence[Point], window: int = WINDOW) -> list[Point]:
    """Mean over the last ``window`` points at each point."""
    out, total = [], 0.0
    for place, (step, value) in enumerate(points):
        total += value
        if place >= window:
            total -= points[place - window][1]
        out.append((step, total / min(place + 1, window)))
    return out


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Evenly chosen points, the last one kept."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _card(title: str, curves: Mapping[str, list[Point]], stages: Sequence[tuple[str, int, int]]) -> str:
    first, last = stages[0][1], max(stages[-1][2], stages[0][1] + 1)
    top = _nice_top(max(_high(points) for points in curves.values()))
    parts = [_grid(top), _stage_marks(stages, first, last)]
    for place, points in enumerate(curves.values()):
        colour = f"var(--c{place % 4})"
        parts.append(_line(points, first, last, top, colour, 1, 0.4))
        parts.append(_line(running_mean(points), first, last, top, colour, 2, 1.0))
    key = "".join(
        f'<span><i style="background:var(--c{place % 4})"></i>{escape(name)}: {running_mean(points)[-1][1]:.3f}</span>'
        for place, (name, points) in enumerate(curves.items())
    )
    label = f"{title}: loss over steps"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    return f'<div class="card"><h3>{escape(title)}</h3>{svg}<div class="key">{key}</div></div>'


def _high(points: Sequence[Point]) -> float:
    """The level that all but the highest hundredth stay under, so that one spike does not flatten the rest."""
    values = sorted(value for _, value in points)
    return max(values[min(len(values) - 1, int(0.99 * len(values)))], 1e-3)


def _nice_top(value: float) -> float:
    step = 10.0 ** math.floor(math.log10(value))
    return next(step * factor for factor in (1, 2, 3, 4, 5, 6, 8, 10, 20) if step * factor >= value)


def _x(step: int, first: int, last: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(value, 0.0), top) / top)


def _grid(top: float) -> str:
    out = []
    for quarter in range(5):
        value = top * quarter / 4
        y = _y(value, top)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
        out.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    return "".join(out)


def _stage_marks(stages: Sequence[tuple[str, int, int]], first: int, last: int) -> str:
    out = []
    floor = HEIGHT - BOTTOM
    for place, (name, begin, end) in enumerate(stages):
        left, right = _x(begin, first, last), _x(max(end, begin), first, last)
        if place:
            out.append(f'<path d="M{left:.1f} {TOP}V{floor + 18}" stroke="var(--soft)" stroke-dasharray="2 3"/>')
        out.append(f'<text x="{(left + right) / 2:.1f}" y="{floor + 16}" text-anchor="middle">{escape(name)}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step {last}</text>')
    return "".join(out)


def _line(points: Sequence[Point], first: int, last: int, top: float, colour: str, width: int, opacity: float) -> str:
    """A stroke that is lifted where steps without the term lie between."""
    path, before = [], None
    shown = thinned(points)
    gap = max(2, 3 * math.ceil(len(points) / max(1, len(shown))))
    for step, value in shown:
        pen = "L" if before is not None and step - before <= gap else "M"
        path.append(f"{pen}{_x(step, first, last):.1f} {_y(value, top):.1f}")
        before = step
    return f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'
