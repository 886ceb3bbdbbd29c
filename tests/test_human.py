"""Numbers for people: known answers, and properties over all magnitudes."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline import human

FORMATS = (
    human.integer,
    human.fixed,
    human.scientific,
    human.percent,
    human.short,
    human.size,
    human.duration,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (human.integer(1234567), "1,234,567"),
        (human.fixed(3.21449), "3.214"),
        (human.scientific(3e-4), "3.0e-4"),
        (human.scientific(0), "0"),
        (human.percent(0.412), "41.2%"),
        (human.percent(4e-5), "<0.1%"),
        (human.percent(0), "0%"),
        (human.short(12345), "12.3k"),
        (human.short(9.4e6), "9.40M"),
        (human.short(999_950), "1.00M"),
        (human.short(7), "7"),
        (human.size(1288490189), "1.20 GiB"),
        (human.size(512), "512 B"),
        (human.size(1023.9 * 1024), "1.00 MiB"),
        (human.duration(0), "0s"),
        (human.duration(0.0123), "12.3ms"),
        (human.duration(0.9999), "1.00s"),
        (human.duration(59.7), "1m00s"),
        (human.duration(192.4), "3m12s"),
        (human.duration(3 * 3600 + 59), "3h0m"),
        (human.duration(90061), "1d1h"),
    ],
)
def test_known_answers(text: str, expected: str) -> None:
    assert text == expected


def test_the_unknown_is_a_dash_and_the_infinite_says_so() -> None:
    for show in FORMATS:
        assert show(None) == human.DASH
        assert show(math.nan) == "NaN"
        assert show(-math.inf) == "−∞"


@given(st.floats(min_value=1e-3, max_value=9.9e17))
def test_short_numbers_keep_three_digits_and_their_value(value: float) -> None:
    match = re.fullmatch(r"([\d.]+)([kMGTP]?)", human.short(value))
    assert match is not None
    digits, unit = match.groups()
    assert float(digits) < 1000
    factor = 1000.0 ** ["", "k", "M", "G", "T", "P"].index(unit)
    assert float(digits) * factor == pytest.approx(value, rel=5.1e-3, abs=5.1e-3)


@given(st.floats(min_value=0, max_value=1e8))
def test_durations_keep_their_value_to_the_smaller_unit_shown(seconds: float) -> None:
    text = human.duration(seconds)
    unit_s = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
    parts = re.findall(r"([\d.]+)(ms|[smhd])", text)
    assert "".join(n + u for n, u in parts) == text
    said = sum(float(n) * unit_s[u] for n, u in parts)
    assert abs(said - seconds) <= unit_s[parts[-1][1]]
