"""A parity check for people."""

from __future__ import annotations

from ridgeline.human import scientific
from ridgeline.train.parity import ENOUGH_NATS, Compared, Difference, Parity

BESIDE = 3
"""Layouts that stand beside the reference in 100 columns."""


def table(found: Parity) -> str:
    """Loss and gradient norm of every step side by side, then a verdict for each layout."""
    tolerance = found.tolerance
    lines = [
        f"{found.run}: {found.steps} steps in one process "
        f"('{_short(found, found.reference)}') and in layouts",
        f"{found.precision} rounds: loss may differ by {tolerance.loss:g}, norm by "
        f"{tolerance.grad_norm:g},",
        "at step 1 the norm, and each gradient relative to its largest value, by "
        f"{tolerance.gradient:g}",
        _learnt(found),
    ]
    for first in range(0, len(found.layouts), BESIDE):
        lines += ["", *_side_by_side(found, found.layouts[first : first + BESIDE])]
    lines += ["", *(_verdict(found, each) for each in found.layouts)]
    lines += [f"{_short(found, layout):28} skipped: {why}" for layout, why in found.skipped]
    return "\n".join(lines)


def _short(found: Parity, layout: str) -> str:
    """A layout's sentence without the precision, which stands above all of them."""
    return " ".join(word for word in layout.split() if word != found.precision) or "dp1"


def _learnt(found: Parity) -> str:
    learnt = f"in one process the loss fell by {found.learnt_nats:.3f} nats"
    if found.learnt_nats >= ENOUGH_NATS:
        return learnt
    return (
        f"{learnt}: less than {ENOUGH_NATS:g}, so this shows little beyond the first step; "
        "a higher optimizer.lr, a shorter warm-up or more --steps shows more"
    )


def _side_by_side(found: Parity, layouts: list[Compared]) -> list[str]:
    titles = ["one process", *(_short(found, each.layout) for each in layouts)]
    columns = [(found.loss, found.grad_norm), *((each.loss, each.grad_norm) for each in layouts)]
    lines = [
        "     " + "".join(f" {title[:22]:^22}" for title in titles),
        " step" + f" {'loss':>11} {'norm':>10}" * len(titles),
    ]
    for step in range(found.steps):
        numbers = (f" {losses[step]:11.7f} {norms[step]:10.6f}" for losses, norms in columns)
        lines.append(f"{step + 1:5d}" + "".join(numbers))
    return [line.rstrip() for line in lines]


def _verdict(found: Parity, each: Compared) -> str:
    layout = _short(found, each.layout)
    if each.first_difference is not None:
        return f"{layout:28} DIFFERS at {_where(each.first_difference)}"
    return (
        f"{layout:28} equal    loss {scientific(each.loss_difference)}  "
        f"norm {scientific(each.norm_difference)}  "
        f"gradients {scientific(each.gradient_difference)}"
    )


def _where(first: Difference) -> str:
    of = f"gradient of {first.tensor}" if first.tensor else first.what.replace("_", " ")
    rank = "" if first.rank is None else f" on rank {first.rank}"
    there, here = (
        "missing" if value is None else f"{value:.8g}" for value in (first.reference, first.here)
    )
    return f"step {first.step}, {of}: {there} in one process, {here} here{rank}"
