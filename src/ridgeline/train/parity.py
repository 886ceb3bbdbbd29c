"""Parity: the same few steps in one process and in every layout, side by side.

Every process of it trains with the program that `ridgeline train` runs, from the data to the
optimizer; what is added only listens. Compared are, on every rank, each step's loss and gradient
norm, and at the first step the whole gradient of every parameter this rank holds.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ridgeline.errors import LayoutError, RidgelineError
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout, Precision
from ridgeline.model.decoder import Decoder
from ridgeline.run import Budget, Cluster, Run
from ridgeline.train.build import MakeDecoder, MakeOptimizer, check_decoder, without_memory
from ridgeline.train.loop import LossFunction
from ridgeline.train.optimizer import adamw
from ridgeline.train.resolve import Host, resolve, this_host
from ridgeline.train.schedule import batch_unit
from ridgeline.train.start import refuse_impossible
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.witness import Seen, witness

What = Literal["loss", "grad_norm", "gradient"]
ENOUGH_NATS = 0.5
"""A loss that falls by less in these steps has hardly used its gradients."""

USUAL = (
    *("dp1", "dp2", "dp4", "tp2", "tp4", "pp2", "pp4", "cp2", "cp4"),
    *("dp2 tp2 pp2", "dp2 pp4", "tp2 pp2 v2", "tp2 cp2", "dp2 cp2"),
    *("dp2 zero1", "dp2 zero2", "dp2 zero3", "dp4 zero3/2"),
    *("pp2 gpipe", "pp2 v2", "pp2 zbh1", "pp2 v2 izb", "pp2 zbv", "pp2 dualpipev"),
    *("dp1 selective", "dp1 full"),
)
"""Layouts compared when none are named, after the run's own: each axis alone and combined, ZeRO,
schedules, recompute. dp1 is another number of micro-batches."""
USUAL_FOR_EXPERTS = ("dp2 ep2", "dp4 ep4", "dp2 tp2 pp2 ep2")


@dataclass(frozen=True)
class Tolerance:
    """Differences that rounding explains, as fractions; what is larger is another model."""

    loss: float
    """Of a step's loss."""
    grad_norm: float
    """Of a step's gradient norm."""
    gradient: float
    """Of one element of a gradient of the first step, against the tensor's largest; and of that
    step's norm, which has inherited nothing from earlier ones either. A parameter counted twice
    moves the norm by little: half of its share in the squares."""

    def of(self, difference: Difference) -> float:
        """What `difference` may be."""
        first = difference.step == 1 and difference.what == "grad_norm"
        return self.gradient if first else float(getattr(self, difference.what))


ROUNDING: dict[Precision, float] = {"fp32": 2.0**-23, "bf16": 2.0**-8}
"""Relative distance of neighbouring numbers. What is this much of the largest of all gradients is
rounding wherever it stands: all that there is, in a tensor whose gradient would be zero (as that of
a key projection's bias, which moves all scores of a query alike)."""
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(loss=1e-5, grad_norm=1e-4, gradient=1e-5),
    # bf16 keeps 8 significant bits, so each rounding is off by up to 2⁻⁹ of a value, a gradient's
    # element by a few of them, and later steps inherit it. Measured with data parallel, at a rate
    # that learns 1.2 nats in 10 steps: 1e-4, 5e-3 and 7e-3. At a rate at which norms leap, no two
    # roundings end alike: parity of such a run is asked in fp32.
    "bf16": Tolerance(loss=2e-3, grad_norm=2e-2, gradient=2.0**-6),
}


@dataclass(frozen=True)
class Difference:
    """Where a layout first left the reference; for a gradient, its element that is furthest off."""

    step: int
    what: What
    tensor: str | None
    """The gradient's parameter, when `what` is a gradient."""
    rank: int | None
    """None: all of them."""
    reference: float | None
    """None: the reference has no such gradient."""
    here: float | None
    """None: no rank has this gradient; `reference` is then its largest element."""


