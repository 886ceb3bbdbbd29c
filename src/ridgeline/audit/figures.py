"""The figures of a report: each takes a History and returns a Chart, or None without data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ridgeline import human
from ridgeline.audit.history import Evaluation, History, LoggedStep, number
from ridgeline.audit.plots import (
    Chart,
    FloatArray,
    Reference,
    Series,
    keep_extremes,
    share_bar,
)

TRAIN, HELD_OUT = 0, 1  # the tones of the two losses, wherever they are drawn
TONES = 8  # colours in report.css; a ninth curve takes the first again
FEW = 40  # logged steps, below which there is nothing to smooth
OTHER = "other"  # the part of a step that no phase accounts for


def column(steps: list[LoggedStep], measure: Callable[[LoggedStep], float | None]) -> FloatArray:
    """One measure over the logged steps [N]; NaN where it is not known or not finite."""
    values = [np.nan if (v := measure(s)) is None else v for s in steps]
    array = np.array(values, dtype=np.float64)
    array[~np.isfinite(array)] = np.nan
    return array


def step_axis(records: list[LoggedStep] | list[Evaluation]) -> FloatArray:
    """The step of each record [N]."""
    return np.array([r.step for r in records], dtype=np.float64)


def smoothed(values: FloatArray) -> FloatArray:
    """Centred mean over 2% of the points [N], or over up to 9 of a few hundred.

    NaN stays out of the mean and stays NaN itself.
    Near the first point, where a loss is steep, the window narrows on both sides so that it does
    not lag; near the last, where it is flat, only what is not there yet is missing.
    """
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    i = np.arange(len(values))
    half = np.minimum(i, max(len(values) // 100, min(len(values) // FEW, 4)))
    low, high = i - half, np.minimum(i + half + 1, len(values))
    mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return np.where(known, mean, np.nan)


def baselines(history: History) -> dict[str, float]:
    """Held-out losses that a run must beat, in nats per token, under the names readers know."""
    said = history.latest("baselines")
    keys = {"unigram entropy": "unigram_entropy", "bigram model": "bigram_held_out_loss"}
    levels = (
        {name: number(said.get(key)) for name, key in keys.items()}
        if isinstance(said, dict)
        else {}
    )
    return {name: level for name, level in levels.items() if level is not None}


def charts(history: History) -> list[Chart]:
    """Every figure that the records can fill, in reading order."""
    drawn = (loss, held_out_by_corpus, learning_rate, gradient_norm, throughput, memory, step_time)
    return [chart for draw in drawn if (chart := draw(history)) is not None]


def loss(history: History) -> Chart | None:
    x, raw = step_axis(history.steps), column(history.steps, lambda s: s.loss)
    evaluations = [e for e in history.evaluations if _finite(e.held_out_loss)]
    held_out = np.array([e.held_out_loss for e in evaluations], dtype=np.float64)
    if not (np.isfinite(raw).any() or len(held_out)):
        return None
    smooth = smoothed(raw)
    kept = keep_extremes(x, raw)
    series = [Series("train", x[kept], raw[kept], TRAIN, "faint" if len(x) >= FEW else "line")]
    if len(x) >= FEW:
        series.append(Series("train, smoothed", x[kept], smooth[kept], TRAIN))
    sentence = ""
    if (known := smooth[np.isfinite(smooth)]).size:
        sentence = f"Training loss went from {known[0]:.2f} to {known[-1]:.2f}"
    levels = baselines(history)
    if len(held_out):
        at = step_axis(evaluations)
        some = keep_extremes(at, held_out)
        series.append(Series("held-out", at[some], held_out[some], HELD_OUT, "points"))
        sentence += "; held-out" if sentence else "Held-out"
        sentence += f" loss ends at {held_out[-1]:.2f}" + below(held_out[-1], levels)
    references = [Reference(name, level) for name, level in levels.items() if _finite(level)]
    return Chart(
        "Loss",
        "nats per token",
        sentence + ".",
        series,
        human.fixed,
        references,
        from_zero=False,
        wide=True,
    )


def below(held_out: float, levels: dict[str, float]) -> str:
    """', 2.75 below the unigram entropy and 0.85 below the bigram model', or nothing."""
    parts = [
        f"{abs(level - held_out):.2f} {'below' if held_out <= level else 'above'} the {name}"
        for name, level in levels.items()
    ]
    return ", " + " and ".join(parts) if parts else ""


def held_out_by_corpus(history: History) -> Chart | None:
    corpora = sorted({name for e in history.evaluations for name in e.held_out})
    if len(corpora) < 2:
        return None
    x = step_axis(history.evaluations)
    nan = float("nan")
    curves = [np.array([e.held_out.get(c, nan) for e in history.evaluations]) for c in corpora]
    kept = keep_extremes(x, *curves)
    series = [
        Series(name, x[kept], curve[kept], (HELD_OUT + i) % TONES, "points")
        for i, (name, curve) in enumerate(zip(corpora, curves, strict=True))
    ]
    last = history.evaluations[-1].held_out
    ranked = sorted((v, k) for k, v in last.items() if _finite(v))
    sentence = "Held-out loss of each corpus."
    if len(ranked) > 1:
        (low, easiest), (high, hardest) = ranked[0], ranked[-1]
        sentence = (
            f"Of the corpora, {easiest} ends lowest at {low:.2f}, {hardest} highest at {high:.2f}."
        )
    title = "Held-out loss by corpus"
    return Chart(title, "nats per token", sentence, series, human.fixed, from_zero=False, wide=True)


def learning_rate(history: History) -> Chart | None:
    def sentence(x: FloatArray, y: FloatArray) -> str:
        top = int(np.argmax(y))
        text = f"Peaks at {human.scientific(y[top])} at step {human.integer(x[top])}"
        text += f" and ends at {human.scientific(y[-1])}." if y[-1] < y[top] else "."
        return text.replace("e-", "e\N{NON-BREAKING HYPHEN}")  # a number is not to be wrapped

    return _simple(history, "Learning rate", "", lambda s: s.lr, human.scientific, sentence, tone=6)


def gradient_norm(history: History) -> Chart | None:
    def sentence(x: FloatArray, y: FloatArray) -> str:
        top, middle = int(np.argmax(y)), float(np.median(y))
        at = human.integer(x[top])
        return f"Median {human.fixed(middle, 2)}; the largest, {y[top]:.2f}, came at step {at}."

    show = human.fixed
    return _simple(history, "Gradient norm", "", lambda s: s.grad_norm, show, sentence, tone=3)


def throughput(history: History) -> Chart | None:
    def sentence(x: FloatArray, y: FloatArray) -> str:
        low, middle = int(np.argmin(y)), human.short(float(np.median(y)))
        at = human.integer(x[low])
        return f"Median {middle} tokens/s; slowest, {human.short(y[low])}, at step {at}."

    def measure(step: LoggedStep) -> float | None:
        return step.tokens_per_s

    return _simple(history, "Throughput", "tokens/s", measure, human.short, sentence, tone=2)


def memory(history: History) -> Chart | None:
    unit_bytes, unit = 2.0**30, "GiB"
    if max((s.memory_bytes or 0.0 for s in history.steps), default=0.0) < 2**30:
        unit_bytes, unit = 2.0**20, "MiB"

    def sentence(x: FloatArray, y: FloatArray) -> str:
        top = int(np.argmax(y))
        size = human.size(y[top] * unit_bytes)
        return f"At most {size} on rank 0, first seen at step {human.integer(x[top])}."

    def measure(step: LoggedStep) -> float | None:
        return None if step.memory_bytes is None else step.memory_bytes / unit_bytes

    def show(value: float) -> str:
        return human.size(value * unit_bytes)

    return _simple(history, "Memory", unit, measure, show, sentence, tone=4)


def _simple(
    history: History,
    title: str,
    unit: str,
    measure: Callable[[LoggedStep], float | None],
    show: Callable[[float], str],
    sentence: Callable[[FloatArray, FloatArray], str],
    tone: int,
) -> Chart | None:
    """One measure over steps; the sentence is made from its finite points."""
    x, y = step_axis(history.steps), column(history.steps, measure)
    known = np.isfinite(y)
    if not known.any():
        return None
    kept = keep_extremes(x, y)
    series = [Series(title.lower(), x[kept], y[kept], tone)]
    return Chart(title, unit, sentence(x[known], y[known]), series, show)


def step_time(history: History) -> Chart | None:
    """Mean seconds per step by phase, stacked; what no phase explains is 'other'."""
    steps = [s for s in history.steps if s.seconds]
    if not steps:
        return None
    names = list(dict.fromkeys(name for s in steps for name in s.seconds))
    phases = {n: np.array([s.seconds.get(n, 0.0) for s in steps]) for n in names}
    phases = {n: np.maximum(np.nan_to_num(seconds), 0.0) for n, seconds in phases.items()}
    explained = np.sum(list(phases.values()), axis=0)
    whole = np.nan_to_num(column(steps, lambda s: s.step_s))
    rest = np.maximum(whole - explained, 0.0)
    weight = np.array([max(s.steps_covered, 1) for s in steps], dtype=np.float64)
    if (rest @ weight) > 0.005 * (whole @ weight):
        phases[OTHER] = phases.get(OTHER, 0.0) + rest
    spent = {name: float(seconds @ weight) for name, seconds in phases.items()}
    total = sum(spent.values())
    if total <= 0:
        return None
    ranked = sorted(spent.items(), key=lambda part: -part[1])
    tones = {name: i % TONES for i, (name, _) in enumerate(ranked)}  # the calmest to the largest
    shares = {name: seconds / total for name, seconds in spent.items()}
    x = step_axis(steps)
    kept = keep_extremes(x, np.sum(list(phases.values()), axis=0))
    factor, unit = (1000.0, "ms per step") if total / weight.sum() < 1 else (1.0, "s per step")
    series = [
        Series(
            _phase(name),
            x[kept],
            factor * seconds[kept],
            tones[name],
            "band",
            human.percent(shares[name]),
        )
        for name, seconds in phases.items()
    ]
    sentence = " and ".join(
        f"{human.percent(shares[name])} went to {_phase(name)}" for name, _ in ranked[:2]
    )
    return Chart(
        "Where the step's time went",
        unit,
        f"Percentages are of the whole run: {sentence}.",
        series,
        lambda value: human.duration(value / factor),
        wide=True,
        above=share_bar([(_phase(n), share, tones[n]) for n, share in shares.items()]),
    )


def _phase(name: str) -> str:
    return name.replace("_", " ")


def _finite(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
