"""The vectorised physics against a plain one: one layout at a time, with ordinary numbers."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest

from ridgeline.layout.layout import Layout
from ridgeline.machine.cluster import parse_devices
from ridgeline.model.catalogue import entry
from ridgeline.plan.constants import Shared, calibration, rates_of
from ridgeline.plan.memory import FRAGMENTATION, FRAMEWORK_BYTES, memory
from ridgeline.plan.quantities import Layouts, Rates, Task, task_of
from ridgeline.plan.search import Pricer
from ridgeline.plan.space import space


@dataclass(frozen=True)
class Plain:
    """One layout of one run, priced with Python's own numbers."""

    task: dict[str, float]
    rates: dict[str, float]
    shared: Shared
    layout: Layout

    def group(self, ranks: float, stride: float) -> tuple[float, float]:
        """Rate and latency of a ring of `ranks` that stand `stride` apart."""
        r = self.rates
        within = min(max(math.floor(r["node_ranks"] / stride), 1), ranks)
        if within >= ranks:
            rate = r["near"] if ranks * stride <= r["near_ranks"] else r["link"]
        else:
            port = r["port"]
            if ranks * stride > r["pod_ranks"]:
                port /= r["oversubscription"]
            rate = min(r["link"], port * within)
        hops = r["link_latency"] * (within - 1)
        hops += r["port_latency"] * (math.ceil(ranks / within) - 1)
        return rate, hops

    def gather(self, size: float, ranks: float, stride: float) -> float:
        """A ring all-gather of `size` bytes."""
        if ranks <= 1:
            return 0.0
        rate, latency = self.group(ranks, stride)
        return latency + size * (ranks - 1) / ranks / rate

    def product(self, m: float, n: float, k: float) -> float:
        """Seconds of one matrix product."""
        e = self.rates["edge"]
        arithmetic = 2 * m * n * k * (1 + e / m) * (1 + e / n) * (1 + e / k) / self.rates["matrix"]
        memory_s = self.task["weight_bytes"] * (m * k + k * n + m * n) / self.rates["memory"]
        return max(arithmetic, memory_s)

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch on one rank."""
        return self.layout.micro_batch * self.task["sequence"] / self.layout.context

    def block(self) -> dict[str, float]:
        """The dense block's forward and backward, and its parts."""
        t, r, layout = self.task, self.rates, self.layout
        tensor, rows, hidden = layout.tensor, self.rows, t["hidden"]
        width = t["heads"] * t["head_dim"] / tensor
        queries = (t["heads"] + 2 * t["kv_heads"]) * t["head_dim"] / tensor
        gates, ffn = t["mlp_matrices"] - 1, t["ffn"] / tensor
        matrix = self.product(rows, queries, hidden) + self.product(rows, hidden, width)
        matrix += self.product(rows, gates * ffn, hidden) + self.product(rows, hidden, ffn)
        narrow = min(1.0, t["head_dim"] / 128) ** self.shared.narrow_heads
        short = 1 + r["edge"] * layout.context / t["sequence"]
        attention = 2 * rows * t["sequence"] * width * short / (r["attention"] * narrow)
        smooth = rows * (20 * hidden / tensor + 4 * queries) + rows * ffn * 2 * (gates + 1)
        element = smooth * r["traffic"] / r["memory"]
        reduce = 2 * self.gather(rows * hidden * 2, tensor, 1)
        exchange = 2 * reduce * r["tensor_exposed"]
        values = rows * layout.context * 2 * t["kv_heads"] * t["head_dim"] / tensor * 2
        ring = self.gather(values, layout.context, tensor)
        context = max(ring - attention, 0) + r["exposed"] * min(ring, attention)
        again = {
            "none": (0.0, 0.0, 0.0),
            "selective": (r["selective_matrix"], r["selective_attention"], 1.0),
            "full": (1.0, 1.0, 1.0),
        }[layout.recompute]
        redo = again[0] * matrix + again[1] * attention + again[2] * element
        full = layout.recompute == "full"
        host = r["host"] * (1 + self.shared.host_growth * (tensor > 1))
        one = matrix + attention + element
        two = 2 * (matrix + element) + self.shared.attention_backward * attention

        def floor(device: float, launched: float) -> float:
            return float((device**3 + launched**3) ** (1 / 3))

        forward = floor(one + exchange + context, 0.28 * host)
        recomputed = floor(redo + (exchange + context) * full, 0.28 * host * full)
        backward = recomputed + floor(two + exchange + 2 * context, 0.44 * host)
        head = self.head()
        return {"forward": forward, "backward": backward, "matrix": matrix, "head": head}

    def head(self) -> float:
        """Logits and loss of a micro-batch."""
        t, e, rows = self.task, self.rates["edge"], self.rows
        width, hidden = t["vocab"] / self.layout.tensor, t["hidden"]
        each = 2 * rows * width * hidden * (1 + e / rows) * (1 + e / width) * (1 + e / hidden)
        loss = rows * width * 12 * self.rates["traffic"] / self.rates["memory"]
        busy = 3 * each / self.rates["matrix_16"] + loss
        launched = self.shared.head_host * self.rates["host"]
        return float((busy**3 + launched**3) ** (1 / 3))

    def parameters(self) -> float:
        """Of one layer on one rank."""
        t = self.task
        attention = 2 * t["hidden"] * t["head_dim"] * (t["heads"] + t["kv_heads"])
        mlp = t["mlp_matrices"] * t["hidden"] * t["ffn"]
        return (attention + mlp) / self.layout.tensor + 2 * t["hidden"]

    def embeddings(self) -> int:
        """Copies of the vocabulary's matrix on the rank that has most."""
        folded = self.layout.schedule in ("zbv", "dualpipev")
        return 2 if (self.layout.pipeline == 1 or folded) and not self.task["tied"] else 1

    def seconds(self) -> float:
        """The whole step."""
        t, r, layout = self.task, self.rates, self.layout
        replicas = layout.data * layout.context
        group = layout.shard_group or replicas
        stride, pp, v = layout.tensor, layout.pipeline, layout.interleave
        micro_batches = t["global_batch"] / (layout.data * layout.micro_batch)
        block, params = self.block(), self.parameters()
        gather = scatter = 0.0
        if layout.zero == 3:
            gather = self.gather(params * t["weight_bytes"], group, stride) / r["gather"]
        if layout.zero >= 2:
            scatter = self.gather(params * t["reduce_bytes"], group, stride) / r["gather"]

        def both(compute: float, communication: float) -> float:
            shorter = min(compute, communication)
            return max(compute, communication) + r["exposed"] * shorter

        forward = both(block["forward"], gather)
        backward = both(block["backward"], gather + scatter)
        most = math.ceil(t["layers"] / (pp * v)) * v
        least = math.floor(t["layers"] / (pp * v)) * v
        layer = forward + backward
        slowest = max(most * layer, (least if pp > 1 else most) * layer + block["head"])
        through = t["layers"] * layer + block["head"]
        late = min(block["matrix"], backward)
        soon = backward - late
        idle = {
            "zbh1": forward + soon - late,
            "izb": forward + soon - late,
            "zbv": max(soon, late, 2 * (soon - late)),
            "dualpipev": max(forward + soon, 2 * soon) - late,
        }
        left = idle.get(layout.schedule, layer) / layer
        busy = micro_batches * slowest + (through - slowest) / v * max(left, 0.0)
        embedding = t["vocab"] * t["hidden"] / layout.tensor
        owned = most * params + embedding * self.embeddings()
        weights = self.gather(owned * t["weight_bytes"], group, stride)
        gradients = self.gather(owned * t["reduce_bytes"], replicas, stride)
        joins = self.gather(owned / group * t["reduce_bytes"], replicas / group, stride * group)
        reduction = (2 * gradients, gradients + weights, 2 * joins + weights, 2 * joins)[
            layout.zero
        ]
        window = (min(pp, micro_batches) if v > 1 else 1) * most * backward
        data = max(reduction - window, 0) + r["exposed"] * min(reduction, window)
        optimizer = owned / (group if layout.zero else 1) * 32 / r["memory"]
        sends = 0.0
        if pp > 1:
            rate, latency = self.group(2, stride * replicas)
            message = self.rows * t["hidden"] * 2 / layout.tensor
            sends = 2 * micro_batches * v * (latency + message / rate)
        total = busy + data + optimizer + sends
        nodes = max(layout.world / r["node_ranks"], 1)
        return total * (1 + self.shared.jitter * math.sqrt(2 * math.log(nodes)))

    def bytes(self) -> float:
        """Memory of the fullest device."""
        t, layout, rows = self.task, self.layout, self.rows
        group = layout.shard_group or layout.data * layout.context
        pp, v, params = layout.pipeline, layout.interleave, self.parameters()
        layers = math.ceil(t["layers"] / (pp * v)) * v
        embedding = t["vocab"] * t["hidden"] / layout.tensor
        owned = layers * params + embedding * self.embeddings()
        biggest = max(params, embedding)
        states = owned * t["weight_bytes"] * (layout.zero < 3)
        states += owned * t["gradient_bytes"] / (group if layout.zero >= 2 else 1)
        states += owned * t["master_bytes"] / (group if layout.zero >= 1 else 1)
        states += 2 * biggest * t["weight_bytes"] * (layout.zero == 3)
        states += biggest * t["gradient_bytes"] * (layout.zero >= 2)
        hidden = 2 * rows * t["hidden"] / layout.tensor
        queries = 2 * rows * (t["heads"] + 2 * t["kv_heads"]) * t["head_dim"] / layout.tensor
        out = 2 * rows * t["heads"] * t["head_dim"] / layout.tensor
        gates, inner = t["mlp_matrices"] - 1, 2 * rows * t["ffn"] / layout.tensor
        messages = 4 * 2 * rows * t["hidden"] * (layout.tensor > 1)
        whole = 4 * hidden + queries + out + 4 * rows * t["heads"] / layout.tensor
        whole += 2 * gates * inner + 2 * hidden * (layout.tensor - 1)
        some = 3 * hidden + queries + gates * inner + messages
        kept = {"none": whole, "selective": some, "full": hidden}[layout.recompute]
        live = max(whole - kept, 0) + 2 * gates * inner + 2 * hidden
        micro_batches = t["global_batch"] / (layout.data * layout.micro_batch)
        warm = {"gpipe": math.inf, "zbv": 2 * pp, "dualpipev": 2 * pp + 1}.get(
            layout.schedule, pp * v + pp - 1 if v > 1 else pp
        )
        first = kept * layers / v * min(micro_batches * v, warm)
        looped = (v - 1) * pp + 1 if v > 1 else 1
        last_warm = looped if layout.schedule == "1f1b" else warm
        last = kept * layers / v * min(micro_batches * v, last_warm)
        if layout.schedule in ("zbh1", "zbv"):
            half = gates * inner + queries + 2 * hidden * (layout.tensor + 1)
            last += half * layers / v * (min(micro_batches * v, warm) - 1)
        logits = rows * t["logit_bytes"] + min(rows, 2048) * t["chunk_logit_bytes"]
        logits *= t["vocab"] / layout.tensor
        used = states + max(first + live, last + max(logits, live))
        return used * (1 + FRAGMENTATION) + FRAMEWORK_BYTES