@dataclass(frozen=True)
class Compared:
    """One layout beside the reference; differences are the largest over ranks and steps."""

    layout: str
    loss: list[float]
    grad_norm: list[float]
    loss_difference: float
    norm_difference: float
    gradient_difference: float
    """Beyond what follows from another norm, by which gradients are clipped."""
    first_difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether everything is within the tolerance."""
        return self.first_difference is None


@dataclass(frozen=True)
class Parity:
    """What `parity` found. Losses are nats per token, differences fractions."""

    run: str
    steps: int
    precision: Precision
    tolerance: Tolerance
    reference: str
    """The layout of the one process."""
    loss: list[float]
    grad_norm: list[float]
    layouts: list[Compared]
    skipped: list[tuple[str, str]]
    """Usual layouts that this run or this machine cannot have, each with why."""

    @property
    def equal(self) -> bool:
        """Whether every layout is the same model."""
        return all(each.equal for each in self.layouts)

    @property
    def learnt_nats(self) -> float:
        """By how much the loss fell in one process: parity of a model that stands still is weak."""
        return self.loss[0] - self.loss[-1]

    def json(self) -> dict[str, Any]:
        """As one JSON object; what is not a finite number is null."""
        reference = {"layout": self.reference, "loss": self.loss, "grad_norm": self.grad_norm}
        found = {
            "run": self.run,
            "steps": self.steps,
            "precision": self.precision,
            "tolerance": asdict(self.tolerance),
            "equal": self.equal,
            "learnt_nats": self.learnt_nats,
            "reference": reference,
            "layouts": [{"equal": each.equal} | asdict(each) for each in self.layouts],
            "skipped": [{"layout": layout, "why": why} for layout, why in self.skipped],
        }
        return {key: _finite(value) for key, value in found.items()}


def parity(
    run: Run,
    layouts: Sequence[str] = (),
    steps: int = 10,
    *,
    decoder: MakeDecoder = Decoder,
    loss: LossFunction = token_loss,
    optimizer: MakeOptimizer = adamw,
    pool: Pool | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Parity:
    """Train `steps` steps of `run` in one process and in each of `layouts` on local processes.

    Where none are named they are the run's own and the usual ones, as far as they divide this run
    and fit this machine. The precision is the run's; where that is auto it is float32, in which
    rounding hides least. The budget becomes `steps`, and the learning rate follows it; the run's
    folder is neither read nor written. `pool`: processes to use, instead of new ones;
    `progress(what, share done)` is called before each layout. Raises LayoutError, before any
    process starts, for a named layout that cannot be trained here; the error of the rank that
    failed first, with its layout; and all that `ridgeline.train` raises beforehand.
    """
    host = this_host()
    alone = _reference(run, steps, host)
    assert isinstance(alone.layout, Layout)
    refuse_impossible(alone, host, None)
    model = without_memory(decoder, alone.model)  # raises for a model that can only be planned
    chosen = layouts or _usual(alone, run.layout)
    runs, skipped = _runs(alone, chosen, host, model, refuse=bool(layouts))
    tolerance, rounding = TOLERANCES[alone.layout.precision], ROUNDING[alone.layout.precision]
    with ExitStack() as stack:
        pool = pool or stack.enter_context(Pool())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ridgeline-"))
        parts = (decoder, loss, optimizer, Path(folder) / "gradients.safetensors")
        progress(f"one process, {alone.layout}", 0.0)
        (reference,) = _watch(pool, alone, *parts, None)
        compared = []
        for number, divided in enumerate(runs, start=1):
            progress(str(divided.layout), number / (len(runs) + 1))
            ranks = _watch(pool, divided, *parts, rounding)
            clip_norm = run.optimizer.clip_norm
            compared.append(compare(str(divided.layout), reference, ranks, tolerance, clip_norm))
    return Parity(
        run=run.name,
        steps=steps,
        precision=alone.layout.precision,
        tolerance=tolerance,
        reference=str(alone.layout),
        loss=reference.loss,
        grad_norm=reference.grad_norm,
        layouts=compared,
        skipped=skipped,
    )


def _watch(pool: Pool, run: Run, *arguments: Any) -> list[Seen]:
    """What every rank of `run` saw; an error says in which layout."""
    assert isinstance(run.layout, Layout)
    try:
        return pool.run(witness, (run, *arguments), run.layout.world)
    except RidgelineError as error:
        said = f"layout '{run.layout}': {error.asked}"
        raise type(error)(said, error.rule, error.remedy) from None


def _reference(run: Run, steps: int, host: Host) -> Run:
    """`run` resolved for one process: nothing divided, and `steps` steps."""
    if run.layout == "auto":
        run = resolve(run, host, 1)[0]
        precision: Precision = "fp32"
    else:
        precision = "fp32" if run.layout.precision == "auto" else run.layout.precision
    assert isinstance(run.layout, Layout)
    layout = Layout(micro_batch=run.layout.micro_batch, precision=precision)
    if precision not in TOLERANCES:
        raise LayoutError(
            f"parity in {precision}",
            "how far layouts may differ is known for fp32 and bf16",
            "a layout with fp32",
        )
    update = {"layout": layout, "budget": Budget(steps=steps), "cluster": Cluster()}
    return resolve(run.model_copy(update=update), host, None)[0]


def _usual(alone: Run, own: Layout | Literal["auto"]) -> list[Layout]:
    """The run's own layout, and the usual ones with micro-batches that fit them."""
    layouts = [] if own == "auto" else [own]
    for sentence in USUAL + USUAL_FOR_EXPERTS * (alone.model.experts is not None):
        layout = Layout.model_validate(sentence)
        size = _usual_micro_batch(alone, layout)
        layouts.append(layout.model_copy(update={"micro_batch": size}))
    return layouts


