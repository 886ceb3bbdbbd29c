"""A plan for people: the table, the explanation, and the run file that follows from it."""

from __future__ import annotations

from ridgeline.errors import PlanError
from ridgeline.human import DASH, duration, percent, short, size
from ridgeline.machine.local import LOCAL, is_local
from ridgeline.plan.ledgers import CAUSES
from ridgeline.plan.plan import USABLE, Plan, Planned, Question
from ridgeline.run import Cluster, Run, make_run

HEAD = (
    f"{'layout':44} {'step':>8} {'80% interval':>17} {'MFU':>6} {'full':>6} {'HFU':>6} "
    f"{'tokens/s':>9} {'days':>8} {'energy':>9} {'money':>10} {'memory':24} bound by"
)


def table(plan: Plan) -> str:
    """Question, ranked layouts, the naive baseline and what was searched."""
    asked = plan.question
    lines = [
        f"{asked.shape.name} on {asked.devices:,} {asked.cluster.device.name} ({asked.cluster.name}"
        f"), batch {asked.global_batch:,} x {asked.sequence:,} tokens, {asked.precision}, "
        f"{'no budget' if asked.tokens is None else f'{short(float(asked.tokens))} tokens'}",
        *(f"assumed: {note}" for note in asked.notes),
        "",
        HEAD,
    ]
    lines += [row(each) for each in plan.layouts]
    if plan.asked:
        verdict = "" if plan.asked.fits else f", which does not fit {USABLE:.0%} of a device"
        lines += [f"the run's own{verdict}:", row(plan.asked)]
    lines += ["the best that this version can train:"]
    lines += [row(plan.best_trainable) if plan.best_trainable else "  none fits"]
    lines += [
        "",
        f"naive baseline, FLOPs / (0.5 · peak): {duration(plan.baseline_s)} a step",
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
    days = DASH if each.train_s is None else f"{each.train_s / 86400:,.1f}"
    energy = DASH if each.energy_j is None else f"{short(each.energy_j / 3600)}Wh"
    money = DASH if each.money is None else f"{short(each.money)} {each.currency}"
    second = _causes(each)
    return (
        f"{str(each.layout) + ' ' + marks:44} {duration(each.step_s):>8} "
        f"{duration(low) + ' – ' + duration(high):>17} {percent(each.mfu):>6} "
        f"{percent(each.mfu_full_attention):>6} {percent(each.hfu):>6} "
        f"{short(each.tokens_per_s):>9} {days:>8} {energy:>9} {money:>10} "
        f"{bar} {size(each.memory_bytes):>9} {share:4.0%} {second}"
    )


def _causes(each: Planned) -> str:
    seconds = {name: getattr(each.ledger.seconds, f"{name}_s") or 0.0 for name in CAUSES}
    top = sorted(seconds, key=lambda name: -seconds[name])[:2]
    return ", ".join(f"{name} {seconds[name] / each.step_s:.0%}" for name in top)


def explain(plan: Plan) -> str:
    """The best layout's ledger term by term, and why the next different one lost."""
    best = plan.layouts[0]
    lines = ["", f"why '{best.layout}'", "", "seconds of a step"]
    for name in CAUSES:
        value = getattr(best.ledger.seconds, f"{name}_s")
        if value:
            lines.append(f"  {name:12} {duration(value):>9} {value / best.step_s:6.1%}")
    lines += ["", "memory of the fullest device"]
    fullest = max(best.ledger.memory, key=lambda stage: stage.total_bytes or 0)
    for name, value in fullest:
        if value:
            lines.append(f"  {name.removesuffix('_bytes'):12} {size(value):>9}")
    rival = next((each for each in plan.layouts[1:] if _differs(each, best)), None)
    if rival:
        lines += ["", f"the runner-up, '{rival.layout}', takes {rival.step_s - best.step_s:+.3g} s"]
        for name in CAUSES:
            ours = getattr(best.ledger.seconds, f"{name}_s") or 0.0
            theirs = getattr(rival.ledger.seconds, f"{name}_s") or 0.0
            if abs(theirs - ours) > 0.002 * best.step_s:
                lines.append(f"  {name:12} {theirs - ours:+9.3g} s")
    return "\n".join(lines)


def _differs(one: Planned, other: Planned) -> bool:
    """Whether more than the ZeRO group or the schedule differs."""
    names = ("data", "context", "tensor", "pipeline", "micro_batch", "interleave", "recompute")
    return any(getattr(one.layout, n) != getattr(other.layout, n) for n in names)


def run_of(plan: Plan, base: Run | None) -> str:
    """A run file with the best layout that this version can train.

    Raises PlanError where none fits.
    """
    asked, best = plan.question, plan.best_trainable
    if best is None:
        raise PlanError(
            f"a run file for {asked.shape.name} on {asked.devices} devices",
            "of the layouts that fit, this version can train none: it has dp and mb only",
            "a smaller model, or a plan without --write",
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
