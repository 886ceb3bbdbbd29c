"""Predictions beside published runs: error, bias, ranking, regret, memory and coverage.

Rows in 8 and 4 bits are scored apart. The naive baseline that stands beside every figure is the
run's model FLOPs (recomputation left out) over half the peak.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.plan.cases import Case, predict, predict_memory, read_cases
from ridgeline.plan.certainty import Certainty, certainty
from ridgeline.plan.constants import NARROW, Constants, calibration, peak
from ridgeline.plan.memory import FRAGMENTATION
from ridgeline.plan.quantities import Array

NAIVE_SHARE = 0.5


@dataclass(frozen=True)
class Outcome:
    """One row with a step time, predicted."""

    case: Case
    step_s: float
    predicted_s: float
    interval_s: tuple[float, float]
    baseline_s: float
    memory_bytes: float
    """Predicted, of one device, without what the allocator does not report: what it has reserved,
    or where the row says so, what is allocated of it."""
    extrapolated: bool

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted_s / self.step_s - 1

    @property
    def narrow(self) -> bool:
        """Whether the matrix products are in fewer than 16 bits."""
        return self.case.precision in NARROW


@dataclass(frozen=True)
class Validation:
    """All rows of some files."""

    rows: int
    outcomes: list[Outcome]
    skipped: list[tuple[str, str]]


def validate(
    paths: list[Path], known: Constants | None = None, sure: Certainty | None = None
) -> Validation:
    """Predict every row of the CSV files that has a step time.

    Raises SourceError for a file that cannot be read. Rows that cannot be expressed, or that have
    no step time, are listed in `skipped` with the reason.
    """
    known, sure = known or calibration(), sure or certainty()
    cases = read_cases(paths, known)
    rows = [row for row in cases.rows if row.step_s]
    untimed = [(row.id, "no step time to compare with") for row in cases.rows if not row.step_s]
    skipped = cases.skipped + untimed
    outcomes = _outcomes(rows, known, sure) if rows else []
    return Validation(len(rows) + len(skipped), outcomes, skipped)


def _outcomes(rows: list[Case], known: Constants, sure: Certainty) -> list[Outcome]:
    seconds = predict(rows, known).total
    table = predict_memory(rows, known)
    used = table.total - table.framework
    reserved = used * (1 + FRAGMENTATION)
    found = []
    for row, predicted, tight, loose in zip(rows, seconds, used, reserved, strict=True):
        sizes = {name: np.array(row.numbers[name]) for name in ("sequence", "tensor", "pipeline")}
        sizes["devices"] = np.array(float(row.devices))
        stretch = sure.stretch(row.cluster.device.name, row.precision, sizes)
        low, high = sure.interval(predicted, row.stack, row.precision, stretch)
        found.append(
            Outcome(
                case=row,
                step_s=float(row.step_s or np.nan),
                predicted_s=float(predicted),
                interval_s=(float(low), float(high)),
                baseline_s=model_flops(row) / row.devices / NAIVE_SHARE
                / peak(row.cluster, row.precision),
                memory_bytes=float(tight if row.allocated else loose),
                extrapolated=bool(stretch > 1),
            )
        )  # fmt: skip
    return found


def model_flops(case: Case) -> float:
    """Model FLOPs of one step, attention over the full square as most papers count it."""
    n = case.numbers
    width = n["heads"] * n["head_dim"]
    attention = 2 * n["hidden"] * (width + n["kv_heads"] * n["head_dim"])
    dense = n["dense_layers"] * n["ffn"]
    routed = (n["layers"] - n["dense_layers"]) * n["top_k"] * n["expert_ffn"]
    mlp = n["mlp_matrices"] * n["hidden"] * (dense + routed)
    matrices = n["layers"] * attention + mlp + n["vocab"] * n["hidden"]
    scores = 4 * n["layers"] * n["sequence"] * width
    return float(3 * n["global_batch"] * n["sequence"] * (2 * matrices + scores))


def summary(validation: Validation) -> dict[str, Any]:
    """The figures of `ridgeline validate --json`; fractions, None where nothing could be computed.

    The headline counts the 16-bit rows; `narrow` those in 8 and 4 bits.
    """
    wide = [each for each in validation.outcomes if not each.narrow]
    narrow = [each for each in validation.outcomes if each.narrow]
    return {
        "rows": validation.rows,
        "predicted": len(validation.outcomes),
        "skipped": [{"id": name, "why": why} for name, why in validation.skipped],
        **_scores(wide),
        "narrow": _scores(narrow),
        "by_source": _by(validation.outcomes, "source"),
        "by_tier": _by(validation.outcomes, "tier"),
        "cases": [_row(each) for each in validation.outcomes],
    }


def _scores(outcomes: list[Outcome]) -> dict[str, Any]:
    errors = np.array([each.error for each in outcomes])
    baseline = np.array([each.baseline_s / each.step_s - 1 for each in outcomes])
    memories = np.array(
        [
            each.memory_bytes / each.case.memory_bytes - 1
            for each in outcomes
            if each.case.memory_bytes
        ]
    )
    inside = np.array(
        [each.interval_s[0] <= each.step_s <= each.interval_s[1] for each in outcomes], dtype=float
    )
    regrets, pairs = _choices(outcomes)
    return {
        "scored": len(outcomes),
        "mape": _mean(np.abs(errors)),
        "median": _median(np.abs(errors)),
        "bias": _mean(errors),
        "baseline_mape": _mean(np.abs(baseline)),
        "spearman": _spearman(outcomes),
        "regret": _mean(np.array(regrets)),
        "regret_groups": len(regrets),
        "pairs_ordered": _mean(np.array(pairs)),
        "memory_mape": _mean(np.abs(memories)),
        "coverage": _mean(inside),
    }


def _by(outcomes: list[Outcome], name: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        groups[getattr(each.case, name)].append(each)
    table = {}
    for key, members in sorted(groups.items()):
        wide = [each for each in members if not each.narrow]
        narrow = [each for each in members if each.narrow]
        table[key] = {"rows": len(members), **_scores(wide), "narrow": _scores(narrow)}
    return table


def _row(each: Outcome) -> dict[str, Any]:
    return {
        "id": each.case.id,
        "source": each.case.source,
        "tier": each.case.tier,
        "precision": each.case.precision,
        "step_s": each.step_s,
        "predicted_s": each.predicted_s,
        "error": each.error,
        "interval_s": list(each.interval_s),
        "baseline_s": each.baseline_s,
        "memory_bytes": each.case.memory_bytes,
        "predicted_memory_bytes": each.memory_bytes,
        "extrapolated": each.extrapolated,
        "stack": each.case.stack,
        "assumed": list(each.case.assumed),
    }


def _choices(outcomes: list[Outcome]) -> tuple[list[float], list[float]]:
    """Regret of each group of four or more layouts, and for each pair whether it is in order."""
    groups: dict[tuple[object, ...], list[Outcome]] = defaultdict(list)
    for each in outcomes:
        n = each.case.numbers
        same = ("layers", "hidden", "heads", "sequence", "global_batch")
        key = (each.case.source, each.case.devices, each.case.precision, each.case.compiled)
        groups[key + tuple(n[name] for name in same)].append(each)
    regrets, pairs = [], []
    for members in groups.values():
        if len(members) < 4:
            continue
        picked = min(members, key=lambda each: each.predicted_s)
        regrets.append(picked.step_s / min(each.step_s for each in members) - 1)
        for i, one in enumerate(members):
            pairs += [
                float((one.step_s < two.step_s) == (one.predicted_s < two.predicted_s))
                for two in members[i + 1 :]
                if one.step_s != two.step_s
            ]
    return regrets, pairs


def _spearman(outcomes: list[Outcome]) -> float | None:
    """Rank correlation of predicted and published step times, ties in the mean of their ranks."""
    if len(outcomes) < 3:
        return None
    ranks = [
        _ranks(np.array(values))
        for values in zip(*((each.step_s, each.predicted_s) for each in outcomes), strict=True)
    ]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _ranks(values: Array) -> Array:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[where], dtype=np.float64)


def _mean(values: Array) -> float | None:
    return float(values.mean()) if values.size else None


def _median(values: Array) -> float | None:
    return float(np.median(values)) if values.size else None
