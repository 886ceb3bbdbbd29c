"""The planner's entries in a `Ledger`: memory by stage, seconds by cause, bytes sent by axis."""

from __future__ import annotations

from collections.abc import Mapping

from ridgeline.ledger import Ledger, SentBytes, StepSeconds
from ridgeline.ledger import Memory as StageMemory
from ridgeline.plan.memory import Memory
from ridgeline.plan.step import Step

CAUSES = (
    "compute", "tensor", "context", "expert", "pipeline", "data", "bubble", "optimizer", "host",
)  # fmt: skip
AXES = ("tensor", "pipeline", "data", "context", "expert")
PARTS = ("weights", "gradients", "optimizer", "activations", "temporary", "framework", "total")
SOURCES = {
    "memory.weights_bytes": "2 bytes per parameter of the stage (arXiv:1910.02054)",
    "memory.gradients_bytes": "4 bytes per parameter, over the shards from ZeRO-2 on",
    "memory.optimizer_bytes": "master weight and two moments, over the shards from ZeRO-1 on",
    "memory.activations_bytes": "saved tensors times micro-batches in flight (arXiv:2205.05198)",
    "memory.temporary_bytes": "gathered layers, logits, one layer's backward pass",
    "memory.framework_bytes": "2 GiB but on a CPU, and 3%: assumed",
    "seconds.compute_s": "matrix products, attention, element-wise work: plan/block.py",
    "seconds.tensor_s": "ring all-reduces (arXiv:1909.08053)",
    "seconds.context_s": "ring of keys and values behind attention",
    "seconds.expert_s": "all-to-all to the experts and back",
    "seconds.pipeline_s": "sends between stages",
    "seconds.data_s": "ZeRO's gathers and reductions that compute does not hide",
    "seconds.bubble_s": "fill of the pipeline and its slowest stage (arXiv:2104.04473)",
    "seconds.optimizer_s": "32 bytes per owned parameter through memory",
    "seconds.host_s": "launching kernels, and the slowest of many nodes",
    "seconds.total_s": "the slowest stage's micro-batches and the pipeline's fill: plan/step.py",
    "flops_per_device": "matrix products and causal attention: model/counts.py",
    "tokens_per_s": "the global batch over the step",
    "mfu": "model FLOPs over the step and the device's peak",
    "energy_j": "power of devices and nodes over the run, docs/planner.md",
    "money": "rent of all devices over the run, failures included where they are known",
    "sent.tensor_bytes": "rings per layer and pass, and at the ends: plan/program.py",
    "sent.pipeline_bytes": "outputs and gradients of each chunk and micro-batch",
    "sent.data_bytes": "ring reductions once per step, and ZeRO's gathers per micro-batch",
    "sent.context_bytes": "keys and values round the ring, and their gradients",
    "sent.expert_bytes": "tokens to their experts and back, spread evenly",
}
"""What each term is computed from."""


def ledger_of(
    steps: Step,
    sending: Mapping[str, float],
    stages: Memory,
    row: int,
    flops_per_device: float,
    **known: float | str | None,
) -> Ledger:
    """The predicted ledger of one layout: row `row` of `steps`, and `stages` first to last.

    `known`: further terms of the ledger, such as `mfu`.
    """
    # differences of nearly equal times may come out a rounding below zero
    seconds = {f"{name}_s": max(0.0, float(getattr(steps, name)[row])) for name in CAUSES}
    seconds["host_s"] += float(steps.jitter[row])
    memory = tuple(
        StageMemory(**{f"{name}_bytes": float(getattr(stages, name)[stage]) for name in PARTS})
        for stage in range(len(stages.total))
    )
    return Ledger.model_validate(
        {
            "witness": "plan",
            "memory": memory,
            "seconds": StepSeconds(total_s=float(steps.total[row]), **seconds),
            "sent": SentBytes(**{f"{name}_bytes": sending[name] for name in AXES}),
            "flops_per_device": flops_per_device,
            "sources": SOURCES,
            **known,
        }
    )
