"""A plan for people: the table, the explanation, and the run file that follows from it."""

from __future__ import annotations

from ridgeline.errors import PlanError
from ridgeline.human import DASH, duration, percent, short, size
from ridgeline.machine.local import LOCAL, is_local
from ridgeline.plan.ledgers import AXES, CAUSES, PARTS, SOURCES
from ridgeline.plan.plan import Plan, Planned
from ridgeline.plan.question import USABLE, Question
from ridgeline.run import Cluster, Run, make_run

HEAD = (
    f"{'layout':44} {'step':>8} {'80% interval':>19} {'MFU':>6} {'full':>6} {'HFU':>6} "
    f"{'tokens/s':>9} {'days':>8} {'energy':>9} {'money':>10} {'memory':24} bound by"
)


def table(plan: Plan) -> str:
    """Question, ranked layouts, the naive baseline and what was searched."""
    asked = plan.question
    lines = [
        f"{asked.shape.name} on {asked.devices:,} {asked.cluster.device.name} ({asked.cluster.name}"
        f"), batch {asked.global_batch:,} x {asked.sequence:,} tokens, {asked.precision}, "
        f"{'no budget' if asked.tokens is None else f'{short(float(asked.tokens))} tokens'}",
        *(f"assumed: {note}" for note in asked.assumed),
        "",
        HEAD,
    ]
    lines += [row(each) for each in plan.layouts]
    if plan.asked:
        verdict = "" if plan.asked.fits else f", which does not fit {USABLE:.0%} of a device"
        lines += [f"the run's own{verdict}:", row(plan.asked)]
        if not plan.asked.fits:
            over = plan.asked.memory_bytes - USABLE * plan.asked.capacity_bytes
            lines += [f"the nearest to it that fits ({size(over)} less):"]
            lines += [row(plan.asked_fitting) if plan.asked_fitting else "  none on the same mesh"]
    if not any(each.trainable for each in plan.layouts):
        lines += ["the best that this version can train:"]
        lines += [row(plan.best_trainable) if plan.best_trainable else "  none of the best"]
    lines += [
        "",
        f"naive baseline, FLOPs / (0.5 · peak): {_seconds(plan.baseline_s)} a step",
        *(f"totals: {note}" for note in _money_notes(plan)),
        f"searched {plan.space:,} layouts: {plan.arithmetic_ok:,} divide the run, "
        f"{plan.memory_ok:,} of them fit, in {plan.search_s:.2f} s",
        "MFU counts causal attention, `full` the whole square; t: this version can train it",
    ]
    if any(each.extrapolated for each in plan.layouts):
        lines.append(
            "! outside what the planner was calibrated on: see docs/planner.md before believing it"
        )
    return "\n".join(lines)


def row(each: Planned) -> str:
    """One line of the table."""
    marks = ("!" if each.extrapolated else "") + ("t" if each.trainable else "")
    low, high = each.interval_s
    share = each.memory_bytes / each.capacity_bytes
    filled = min(8, round(8 * share))
    bar = "█" * filled + "░" * (8 - filled)
    days = DASH if each.train_s is None else _three_digits(each.train_s / 86400)
    energy = DASH if each.energy_j is None else f"{short(each.energy_j / 3600)}Wh"
    money = DASH if each.money is None else f"{short(each.money)} {each.currency}"
    second = _causes(each)
    return (
        f"{str(each.layout) + ' ' + marks:44} {_seconds(each.step_s):>8} "
        f"{_seconds(low) + ' – ' + _seconds(high):>19} {percent(each.mfu):>6} "
        f"{percent(each.mfu_full_attention):>6} {percent(each.hfu):>6} "
        f"{short(each.tokens_per_s):>9} {days:>8} {energy:>9} {money:>10} "
        f"{bar} {size(each.memory_bytes):>9} {share:4.0%} {second}"
    )


def _seconds(value: float) -> str:
    """A step's time: always in seconds below an hour, so that near ones can be told apart."""
    if not 0.9995 <= value < 3600:
        return duration(value)
    return f"{value:.1f}s" if value >= 99.995 else f"{value:.2f}s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def _money_notes(plan: Plan) -> list[str]:
    """What stands behind the totals: failures counted or not, and what is assumed of the centre."""
    totals = plan.totals
    if totals is None:
        return ["not known without a token budget"]
    if totals.goodput is None:
        return list(totals.notes)
    return [
        f"goodput {percent(totals.goodput)}, a failure every {duration(totals.mtbf_s)}, a "
        f"checkpoint every {duration(totals.checkpoint_interval_s)}",
        *totals.notes,
    ]


