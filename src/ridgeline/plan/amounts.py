"""Numbers that people ask with: `15T` tokens, a price, a share. Absurd ones are refused by name."""

from __future__ import annotations

import math
import re

from ridgeline.errors import PlanError

DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "P": 10**15}
"""What a letter behind a number multiplies it by; B is a billion, as in 405B parameters."""

MOST = 1e18
MOST_BATCH = 1e12
"""Tokens per step: thousands of times more than any published run took."""
UNKNOWN = ", or leave it out where it is not known"


def count_of(text: str, what: str, example: str = "15T, or 15e12", most: float = MOST) -> int:
    """`15T` → 15_000_000_000_000; `1.5B`, `380e9`, `3,072` are read as well.

    Raises PlanError, calling the number `what`, for anything else, for less than one and for more
    than `most`: with the nearest such number, or `example` where the text is no number at all.
    """
    form = r"(-?[\d_,]*\.?\d+(?:[eE][+-]?\d{1,3})?)\s*([kMGBT]?|P)"
    match = re.fullmatch(form, text.strip())
    value = float(re.sub(r"[_,]", "", match[1])) * DECIMAL[match[2]] if match else math.nan
    if not (1 <= value <= most and value == int(value)):  # NaN compares false
        close = min(max(value, 1.0), most)
        raise PlanError(
            f"{what} {text!r}",
            f"a whole number from 1 to {most:g}; k, M, B, T, P: 1e3, 1e6, 1e9, 1e12, 1e15",
            example if math.isnan(value) else f"{round(close):,}" if close < 1e6 else f"{close:g}",
        )
    return int(value)


def positive(value: float, what: str, unit: str = "") -> float:
    """`value` if it is finite and above zero; PlanError otherwise."""
    if not math.isfinite(value) or value <= 0:
        close = _opposite(value) if value < 0 else "a number above 0"
        _refuse(value, what, unit, "finite and above 0", close + UNKNOWN)
    return value


def not_negative(value: float, what: str, unit: str = "") -> float:
    """`value` if it is finite and not below zero; PlanError otherwise."""
    if not math.isfinite(value) or value < 0:
        close = _opposite(value) if value < 0 else "0 or more"
        _refuse(value, what, unit, "finite and not below 0", close + UNKNOWN)
    return value


def _opposite(value: float) -> str:
    """What a negative number may have been meant as."""
    return f"{-value:g}" if math.isfinite(value) else "a finite number"


def share(value: float, what: str) -> float:
    """`value` if it is above 0 and at most 1; PlanError otherwise."""
    if not 0 < value <= 1:  # NaN compares false
        percent = f"{value / 100:g}, which is {value:g}%" if 1 < value <= 100 else ""
        meant = percent or "a fraction such as 0.4"
        if 1 < value < 2:
            meant = f"1 at most, or {percent}"
        _refuse(value, what, "", "a fraction above 0 and at most 1", meant)
    return value


def _refuse(value: float, what: str, unit: str, rule: str, remedy: str) -> None:
    asked = f"{what} {value:g}" + (f" {unit}" if unit else "")
    raise PlanError(asked, f"{what} is {rule}", remedy)
