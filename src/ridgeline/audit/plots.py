"""Charts as inline SVG that scale to any width without scaling their text.

Every position is a percentage of the plot (labels, grid, points) or lies in a nested box that
stretches (curves), so one drawing serves a phone, a screen and paper, with no script. The
values that a reader sees on hovering are formatted here and carried along; report.js only
picks the nearest.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
import numpy.typing as npt

from ridgeline import human

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.intp]

BUCKETS = 400  # of min and max: two points for each pixel or so of the widest plot
BOX = (4000, 1000)  # the stretched box of the curves; integers in it are finer than a pixel
MOST_MARKERS = 60  # more would hide the curve that they stand on


@dataclass(frozen=True)
class Series:
    """One curve over steps; y is NaN where nothing is known. `tone` is a colour of report.css."""

    name: str
    x: FloatArray
    y: FloatArray
    tone: int
    look: Literal["line", "faint", "points", "band"] = "line"
    note: str = ""  # stands in the legend beside the value, and does not change on hovering


@dataclass(frozen=True)
class Reference:
    """A known level to compare a curve with, drawn as a dashed horizontal line."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """One figure. `show` formats a value for a reader; `sentence` says what there is to see.

    Series that look like bands are stacked in their order; they must share their x.
    """

    title: str
    unit: str
    sentence: str
    series: Sequence[Series]
    show: Callable[[float], str]
    references: Sequence[Reference] = ()
    from_zero: bool = True
    wide: bool = False
    above: str = ""  # HTML between the caption and the plot


@dataclass(frozen=True)
class Scale:
    """Maps values to fractions 0 to 1 of an axis, evenly or by logarithm."""

    low: float
    high: float
    logarithmic: bool = False

    def fraction(self, values: FloatArray) -> FloatArray:
        if self.logarithmic:
            low, high = math.log(self.low), math.log(self.high)
            return (np.log(values) - low) / (high - low)
        return (values - self.low) / (self.high - self.low)

    def at(self, value: float) -> float:
        return float(self.fraction(np.array([value]))[0])


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], `about` of them.

    Source of the rule: P. Heckbert, "Nice numbers for graph labels", Graphics Gems (1990).
    """
    spacing = (high - low) / max(about, 1)
    if not (math.isfinite(spacing) and spacing > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(spacing))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= spacing * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks in one common precision, so that a column of them aligns."""
    largest = max((abs(t) for t in ticks), default=0.0)
    gaps = [b - a for a, b in itertools.pairwise(ticks) if b > a]
    if 0 < largest < 1e-2:
        return [
            "0" if t == 0 else f"{t:.1e}".replace("e-0", "e-").replace(".0e", "e") for t in ticks
        ]
    divisor, unit = next((d, u) for d, u in _PREFIXES if largest >= 10 * d or d == 1)
    gap = min(gaps, default=1.0) / divisor
    digits = next((d for d in range(4) if abs(gap - round(gap, d)) < gap * 1e-6), 4)
    return [f"{t / divisor:,.{digits}f}{unit}" if t else "0" for t in ticks]


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def keep_extremes(x: FloatArray, *columns: FloatArray, buckets: int = BUCKETS) -> IndexArray:
    """Indices that keep the first and last point and, in each bucket of x, every column's extremes.

    x [N] rises; each column is [N]. A bucket also keeps its first NaN of a column, so that a gap
    stays a gap. At most 2 + 3 * len(columns) * buckets indices come back, sorted; all N when N is
    small enough to need no thinning.
    """
    if len(x) <= 2 * buckets:
        return np.arange(len(x))
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], buckets + 1)[1:-1])
    kept = {0, len(x) - 1}
    for start, stop in zip([0, *edges], [*edges, len(x)], strict=True):
        for column in columns:
            part = column[start:stop]
            finite = np.isfinite(part)
            if finite.any():
                kept.add(int(start + np.argmin(np.where(finite, part, np.inf))))
                kept.add(int(start + np.argmax(np.where(finite, part, -np.inf))))
            if not finite.all():
                kept.add(int(start + np.argmin(finite)))
    return np.array(sorted(kept), dtype=np.intp)


def figure(chart: Chart, last_step: float) -> str:
    """The chart as an HTML <figure>: caption, legend with the last values, and the drawing.

    The x axis runs from 0 to `last_step` in every figure of a page, so that one place on it is
    one moment of the run.
    """
    drawn = _stacked(chart.series)
    x_scale, y_scale = Scale(0.0, max(last_step, 1.0)), _y_scale(chart, drawn)
    references = [_reference(r, chart, y_scale) for r in chart.references]
    body = [_axes(x_scale, y_scale), *(line for line, _ in references)]
    curves = [_curve(s, floor, x_scale, y_scale) for s, floor in drawn]
    box = f'viewBox="0 0 {BOX[0]} {BOX[1]}" preserveAspectRatio="none" width="100%" height="100%"'
    body.append(f"<svg {box}>{''.join(curves)}</svg>")
    body += [_points(s, x_scale, y_scale) for s, _ in drawn if s.look == "points"]
    body += [label for _, label in references]  # above the curves, with a halo
    body.append('<g class="probe"><line y1="0" y2="100%"/></g>')
    title, unit, sentence = map(escape, (chart.title, chart.unit, chart.sentence))
    label = f"{title}, in {unit}. {sentence}" if unit else f"{title}. {sentence}"
    return (
        f'<figure class="chart{" wide" if chart.wide else ""}" '
        f'data-chart="{escape(_hover_data(chart, drawn, x_scale, y_scale))}">'
        f"<figcaption><h3>{title} <small>{unit}</small></h3><p>{sentence}</p></figcaption>"
        f'{chart.above}{_legend(chart)}<div class="plot">'
        f'<svg class="canvas" role="img" tabindex="0" aria-label="{label}">{"".join(body)}</svg>'
        "</div></figure>"
    )


def share_bar(shares: Sequence[tuple[str, float, int]]) -> str:
    """One horizontal bar of (name, fraction, tone) parts that add up to 1."""
    parts, left = [], 0.0
    for name, share, tone in shares:
        parts.append(
            f'<rect class="tone{tone}" x="{100 * left:.3f}%" width="{100 * share:.3f}%" '
            f'height="100%"><title>{escape(name)} {human.percent(share)}</title></rect>'
        )
        left += share
    said = ", ".join(f"{name} {human.percent(share)}" for name, share, _ in shares)
    return f'<svg class="share" role="img" aria-label="{escape(said)}">{"".join(parts)}</svg>'


def _stacked(series: Sequence[Series]) -> list[tuple[Series, FloatArray | None]]:
    """Each series as drawn: a band is raised by those before it, and comes with its floor."""
    floor: FloatArray | None = None
    drawn: list[tuple[Series, FloatArray | None]] = []
    for one in series:
        if one.look != "band":
            drawn.append((one, None))
            continue
        floor = np.zeros_like(one.y) if floor is None else floor
        top = floor + np.nan_to_num(one.y)
        drawn.append((Series(one.name, one.x, top, one.tone, one.look), floor))
        floor = top
    return drawn


def _y_scale(chart: Chart, drawn: Sequence[tuple[Series, FloatArray | None]]) -> Scale:
    values = np.concatenate([s.y for s, _ in drawn] + [np.array([r.y for r in chart.references])])
    values = values[np.isfinite(values)]
    if not len(values):
        return Scale(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    banded = any(s.look == "band" for s, _ in drawn)
    if chart.from_zero and not banded and 0 < 30 * float(np.median(values)) < high and low > 0:
        return Scale(low / 1.2, high * 1.2, logarithmic=True)  # or a spike hides the rest
    low = min(low, 0.0) if chart.from_zero else low
    margin = 0.06 * (high - low or abs(high) or 1.0)
    return Scale(low if chart.from_zero else low - margin, high + margin)


def _y_ticks(scale: Scale) -> list[float]:
    if not scale.logarithmic:
        return nice_ticks(scale.low, scale.high)
    low, high = math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high))
    return [10.0**e for e in range(low, high + 1)] or [scale.low, scale.high]


def _axes(x_scale: Scale, y_scale: Scale) -> str:
    y_ticks, x_ticks = _y_ticks(y_scale), nice_ticks(x_scale.low, x_scale.high)
    x_ticks = [t for t in x_ticks if t == round(t)]
    y_labels = [human.short(t) if y_scale.logarithmic else "" for t in y_ticks]
    y_labels = y_labels if y_scale.logarithmic else tick_labels(y_ticks)
    lines = []
    for tick, label in zip(y_ticks, y_labels, strict=True):
        y = f"{100 * (1 - y_scale.at(tick)):.2f}%"
        lines.append(f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>')
        lines.append(f'<text class="y" x="-10" y="{y}" dy=".35em">{label}</text>')
    for tick, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        x = f"{100 * x_scale.at(tick):.2f}%"
        lines.append(f'<text class="x" x="{x}" y="100%" dy="1.6em">{label}</text>')
    lines.append('<line class="base" x2="100%" y1="100%" y2="100%"/>')
    return "".join(lines)


def _curve(one: Series, floor: FloatArray | None, x_scale: Scale, y_scale: Scale) -> str:
    x = _grid(x_scale.fraction(one.x), BOX[0])
    y = _grid(1 - y_scale.fraction(one.y), BOX[1])
    kind = f'class="{one.look} tone{one.tone}"'
    if floor is not None:
        below = _grid(1 - y_scale.fraction(floor), BOX[1])
        there = [f"{a},{b}" for a, b in zip(x, y, strict=True)]
        back = [f"{a},{b}" for a, b in zip(x[::-1], below[::-1], strict=True)]
        return f'<path {kind} d="M{"L".join(there + back)}Z"/>' if there else ""
    path, pen_down = [], False
    for a, b in zip(x, y, strict=True):
        if b is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{a},{b}" + ("" if pen_down else "h0"))
        pen_down = True
    return f'<path {kind} d="{"".join(path)}"/>'


def _grid(fractions: FloatArray, size: int) -> list[int | None]:
    return [round(size * f) if math.isfinite(f) else None for f in fractions.tolist()]


def _points(one: Series, x_scale: Scale, y_scale: Scale) -> str:
    if len(one.x) > MOST_MARKERS:
        return ""
    spots = zip(x_scale.fraction(one.x).tolist(), y_scale.fraction(one.y).tolist(), strict=True)
    return "".join(
        f'<circle class="points tone{one.tone}" r="4" cx="{100 * x:.2f}%" '
        f'cy="{100 - 100 * y:.2f}%"/>'
        for x, y in spots
        if math.isfinite(y)
    )


def _reference(one: Reference, chart: Chart, y_scale: Scale) -> tuple[str, str]:
    """The dashed line and its label."""
    y = f"{100 * (1 - y_scale.at(one.y)):.2f}%"
    others = [r.y for r in chart.references if r is not one]
    hangs = any(one.y < y for y in others) and y_scale.at(one.y) > 0.12  # clear of the axis
    # The lower label hangs at the left, where a falling curve is still above it.
    place = (
        'class="reference left" x="6" dy="1.25em"'
        if hangs
        else 'class="reference" x="100%" dy="-.45em"'
    )
    text = f"{escape(one.name)} {escape(chart.show(one.y))}"
    return (
        f'<line class="reference" x2="100%" y1="{y}" y2="{y}"/>',
        f'<text {place} y="{y}">{text}</text>',
    )


def _legend(chart: Chart) -> str:
    """The series with their last known values; report.js rewrites the values on hovering."""
    x_last = max((s.x[-1] for s in chart.series if len(s.x)), default=None)
    items = [f'<li class="step">step <output>{human.integer(x_last)}</output></li>']
    for one in chart.series:
        known = one.y[np.isfinite(one.y)]
        value = chart.show(float(known[-1])) if len(known) else human.DASH
        note = f" <span>{escape(one.note)}</span>" if one.note else ""
        items.append(
            f'<li><i class="{one.look} tone{one.tone}"></i>{escape(one.name)} '
            f"<output>{escape(value)}</output>{note}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _hover_data(
    chart: Chart,
    drawn: Sequence[tuple[Series, FloatArray | None]],
    x_scale: Scale,
    y_scale: Scale,
) -> str:
    """JSON for report.js: the end of x and, per series, x, height in 0..1000, and the text."""
    series = []
    for one, (raised, _) in zip(chart.series, drawn, strict=True):
        heights = _grid(1 - y_scale.fraction(raised.y), 1000)
        known = [i for i, h in enumerate(heights) if h is not None and math.isfinite(one.y[i])]
        series.append(
            {
                "tone": one.tone,
                "x": [int(one.x[i]) for i in known],
                "y": [heights[i] for i in known],
                "text": "|".join(chart.show(float(one.y[i])) for i in known),
            }
        )
    return json.dumps({"end": x_scale.high, "series": series}, separators=(",", ":"))