def _causes(each: Planned) -> str:
    seconds = {name: getattr(each.ledger.seconds, f"{name}_s") or 0.0 for name in CAUSES}
    top = sorted(seconds, key=lambda name: -seconds[name])[:2]
    return ", ".join(f"{name} {seconds[name] / each.step_s:.0%}" for name in top)


def explain(plan: Plan) -> str:
    """The best layout's ledger term by term, each with its source, and why the next one lost."""
    best = plan.layouts[0]
    fullest = max(best.ledger.memory, key=lambda stage: stage.total_bytes or 0)
    lines = ["", f"why '{best.layout}'", "", "seconds of a step"]
    for name in CAUSES:
        value = getattr(best.ledger.seconds, f"{name}_s")
        if value:
            source = SOURCES[f"seconds.{name}_s"]
            lines.append(f"  {name:12} {duration(value):>9} {value / best.step_s:6.1%}  {source}")
    lines += ["", "memory of the fullest device"]
    for name in PARTS:
        value = getattr(fullest, f"{name}_bytes")
        if value:
            source = SOURCES.get(f"memory.{name}_bytes", "")
            part = value / (fullest.total_bytes or value)
            lines.append(f"  {name:12} {size(value):>9} {part:6.1%}  {source}".rstrip())
    lines += ["", "bytes that a device sends in a step"]
    for name in AXES:
        value = getattr(best.ledger.sent, f"{name}_bytes")
        if value:
            lines.append(f"  {name:12} {size(value):>9}         {SOURCES[f'sent.{name}_bytes']}")
    rival = next((each for each in plan.layouts[1:] if _differs(each, best)), None)
    return "\n".join(lines + (_lost(plan, best, rival) if rival else []))


def _lost(plan: Plan, best: Planned, rival: Planned) -> list[str]:
    """Why the runner-up lost: what it takes more of, and where; the terms add up to the step."""
    more = rival.step_s - best.step_s
    lines = [
        "",
        f"the runner-up, '{rival.layout}', takes {more:+.3g} s a step ({more / best.step_s:+.1%})",
    ]
    if plan.rank == "energy" and best.energy_j and rival.energy_j:
        joules = rival.energy_j - best.energy_j
        lines[-1] += f" and burns {short(joules / 3600)}Wh more ({joules / best.energy_j:+.1%})"
    rest = more
    for name in CAUSES:
        ours = getattr(best.ledger.seconds, f"{name}_s") or 0.0
        theirs = getattr(rival.ledger.seconds, f"{name}_s") or 0.0
        if abs(theirs - ours) > 0.1 * abs(more):
            lines.append(f"  {name:12} {theirs - ours:+9.3g} s")
            rest -= theirs - ours
    if abs(rest) > 0.005 * abs(more):
        lines.append(f"  {'all others':12} {rest:+9.3g} s")
    memory = rival.memory_bytes - best.memory_bytes
    lines.append(f"  {'memory':12} {'+' if memory >= 0 else '-'}{size(abs(memory))}")
    return lines


def _differs(one: Planned, other: Planned) -> bool:
    """Whether more than the ZeRO group or the schedule differs."""
    names = ("data", "context", "tensor", "pipeline", "micro_batch", "interleave", "recompute")
    return any(getattr(one.layout, n) != getattr(other.layout, n) for n in names)


def run_of(plan: Plan, base: Run | None) -> str:
    """A run file with the best layout that this version can train.

    Raises PlanError where it can train none.
    """
    asked, best = plan.question, plan.best_trainable
    if best is None:
        raise PlanError(
            f"a run file for {asked.shape.name} on {asked.devices} devices",
            "of the best layouts that fit, this version can train none",
            "`ridgeline train` with one of them says why; or a plan without --write",
        )
    if base is not None:
        changed = base.model_copy(update={"layout": best.layout, "cluster": _machine(asked)})
        return changed.to_toml()
    budget = {"tokens": asked.tokens} if asked.tokens else {"steps": 1000}
    run = make_run(
        {
            "name": asked.shape.name,
            "model": asked.shape.model_dump(),
            "cluster": _machine(asked).model_dump(),
            "layout": str(best.layout),
            "data": {"sequence": asked.sequence},
            "schedule": {"global_batch": asked.global_batch},
            "budget": budget,
        }
    )
    return run.to_toml()


def _machine(asked: Question) -> Cluster:
    name = asked.cluster.device.name
    return Cluster(device=LOCAL if is_local(name) else name, devices=asked.devices)
