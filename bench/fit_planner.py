"""Fit the planner's calibration to published runs, and say how well it predicts unseen sources.

    python bench/fit_planner.py CASES.csv ... [--write FOLDER] [--left-out] [--folds]

Levenberg-Marquardt in the logarithms of the constants, on predicted over published step time less
one, reweighted towards the mean absolute error; each constant is held near its
start (`PRIOR`) or near that of a device's kin (`KIN`), so that what the rows do not determine
stays where it was.
`--left-out` fits again without each source in turn and prints the error on that source, `--folds`
without a fifth of the rows at a time; `--write`
stores the fit on all rows as the three files of `src/ridgeline/plan/calibration`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ridgeline.machine.device import devices
from ridgeline.plan.block import block
from ridgeline.plan.cases import Case, predict, rates_of_cases, read_cases, task_and_layouts
from ridgeline.plan.certainty import RANGE, UNKNOWN, Certainty
from ridgeline.plan.constants import FILES, Constants, DeviceConstants, constants_from, names_of
from ridgeline.plan.quantities import Array
from ridgeline.plan.step import step

START = Path(__file__).parent / "planner_start"
Key = tuple[str, str, str]
KIN = {
    "A100-SXM-40GB": "A100-SXM-80GB",
    "A100-SXM-64GB": "A100-SXM-80GB",
    "H100-SXM-96GB-HBM2e": "H100-SXM-80GB",
    "H800-SXM-80GB": "H100-SXM-80GB",
    "H200-SXM-141GB": "H100-SXM-80GB",
    "GH200-96GB": "H100-SXM-80GB",
    "GB300": "GB200",
    "B300": "B200-SXM-180GB",
    "V100-SXM2-16GB": "A100-SXM-80GB",
    "V100-SXM3-32GB": "V100-SXM2-16GB",
    "MI325X": "MI300X",
}
PRIOR = {
    "matrix": 0.1, "matrix_8": 0.15, "matrix_4": 0.25, "edge": 0.5, "attention": 0.25,
    "memory": 0.15, "link": 0.25, "port": 0.25, "host": 0.12, "exposed": 0.6, "gather": 0.6,
    "tensor_exposed": 0.5, "traffic": 0.3, "attention_backward": 0.1, "narrow_heads": 0.4,
    "score_bytes": 0.4, "softmax_fallback": 0.2, "head_host": 0.4, "host_growth": 0.5,
    "link_latency": 0.5, "port_latency": 0.5, "compiled": 0.3, "jitter": 0.7,
}  # fmt: skip
"""Standard deviation of the logarithm of each constant about its start, before any row is seen."""
KIN_PRIOR = 0.5
"""Share of that between kin."""
ROW_ERROR = 0.1
"""What a published step time scatters by."""
SINGLE_NODE_WEIGHT = 0.2
"""Of a row that was composed from layer profiles, against one that was timed."""


def keys_of(constants: Constants, rows: list[Case]) -> list[Key]:
    """The constants that are fitted: of the devices and stacks with rows, and the shared ones."""
    devices = sorted({row.cluster.device.name for row in rows})
    keys: list[Key] = [("device", d, n) for d in devices for n in names_of(DeviceConstants)]
    for stack in sorted({row.stack for row in rows}):
        keys += [("stack", stack, n) for n in constants.fitted[f"stack {stack}"]]
    return keys + [("shared", "", n) for n in constants.fitted["shared"]]


def value_of(constants: Constants, key: Key) -> float:
    """One constant."""
    kind, name, field = key
    owner = {"device": constants.devices, "stack": constants.stacks}.get(kind)
    return float(getattr(owner[name] if owner else constants.shared, field))


def with_values(constants: Constants, keys: list[Key], logs: Array) -> Constants:
    """The constants with the fitted ones put in."""
    devices, stacks, shared = dict(constants.devices), dict(constants.stacks), constants.shared
    for (kind, name, field), value in zip(keys, np.exp(logs), strict=True):
        if kind == "device":
            devices[name] = replace(devices[name], **{field: float(value)})
        elif kind == "stack":
            stacks[name] = replace(stacks[name], **{field: float(value)})
        else:
            shared = replace(shared, **{field: float(value)})
    return Constants(devices, stacks, shared, constants.fitted)


def fit(rows: list[Case], start: Constants, rounds: int = 25) -> Constants:
    """The constants that fit the rows best without straying from `start` needlessly."""
    keys = keys_of(start, rows)
    task, layouts = task_and_layouts(rows)
    measured = np.array([row.step_s or np.nan for row in rows])
    weights = np.array([SINGLE_NODE_WEIGHT if row.model == "GPT" else 1.0 for row in rows])
    origin = np.log([value_of(start, key) for key in keys])
    prior = np.array([PRIOR[key[2]] for key in keys])
    index = {key: i for i, key in enumerate(keys)}
    kin = [
        (i, index[kind, KIN[name], field], KIN_PRIOR * PRIOR[field])
        for i, (kind, name, field) in enumerate(keys)
        if name in KIN and (kind, KIN[name], field) in index
    ]
    related = {i for i, _, _ in kin}
    own = np.array([i for i in range(len(keys)) if i not in related])

    def errors(logs: Array) -> Array:
        constants = with_values(start, keys, logs)
        rates = rates_of_cases(rows, constants)
        blocks = block(task, rates, constants.shared, layouts)
        seconds = step(task, rates, constants.shared, layouts, blocks).total
        return np.asarray(seconds / measured - 1, dtype=np.float64)

    def penalties(logs: Array) -> Array:
        between = [(logs[i] - origin[i] - logs[j] + origin[j]) / scale for i, j, scale in kin]
        return np.concatenate([(logs[own] - origin[own]) / prior[own], np.array(between)])

    logs = _marquardt(errors, penalties, weights, origin.copy(), rounds)
    fitted = with_values(start, keys, logs)
    # ours is built on FSDP2 and the same attention, and has no published runs yet
    stacks = {**fitted.stacks, "ridgeline": fitted.stacks["fsdp2"]}
    fitted = replace(fitted, stacks=stacks)
    return _kin_filled(fitted, start, {row.cluster.device.name for row in rows})


def _marquardt(
    errors: Callable[[Array], Array],
    penalties: Callable[[Array], Array],
    weights: Array,
    logs: Array,
    rounds: int,
) -> Array:
    damping, step_size = 1e-2, 1e-4
    scale = weights / ROW_ERROR

    def objective(at: Array) -> float:
        return float(np.sum(scale * np.abs(errors(at)) * 2) + np.sum(penalties(at) ** 2))

    best = objective(logs)
    for _ in range(rounds):
        base, held = errors(logs), penalties(logs)
        # weight 1/|e| turns the squares into absolute values; floored where rows scatter anyway
        root = np.sqrt(scale / np.maximum(np.abs(base), 0.3 * ROW_ERROR))
        rows, priors = [], []
        for i in range(len(logs)):
            moved = logs.copy()
            moved[i] += step_size
            rows.append(root * (errors(moved) - base) / step_size)
            priors.append((penalties(moved) - held) / step_size)
        jacobian = np.concatenate([np.array(rows).T, np.array(priors).T])
        residual = np.concatenate([root * base, held])
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ residual
        for _ in range(6):
            change = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
            trial = logs + np.clip(change, -0.5, 0.5)
            value = objective(trial)
            if value < best:
                gain, best, logs, damping = best - value, value, trial, damping / 3
                break
            damping *= 4
        else:
            break
        if gain < 1e-4 * best:
            break
    return logs


def _kin_filled(fitted: Constants, start: Constants, seen: set[str]) -> Constants:
    """Devices without rows move with their kin."""
    devices = dict(fitted.devices)
    for name in devices:
        kin, chain = name, [name]
        while kin not in seen and kin in KIN:
            kin = KIN[kin]
            chain.append(kin)
        if kin in seen and name not in seen:
            moved = {
                field: getattr(start.devices[name], field)
                * getattr(fitted.devices[kin], field)
                / getattr(start.devices[kin], field)
                for field in names_of(DeviceConstants)
            }
            devices[name] = DeviceConstants(**moved)
    return replace(fitted, devices=devices)


def family(source: str) -> str:
    """A source's name without the page or table: what is left out together."""
    return source.split(" README")[0].split(" Table")[0].split(" scripts")[0].split(" (")[0][:45]


