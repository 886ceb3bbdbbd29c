"""The audit within the report: goodput, step, pipeline, memory, and the table of all terms."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ridgeline import human
from ridgeline.audit import audit_text
from ridgeline.audit.audit import Audit, Term, audit_of
from ridgeline.audit.bars import Bar, Part, lanes, stacked
from ridgeline.audit.history import History
from ridgeline.audit.witnesses import Witnesses

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "temporary", "framework")
REST = "not told apart"
REST_TONE = 7
MOST_STAGES = 8
"""Pipeline stages whose memory is drawn; of more, the fullest."""
NOT_CAUSES = ("total", "forward", "backward", "checkpoint_stall", "evaluation")
"""Of a step's seconds: the whole, parts of compute, and what lies between steps."""
LEAST = 0.003
"""Of the longest bar: causes below are drawn with the rest."""
TONES = 7  # causes have a colour each; what is left has the eighth


def section(history: History, found: Witnesses) -> str:
    """The audit as HTML; empty where nobody but metrics.jsonl says anything."""
    told = audit_of(history, found)
    if not found.ledgers and told.goodput.held_s is None:
        return ""
    parts = [_goodput(told), _step(told), _pipeline(found), _memory(told), _table(told)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in told.notes[len(history.notes) :])
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        '<section class="audit"><h2>Planned, rehearsed, measured</h2>'
        "<p>What the planner foresaw, what a trace of the program showed, and what the run did. "
        "Differences are of the measured number; a dash means not known.</p>"
        f"{notes}{''.join(parts)}</section>"
    )


def _table(told: Audit) -> str:
    groups = audit_text.grouped(audit_text.listed(told))
    if told.per_billion_tokens:
        groups.append(("for a billion tokens", list(told.per_billion_tokens)))
    bodies = []
    for title, terms in groups:
        rows = "".join(_row(term, told.currency) for term in terms)
        heading = f'<tr><th scope="rowgroup" colspan="6">{escape(title)}</th></tr>'
        bodies.append(f"<tbody>{heading}{rows}</tbody>")
    heads = ("", "planned", "rehearsed", "measured", "plan ±", "rehearsal ±")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    sources = "".join(
        f"<li><b>{escape(audit_text.label(term))}</b> {audit_text.WORDS[witness]}: "
        f"{escape(source)}</li>"
        for term in _without_stages(audit_text.listed(told))
        for witness, source in term.sources.items()
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="terms"><thead><tr>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
        f"<details><summary>Where the numbers come from</summary><ul>{sources}</ul></details>"
    )


def _without_stages(terms: Sequence[Term]) -> list[Term]:
    """One term of those that differ only in the pipeline stage."""
    by_name: dict[tuple[str, ...], Term] = {}
    for term in terms:
        plain = tuple(part for part in term.name.split(".") if not part.isdecimal())
        by_name.setdefault(plain[:1] if plain[0] == "flops_by_module" else plain, term)
    return list(by_name.values())


def _row(term: Term, currency: str | None) -> str:
    cells = [
        *(
            audit_text.shown(term.name, value, currency)
            for value in (term.planned, term.rehearsed, term.measured)
        ),
        audit_text.difference(term.planned_difference),
        audit_text.difference(term.rehearsed_difference),
    ]
    row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(audit_text.label(term))}</th>{row}</tr>'


def _pipeline(found: Witnesses) -> str:
    known = (("planned", found.planned_spans), ("measured", found.measured_spans))
    pictures = [
        (name if spans.step is None else f"{name} at step {spans.step:,}", spans.ranks)
        for name, spans in known
        if spans is not None and any(spans.ranks)
    ]
    if not any(len(ranks) > 1 for _, ranks in pictures):
        return ""
    ends = [max(span.end_s for rank in ranks for span in rank) for _, ranks in pictures]
    sentence = f"The last action ends after {' and '.join(map(human.duration, ends))}"
    sentence += ", planned and measured." if len(pictures) == 2 else f", {pictures[0][0]}."
    return lanes(
        "The pipeline",
        f"{sentence} A row for each rank, bars with the number of their micro-batch, all on one "
        "scale.",
        pictures,
        human.duration,
    )


def _memory(told: Audit) -> str:
    """Bytes by component, of each stage and witness."""
    values = {term.name: term for term in told.terms if term.name.startswith("memory.")}
    stages = sorted({int(name.split(".")[1]) for name in values})
    if len(stages) > MOST_STAGES:
        stages = [stage for stage in (audit_text.fullest(told),) if stage is not None]
    rows = []
    for stage in stages:
        for witness in ("planned", "rehearsed", "measured"):
            parts = []
            for tone, name in enumerate(COMPONENTS):
                term = values.get(f"memory.{stage}.{name}_bytes")
                if term is not None and (value := getattr(term, witness)):
                    parts.append(Part(name, value, tone))
            total = values.get(f"memory.{stage}.total_bytes")
            rows.append(_with_rest(f"stage {stage} {witness}", parts, total, witness))
    return stacked(
        "Memory of the fullest device",
        "By component and pipeline stage, at the fullest moment of a step.",
        [row for row in rows if row.parts],
        human.size,
    )


def _step(told: Audit) -> str:
    """Seconds by cause, planned above measured."""
    values = {
        term.name.removeprefix("seconds.").removesuffix("_s"): term
        for term in told.terms
        if term.name.startswith("seconds.")
    }
    total = values.pop("total", None)
    causes = {name: term for name, term in values.items() if name not in NOT_CAUSES}

    def most(name: str) -> float:
        return max(causes[name].planned or 0.0, causes[name].measured or 0.0)

    longest = max(map(most, causes), default=0.0)
    ranked = sorted((n for n in causes if most(n) > LEAST * longest), key=most, reverse=True)
    tones = {name: tone for tone, name in enumerate(ranked[:TONES])}
    rows = []
    for witness in ("planned", "measured"):
        parts = [
            Part(name.replace("_", " "), value, tone)
            for name, tone in tones.items()
            if (value := getattr(causes[name], witness))
        ]
        rows.append(_with_rest(witness, parts, total, witness))
    return stacked(
        "Where a step's time goes",
        "By cause; communication counts where compute does not hide it.",
        [row for row in rows if row.parts],
        human.duration,
    )


def _with_rest(name: str, parts: list[Part], total: Term | None, witness: str) -> Bar:
    """A bar, and what its parts leave of the witness' total."""
    whole = getattr(total, witness) if total is not None else None
    rest = (whole or 0.0) - sum(part.value for part in parts)
    if whole and rest > LEAST * whole:
        parts.append(Part(REST, rest, REST_TONE))
    return Bar(name, parts)


def _goodput(told: Audit) -> str:
    said = told.goodput
    if not said.held_s:
        return ""
    seconds = {"kept steps": said.useful_s, **said.badput_s}
    parts = [
        Part(name, value, (2, 0, 1, 3, 4, 5, 6, 7)[place])
        for place, (name, value) in enumerate(seconds.items())
        if value
    ]
    lost = sorted((part for part in parts[1:]), key=lambda part: -part.value)
    most = f"; most of the rest went to {lost[0].name}" if lost else ""
    sessions = f"{said.sessions} session{'s' if said.sessions != 1 else ''}"
    return stacked(
        "Goodput",
        f"{human.percent(said.fraction)} of {human.duration(said.held_s)} held in {sessions} went "
        f"into steps that were kept{most}.",
        [Bar("held", parts)],
        human.duration,
    )
