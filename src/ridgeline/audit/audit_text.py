"""An audit for people: one table, the goodput, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline import human
from ridgeline.audit.audit import Audit, Term
from ridgeline.audit.calibrate import ENOUGH, Calibrated
from ridgeline.ledger import Witness

WORDS: dict[Witness, str] = {"plan": "planned", "rehearse": "rehearsed", "train": "measured"}
MOST_STAGES = 4
"""Pipeline stages whose memory is listed; of more, the fullest."""
NOTHING = 1e-9
"""What is left of differences of equal numbers: shown as 0 is, not at all."""
TITLES = {
    "seconds": "time of a step",
    "sent": "sent by a device in a step",
    "calls": "messages of a device in a step",
    "flops_by_module": "FLOP of a device in a step",
}
REST = "the whole"
NAMES = {
    "mfu": "MFU",
    "mfu_full_attention": "MFU, full attention",
    "hfu": "HFU",
    "flops_per_device": "FLOP of a device",
    "hardware_flops_per_device": "FLOP with recomputation",
    "kernels": "kernels of a device",
    "tokens_per_s": "tokens/s",
    "train_s": "the run",
    "step_energy_j": "energy of a step",
    "device_s": "devices' time",
}
"""Where a term's own name would not do."""
SHARES = ("mfu", "mfu_full_attention", "hfu", "goodput")


def table(found: Audit) -> str:
    """Every term that somebody knows, with what it differs by from the measured one."""
    reached = f"step {found.step:,}"
    tokens = "" if found.tokens is None else f", {human.short(found.tokens)} tokens"
    layout = f"  layout {found.layout}" if found.layout else ""
    lines = [f"run {found.run}{layout}  {reached}{tokens}", *(f"  {note}" for note in found.notes)]
    shown = listed(found)
    for title, terms in grouped(shown):
        lines += ["", f"{title:34} {'planned':>10} {'rehearsed':>10} {'measured':>10} "
                  f"{'plan ±':>8} {'reh. ±':>8}"]  # fmt: skip
        lines += [_row(term, found.currency) for term in terms]
    if found.per_billion_tokens:
        lines += ["", "for a billion tokens"]
        lines += [_row(term, found.currency) for term in found.per_billion_tokens]
    lines += ["", *goodput_lines(found)]
    if sources := list(_sources(shown)):
        lines += ["", "where the numbers come from", *sources]
    return "\n".join(lines)


def listed(found: Audit) -> list[Term]:
    """The terms for people: not those that are 0 for all, nor stages beyond a few."""
    stages = {_stage(term) for term in found.terms} - {None}
    keep = stages if len(stages) <= MOST_STAGES else {fullest(found)}
    return [
        term
        for term in found.terms
        if max(term.planned or 0.0, term.rehearsed or 0.0, term.measured or 0.0) > NOTHING
        and _stage(term) in {None, *keep}
    ]


def fullest(found: Audit) -> int | None:
    """The stage with most memory: measured, or else rehearsed, or else planned."""
    totals = {_stage(t): t for t in found.terms if t.name.endswith(".total_bytes")}
    for witness in ("measured", "rehearsed", "planned"):
        known = {k: v for k, t in totals.items() if (v := getattr(t, witness)) is not None}
        if known:
            return max(known, key=lambda stage: known[stage])
    return None


def grouped(terms: list[Term]) -> list[tuple[str, list[Term]]]:
    """The terms under titles, in their order."""
    groups: dict[str, list[Term]] = {}
    for term in terms:
        head = term.name.partition(".")[0]
        stage = _stage(term)
        title = TITLES.get(head, REST) if stage is None else f"memory of stage {stage}"
        groups.setdefault(title, []).append(term)
    return list(groups.items())


def label(term: Term) -> str:
    """A term's name without its group and unit: `bubble`, `tokens per s`."""
    name = term.name.rpartition(".")[2]
    if name in NAMES:
        return NAMES[name]
    for unit in ("_bytes", "_s", "_j"):
        if name.endswith(unit) and not name.endswith("_per_s"):
            name = name.removesuffix(unit)
    return name.replace("_", " ")