def report(title: str, rows: list[Case], seconds: Array) -> None:
    """Errors by source and in all, 16-bit and narrower apart."""
    print(f"\n{title}")
    measured = np.array([row.step_s for row in rows], dtype=float)
    error = seconds / measured - 1
    wide = np.array([row.precision in ("bf16", "fp16") for row in rows])
    single = np.array([row.model == "GPT" for row in rows])
    sources = np.array([family(row.source) + ("" if w else " [8/4 bit]") for row, w in
                        zip(rows, wide, strict=True)])  # fmt: skip
    groups = [(name, sources == name) for name in sorted(set(sources))]
    groups += [("ALL 16-bit cases", wide & ~single), ("ALL fp8, fp4", ~wide)]
    print(f"{'source':58} {'rows':>5} {'MAPE':>7} {'median':>7} {'bias':>7}")
    for name, mask in groups:
        if mask.any():
            e = error[mask]
            print(f"{name:58} {mask.sum():5d} {np.abs(e).mean():7.1%} "
                  f"{np.median(np.abs(e)):7.1%} {e.mean():+7.1%}")  # fmt: skip


def write(constants: Constants, rows: list[Case], folder: Path) -> None:
    """The three files of the calibration, fitted numbers apart from assumed ones."""
    seen = {row.cluster.device.name for row in rows}
    lines = [HEADER]
    for name, device in constants.devices.items():
        origin = "fitted" if name in seen else "assumed"
        lines += [f'["{name}".{origin}]', *_lines(device.__dict__), ""]
    (folder / "devices.toml").write_text("\n".join(lines), encoding="utf-8")
    lines = [HEADER]
    for name, stack in constants.stacks.items():
        free = constants.fitted[f"stack {name}"]
        values = stack.__dict__
        if free:
            lines += [f"[{name}.fitted]", *_lines({k: values[k] for k in free}), ""]
        rest = {k: v for k, v in values.items() if k not in free}
        lines += [f"[{name}.assumed]", *_lines(rest), ""]
    (folder / "stacks.toml").write_text("\n".join(lines), encoding="utf-8")
    free = constants.fitted["shared"]
    values = constants.shared.__dict__
    lines = [HEADER, "[fitted]", *_lines({k: values[k] for k in free}), "", "[assumed]"]
    lines += _lines({k: v for k, v in values.items() if k not in free})
    (folder / "shared.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


HEADER = """\
# Written by bench/fit_planner.py. `fitted`: on published step times; `assumed`: determined by
# none of them, kept at the start of the fit or moved with the device's kin. Effective numbers of
# this planner's formulas, not facts about hardware; their meaning stands in plan/constants.py.
"""


def in_folds(rows: list[Case], start: Constants, rounds: int, folds: int = 5) -> Array:
    """Every row predicted by a fit on the other folds; rows are dealt out at random, seed 0."""
    fold = np.random.default_rng(0).permutation(len(rows)) % folds
    seconds = np.zeros(len(rows))
    for each in range(folds):
        inside = [row for row, f in zip(rows, fold, strict=True) if f != each]
        apart = [row for row, f in zip(rows, fold, strict=True) if f == each]
        seconds[fold == each] = predict(apart, fit(inside, start, rounds)).total
    return seconds


def evidence(rows: list[Case]) -> Certainty:
    """What the rows calibrate: per device the range and the precisions; no half-widths yet."""
    ranges, precisions = {}, {}
    for name in sorted({row.cluster.device.name for row in rows}):
        own = [row for row in rows if row.cluster.device.name == name]
        # a pipeline of 16 is one on any device; a job of 10,000 needs its own network
        ranges[name] = {
            size: max(
                r.devices if size == "devices" else r.numbers[size]
                for r in (own if size in ("devices", "sequence") else rows)
            )
            for size in RANGE
        }
        kinds = {"fp16" if row.precision == "bf16" else row.precision for row in own}
        precisions[name] = tuple(sorted(kinds))
    kin = {
        name: tuple(k for k in ranges if k != name and devices()[k].peak_flops.get("fp16") == peak)
        for name, one in devices().items()
        if (peak := one.peak_flops.get("fp16"))
    }
    return Certainty({}, ranges, precisions, {name: ks for name, ks in kin.items() if ks})


def stretches(rows: list[Case], families: Array) -> Array:
    """What each row's interval would be multiplied by had its source not been fitted."""
    found = np.zeros(len(rows))
    for name in sorted(set(families)):
        known = evidence([row for row, f in zip(rows, families, strict=True) if f != name])
        for i in np.flatnonzero(families == name):
            numbers = rows[i].numbers | {"devices": float(rows[i].devices)}
            sizes = {size: np.array(numbers[size]) for size in RANGE}
            device = rows[i].cluster.device.name
            found[i] = known.stretch(device, rows[i].precision, sizes)
    return found


def half_widths(rows: list[Case], seconds: Array, stretch: Array) -> dict[str, float]:
    """The 80% quantile of the absolute error, in logarithms and over its stretch, by class of row.

    Sources count equally within a class; a class of few sources is drawn to the quantile of all.
    """
    error = np.abs(np.log(seconds / np.array([row.step_s for row in rows], dtype=float))) / stretch
    classes = np.array([class_of(row) for row in rows])
    families = np.array([family(row.source) for row in rows])
    every = _quantile(error, families)
    widths = {"all": every}
    for name in sorted(set(classes)):
        mask = classes == name
        own, sources = _quantile(error[mask], families[mask]), len(set(families[mask]))
        widths[name] = float(np.exp((sources * np.log(own) + np.log(every)) / (sources + 1)))
    return widths


def _quantile(error: Array, families: Array) -> float:
    """The 80% quantile where every source weighs the square root of its rows.

    Of n sources a new one lies within the 0.8·(n + 1)/n quantile four times in five (split
    conformal prediction, arXiv:1604.04173); of a few there is no such quantile.
    """
    count = {name: int(np.sum(families == name)) for name in set(families)}
    weight = np.array([count[name] ** -0.5 for name in families])
    order = np.argsort(error)
    share = np.cumsum(weight[order]) / weight.sum()
    level = 0.8 * (len(count) + 1) / len(count) if len(count) > 6 else 0.8
    return float(error[order][min(int(np.searchsorted(share, level)), len(error) - 1)])


def class_of(row: Case) -> str:
    """The class of `plan.certainty` that a row belongs to."""
    return f"{row.stack} {'wide' if row.precision in ('bf16', 'fp16') else 'narrow'}"


def coverage(rows: list[Case], families: Array, seconds: Array) -> None:
    """Share of unseen rows within intervals that were drawn from the other sources alone."""
    measured = np.array([row.step_s for row in rows], dtype=float)
    inside, half, error = np.zeros(len(rows)), np.zeros(len(rows)), np.abs(seconds / measured - 1)
    stretch = stretches(rows, families)
    for name in sorted(set(families)):
        others = families != name
        apart = [row for row, o in zip(rows, others, strict=True) if o]
        widths = half_widths(apart, seconds[others], stretch[others])
        for i in np.flatnonzero(~others):
            half[i] = widths.get(class_of(rows[i]), widths["all"]) * stretch[i]
            inside[i] = abs(np.log(seconds[i] / measured[i])) <= half[i]
    wide = np.array([row.precision in ("bf16", "fp16") for row in rows])
    single = np.array([row.model == "GPT" for row in rows])
    for title, mask in (("16-bit", wide & ~single), ("fp8, fp4", ~wide), ("one node", single)):
        near = mask & (stretch < UNKNOWN)
        print(
            f"80% interval, {title}: covers {inside[mask].mean():.1%}, median half-width "
            f"{np.median(half[mask]):.1%}, MAPE {error[mask].mean():.1%}; where the device, or one "
            f"of its peak, was in the fit ({near.sum()} rows): {inside[near].mean():.1%}, "
            f"{np.median(half[near]):.1%}, {error[near].mean():.1%}"
        )


def write_certainty(known: Certainty, widths: dict[str, float], folder: Path) -> None:
    """calibration/certainty.toml: intervals, the range that the rows span, and devices alike."""
    lines = [HEADER, "[half_width]", *(f'"{k}" = {v:.4g}' for k, v in widths.items()), "", "[kin]"]
    lines += [f'"{name}" = {json.dumps(names)}' for name, names in known.kin.items()] + [""]
    for name, sizes in known.ranges.items():
        lines += [f'[range."{name}"]', *(f"{size} = {most:g}" for size, most in sizes.items())]
        lines += [f"precisions = {json.dumps(known.precisions[name])}", ""]
    (folder / "certainty.toml").write_text("\n".join(lines), encoding="utf-8")


def _lines(values: dict[str, float]) -> list[str]:
    return [f"{name} = {value:.4g}" for name, value in values.items()]


def main() -> None:
    """Fit, report, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--left-out", action="store_true")
    parser.add_argument("--folds", action="store_true")
    parser.add_argument("--rounds", type=int, default=25)
    asked = parser.parse_args()
    start = constants_from({n: (START / f"{n}.toml").read_text() for n in FILES})
    read = read_cases(asked.cases, start)
    # a run that two files tell of counts once
    rows = list({row.id: row for row in read.rows if row.step_s}.values())
    print(f"{len(rows)} rows with a step time, {len(read.skipped)} skipped")
    fitted = fit(rows, start, asked.rounds)
    report("in the fit", rows, predict(rows, fitted).total)
    if asked.write:
        write(fitted, rows, asked.write)
    if asked.folds:
        report("a fifth of the rows left out at a time", rows, in_folds(rows, start, asked.rounds))
    if asked.left_out:
        left_out = np.zeros(len(rows))
        families = np.array([family(row.source) for row in rows])
        for name in sorted(set(families)):
            inside = [row for row, f in zip(rows, families, strict=True) if f != name]
            constants = fit(inside, start, asked.rounds)
            apart = [row for row, f in zip(rows, families, strict=True) if f == name]
            left_out[families == name] = predict(apart, constants).total
        report("each source left out", rows, left_out)
        coverage(rows, families, left_out)
        if asked.write:
            widths = half_widths(rows, left_out, stretches(rows, families))
            write_certainty(evidence(rows), widths, asked.write)


if __name__ == "__main__":
    main()
