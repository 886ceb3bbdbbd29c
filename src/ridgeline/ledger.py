"""Ledger: one table of quantities that planning, rehearsing and training a run all fill.

Units are bytes, seconds, FLOP, joules and fractions of 1; money has its currency beside it. What a
witness does not know is None: never zero, and never guessed. So three ledgers of one run can be
laid side by side, term by term, and each term can say in `sources` where it comes from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ridgeline.errors import LedgerError, nearest

Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Witness = Literal["plan", "rehearse", "train"]
SCHEMA: Final = 1
"""Raised whenever a field changes its name or its meaning."""


class _Table(BaseModel):
    """Frozen, closed, documented."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Memory(_Table):
    """Bytes on the fullest device of one pipeline stage, at the fullest moment of a step."""

    weights_bytes: Quantity | None = None
    """Parameters in the precision of the matrix products."""
    gradients_bytes: Quantity | None = None
    """Gradients that are kept over micro-batches."""
    optimizer_bytes: Quantity | None = None
    """Master weights and moments."""
    activations_bytes: Quantity | None = None
    """What forward keeps for backward, of all micro-batches in flight."""
    temporary_bytes: Quantity | None = None
    """Gathered parameters, logits, workspaces, communication buffers."""
    framework_bytes: Quantity | None = None
    """Context, libraries, allocator's slack."""
    total_bytes: Quantity | None = None
    """All of it. Measured where a witness measures; otherwise the sum of the components."""

    @model_validator(mode="before")
    @classmethod
    def _add_up(cls, values: Any) -> Any:
        """A total that is not given is the sum of the components, where all of them are known."""
        if isinstance(values, dict) and values.get("total_bytes") is None:
            names = [name for name in cls.model_fields if name != "total_bytes"]
            parts = [values.get(name) for name in names]
            if all(isinstance(part, int | float) for part in parts):
                return values | {"total_bytes": sum(part for part in parts if part is not None)}
        return values


class StepSeconds(_Table):
    """Seconds of one optimizer step by cause, on the device that all others wait for.

    Communication counts only where compute does not hide it.
    """

    compute_s: Quantity | None = None
    """Forward, backward and recomputation."""
    forward_s: Quantity | None = None
    """The part of `compute_s` that is forward."""
    backward_s: Quantity | None = None
    """The part of `compute_s` that is backward, with what it recomputes."""
    tensor_s: Quantity | None = None
    """Exposed tensor-parallel communication."""
    pipeline_s: Quantity | None = None
    """Exposed sending between pipeline stages."""
    data_s: Quantity | None = None
    """Exposed gathers and reductions over data-parallel replicas."""
    context_s: Quantity | None = None
    """Exposed context-parallel communication."""
    expert_s: Quantity | None = None
    """Exposed expert-parallel communication."""
    bubble_s: Quantity | None = None
    """Idle time of the pipeline's order."""
    host_s: Quantity | None = None
    """Waiting for the host to launch kernels, and for the slowest device."""
    optimizer_s: Quantity | None = None
    """The update."""
    data_stall_s: Quantity | None = None
    """Waiting for the next batch."""
    checkpoint_stall_s: Quantity | None = None
    """Waiting for a checkpoint, spread over the steps between two."""
    evaluation_s: Quantity | None = None
    """Evaluations, spread over the steps between two."""
    logging_s: Quantity | None = None
    """Writing down numbers, spread over all steps."""
    total_s: Quantity | None = None
    """The whole step. May exceed the sum of the causes that a witness can tell apart."""


class SentBytes(_Table):
    """Bytes one device sends in one optimizer step, by mesh axis."""

    tensor_bytes: Quantity | None = None
    """Over tensor-parallel ranks."""
    pipeline_bytes: Quantity | None = None
    """To neighbouring pipeline stages."""
    data_bytes: Quantity | None = None
    """Over data-parallel replicas."""
    context_bytes: Quantity | None = None
    """Over context-parallel ranks."""
    expert_bytes: Quantity | None = None
    """Over expert-parallel ranks."""
    world_bytes: Quantity | None = None
    """Over all ranks: the gradient's norm and the loss."""


class Calls(_Table):
    """Collective calls, sends and receives of one device in one optimizer step, by mesh axis."""

    tensor: Quantity | None = None
    """Over tensor-parallel ranks."""
    pipeline: Quantity | None = None
    """To and from neighbouring pipeline stages."""
    data: Quantity | None = None
    """Over data-parallel replicas."""
    context: Quantity | None = None
    """Over context-parallel ranks."""
    expert: Quantity | None = None
    """Over expert-parallel ranks."""
    world: Quantity | None = None
    """Over all ranks."""