def plain_of(task: Task, rates: Rates, layout: Layout) -> Plain:
    """The plain twin of vectorised inputs."""
    numbers = {name: float(value) for name, value in task.__dict__.items()}
    return Plain(
        numbers, {k: float(v) for k, v in rates.__dict__.items()}, calibration().shared, layout
    )


@pytest.mark.parametrize(
    ("model", "machine", "sequence", "batch", "seed"),
    [
        ("llama3.1-405b", "2048xH100", 8192, 512, 1),
        ("frontier-1t", "3072xFrontier", 2048, 9600, 2),
        ("llama2-7b", "64xA100", 4096, 256, 3),
        ("gpt3-175b", "1536xLlama 3 cluster", 2048, 1536, 4),
    ],
)
def test_random_members_of_the_space_equal_the_plain_physics(
    model: str, machine: str, sequence: int, batch: int, seed: int
) -> None:
    devices, cluster = parse_devices(machine)
    shape = entry(model).shape
    task = task_of(shape, sequence, batch)
    arrays = rates_of([cluster], ["ridgeline"], ["bf16"], [False], calibration())
    rates = Rates(**{k: np.asarray(v[0]) for k, v in arrays.__dict__.items()})
    everything = space(shape, sequence, batch, devices)
    pricer = Pricer(task, rates, calibration().shared, everything)
    draw = random.Random(seed)
    chunks = list(everything.chunks())
    for _ in range(250):
        chunk = draw.choice(chunks)
        row = np.array([draw.randrange(chunk.count)])
        one: Layouts = chunk.take(row)
        plain = plain_of(task, rates, one.layout(0, "bf16"))
        assert pricer.step(one).total[0] == pytest.approx(plain.seconds(), rel=1e-9)
        assert memory(task, rates, one).total[0] == pytest.approx(plain.bytes(), rel=1e-9)
