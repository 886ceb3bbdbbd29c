"""The effective rates of a machine that `ridgeline probe` measured: no calibration in between.

Products, attention, memory and links are measured alone. What a stack adds (its host's work,
element-wise traffic, the loss, the optimizer) is what makes the planner's own formulas give the
times back that whole layers, the ends and the update of a small decoder took.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ridgeline.errors import MachineError
from ridgeline.layout.layout import Layout
from ridgeline.machine.cluster import Cluster
from ridgeline.machine.device import PROBED_HEAD_DIM, Decoder, Effective
from ridgeline.model.shape import ModelShape
from ridgeline.plan.block import block
from ridgeline.plan.constants import calibration, peak
from ridgeline.plan.quantities import Array, Layouts, Rates, task_of

STACK = "ridgeline"
EXPOSED = 1.0
"""Cores that reduce gradients do not compute meanwhile (assumed)."""
JOIN = 1.0
"""The host is the device: its work adds to the kernels'."""
ONE = np.asarray(1.0)


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
        "host": 0.0,
        "traffic": 0.0,
        "exposed": EXPOSED,
        "tensor_exposed": 1.0,
        "gather": 1.0,
        "join": JOIN,
        "loss_traffic": 0.0,
        "update": told.update_s,
        "selective_matrix": kind.selective_matrix,
        "selective_attention": kind.selective_attention,
    }
    bare = Rates(**{name: np.float64(value) for name, value in numbers.items()})  # type: ignore[arg-type]
    return _with_stack(bare, told, precision)


def _with_stack(bare: Rates, told: Effective, precision: str) -> Rates:
    """`bare`, which has neither host, traffic nor loss, with those of the probed decoder.

    Passes are linear in all three, since `join` is 1: what one second of host, one byte of traffic
    and one byte of loss add to them divides what the measured passes took beyond the bare ones.
    """
    bare_layer_s, bare_ends_s = _passes(bare, told.decoder, precision)
    hosted_layer_s, hosted_ends_s = _passes(replace(bare, host=ONE), told.decoder, precision)
    smooth_layer_s, _ = _passes(replace(bare, traffic=ONE), told.decoder, precision)
    _, lossy_ends_s = _passes(replace(bare, loss_traffic=ONE), told.decoder, precision)
    beyond = np.array(told.layer_s) - bare_layer_s
    costs = np.stack([hosted_layer_s - bare_layer_s, smooth_layer_s - bare_layer_s], axis=1)
    host, traffic = _not_negative(costs, beyond, np.array(told.layer_s))
    ends_s = bare_ends_s[-1] + host * (hosted_ends_s - bare_ends_s)[-1]
    loss = max((told.ends_s - ends_s) / (lossy_ends_s - bare_ends_s)[-1], 0.0)
    return replace(bare, host=host, traffic=traffic, loss_traffic=np.asarray(loss))


def _passes(rates: Rates, decoder: Decoder, precision: str) -> tuple[Array, Array]:
    """Seconds of a layer and of the ends, forward and backward, with few rows and many."""
    shape = ModelShape(
        layers=1, hidden=decoder.hidden, heads=decoder.heads, head_dim=PROBED_HEAD_DIM,
        ffn_hidden=decoder.inner, vocab=decoder.vocab, max_sequence=decoder.sequence,
    )  # fmt: skip
    task = task_of(shape, decoder.sequence, 1, precision=precision)
    keys = Layouts.of([Layout(micro_batch=rows // decoder.sequence) for rows in decoder.rows])
    priced = block(task, rates, calibration().shared, keys)
    return priced.forward + priced.backward, priced.head


def _not_negative(costs: Array, beyond: Array, whole: Array) -> tuple[Array, Array]:
    """The two numbers not below 0 by which the columns of `costs` best sum up to `beyond`.

    Best by the squares of the errors relative to `whole`; one number is 0 where both rows cannot be
    met without a negative one.
    """
    costs, beyond = costs / whole[:, None], beyond / whole
    both = np.linalg.solve(costs, beyond)
    if np.all(both >= 0):
        return both[0], both[1]
    alone = np.maximum(costs.T @ beyond / np.sum(costs**2, axis=0), 0.0)
    errors = np.sum((costs * alone - beyond[:, None]) ** 2, axis=0)
    kept = np.where(errors == errors.min(), alone, 0.0)
    return kept[0], kept[1]
