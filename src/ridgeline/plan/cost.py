"""Days, money and energy of training a model on so many tokens.

Seconds, joules and money per unit come in; what is not known (a price, a failure rate, a power
limit) leaves None in everything that would need it. The symbols are the field's: N parameters, D
tokens, n devices, MFU the share of the devices' dense peak that the model's own FLOPs reach.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from ridgeline.errors import PlanError, nearest
from ridgeline.machine.cluster import Cluster
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.shape import ModelShape
from ridgeline.plan.amounts import not_negative, positive, share
from ridgeline.plan.goodput import HOUR, Goodput, goodput, job_mtbf_s

DAY = 86400.0
LEAST_GOODPUT = 0.01
"""Share of the time that must be kept work; below it a run that fails has no end worth a number."""
KWH = 3.6e6
"""Joules in a kilowatt-hour."""


@dataclass(frozen=True)
class Rates:
    """What things cost where the run runs. None: not known. Raises PlanError for absurd ones."""

    device_price: float | None = None
    """Price of buying one device."""
    other_capital: float | None = None
    """Share of the whole centre's capital that is not devices: land, buildings, hosts, network."""
    price_per_hour: float | None = None
    """Rent of one device for an hour."""
    price_per_kwh: float | None = None
    """Price of electricity."""
    currency: str = "USD"
    """Of all prices."""
    device_w: float | None = None
    """Power of one device with its share of the node; None: the catalogue's limits."""
    pue: float | None = None
    """Power of the whole centre over that of its nodes; None: the catalogue's."""
    grid_g_per_kwh: float | None = None
    """Grams of CO₂ (equivalent) per kilowatt-hour of the grid."""
    failures_per_device_hour: float | None = None
    """Job-stopping failures per device and hour; None: the catalogue's."""
    checkpoint_s: float | None = None
    """Seconds a checkpoint blocks training."""
    restart_s: float | None = None
    """Seconds from a failure until training goes on."""

    def __post_init__(self) -> None:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in named.items():
            if isinstance(value, float | int):
                not_negative(float(value), _words(name))
        for name in ("device_w", "failures_per_device_hour", "checkpoint_s"):
            if named[name] is not None:
                positive(named[name], _words(name))
        if not re.fullmatch("[A-Z]{3}", self.currency):
            raise PlanError(
                f"currency {self.currency!r}", "currencies have three letters (ISO 4217)", "USD"
            )
        if self.pue is not None and self.pue < 1:
            raise PlanError(
                f"pue {self.pue:g}",
                "PUE is at least 1: a centre draws what its nodes draw, or more",
                "1",
            )
        if self.other_capital is not None and self.other_capital >= 1:
            raise PlanError(
                f"other capital {self.other_capital:g}",
                "it is the share of all capital that is not devices, below 1",
                f"{self.other_capital / 100:g}" if self.other_capital < 100 else "0.5",
            )


def _words(name: str) -> str:
    """A field's name for people: `checkpoint_s` is checkpoint seconds."""
    *words, last = name.split("_")
    return " ".join([*words, {"s": "seconds", "w": "watts"}.get(last, last)])


@dataclass(frozen=True)
class Cost:
    """What a run takes. Seconds, joules, watts, FLOP, fractions; money in `currency`."""

    model: str
    parameters: int
    non_embedding_parameters: int
    """Those a token visits, without embeddings, learned positions and head: the N of 6·N·D."""
    tokens: int
    sequence: int
    devices: int
    device: str
    cluster: str
    precision: str
    peak_flops: float
    """Dense peak of one device, FLOP/s."""
    flops_6nd: float
    """6·N·D (arXiv:2001.08361): no attention scores, no head."""
    flops: float
    """Counted exactly, attention causal."""
    flops_full_attention: float
    """Counted exactly, attention over the whole square."""
    mfu: float
    """Of `flops` and the dense peak."""
    mfu_full_attention: float
    """The same run's MFU in the papers' convention."""
    at_peak_s: float
    """Seconds at MFU 1: nobody reaches it."""
    train_s: float
    """Seconds of training without a failure."""
    tokens_per_s: float
    goodput: float | None
    """Share of the time that is kept work, at the best checkpoint interval."""
    mtbf_s: float | None
    """Seconds between failures of the job."""
    checkpoint_interval_s: float | None
    """Best seconds of training between two checkpoints."""
    wall_s: float | None
    """train_s / goodput."""
    device_hours: float
    """Hours of all devices together, over wall_s where it is known, else over train_s."""
    power_w: float | None
    """Of the centre: devices at their limit, their share of the nodes, times PUE."""
    energy_j: float | None
    co2_kg: float | None
    device_capital: float | None
    """Price of the devices."""
    capital: float | None
    """Price of the devices and of all around them."""
    electricity: float | None
    """Price of energy_j."""
    ownership: float | None
    """capital + electricity."""
    rent: float | None
    """Price of device_hours."""
    currency: str
    notes: tuple[str, ...]
    """What was assumed, and what would fill a None."""


