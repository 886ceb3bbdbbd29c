"""The effective rates of a machine that `ridgeline probe` measured: no calibration in between."""

from __future__ import annotations

import numpy as np

from ridgeline.errors import MachineError
from ridgeline.machine.cluster import Cluster
from ridgeline.machine.device import PROBED_HEAD_DIM
from ridgeline.plan.constants import calibration, peak
from ridgeline.plan.quantities import Rates

STACK = "ridgeline"
EXPOSED = 1.0
"""Cores that reduce gradients do not compute meanwhile (assumed)."""


def measured_rates(cluster: Cluster, devices: int, stack: str, precision: str) -> Rates:
    """Rates of a measured cluster for runs of all its devices in `precision`, as scalars.

    All products, the head's and attention's too, run in the precision of the run. Raises
    MachineError for another number of devices, another stack than Ridgeline's own, and a precision
    that was not measured.
    """
    if devices != cluster.node.devices:
        raise MachineError(
            f"{devices} devices of {cluster.name}",
            f"it was measured with {cluster.node.devices} at work at the same time",
            f"--on {devices}xlocal",
        )
    if stack != STACK:
        raise MachineError(
            f"stack {stack!r} on {cluster.name}",
            "the probe measures the operations of Ridgeline's own program",
            f"--stack {STACK}",
        )
    at_peak = peak(cluster, precision)
    told, device = cluster.device.effective[precision], cluster.device
    kind, shared = calibration().stacks[STACK], calibration().shared
    # The probe counts both passes as three times forward, at heads narrower than the formula's.
    passes = (1 + shared.attention_backward) / 3
    narrow = (PROBED_HEAD_DIM / 128) ** shared.narrow_heads
    hop = shared.link_latency if cluster.node.hop_s is None else cluster.node.hop_s
    numbers = {
        "peak": at_peak,
        "matrix": told.matrix_flops,
        "matrix_16": told.matrix_flops,
        "cast": 0.0,
        "edge": told.edge,
        "attention": told.attention_flops * passes / narrow,
        "memory": device.memory_bandwidth or np.nan,
        "near_ranks": cluster.node.links[0][0],
        "near": cluster.node.links[0][1],
        "node_ranks": cluster.node.devices,
        "link": cluster.node.links[-1][1],
        "port": cluster.network.node_bandwidth / cluster.node.devices,
        "pod_ranks": np.inf,
        "oversubscription": 1.0,
        "link_latency": hop,
        "port_latency": hop,
        "host": told.host_s,
        "traffic": told.traffic,
        "exposed": EXPOSED,
        "tensor_exposed": 1.0,
        "gather": 1.0,
        "selective_matrix": kind.selective_matrix,
        "selective_attention": kind.selective_attention,
    }
    return Rates(**{name: np.float64(value) for name, value in numbers.items()})  # type: ignore[arg-type]