class Ledger(_Table):
    """What one witness knows of a run: what a step costs, and what the whole run does."""

    schema_version: Literal[1] = SCHEMA
    """Which fields to expect."""
    witness: Witness
    """Who filled it: plan predicts, rehearse traces the real program, train measures."""
    layout: str | None = None
    """The sentence of the layout that it is of."""
    memory: tuple[Memory, ...] = ()
    """Bytes per device, one entry per pipeline stage; empty: not known."""
    seconds: StepSeconds = StepSeconds()
    """Where a step's time goes."""
    sent: SentBytes = SentBytes()
    """What a device sends in a step."""
    calls: Calls = Calls()
    """How often it does."""
    kernels: Quantity | None = None
    """Operations that the host launches on one device in a step."""
    flops_per_device: Quantity | None = None
    """FLOP of one step on one device that the model asks for, without recomputation."""
    hardware_flops_per_device: Quantity | None = None
    """FLOP of one step on one device that are executed, with recomputation."""
    flops_by_module: dict[str, Quantity] = {}
    """Executed FLOP of a step on one device by kind of module, as `mlp`; empty: not known."""
    tokens_per_s: Quantity | None = None
    """Tokens of all devices together."""
    mfu: Quantity | None = None
    """Model FLOPs over the device's dense peak, attention counted causally."""
    mfu_full_attention: Quantity | None = None
    """The same with attention counted over the whole square, as PaLM and most papers do."""
    hfu: Quantity | None = None
    """Executed FLOPs over the device's dense peak, attention counted causally."""
    goodput: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the run's time that is kept work, between failures, checkpoints and restarts."""
    train_s: Quantity | None = None
    """Seconds of the whole run."""
    step_energy_j: Quantity | None = None
    """Energy of one step on all devices."""
    energy_j: Quantity | None = None
    """Energy of the whole run."""
    money: Quantity | None = None
    """What the whole run costs, in `currency`."""
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = None
    """ISO 4217, such as USD."""
    sources: dict[str, str] = {}
    """Where a term comes from (a formula's name, a counter): `seconds.bubble_s`, `memory.…`."""

    @property
    def memory_bytes(self) -> float | None:
        """Bytes of the fullest device of all; None where any stage is not known."""
        totals = [stage.total_bytes for stage in self.memory]
        known = [total for total in totals if total is not None]
        return max(known) if known and len(known) == len(totals) else None

    @field_validator("sources")
    @classmethod
    def _of_terms(cls, sources: dict[str, str]) -> dict[str, str]:
        terms = term_names()
        for name in sources:
            if name not in terms:
                raise LedgerError(
                    f"a source for {name!r} in a ledger",
                    "sources name terms of the ledger",
                    nearest(name, terms),
                )
        return sources

    @model_validator(mode="after")
    def _money_has_a_currency(self) -> Ledger:
        if self.money is not None and self.currency is None:
            raise LedgerError(
                f"money {self.money} in a ledger", "money has its currency beside it", "USD"
            )
        return self

    def to_json(self) -> str:
        """The ledger as JSON, unknown quantities as null."""
        return self.model_dump_json(indent=2) + "\n"


NO_TERMS = ("schema_version", "witness", "layout", "sources", "currency", "flops_by_module")
"""Fields that are no single quantity."""


def term_names() -> list[str]:
    """Every term of a ledger by its dotted name, stages of memory taken together."""
    parts: dict[str, type[BaseModel]] = {
        "memory": Memory,
        "seconds": StepSeconds,
        "sent": SentBytes,
        "calls": Calls,
    }
    plain = [name for name in Ledger.model_fields if name not in (*parts, *NO_TERMS)]
    return plain + [f"{name}.{term}" for name, part in parts.items() for term in part.model_fields]


def ledger_from_json(text: str, where: str = "ledger") -> Ledger:
    """Read a ledger back. Raises LedgerError for JSON that is none, saying which term is wrong."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as fault:
        raise LedgerError(where, f"it is not JSON: {fault}", "a file that to_json wrote") from None
    return make_ledger(values, where)


def make_ledger(values: Any, where: str = "ledger") -> Ledger:
    """A Ledger from plain values. Raises LedgerError, naming the term, for impossible ones."""
    try:
        return Ledger.model_validate(values)
    except ValidationError as fault:
        first = fault.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "ledger"
        unknown = first["type"] == "extra_forbidden"
        remedy = nearest(str(first["loc"][-1]), _keys()) if unknown else "null where it is unknown"
        rule = f"no such term; schema {SCHEMA} has its own" if unknown else str(first["msg"])
        raise LedgerError(f"{name} = {first['input']!r} in {where}", rule, remedy) from None


def read_ledger(path: Path) -> Ledger:
    """Read a ledger's file. Raises LedgerError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise LedgerError(f"ledger {path}", f"it cannot be read: {fault}", "") from None
    return ledger_from_json(text, str(path))


def _keys() -> set[str]:
    return set(Ledger.model_fields) | {name.split(".")[-1] for name in term_names()}
