"""Pictures of a replayed schedule: one self-contained SVG, and a trace for Perfetto."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from ridgeline import human
from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import PipelineSchedule, schedule_of
from ridgeline.plan.timeline import Timeline, even_durations, replay

WIDTH = 960
ROW = 26
BAR = 20
LEFT = 64
MOST_BARS = 10_000
MOST_PASSES = 1_000_000
TOP = 40
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
# Okabe and Ito's colours, told apart with any colour vision; the letter says the kind as well.
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #222 }
.n { fill: #111; font-size: 9px; text-anchor: middle }
.idle { fill: #eee }
.kF { fill: #56b4e9 } .kB { fill: #e69f00 } .kI { fill: #f0c36a } .kW { fill: #3cbf9a }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .n { fill: #111 } .idle { fill: #333 }
}
"""


def draw(
    sentence: str,
    micro_batches: int,
    *,
    forward_s: float = 1.0,
    backward_input_s: float = 1.0,
    backward_weight_s: float = 1.0,
    send_s: float = 0.0,
    svg: Path | None = None,
    trace: Path | None = None,
) -> str:
    """What `ridgeline pipeline` prints of a layout sentence, and the pictures it writes if asked.

    The seconds are those of one micro-batch on one rank, all its chunks together. Raises
    LayoutError.
    """
    schedule = replayable(Layout.model_validate(sentence), micro_batches)
    per_rank = schedule.chunks // schedule.ranks
    durations = even_durations(
        schedule.chunks,
        forward_s / per_rank,
        backward_input_s / per_rank,
        backward_weight_s / per_rank,
        send_s,
    )
    return drawn(replay(schedule, durations), svg, trace)


def replayable(layout: Layout, micro_batches: int) -> PipelineSchedule:
    """The schedule of a layout. Raises LayoutError for more than can be replayed."""
    chunks = schedule_of(layout, 1).chunks
    if micro_batches * chunks > MOST_PASSES:
        raise LayoutError(
            f"{micro_batches:,} micro-batches through {chunks:,} chunks",
            f"that is {micro_batches * chunks:,} forward passes; at most {MOST_PASSES:,} are "
            "replayed",
            f"{max(1, MOST_PASSES // chunks):,} micro-batches: more of them idle no longer",
        )
    return schedule_of(layout, micro_batches)


def drawn(timeline: Timeline, svg: Path | None = None, trace: Path | None = None) -> str:
    """The timeline in words; a picture and a trace of it in files, where they are wanted."""
    for path, text in ((svg, timeline_svg), (trace, timeline_trace)):
        if path is not None:
            path.write_text(text(timeline), encoding="utf-8")
    return describe(timeline)


def describe(timeline: Timeline) -> str:
    """The step, and for each rank its work, idle time and most activations kept."""
    schedule = timeline.schedule
    chunks = schedule.chunks // schedule.ranks
    kept = f"kept, of {schedule.micro_batches} micro-batches in {chunks} chunks"
    lines = [_title(timeline), f"  rank      busy      idle  {kept}"]
    for rank, (busy_s, idle_s, peak) in enumerate(
        zip(timeline.busy_s, timeline.bubble_s, schedule.peak_in_flight(), strict=True)
    ):
        busy, idle = human.duration(busy_s), human.duration(max(0.0, idle_s))
        lines.append(f"  {rank:4}  {busy:>8}  {idle:>8}  {peak}")
    return "\n".join(lines)


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    idle = human.percent(1 - min(timeline.busy_s) / timeline.step_s)
    return (
        f"{schedule.name}, {schedule.ranks} ranks, {schedule.micro_batches} micro-batches: "
        f"{human.duration(timeline.step_s)} from first to last, at most {idle} of it idle"
    )


def timeline_svg(timeline: Timeline) -> str:
    """An SVG of every rank's work over time: a row per rank, a bar per action, bubbles bare.

    Bars wide enough carry their micro-batch. Chunks beyond a rank's first are paler. Colours stay
    apart in colour-blind eyes, and follow the reader's light or dark scheme. Raises LayoutError for
    more actions than a picture can show.
    """
    schedule = timeline.schedule
    count = sum(len(spans) for spans in timeline.spans)
    if count > MOST_BARS:
        fewer = max(1, schedule.micro_batches * MOST_BARS // count)
        raise LayoutError(
            f"a picture of {schedule.micro_batches} micro-batches over {schedule.ranks} ranks",
            f"that is {count:,} bars; a picture shows at most {MOST_BARS:,}",
            f"{fewer} micro-batches, or a trace",
        )
    scale = (WIDTH - LEFT - 8) / timeline.step_s
    height = TOP + ROW * schedule.ranks + 24
    title = _title(timeline)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text x="4" y="14">{escape(title)}</text>',
        _legend(timeline),
    ]
    for rank, spans in enumerate(timeline.spans):
        y = TOP + ROW * rank
        parts.append(f'<text x="4" y="{y + 14}">rank {rank}</text>')
        parts.append(
            f'<rect class="idle" x="{LEFT}" y="{y}" width="{timeline.step_s * scale:.2f}" '
            f'height="{BAR}"/>'
        )
        first = schedule.rank_of_chunk.index(rank)
        for action, start, end in spans:
            x, width = LEFT + start * scale, (end - start) * scale
            drawn = max(0.0, width - 0.6)  # a gap between neighbours
            later = ' opacity=".62"' if action.chunk != first else ""
            parts.append(
                f'<rect class="k{action.kind}" x="{x:.2f}" y="{y}" width="{drawn:.2f}"'
                f' height="{BAR}"{later}/>'
            )
            if width >= 12:
                parts.append(
                    f'<text class="n" x="{x + width / 2:.2f}" y="{y + 14}">{action.micro_batch}'
                    "</text>"
                )
    foot = TOP + ROW * schedule.ranks + 14
    parts.append(f'<text x="{LEFT}" y="{foot}">0</text>')
    parts.append(
        f'<text x="{WIDTH - 8}" y="{foot}" text-anchor="end">'
        f"{human.duration(timeline.step_s)}</text></svg>"
    )
    return "\n".join(parts)


def _legend(timeline: Timeline) -> str:
    kinds = {action.kind for rank in timeline.spans for action, _, _ in rank}
    parts, x = [], LEFT
    for kind, name in NAMES.items():
        if kind in kinds:
            parts.append(f'<rect class="legend k{kind}" x="{x}" y="22" width="12" height="12"/>')
            parts.append(f'<text x="{x + 16}" y="32">{name}</text>')
            x += 140
    parts.append(f'<rect class="legend idle" x="{x}" y="22" width="12" height="12"/>')
    chunks = timeline.schedule.chunks // timeline.schedule.ranks
    paler = "; paler: later chunks of the rank" if chunks > 1 else ""
    parts.append(f'<text x="{x + 16}" y="32">idle{paler}</text>')
    return "".join(parts)


def timeline_trace(timeline: Timeline) -> str:
    """The Chrome trace-event JSON of a timeline, for ui.perfetto.dev: one thread per rank."""
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": name}}
        for rank, name in enumerate(f"pipeline rank {r}" for r in range(timeline.schedule.ranks))
    ]
    for rank, spans in enumerate(timeline.spans):
        for action, start, end in spans:
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "name": str(action),
                    "cat": NAMES[action.kind],
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"chunk": action.chunk, "micro_batch": action.micro_batch},
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
