"""What a run leaves open, decided for machines of every kind, each with its reason."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.layout import Layout
from ridgeline.run import Run, make_run
from ridgeline.train.resolve import Host, resolve, this_host

LAPTOP = Host(torch.device("cpu"), devices=0, cores=8, numa_domains=1, bf16=None)
NODE = replace(LAPTOP, cores=48, numa_domains=4, bf16="this CPU multiplies bf16 natively (AMX)")
GPUS = Host(torch.device("cuda"), devices=8, cores=96, numa_domains=2, bf16="this cuda device …")


def run_of(batch: int = 64, **changes: Any) -> Run:
    model = {"layers": 1, "hidden": 8, "heads": 1, "vocab": 300, "max_sequence": 1024}
    schedule = {"global_batch": batch, **changes.pop("schedule", {})}
    return make_run({"model": model, "schedule": schedule, **changes})


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        (LAPTOP, "dp2 mb4 fp32"),  # two processes; 4 · 1,024 tokens fill the CPU's limit
        (replace(LAPTOP, cores=1), "mb4 fp32"),
        (NODE, "dp4 mb4 bf16"),  # one process per NUMA domain
        (GPUS, "dp8 mb8 bf16"),  # 64 / 8 sequences of the limit's 16
        (replace(GPUS, bf16=None), "dp8 mb8 fp32"),  # a device without bf16, such as a V100
        (replace(GPUS, devices=1), "mb16 bf16"),
    ],
)
def test_auto_fits_the_machine(host: Host, sentence: str) -> None:
    resolved, reasons = resolve(run_of(), host, None)
    assert resolved.layout == Layout.model_validate(sentence)
    assert resolved.cluster.devices == 0  # a resumed run may have another layout
    assert "layout" in reasons
    assert ("bf16 is not native here" in reasons["layout"]) == (host.bf16 is None)


def test_replicas_divide_the_batch_and_say_so() -> None:
    resolved, reasons = resolve(run_of(6), GPUS, None)
    assert resolved.layout == Layout.model_validate("dp6 mb1 bf16")
    assert "as far as they divide the batch of 6" in reasons["layout"]


def test_a_launcher_or_the_cluster_decides_the_replicas() -> None:
    assert resolve(run_of(), LAPTOP, 16)[0].layout.world == 16  # type: ignore[union-attr]
    clustered = run_of(cluster={"devices": 32})
    resolved, reasons = resolve(clustered, LAPTOP, None)
    assert resolved.layout.world == 32  # type: ignore[union-attr]
    assert "cluster.devices" in reasons["layout"]


def test_what_is_said_is_kept_and_only_the_precision_is_chosen() -> None:
    resolved, reasons = resolve(run_of(layout="dp4 mb2"), NODE, None)
    assert resolved.layout == Layout.model_validate("dp4 mb2 bf16")
    assert reasons["layout"].startswith("bf16: this CPU multiplies bf16 natively (AMX)")
    fixed, reasons = resolve(run_of(layout="dp4 mb2 fp32", cluster={"devices": 4}), NODE, None)
    assert fixed.layout == Layout.model_validate("dp4 mb2 fp32")
    assert "layout" not in reasons


def test_tokens_per_step_become_sequences() -> None:
    schedule = {"global_batch": None, "global_batch_tokens": 8192}
    resolved, reasons = resolve(run_of(schedule=schedule), LAPTOP, None)
    assert resolved.schedule.global_batch == 8
    assert resolved.schedule.global_batch_tokens is None
    assert reasons["schedule.global_batch"] == "8192 tokens in sequences of 1024"
    assert resolved.data.sequence == 1024


@given(
    batch=st.integers(1, 300),
    devices=st.integers(0, 9),
    cores=st.integers(1, 64),
    domains=st.integers(1, 8),
)
def test_a_resolved_run_leaves_nothing_open_and_resolves_to_itself(
    batch: int, devices: int, cores: int, domains: int
) -> None:
    host = Host(torch.device("cpu"), devices, cores, domains, None)
    resolved, reasons = resolve(run_of(batch), host, None)
    assert isinstance(resolved.layout, Layout)
    assert batch % (resolved.layout.data * resolved.layout.micro_batch) == 0
    assert resolve(resolved, host, None) == (resolved, {})
    text = resolved.to_toml(reasons)
    assert make_run(tomllib.loads(text)) == resolved
    for reason in reasons.values():
        assert f"# {reason}" in text


def test_this_machine_can_be_looked_at() -> None:
    host = this_host()
    assert host.cores >= 1
    assert host.numa_domains >= 1
    assert (host.devices == 0) == (host.device.type == "cpu")
