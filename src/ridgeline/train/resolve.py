"""What a run leaves open, decided for this machine, each with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ridgeline.layout.fewer import fewer_devices
from ridgeline.layout.layout import Layout, Precision
from ridgeline.run import Run
from ridgeline.torch_compat import multiplies_bf16
from ridgeline.train.schedule import batch_unit

CPU_TOKENS = 4096
ACCELERATOR_TOKENS = 16384


@dataclass(frozen=True)
class Host:
    """This machine, as far as a layout depends on it."""

    device: torch.device
    devices: int
    """Accelerators, or 0."""
    cores: int
    numa_domains: int
    bf16: str | None
    """Why bf16 is native here, or None when it is not."""


def this_host() -> Host:
    """Look at this machine."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    domains = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    return Host(
        device=device or torch.device("cpu"),
        devices=torch.accelerator.device_count() if device else 0,
        cores=len(os.sched_getaffinity(0)),
        numa_domains=max(1, domains),
        bf16=_why_bf16(device),
    )


def _why_bf16(device: torch.device | None) -> str | None:
    if device is not None:
        return f"this {device.type} device multiplies bf16" if multiplies_bf16(device) else None
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return None
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "SVE/NEON")):
        if flag in flags:
            return f"this CPU multiplies bf16 natively ({name})"
    return None


def resolve(run: Run, host: Host, world: int | None) -> tuple[Run, dict[str, str]]:
    """`run` with nothing left open, and the reason of each value that was, by its dotted name.

    `world`: number of processes when a launcher started them, else None.
    """
    reasons: dict[str, str] = {}
    data = run.data
    if not data.sequence:
        data = data.model_copy(update={"sequence": run.sequence})
        reasons["data.sequence"] = "the model's max_sequence"
    schedule = run.schedule
    if not schedule.global_batch:
        schedule = schedule.model_copy(
            update={"global_batch": run.global_batch, "global_batch_tokens": None}
        )
        tokens = run.schedule.global_batch_tokens
        reasons["schedule.global_batch"] = (
            f"{tokens} tokens in sequences of {run.sequence}" if tokens else "the default"
        )
    layout, why = _choose_layout(run, host, world)
    if why:
        reasons["layout"] = why
    # cluster.devices stays open: a resumed run may have another layout, or another machine.
    update = {"data": data, "schedule": schedule, "layout": layout}
    return run.model_copy(update=update), reasons


def _choose_layout(run: Run, host: Host, world: int | None) -> tuple[Layout, str]:
    said = []
    if run.layout == "auto":
        replicas, why = _replicas(run, host, world)
        said.append(f"dp{replicas}: {why}")
        per_replica = batch_unit(run) // replicas
        limit = ACCELERATOR_TOKENS if host.devices else CPU_TOKENS
        micro_batch = next(
            size
            for size in range(max(1, min(per_replica, limit // run.sequence)), 0, -1)
            if per_replica % size == 0
        )
        said.append(f"mb{micro_batch}: up to {limit} tokens at a time")
        layout = Layout(data=replicas, micro_batch=micro_batch)
    else:
        layout = run.layout
    if world is not None and world < layout.world and run.faults.fewer_devices:
        said.append(f"{world} of the {layout.world} devices of '{layout}' are there")
        layout = fewer_devices(layout, world, run.model, run.sequence, batch_unit(run))
    if layout.precision == "auto":
        precision: Precision = "bf16" if host.bf16 else "fp32"
        said.append(f"{precision}: {host.bf16 or 'bf16 is not native here'}")
        layout = layout.model_copy(update={"precision": precision})
    return layout, "; ".join(said)


def _replicas(run: Run, host: Host, world: int | None) -> tuple[int, str]:
    """Data-parallel replicas and why: as many as asked, or as this machine has devices."""
    if world is not None:
        return world, "the launcher started as many processes"
    if run.cluster.devices:
        return run.cluster.devices, "cluster.devices"
    if host.devices:
        wanted, why = host.devices, f"one process for each {host.device.type} device"
    else:
        wanted = min(host.cores, max(2, host.numa_domains))
        why = f"one process per NUMA domain, at least two; {host.cores} cores"
    unit = batch_unit(run)
    fits = next(size for size in range(min(wanted, unit), 0, -1) if unit % size == 0)
    return fits, why if fits == wanted else f"{why}, as far as they divide the batch of {unit}"