def flops_6nd(parameters_: float, tokens: float) -> float:
    """6·N·D FLOPs of training: 2 forward, 4 backward per parameter and token (arXiv:2001.08361)."""
    return 6.0 * positive(parameters_, "parameters") * positive(tokens, "tokens")


def training_s(flops: float, devices: int, peak_flops: float, mfu: float = 1.0) -> float:
    """Seconds of `flops` on `devices` of `peak_flops` each: F/(n·peak·MFU). Raises PlanError."""
    rate = positive(devices, "devices") * positive(peak_flops, "peak", "FLOP/s")
    return positive(flops, "training", "FLOP") / (rate * share(mfu, "mfu"))


def centre_capital(devices: int, device_price: float, other_capital: float) -> float:
    """Price of a centre whose devices cost `device_price` each, and all else that share of it.

    n·price/(1 - share): at one half, as much again. Raises PlanError for absurd numbers.
    """
    rates = Rates(device_price=device_price, other_capital=other_capital)
    return positive(devices, "devices") * device_price / (1 - (rates.other_capital or 0))


def cost(
    shape: ModelShape,
    tokens: int,
    devices: int,
    cluster: Cluster,
    *,
    mfu: float | None = None,
    days: float | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    rates: Rates | None = None,
) -> Cost:
    """Days, energy and money of training `shape` on `tokens` with `devices` of `cluster`.

    How fast is said once: by `mfu` (causal attention, of the dense peak), or by the `days` it takes
    without failures. `sequence` (tokens) sets attention's share; None: the model's, at most 8,192.
    `precision` None: bf16, or the next wider one the device has a peak for. Raises PlanError for
    absurd or contradictory numbers and for a precision whose peak is not known.
    """
    rates = rates or Rates()
    sequence = min(shape.max_sequence, 8192) if sequence is None else sequence
    positive(sequence, "sequence", "tokens")
    precision, peak = _peak(cluster, precision)
    flops = float(flops_per_token(shape, sequence, "causal").total * positive(tokens, "tokens"))
    full = float(flops_per_token(shape, sequence, "full").total * tokens)
    at_peak_s = training_s(flops, devices, peak)
    mfu, train_s = _speed(at_peak_s, mfu, days)
    losses = _losses(devices, cluster, rates)
    wall_s = train_s / losses.fraction if losses else None
    paid_s = train_s if wall_s is None else wall_s
    counts = parameters(shape)
    visited = counts.non_embedding - counts.idle_experts
    device_hours = devices * paid_s / HOUR
    power_w = _power_w(devices, cluster, rates)
    energy_j = None if power_w is None else power_w * paid_s
    electricity = _times(energy_j, rates.price_per_kwh, 1 / KWH)
    capital = (
        None
        if rates.device_price is None or rates.other_capital is None
        else centre_capital(devices, rates.device_price, rates.other_capital)
    )
    result = Cost(
        model=shape.name,
        parameters=counts.total,
        non_embedding_parameters=visited,
        tokens=tokens,
        sequence=sequence,
        devices=devices,
        device=cluster.device.name,
        cluster=cluster.name,
        precision=precision,
        peak_flops=peak,
        flops_6nd=flops_6nd(visited, tokens),
        flops=flops,
        flops_full_attention=full,
        mfu=mfu,
        mfu_full_attention=mfu * full / flops,
        at_peak_s=at_peak_s,
        train_s=train_s,
        tokens_per_s=tokens / train_s,
        goodput=losses.fraction if losses else None,
        mtbf_s=losses.mtbf_s if losses else None,
        checkpoint_interval_s=losses.interval_s if losses else None,
        wall_s=wall_s,
        device_hours=device_hours,
        power_w=power_w,
        energy_j=energy_j,
        co2_kg=_times(energy_j, rates.grid_g_per_kwh, 1e-3 / KWH),
        device_capital=_times(rates.device_price, float(devices)),
        capital=capital,
        electricity=electricity,
        ownership=None if capital is None or electricity is None else capital + electricity,
        rent=_times(_hour_price(cluster, rates), device_hours),
        currency=rates.currency,
        notes=_notes(cluster, rates, losses),
    )
    _check_finite(result)
    return result


def _check_finite(result: Cost) -> None:
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise PlanError(
                f"{field.name} = {value}",
                "the numbers asked with are too large or too small to multiply",
                "prices below 1e15, and an MFU above 1e-6",
            )


