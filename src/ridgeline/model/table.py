"""The catalogue as text: one line per model, or all figures of one. No torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from ridgeline.human import DASH, percent
from ridgeline.model.catalogue import Entry, entry, names
from ridgeline.model.counts import FlopCounts, flops_per_token, parameters
from ridgeline.model.shape import ModelShape

WIDTH = 100
UNITS = {0: "", 3: "k", 6: "M", 9: "B", 12: "T"}
HEADINGS = (
    *("model", "layers", "hidden", "heads/kv", "ffn", "vocab", "context"),
    *("counted", "published", "GFLOP/token"),
)
NOTE = (
    "counted, published: parameters. GFLOP/token: training (forward and backward) on one token "
    "of a sequence as long as the context, attention counted as causal. "
    "All figures of one model: ridgeline models NAME"
)


def table() -> str:
    """Every model of the catalogue on one line of at most 100 columns, under a heading."""
    rows = [HEADINGS, *(_row(entry(name)) for name in names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([*lines, "", *textwrap.wrap(NOTE, WIDTH)])


def describe(name: str) -> str:
    """All figures of one model: source, shape, parameters and FLOPs by component.

    Raises ModelError, with the nearest name, for a name that is not in the catalogue.
    """
    found = entry(name)
    shape = found.shape
    title = " ".join([shape.name, *(f"(or {alias})" for alias in found.aliases)])
    sections = [
        [title, *textwrap.wrap(f"source: {found.source}", WIDTH)],
        ["shape", *_shape_lines(shape)],
        ["parameters", *_parameter_lines(found)],
        [
            f"FLOPs per token, in sequences of {shape.max_sequence:,} tokens",
            *_flop_lines(shape, shape.max_sequence),
        ],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _row(found: Entry) -> tuple[str, ...]:
    shape, published = found.shape, found.published_parameters
    flops = flops_per_token(shape, shape.max_sequence, "causal").total
    return (
        shape.name,
        str(shape.layers),
        str(shape.hidden),
        f"{shape.heads}/{shape.kv_heads}",
        str(shape.ffn_hidden),
        str(shape.vocab),
        str(shape.max_sequence),
        _rounded(Decimal(parameters(shape).total)),
        DASH if published is None else _rounded(published),
        f"{flops / 1e9:,.2f}",
    )


def _rounded(count: Decimal, most_digits: int = 3) -> str:
    """To the digits it is known to, or fewer: 8030261248 -> '8.03B', 1.3E+9 -> '1.3B'."""
    power = count.adjusted() // 3 * 3
    digits = min(most_digits, len(count.as_tuple().digits))
    number = round(count.scaleb(-power), digits - 1 - (count.adjusted() - power))
    return f"{number:f}{UNITS[power]}"


def _shape_lines(shape: ModelShape) -> list[str]:
    values = shape.model_dump(exclude={"name", "source"}, exclude_none=True)
    flat = dict(_flat(values))
    width = max(map(len, flat))
    return [f"  {name:{width}}  {value}" for name, value in flat.items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, as overrides say them, and values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value).lower() if isinstance(value, bool) else str(value)


def _parameter_lines(found: Entry) -> list[str]:
    counts = parameters(found.shape)
    components = {k: v for k, v in asdict(counts).items() if v and k != "idle_experts"}
    sums = {"total": counts.total}
    if counts.active != counts.total:
        sums["active per token"] = counts.active
    sums["without embeddings and head"] = counts.non_embedding
    lines = [
        f"  {name.replace('_', ' '):27}  {value:>21,}  {percent(value / counts.total):>6}"
        for name, value in (components | sums).items()
    ]
    if published := found.published_parameters:
        apart = float((counts.total - published) / published)
        exact = published.as_tuple().exponent == 0
        text = f"{published:,f}" if exact else _rounded(published, most_digits=9)
        verdict = "the same" if counts.total == published else f"counted {apart:+.1%}"
        lines.append(f"  {'published':27}  {text:>21}  {verdict}")
    return lines


def _flop_lines(shape: ModelShape, sequence: int) -> list[str]:
    """Forward by component, and the sums, in both conventions of counting attention."""
    causal = flops_per_token(shape, sequence, "causal")
    full = flops_per_token(shape, sequence, "full")
    rows = [
        *_components(causal.forward, full.forward),
        ("forward", causal.forward.total, full.forward.total),
        ("backward", causal.backward.total, full.backward.total),
        ("forward and backward", causal.total, full.total),
    ]
    heading = f"  {'':27}  {'causal attention':>21}  {'full attention':>21}"
    return [heading, *(f"  {name:27}  {half:>21,}  {whole:>21,}" for name, half, whole in rows)]


def _components(causal: FlopCounts, full: FlopCounts) -> list[tuple[str, int, int]]:
    others = asdict(full)
    return [
        (f"forward, {name.replace('_', ' ')}", value, others[name])
        for name, value in asdict(causal).items()
        if value
    ]
