"""A validation for people."""

from __future__ import annotations

from typing import Any

from ridgeline.human import DASH, duration
from ridgeline.plan.validate import Outcome, Validation, summary

HEAD = (
    f"{'':58} {'rows':>5} {'MAPE':>7} {'median':>7} {'bias':>7} {'naive':>7} {'in 80%':>7} "
    f"{'rank':>6} {'regret':>6}"
)


def table(found: Validation, with_rows: bool = False) -> str:
    """Errors by source, by tier and in all; every row on a line of its own if asked."""
    figures = summary(found)
    lines = [_row(each) for each in found.outcomes] + [""] if with_rows else []
    lines.append(HEAD)
    for title, group in (("", "by_source"), ("tier ", "by_tier")):
        for name, scores in figures[group].items():
            lines += _lines(title + name, scores)
    wide = sum(not each.narrow for each in found.outcomes)
    lines += ["", _line("all 16-bit rows", wide, figures)]
    if wide < len(found.outcomes):
        lines.append(_line("all 8- and 4-bit rows", len(found.outcomes) - wide, figures["narrow"]))
    lines += [
        "rank: Spearman's correlation of predicted and published times; regret: how much slower "
        "the layout picked is",
        "than the best measured, in groups of four or more layouts; naive: MAPE of FLOPs over half "
        "the peak",
        "",
        f"pairs of layouts in order {_percent(figures['pairs_ordered'])}, over "
        f"{figures['regret_groups']} choices; memory off by {_percent(figures['memory_mape'])}",
        f"{figures['rows']} rows, {figures['predicted']} predicted, "
        f"{len(found.skipped)} skipped" + (":" if found.skipped else ""),
        *(f"  {name}: {why}" for name, why in found.skipped),
    ]
    return "\n".join(lines)


def _lines(name: str, scores: dict[str, Any]) -> list[str]:
    lines = []
    if scores["mape"] is not None:
        lines.append(_line(name, scores["scored"], scores))
    if scores["narrow"]["mape"] is not None:
        lines.append(
            _line(f"{name[:44]} [8, 4 bits]", scores["narrow"]["scored"], scores["narrow"])
        )
    return lines


def _line(name: str, rows: int, scores: dict[str, Any]) -> str:
    figures = " ".join(
        f"{_percent(scores[key]):>7}"
        for key in ("mape", "median", "bias", "baseline_mape", "coverage")
    )
    rank = f"{_plain(scores['spearman'])[:6]:>6} {_percent(scores['regret']):>6}"
    return f"{name[:58]:58} {rows:5d} {figures} {rank}"


def _row(each: Outcome) -> str:
    mark = " !" if each.extrapolated else ""
    assumed = f"; assumed {', '.join(each.case.assumed)}" if each.case.assumed else ""
    return (
        f"{each.case.id:44} published {duration(each.step_s):>8} predicted "
        f"{duration(each.predicted_s):>8} {each.error:+7.1%} (naive "
        f"{each.baseline_s / each.step_s - 1:+.0%}){mark}{assumed}"
    )


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def _plain(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"
