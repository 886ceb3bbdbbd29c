"""Rows of stacked bars on one scale, and a pipeline's lanes, as HTML without any script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ridgeline.audit.plots import nice_ticks, tick_labels
from ridgeline.audit.witnesses import Span

LANE, BAR = 22, 17
"""Pixels of a pipeline rank's row, and of the bars in it."""
MOST_BARS = 1500
"""In one picture, so that the report stays small; beyond, the step is shown from its start on."""
MOST_LANES = 16
"""Pipeline ranks in one picture; of more, some evenly over all."""
KINDS = {
    "F": ("forward", 0),
    "B": ("backward", 1),
    "I": ("backward, inputs", 3),
    "W": ("backward, weights", 2),
}
NUMBERED = 0.018
"""Of the width: bars as wide carry the number of their micro-batch."""


@dataclass(frozen=True)
class Part:
    """One piece of a bar; `tone` is a colour of report.css."""

    name: str
    value: float
    tone: int


@dataclass(frozen=True)
class Bar:
    """One row: its name, and its parts from left to right."""

    name: str
    parts: Sequence[Part]

    @property
    def total(self) -> float:
        """How long the bar is."""
        return sum(part.value for part in self.parts)


def stacked(title: str, sentence: str, rows: Sequence[Bar], show: Callable[[float], str]) -> str:
    """Bars on one scale with the names of their parts below; empty without any."""
    longest = max((row.total for row in rows), default=0.0)
    if longest <= 0:
        return ""
    lines: list[str] = []
    tones: dict[str, int] = {}
    for row in rows:
        drawn, left = [], 0.0
        for part in row.parts:
            tones.setdefault(part.name, part.tone)
            drawn.append(
                f'<rect class="tone{part.tone}" x="{100 * left / longest:.3f}%" height="100%" '
                f'width="{100 * part.value / longest:.3f}%">'
                f"<title>{escape(part.name)} {escape(show(part.value))}</title></rect>"
            )
            left += part.value
        said = ", ".join(f"{part.name} {show(part.value)}" for part in row.parts)
        lines.append(
            f'<li><span>{escape(row.name)}</span><svg role="img" aria-label="{escape(said)}">'
            f"{''.join(drawn)}</svg><output>{escape(show(row.total))}</output></li>"
        )
    alone = {part.name: show(part.value) for row in rows for part in row.parts}
    legend = _legend(tones, alone if len(rows) == 1 else {})
    return _figure(title, sentence, f'<ul class="rows">{"".join(lines)}</ul>{legend}')


def lanes(
    title: str,
    sentence: str,
    pictures: Sequence[tuple[str, Sequence[Sequence[Span]]]],
    show: Callable[[float], str],
) -> str:
    """Pipelines above each other on one scale: a row for each rank, a bar for each action."""
    end_s = max(span.end_s for _, ranks in pictures for rank in ranks for span in rank)
    until_s = min(_until(ranks, end_s) for _, ranks in pictures)
    if until_s < end_s:
        sentence += f" The first {show(until_s)} of the step are shown."
    scale, unit = (1.0, " s") if until_s >= 1 else (1000.0, " ms")
    ticks = nice_ticks(0.0, until_s * scale)
    parts: list[str] = []
    kinds: dict[str, None] = {}
    for name, ranks in pictures:
        chosen = _evenly(len(ranks))
        drawn = [_lane(place, rank, ranks[rank], until_s) for place, rank in enumerate(chosen)]
        height = LANE * len(chosen)
        foot = "".join(
            f'<text class="x" x="{100 * tick / scale / until_s:.2f}%" y="{height + 14}">'
            f"{escape(words)}{unit if tick else ''}</text>"
            for tick, words in zip(ticks, tick_labels(ticks), strict=True)
        )
        parts.append(
            f'<h4>{escape(name)}</h4><div class="lanes"><svg role="img" '
            f'aria-label="{escape(f"{title}, {name}")}" height="{height + 20}">'
            f"{''.join(drawn)}{foot}</svg></div>"
        )
        kinds |= {span.kind: None for rank in ranks for span in rank}
    tones = {words: tone for kind, (words, tone) in KINDS.items() if kind in kinds}
    return _figure(title, sentence, "".join(parts) + _legend(tones, {}))


def _lane(place: int, rank: int, spans: Sequence[Span], until_s: float) -> str:
    """One rank's row; later chunks of a rank are paler."""
    y = LANE * place
    first = min((span.chunk for span in spans), default=0)
    drawn = [
        f'<text class="y" x="-8" y="{y + 13}">{rank}</text>'
        f'<rect class="idle" width="100%" y="{y}" height="{BAR}"/>'
    ]
    for span in spans:
        if span.start_s >= until_s:
            continue
        x, width = span.start_s / until_s, (min(span.end_s, until_s) - span.start_s) / until_s
        paler = ' opacity=".62"' if span.chunk != first else ""
        drawn.append(
            f'<rect class="tone{KINDS[span.kind][1]}" x="{100 * x:.2f}%" y="{y}" '
            f'width="{100 * width:.2f}%" height="{BAR}"{paler}/>'
        )
        if width >= NUMBERED:
            drawn.append(
                f'<text class="n" x="{100 * (x + width / 2):.2f}%" y="{y + 13}">'
                f"{span.micro_batch}</text>"
            )
    return "".join(drawn)


def _until(ranks: Sequence[Sequence[Span]], end_s: float) -> float:
    """The time up to which a picture has no more than `MOST_BARS`."""
    starts = sorted(span.start_s for rank in _evenly(len(ranks)) for span in ranks[rank])
    return starts[MOST_BARS] if len(starts) > MOST_BARS and starts[MOST_BARS] > 0 else end_s


def _evenly(count: int) -> list[int]:
    """The ranks that are drawn: all, or some of them with the first and the last."""
    shown = min(count, MOST_LANES)
    return [round(i * (count - 1) / max(shown - 1, 1)) for i in range(shown)]


def _legend(tones: dict[str, int], values: dict[str, str]) -> str:
    items = []
    for name, tone in tones.items():
        value = f" <output>{escape(values[name])}</output>" if name in values else ""
        items.append(f'<li><i class="band tone{tone}"></i>{escape(name)}{value}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _figure(title: str, sentence: str, body: str) -> str:
    return (
        f'<figure class="bars"><figcaption><h3>{escape(title)}</h3><p>{escape(sentence)}</p>'
        f"</figcaption>{body}</figure>"
    )