def _usual_micro_batch(alone: Run, layout: Layout) -> int:
    """So that each replica has several micro-batches and every stage one; at most the reference's.

    In one process less than that, since the number of micro-batches is all that is other there.
    """
    assert isinstance(alone.layout, Layout)
    per_replica = batch_unit(alone) // layout.data
    memory = alone.layout.micro_batch // (2 if layout.world == 1 else 1)
    sizes = range(min(memory, per_replica // max(2, layout.pipeline)), 0, -1)
    return next((size for size in sizes if per_replica % (size * layout.pipeline) == 0), 1)


def _runs(
    alone: Run, layouts: Sequence[str | Layout], host: Host, model: nn.Module, *, refuse: bool
) -> tuple[list[Run], list[tuple[str, str]]]:
    """The run in every layout to compare; those that it cannot have are refused, or told why."""
    runs: dict[Layout, Run] = {}
    skipped: list[tuple[str, str]] = []
    for layout in map(Layout.model_validate, layouts):
        try:
            layout = _in_precision_of(alone, layout)
            divided = alone.model_copy(update={"layout": layout})
            refuse_impossible(divided, host, None)
            check_decoder(model, layout)
        except LayoutError as error:
            if refuse:
                raise
            skipped.append((str(layout), error.rule))
        else:
            if refuse or layout != alone.layout:
                runs[layout] = divided
    return list(runs.values()), skipped


def _in_precision_of(alone: Run, layout: Layout) -> Layout:
    assert isinstance(alone.layout, Layout)
    precision = alone.layout.precision
    if layout.precision not in ("auto", precision):
        raise LayoutError(
            f"parity of layout '{layout}' with '{alone.layout}'",
            f"both round alike: {layout.precision} is not {precision}",
            f'the run in it as well: --layout "mb{alone.layout.micro_batch} {layout.precision}"',
        )
    return layout.model_copy(update={"precision": precision})


def compare(
    layout: str, reference: Seen, ranks: list[Seen], tolerance: Tolerance, clip_norm: float
) -> Compared:
    """A layout's ranks beside the reference, whose gradients were clipped to `clip_norm`."""
    found: list[tuple[float, Difference]] = []  # how far each number is off, in their order
    for step in range(len(reference.loss)):
        found += _numbers("loss", step, reference, ranks)
        if step == 0:  # the gradient that is furthest off is the one to look at
            found += sorted(_gradients(reference, ranks, clip_norm), key=lambda each: -each[0])
        found += _numbers("grad_norm", step, reference, ranks)
    beyond = (each for size, each in found if size > tolerance.of(each))
    whats = vars(tolerance)
    largest = {what: max(size for size, each in found if each.what == what) for what in whats}
    return Compared(
        layout=layout,
        loss=ranks[0].loss,
        grad_norm=ranks[0].grad_norm,
        loss_difference=largest["loss"],
        norm_difference=largest["grad_norm"],
        gradient_difference=largest["gradient"],
        first_difference=next(beyond, None),
    )


def _numbers(
    what: Literal["loss", "grad_norm"], step: int, reference: Seen, ranks: list[Seen]
) -> Iterator[tuple[float, Difference]]:
    """One number of one step, as every rank has it."""
    expected: float = getattr(reference, what)[step]
    for rank, seen in enumerate(ranks):
        here: float = getattr(seen, what)[step]
        yield _apart(expected, here), Difference(step + 1, what, None, rank, expected, here)


def _gradients(
    reference: Seen, ranks: list[Seen], clip_norm: float
) -> Iterator[tuple[float, Difference]]:
    """Every gradient of the first step, as every rank that holds it has it.

    They were clipped by the norm of their own layout, s = min(1, clip / (norm + 10⁻⁶))
    (torch.nn.utils.clip_grads_with_norm_), so a norm that is off moves all alike, by |s/s₀ − 1|;
    that much is the norm's, and not theirs.
    """

    def scale(norm: float) -> float:
        return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0

    for rank, seen in enumerate(ranks):
        by_norm = _apart(scale(reference.grad_norm[0]), scale(seen.grad_norm[0]))
        for name, each in seen.gradients.items():
            size = each.size if math.isinf(each.size) else max(0.0, each.size - by_norm)
            yield size, Difference(1, "gradient", name, rank, each.reference, each.here)
    held = {name for seen in ranks for name in seen.gradients}
    for name in set(reference.gradients) - held:
        largest = reference.gradients[name].reference
        yield math.inf, Difference(1, "gradient", name, None, largest, None)


def _apart(reference: float, here: float) -> float:
    """|here − reference| as a fraction of the reference; ∞ where one of them is not a number."""
    if here == reference and math.isfinite(here):
        return 0.0
    apart = abs(here - reference) / abs(reference) if reference else math.inf
    return apart if math.isfinite(apart) else math.inf


def _finite(value: Any) -> Any:
    """`value` for JSON: numbers that are not finite, however deep, become None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