def _peak(cluster: Cluster, precision: str | None) -> tuple[str, float]:
    peaks = cluster.device.peak_flops
    chosen = precision or next((p for p in ("bf16", "fp16", "fp32") if p in peaks), "bf16")
    if chosen not in peaks:
        raise PlanError(
            f"{chosen} on {cluster.device.name}",
            f"its dense peak is known in {', '.join(peaks)}",
            nearest(chosen, peaks),
        )
    return chosen, peaks[chosen]


def _speed(at_peak_s: float, mfu: float | None, days: float | None) -> tuple[float, float]:
    """MFU and seconds, from whichever of the two was said."""
    if (mfu is None) == (days is None):
        said = "nothing" if mfu is None else f"mfu {mfu:g} and days {days:g}"
        raise PlanError(
            f"a cost from {said}", "exactly one of mfu and days says how fast", "mfu = 0.4"
        )
    if mfu is not None:
        return share(mfu, "mfu"), at_peak_s / mfu
    train_s = positive(days or 0.0, "days") * DAY
    if train_s < at_peak_s:
        raise PlanError(
            f"{days:g} days",
            f"at the dense peak itself it takes {at_peak_s / DAY:.4g} days: that would be an MFU "
            f"of {at_peak_s / train_s:.3g}",
            f"{math.ceil(at_peak_s / 0.4 / DAY)} days, an MFU of 0.4",
        )
    return at_peak_s / train_s, train_s


def _losses(devices: int, cluster: Cluster, rates: Rates) -> Goodput | None:
    """Goodput where failure rate, checkpoint and restart are all known."""
    rate = rates.failures_per_device_hour or cluster.failures_per_device_hour
    if rate is None or rates.checkpoint_s is None or rates.restart_s is None:
        return None
    losses = goodput(job_mtbf_s(rate, devices), rates.checkpoint_s, rates.restart_s)
    if losses.fraction < LEAST_GOODPUT:
        enough = losses.mtbf_s * devices / (10 * (rates.checkpoint_s + rates.restart_s))
        raise PlanError(
            f"{devices:,} devices that fail {rate:g} times an hour each",
            f"the job fails every {losses.mtbf_s:g} s, saving takes {rates.checkpoint_s:g} s and "
            f"restarting {rates.restart_s:g} s: less than {LEAST_GOODPUT:.0%} of the time is kept "
            "work, so it never ends",
            f"{min(enough, devices - 1):,.0f} devices"
            if enough >= 1
            else f"checkpoint and restart within {losses.mtbf_s / 10:.3g} s together",
        )
    return losses


def _power_w(devices: int, cluster: Cluster, rates: Rates) -> float | None:
    device_w, pue = rates.device_w, rates.pue or cluster.pue
    if device_w is None:
        board_w, node_w = cluster.device.power_w, cluster.node.overhead_w
        if board_w is None or node_w is None:
            return None
        device_w = board_w + node_w / cluster.node.devices
    return None if pue is None else devices * device_w * pue


def _hour_price(cluster: Cluster, rates: Rates) -> float | None:
    if rates.price_per_hour is not None:
        return rates.price_per_hour
    # A price in another currency is no price in this one.
    return cluster.price_per_device_hour if cluster.currency == rates.currency else None


def _times(first: float | None, second: float | None, unit: float = 1.0) -> float | None:
    return None if first is None or second is None else first * second * unit


def _notes(cluster: Cluster, rates: Rates, losses: Goodput | None) -> tuple[str, ...]:
    """What comes from the catalogue and how it is known there; what is missing for a dash."""
    notes = []
    origins = cluster.device.origins | cluster.origins
    if rates.device_w is None and cluster.device.power_w is not None:
        board = f"{cluster.device.power_w:g} W ({origins.get('power_w', 'assumed')})"
        node = (
            f"{cluster.node.overhead_w:g} W a node ({origins.get('node_w', 'assumed')})"
            if cluster.node.overhead_w is not None
            else "an unknown power of its node"
        )
        notes.append(f"power at the limit of the board, {board}, and {node}: an upper bound")
    if rates.pue is None and cluster.pue is not None:
        notes.append(f"pue {cluster.pue:g} ({origins.get('pue', 'assumed')}, {cluster.name})")
    if losses is None:
        wanted = {
            "failure rate": rates.failures_per_device_hour or cluster.failures_per_device_hour,
            "checkpoint seconds": rates.checkpoint_s,
            "restart seconds": rates.restart_s,
        }
        missing = ", ".join(name for name, value in wanted.items() if value is None)
        notes.append(f"time, energy and rent are without failures; not known: {missing}")
    elif rates.failures_per_device_hour is None:
        notes.append(f"failure rate of {cluster.name}: {cluster.source}")
    return tuple(notes)
