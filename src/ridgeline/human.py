"""Numbers for people: short, aligned, and a dash for what is not known.

Every function takes a quantity in base units (bytes, seconds, a fraction) or None, and returns
text. None is a dash, never a zero; what is not finite says so.
"""

from __future__ import annotations

import math

DASH = "—"


def _unknown(value: float | None) -> str | None:
    """The text for a value that no format applies to, else None."""
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return None


def integer(value: float | None) -> str:
    """1234567 -> '1,234,567'."""
    return _unknown(value) or f"{value:,.0f}"


def fixed(value: float | None, digits: int = 3) -> str:
    """3.21449 -> '3.214'."""
    return _unknown(value) or f"{value:,.{digits}f}"


def scientific(value: float | None) -> str:
    """0.0003 -> '3.0e-4'; zero is '0'."""
    text = _unknown(value)
    if text is not None or value is None:
        return text or DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(fraction: float | None) -> str:
    """0.412 -> '41.2%', 0.00004 -> '<0.1%'; a true zero is '0%'."""
    text = _unknown(fraction)
    if text is not None or fraction is None:
        return text or DASH
    if fraction == 0:
        return "0%"
    return "<0.1%" if 0 < fraction < 0.0005 else f"{100 * fraction:.1f}%"


def short(value: float | None) -> str:
    """Three significant digits with a decimal prefix: 12345 -> '12.3k', 9.4e6 -> '9.40M'."""
    return _unknown(value) or _scaled(value or 0.0, 1000.0, ["", "k", "M", "G", "T", "P", "E"])


def size(value_bytes: float | None) -> str:
    """Three significant digits with a binary prefix: 1288490189 -> '1.20 GiB'."""
    units = [" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"]
    return _unknown(value_bytes) or _scaled(value_bytes or 0.0, 1024.0, units)


def _scaled(value: float, base: float, units: list[str]) -> str:
    unit = 0
    while abs(value) >= 999.5 and unit < len(units) - 1:  # 999.5 would print as 1000
        value /= base
        unit += 1
    digits = next((d for d, top in ((2, 9.995), (1, 99.95)) if abs(value) < top), 0)
    if unit == 0 and value == round(value):
        digits = 0
    return f"{value:,.{digits}f}{units[unit]}"


def duration(seconds: float | None) -> str:
    """The two largest units: 192.4 -> '3m12s', 90061 -> '1d1h', 0.0123 -> '12.3ms'."""
    text = _unknown(seconds)
    if text is not None or seconds is None:
        return text or DASH
    if seconds == 0:
        return "0s"
    if seconds < 9.95:
        return f"{1000 * seconds:.1f}ms" if seconds < 0.9995 else f"{seconds:.2f}s"
    whole = round(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= unit_s:
            return f"{whole // unit_s}{unit}{whole % unit_s // part_s}{part}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
