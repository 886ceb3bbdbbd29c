"""Published runs as rows of the physics: reading the CSV, and what is assumed where it is silent.

The assumptions, each from the other columns and never from `source`:

- stack: `FSDP2` in `shard` → fsdp2; a TPU → megatron-core (compiled as a whole, the nearest that is
  calibrated); other FSDP words with the stage → fsdp1; a distributed optimizer or a bare `FSDP n` →
  megatron-core; else fused attention on a device of 2022 or later, or with sequence parallelism →
  megatron-core, else megatron-deepspeed.
- cluster: the one that stands for the device, also where a named one is not in the catalogue.
- ffn 4·hidden; vocab 51,200; kv_heads = heads; not gated where ffn = 4·hidden, else gated; tied
  where not gated and the vocabulary is below 100,000.
- micro-batch: the global batch over data·pipeline where there is a pipeline, else 1.
- recompute: none. interleave: 1, but on megatron-core chunks of about 3.5e9 parameters, as its
  published recipes have; "Interleaved" in the notes: 2.
- shards: on megatron-core the distributed optimizer (zero1); on fsdp2 with a pipeline zero1, since
  torchtitan's stages keep their parameters gathered and reduce once.
- sequence parallel: as on megatron-core and fsdp2, no elsewhere. Flash attention: on devices of
  2022 or later.
- fp8 whose notes say "rowwise" runs its products at the 16-bit rate, as published tables have it.
- compiled, asynchronous tensor parallelism: where the notes say so; megatron-core is fused.
- ports of a node: where no cluster is named, as the notes say ("inter-node 800 Gbps").
- gradients: megatron-deepspeed accumulates and reduces them in float32 where it trains in bf16, as
  Megatron-LM insists, in 16 bits where it trains in fp16; megatron-core and fsdp1 reduce 16 bits.
- memory: what the allocator had reserved, or where the notes say so, what was allocated.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ridgeline.errors import RidgelineError, SourceError
from ridgeline.machine.cluster import Cluster, cluster, clusters
from ridgeline.plan.amounts import MOST
from ridgeline.plan.block import block
from ridgeline.plan.constants import CAST_BYTES, NARROW, Constants, one, peak, rates_of
from ridgeline.plan.memory import Memory, memory
from ridgeline.plan.quantities import (
    FUSED_LOSS_BYTES,
    RECOMPUTES,
    SCHEDULES,
    Array,
    Layouts,
    Rates,
    Task,
    program_memory,
)
from ridgeline.plan.step import Step, step

COLUMNS = ("id", "source", "model", "layers", "hidden", "heads", "seq_len", "device", "devices")
SINGLE_NODE = (
    "devices", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq_len",
    "tensor", "data", "pipeline", "step_ms",
)  # fmt: skip
PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4")
OLD_DEVICES = ("V100", "A100", "MI250X", "A64FX", "TPU v3")
STACK_NAMES = {
    r"ridgeline": "ridgeline",
    r"megatron.?core|mcore|nemo|megatron.?bridge": "megatron-core",
    r"fsdp.?2|torchtitan": "fsdp2",
    r"fsdp|foundry|composer": "fsdp1",
    r"megatron|deepspeed": "megatron-deepspeed",
}
"""What a stack may be called; the first pattern that fits decides."""
SCHEDULE_NAMES = {
    "interleaved1f1b": "1f1b", "interleaved": "1f1b", "zb-h1": "zbh1", "zbh1": "zbh1",
    "interleavedzerobubble": "izb", "zbvzerobubble": "zbv", "zb-v": "zbv",
}  # fmt: skip
"""What others call the schedules."""
UNFUSED_LOSS_BYTES = 52
"""Traffic per logit of Megatron-LM's vocabulary-parallel loss of 2021, by its passes: to float32 6,
maximum 4, less it 8, exponential 8, sum 4, quotient 8, times the gradient 8, back to 16 bits 6."""


@dataclass(frozen=True)
class Case:
    """One row, complete: what was given and what was assumed."""

    id: str
    source: str
    tier: str
    model: str
    cluster: Cluster
    devices: int
    precision: str
    rate: str
    """The precision whose rate the matrix products reach."""
    stack: str
    compiled: bool
    overlap_tensor: bool
    numbers: dict[str, float]
    """Fields of Task and Layouts."""
    step_s: float | None
    memory_bytes: float | None
    allocated: bool
    """Whether that counts what tensors hold, not what the allocator has reserved for them."""
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cases:
    """Rows that can be expressed, and those that cannot, each with the reason."""

    rows: list[Case]
    skipped: list[tuple[str, str]] = field(default_factory=list)


def read_cases(paths: list[Path], known: Constants) -> Cases:
    """Read CSV files of either form. Raises SourceError for one that cannot be read."""
    rows: list[Case] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        for row in _rows_of(path):
            try:
                rows.append(case_of(row, known))
            except (_NotExpressible, RidgelineError) as fault:
                why = fault.rule if isinstance(fault, RidgelineError) else str(fault)
                skipped.append((row["id"], why))
    return Cases(rows, skipped)


class _NotExpressible(Exception):  # noqa: N818 - a verdict about a row
    """Why a row cannot be priced."""


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as fault:
        raise SourceError(f"cases {path}", f"it cannot be read: {fault}", "a CSV file") from None
    if not lines:
        raise SourceError(f"cases {path}", "it is empty", "the columns " + ", ".join(COLUMNS))
    header = lines[0]
    if header[0].lstrip().startswith("#"):
        return [_single_node(path, index, row) for index, row in enumerate(lines[1:], 1) if row]
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise SourceError(
            f"cases {path}", f"the columns {', '.join(missing)} are missing", ", ".join(COLUMNS)
        )
    return [dict(zip(header, row, strict=False)) for row in lines[1:] if row]


def _single_node(path: Path, index: int, values: list[str]) -> dict[str, str]:
    """A row of the eleven-column form: GPT models on one node of A100, Megatron-DeepSpeed."""
    row = dict(zip(SINGLE_NODE, values, strict=False))
    try:
        row["step_s"] = str(float(row.pop("step_ms")) / 1000)
    except (KeyError, ValueError):
        raise SourceError(
            f"cases {path}, row {index}", "it does not have eleven numbers", ", ".join(SINGLE_NODE)
        ) from None
    return row | {
        "id": f"{path.stem}-{index}", "source": path.name, "tier": "A", "model": "GPT",
        "device": "A100-SXM-80GB", "precision": "fp16", "recompute": "full", "flash_attention": "n",
        "sequence_parallel": "n", "shard": "0", "interleave": "1", "context": "1", "notes": "",
    }  # fmt: skip


def case_of(row: dict[str, str], known: Constants) -> Case:
    """One row, completed. Raises _NotExpressible, MachineError or LayoutError with the reason."""
    assumed: list[str] = []
    machine = _machine(row, assumed)
    one(known.devices, machine.device.name)
    shape = _shape(row, assumed)
    notes = row.get("notes", "")
    flash = _flag(row.get("flash_attention", ""))
    if flash is None:
        flash = not machine.device.name.startswith(OLD_DEVICES)
        assumed.append(f"flash_attention {'y' if flash else 'n'}")
    stack = _named_stack(row.get("stack", "")) or _stack(row, machine, flash, assumed)
    layout = _layout(row, shape, stack, assumed)
    precision = row.get("precision", "").strip().lower().removeprefix("amp_")
    if precision in ("", "-"):
        precision = "bf16" if "bf16" in machine.device.peak_flops else "fp16"
        assumed.append(f"precision {precision}")
    if precision not in PRECISIONS:
        raise _NotExpressible(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    peak(machine, precision)
    sequence_parallel = _flag(row.get("sequence_parallel", ""))
    if sequence_parallel is None:
        sequence_parallel = stack not in ("megatron-deepspeed",)
        if layout["tensor"] > 1:
            assumed.append(f"sequence_parallel {'y' if sequence_parallel else 'n'}")
    stated = _flag(row.get("compile", ""))
    compiled = bool(re.search(r"compile", notes)) if stated is None else stated
    old, wide = stack == "megatron-deepspeed", precision == "fp32"
    kept = {
        "flash": float(flash),
        "sequence_parallel": float(sequence_parallel),
        "dropout": float(old),
        "master_bytes": 8.0 if wide else 12.0,
        "weight_bytes": 4.0 if wide else 2.0,
        "gradient_bytes": 2.0 if (old and precision == "fp16") or "PURE" in notes else 4.0,
        "reduce_bytes": 4.0 if wide or stack == "fsdp2" or (old and precision == "bf16") else 2.0,
        "logit_bytes": _logit_bytes(stack, layout["tensor"]),
        "loss_bytes": float(UNFUSED_LOSS_BYTES if old else FUSED_LOSS_BYTES),
        "whole_gradient": 4.0 if stack == "fsdp2" else 0.0,
    }
    return Case(
        id=row["id"],
        source=row.get("source", ""),
        tier=row.get("tier", "") or "-",
        model=row.get("model", ""),
        cluster=machine,
        devices=_whole(row, "devices"),
        precision=precision,
        rate="bf16" if precision == "fp8" and "rowwise" in notes else precision,
        stack=stack,
        compiled=compiled and stack == "fsdp2",
        overlap_tensor=bool(re.search(r"async_tp=y|AsyncTP", notes)),
        numbers=shape | layout | kept | program_memory(stack, precision),
        step_s=_number(row.get("step_s", "")),
        memory_bytes=_times(_number(row.get("memory_gb", "")), 2.0**30),
        allocated="allocated" in notes,
        assumed=tuple(assumed),
    )


def _logit_bytes(stack: str, tensor: float) -> float:
    """Memory per logit of a stack's loss, at its peak.

    PyTorch's parallel loss has four float32 tensors in its backward pass: the logarithms, their
    exponentials, the gradient before and after; its ordinary one has three and 16-bit logits.
    """
    if "fsdp" not in stack:
        return 10.0
    return 16.0 if stack == "fsdp2" and tensor > 1 else 14.0


def _shape(row: dict[str, str], assumed: list[str]) -> dict[str, float]:
    layers, hidden, heads = (_whole(row, name) for name in ("layers", "hidden", "heads"))
    ffn = _number(row.get("ffn_hidden", ""))
    if ffn is None:
        ffn = 4.0 * hidden
        assumed.append(f"ffn_hidden {ffn:.0f}")
    vocab = _number(row.get("vocab", ""))
    if vocab is None:
        vocab = 51200.0
        assumed.append("vocab 51200")
    gated = _flag(row.get("gated", ""))
    if gated is None:
        gated = ffn != 4.0 * hidden
        assumed.append(f"gated {'y' if gated else 'n'}")
    tied = _flag(row.get("tied", ""))
    if tied is None:
        tied = not gated and vocab < 100_000
        assumed.append(f"tied {'y' if tied else 'n'}")
    kv_heads = _number(row.get("kv_heads", ""))
    if not kv_heads:
        kv_heads = float(heads)
        assumed.append(f"kv_heads {heads}")
    experts = _number(row.get("experts", "")) or 0.0
    if re.search(r"MoE|DeepSeek|Mixtral", row.get("model", "")) and not experts:
        raise _NotExpressible("a mixture of experts without the columns experts and top_k")
    return {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": hidden / heads,
        "value_dim": hidden / heads,
        "query_rank": 0.0,
        "kv_rank": 0.0,
        "rope_dim": 0.0,
        "ffn": ffn,
        "mlp_matrices": 3.0 if gated else 2.0,
        "vocab": vocab,
        "tied": float(tied),
        "experts": experts,
        "top_k": _number(row.get("top_k", "")) or (1.0 if experts else 0.0),
        "expert_ffn": (_number(row.get("expert_ffn", "")) or ffn) if experts else 0.0,
        "shared_experts": 0.0,
        "dense_layers": 0.0 if experts else layers,
        "sequence": _whole(row, "seq_len"),
        "global_batch": _whole(row, "global_batch"),
    }


def _machine(row: dict[str, str], assumed: list[str]) -> Cluster:
    """The named cluster if it is known and has the row's device, else the device's usual one."""
    usual = cluster(row["device"].strip())
    named = row.get("cluster", "").strip()
    told = re.search(r"(?:inter|multi)-node (\d+) Gbps", row.get("notes", ""))
    if told and not named:
        ports = replace(usual.network, node_bandwidth=float(told[1]) * 1e9 / 8)
        usual = replace(usual, name=f"{usual.name}, {told[1]} Gbit/s a node", network=ports)
    if not named:
        assumed.append(f"cluster {usual.name}")
        return usual
    found = clusters().get(named)
    if found is None or found.device != usual.device:
        assumed.append(f"cluster {usual.name}")
        return usual
    return found


def _named_stack(words: str) -> str:
    """The calibrated stack that a name means; empty where none is named.

    Raises _NotExpressible for a name that fits none.
    """
    for pattern, stack in STACK_NAMES.items():
        if re.search(pattern, words, re.IGNORECASE):
            return stack
    if words.strip() not in ("", "-"):
        raise _NotExpressible(f"no stack is called {words!r}: {', '.join(STACK_NAMES.values())}")
    return ""


def _stack(row: dict[str, str], machine: Cluster, flash: bool, assumed: list[str]) -> str:
    words = row.get("shard", "")
    if re.search(r"FSDP2|FSDP1 \(sharded|FSDP4 \(", words):
        stack = "fsdp2"
    elif machine.device.name.startswith("TPU") or re.search(
        r"\bFSDP \d|distributed optimizer|FSDP \(optimizer", words
    ):
        stack = "megatron-core"
    elif "FSDP" in words:
        stack = "fsdp1"
    else:
        recent = not machine.device.name.startswith(OLD_DEVICES)
        recent = recent or _flag(row.get("sequence_parallel", "")) is True
        stack = "megatron-core" if flash and recent else "megatron-deepspeed"
    assumed.append(f"stack {stack}")
    return stack


def _layout(
    row: dict[str, str], shape: dict[str, float], stack: str, assumed: list[str]
) -> dict[str, float]:
    devices = _whole(row, "devices")
    given = {name: _number(row.get(name, "")) for name in ("tensor", "pipeline", "context", "data")}
    if given["tensor"] is None or given["pipeline"] is None:
        raise _NotExpressible("tensor and pipeline are not given")
    tensor, pipeline, context = given["tensor"], given["pipeline"], given["context"] or 1.0
    data = given["data"] or devices / (tensor * pipeline * context)
    if data * tensor * pipeline * context != devices:
        raise _NotExpressible(
            f"dp·cp·tp·pp is the number of devices: {data:g}·{context:g}·{tensor:g}·{pipeline:g} "
            f"is not {devices}"
        )
    micro_batch = _number(row.get("micro_batch", ""))
    if micro_batch is None:
        each = shape["global_batch"] / (data * pipeline)
        micro_batch = max(1.0, float(int(each))) if pipeline > 1 and stack == "fsdp2" else 1.0
        assumed.append(f"micro_batch {micro_batch:.0f}")
    if shape["global_batch"] < data * micro_batch:
        raise _NotExpressible(
            f"dp·mb = {data:g}·{micro_batch:g} is more than the global batch "
            f"{shape['global_batch']:g}"
        )
    recompute = row.get("recompute", "").strip().lower()
    if recompute in ("", "-"):
        recompute = "none"
        assumed.append("recompute none")
    if recompute not in RECOMPUTES:
        raise _NotExpressible(f"recompute {recompute!r} is none of {', '.join(RECOMPUTES)}")
    schedule = row.get("schedule", "").strip().lower()
    if not schedule:
        schedule = "1f1b"
        if pipeline > 1:
            assumed.append("schedule 1f1b")
    schedule = SCHEDULE_NAMES.get(schedule, schedule)
    if schedule not in SCHEDULES:
        raise _NotExpressible(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    zero, group = _shards(row.get("shard", ""), data, context)
    if stack == "megatron-core" and row.get("shard", "").strip() in ("", "-"):
        zero = 1.0
        assumed.append("shard zero1")
    if stack == "fsdp2" and pipeline > 1 and zero == 3:
        zero = 1.0
        assumed.append("zero1: stages keep their parameters gathered")
    return {
        "data": data,
        "context": context,
        "tensor": tensor,
        "pipeline": pipeline,
        "expert": _number(row.get("expert", "")) or 1.0,
        "micro_batch": micro_batch,
        "interleave": _interleave(row, shape, stack, assumed),
        "schedule": float(SCHEDULES.index(schedule)),
        "zero": zero,
        "shard_group": _number(row.get("shard_group", "")) or group,
        "recompute": float(RECOMPUTES.index(recompute)),
    }


def _interleave(
    row: dict[str, str], shape: dict[str, float], stack: str, assumed: list[str]
) -> float:
    given, pipeline = _number(row.get("interleave", "")), _number(row["pipeline"]) or 1.0
    if given is not None or pipeline == 1:
        return given or 1.0
    chunks = 1.0
    if stack == "megatron-core":
        attention = 2 * shape["hidden"] ** 2 * (1 + shape["kv_heads"] / shape["heads"])
        layer = attention + shape["mlp_matrices"] * shape["hidden"] * shape["ffn"]
        each = max(1, round(3.5e9 / layer))
        chunks = max(1.0, round(shape["layers"] / (pipeline * each)))
    elif "Interleaved" in row.get("notes", ""):
        chunks = 2.0
    assumed.append(f"interleave {chunks:.0f}")
    return chunks


def _shards(words: str, data: float, context: float) -> tuple[float, float]:
    """The ZeRO stage and the shard group that the words mean."""
    match = re.match(r"(?:zero-?)?([0-3])(?:/(\d+))?\b", words.strip(), re.IGNORECASE)
    if match:
        stage = float(match[1])
    elif "optimizer+grad sharded" in words:
        stage = 2.0
    else:
        stage = 3.0 if "FSDP" in words else 0.0
    replicas = data * context
    sized = re.match(r"FSDP2? (\d+)$", words.strip())
    # a group as large as the data axis is the whole of it, context ranks included
    group = float(sized[1]) if sized and float(sized[1]) != data else replicas
    if match and match[2]:
        group = float(match[2])
    return stage, group if replicas % group == 0 else replicas


def task_and_layouts(rows: list[Case]) -> tuple[Task, Layouts]:
    """The rows as structs of arrays."""

    def column(name: str) -> Array:
        return np.array([row.numbers[name] for row in rows], dtype=np.float64)

    task = Task(**{name: column(name) for name in Task.__dataclass_fields__})
    return task, Layouts(**{name: column(name) for name in Layouts.__dataclass_fields__})


def rates_of_cases(rows: list[Case], known: Constants) -> Rates:
    """The effective rates of every row."""
    kinds = [
        (row.cluster.name, row.stack, row.rate, row.compiled, row.overlap_tensor) for row in rows
    ]
    unique = sorted(set(kinds))
    machines = {row.cluster.name: row.cluster for row in rows}
    names, stacks, precisions, compiled, overlap = zip(*unique, strict=True)
    rates = rates_of(
        [machines[name] for name in names], list(stacks), list(precisions), list(compiled), known
    )
    core = known.stacks["megatron-core"].tensor_exposed
    exposed = np.where(overlap, np.minimum(core, rates.tensor_exposed), rates.tensor_exposed)
    where = {kind: index for index, kind in enumerate(unique)}
    picked = np.array([where[kind] for kind in kinds], dtype=np.intp)
    picked_rates = replace(rates, tensor_exposed=exposed).take(picked)
    # rowwise fp8 reaches the 16-bit rate only, and converts all the same
    narrow = np.array([row.precision in NARROW for row in rows])
    return replace(picked_rates, cast=np.where(narrow, CAST_BYTES, 0.0))


def predict(rows: list[Case], known: Constants) -> Step:
    """The step of every row, by cause."""
    task, layouts = task_and_layouts(rows)
    rates = rates_of_cases(rows, known)
    blocks = block(task, rates, known.shared, layouts)
    return step(task, rates, known.shared, layouts, blocks)


def predict_memory(rows: list[Case], known: Constants) -> Memory:
    """The memory of every row, by component."""
    task, layouts = task_and_layouts(rows)
    return memory(task, rates_of_cases(rows, known), layouts)


def _whole(row: dict[str, str], name: str) -> int:
    value = _number(row.get(name, ""))
    if value is None or value < 1 or value != int(value):
        raise _NotExpressible(f"{name} is {row.get(name) or 'not given'}")
    return int(value)


def _number(text: str) -> float | None:
    """The number, or None where there is none (empty, a dash). Refuses NaN and negatives."""
    if text.strip() in ("", "-", "—"):
        return None
    try:
        value = float(text)
    except ValueError:
        raise _NotExpressible(f"{text!r} is not a number") from None
    if not 0 <= value <= MOST:  # NaN compares false
        raise _NotExpressible(f"{text} is not a quantity from 0 to {MOST:g}")
    return value


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _flag(text: str) -> bool | None:
    return {"y": True, "yes": True, "1": True, "true": True, "n": False, "no": False,
            "0": False, "false": False}.get(text.strip().lower())  # fmt: skip