def shown(name: str, value: float | None, currency: str | None = None) -> str:
    """A term's value in a reader's units, by what its name ends with."""
    if name in SHARES:
        return human.percent(value)
    if name.endswith("_bytes"):
        return human.size(value)
    if name == "money" and value is not None:
        return f"{human.short(value)} {currency or ''}".rstrip()
    if name.endswith("_s") and not name.endswith("_per_s"):
        return human.duration(value)
    if name.endswith("_j"):
        return human.DASH if value is None else f"{human.short(value)}J"
    return human.short(value)


def difference(value: float | None) -> str:
    """`+12.3%`; `0%` only where nothing differs; beyond tenfold `x12`; a dash: not known."""
    if value is None or value == 0:
        return human.DASH if value is None else "0%"
    if abs(value) < 0.0005:
        return "<0.1%"
    if value >= 9:
        return f"x{value + 1:,.0f}"
    return f"{value:+.1%}"


def goodput_lines(found: Audit) -> list[str]:
    """The share of the time held that went into kept steps, and where the rest went."""
    said = found.goodput
    sessions = f"{said.sessions} session{'s' if said.sessions != 1 else ''}"
    if said.held_s is None:
        lines = [f"goodput {human.DASH}: not known when {sessions} began and ended"]
    else:
        lines = [
            f"goodput {human.percent(said.fraction)} of {human.duration(said.held_s)} held in "
            f"{sessions}"
        ]
    for name, seconds in {"kept steps": said.useful_s, **said.badput_s}.items():
        if seconds != 0:
            share = None if seconds is None or not said.held_s else seconds / said.held_s
            lines.append(f"  {name:14} {human.duration(seconds):>9} {human.percent(share):>7}")
    return lines


def calibration(found: Calibrated) -> str:
    """What was corrected, from what, and how far the planner was off before and after."""
    lines = [f"corrections of {found.machine} in {found.precision}, from {found.source}"]
    for name, factor in found.factors.items():
        lines.append(f"  {name:8} x{factor:.3f} of the planner's seconds")
    lines += [f"  {name:8} stays: {why}" for name, why in found.left.items()]
    if found.file is None:
        lines.append("nothing was written: the run tells of no constant")
    else:
        lines.append(f"wrote {found.file}")
    lines += ["", f"{'step time of other layouts':44} {'measured':>9} {'before':>8} {'after':>8}"]
    for each in found.others:
        lines.append(
            f"{each.run + '  ' + each.layout:44} {human.duration(each.measured_s):>9} "
            f"{difference(each.before):>8} {difference(each.after):>8}"
        )
    lines += [f"{name}: left out, {why}" for name, why in found.skipped.items()]
    if found.error_before is not None and found.error_after is not None:
        lines.append(
            f"the planner was off by {found.error_before:.1%} on average before, "
            f"{found.error_after:.1%} after, over {len(found.others)} other runs"
        )
    if len(found.others) < ENOUGH:
        lines.append(
            f"{len(found.others)} other layouts: at least {ENOUGH} are needed to believe a "
            "calibration; train more, or name their folders"
        )
    return "\n".join(lines)


def _stage(term: Term) -> int | None:
    head, _, rest = term.name.partition(".")
    return int(rest.partition(".")[0]) if head == "memory" else None


def _row(term: Term, currency: str | None) -> str:
    values = [shown(term.name, v, currency) for v in (term.planned, term.rehearsed, term.measured)]
    return (
        f"  {label(term):32} {values[0]:>10} {values[1]:>10} {values[2]:>10} "
        f"{difference(term.planned_difference):>8} {difference(term.rehearsed_difference):>8}"
    )


def _sources(terms: list[Term]) -> Iterator[str]:
    """Each source once, of all stages together."""
    said = set()
    for term in terms:
        name = ".".join(part for part in term.name.split(".") if not part.isdecimal())
        name = "flops_by_module" if name.startswith("flops_by_module") else name
        for witness, source in term.sources.items():
            if (name, witness) not in said:
                said.add((name, witness))
                yield f"  {name:28} {WORDS[witness]:9}  {source}"
