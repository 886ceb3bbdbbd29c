"""How sure a predicted step time is: an 80% interval, and whether it lies outside the fit.

`calibration/certainty.toml` is written by the fit in `bench/`: the 80% quantile of the error, in
logarithms, on sources that the fit had not seen, by stack and width of the numbers; and per device
the largest job and sequence that a fitted row had, and the largest tensor and pipeline size of any.

An interval is that quantile times the `stretch` of the evidence: how far the question lies from
what was fitted. Errors on unseen sources are divided by their stretch before the quantile is
taken (locally weighted conformal prediction, arXiv:1604.04173), so that a source which took its
device's only evidence with it does not widen the intervals of devices that are known.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from ridgeline.plan.constants import NARROW
from ridgeline.plan.quantities import Array

BEYOND, UNKNOWN = 2.0, 4.0
"""How much wider the interval is outside a device's calibrated range or where only a device of
the same peak was fitted, and for a device or precision without a published run, a mixture of
experts or latent attention (assumed: such predictions were off by -45% to +98% when tried)."""
RANGE = ("devices", "sequence", "tensor", "pipeline")


@dataclass(frozen=True)
class Certainty:
    """Half-widths in logarithms by class, and the calibrated range by device."""

    half_width: Mapping[str, float]
    ranges: Mapping[str, Mapping[str, float]]
    precisions: Mapping[str, tuple[str, ...]]
    kin: Mapping[str, tuple[str, ...]]
    """Calibrated devices of the same 16-bit peak, by device."""

    def class_of(self, stack: str, precision: str) -> str:
        """The class whose errors speak for a stack and precision; `all` where it has none."""
        name = f"{stack} {'narrow' if precision in NARROW else 'wide'}"
        return name if name in self.half_width else "all"

    def stretch(self, device: str, precision: str, sizes: Mapping[str, Array]) -> Array:
        """What the interval is multiplied by, element by element of `sizes`; 1 within the range."""
        if not self._fitted(device, precision):
            related = any(self._fitted(name, precision) for name in self.kin.get(device, ()))
            shape = np.broadcast(*[np.asarray(v) for v in sizes.values()]).shape
            return np.full(shape, BEYOND if related else UNKNOWN)
        known = self.ranges[device]
        beyond = [np.asarray(sizes[name]) > known[name] for name in RANGE]
        return np.where(np.logical_or.reduce(np.broadcast_arrays(*beyond)), BEYOND, 1.0)

    def _fitted(self, device: str, precision: str) -> bool:
        alike = "fp16" if precision == "bf16" else precision
        return alike in self.precisions.get(device, ())

    def interval(
        self, seconds: Array, stack: str, precision: str, stretch: Array
    ) -> tuple[Array, Array]:
        """Seconds between which four in five such cases would lie."""
        half = self.half_width[self.class_of(stack, precision)]
        factor = np.exp(half * stretch)
        return seconds / factor, seconds * factor


@cache
def certainty() -> Certainty:
    """What ships with Ridgeline."""
    folder = resources.files("ridgeline.plan").joinpath("calibration")
    table = tomllib.loads(folder.joinpath("certainty.toml").read_text(encoding="utf-8"))
    return Certainty(
        table["half_width"],
        {name: {key: row[key] for key in RANGE} for name, row in table["range"].items()},
        {name: tuple(row["precisions"]) for name, row in table["range"].items()},
        {name: tuple(names) for name, names in table["kin"].items()},
    )
