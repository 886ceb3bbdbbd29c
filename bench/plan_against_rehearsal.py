"""What the planner's formulas say of a run, against what its program does.

    python bench/plan_against_rehearsal.py [words of a layout or model ...]

Both ledgers of each run side by side: FLOPs per device, bytes sent by the axis that differs most,
and memory of the stage that needs most, by component. Differences are shares of the rehearsed
value; a component's are shares of the stage's tensors where it is less than a tenth of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from ridgeline.layout.layout import Layout
from ridgeline.ledger import Ledger, Memory
from ridgeline.model.catalogue import entry
from ridgeline.plan.plan import price
from ridgeline.plan.question import question_of_run
from ridgeline.rehearse.rehearse import rehearse
from ridgeline.run import Run, make_run

PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")
AXES = ("tensor", "pipeline", "data", "context", "expert")
SMALL = 0.1
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama2-7b": ({"layers": 8}, 4096),
    "gpt2-xl": ({"layers": 8, "vocab": 50304}, 1024),
    "llama3.1-8b": ({"layers": 8}, 8192),
    "mixtral-8x7b": ({"layers": 4}, 4096),
    "frontier-175b": ({"layers": 8}, 2048),
}
"""Fewer layers than published, which traces sooner, and the length of a sequence."""
LAYOUTS = (
    ("llama2-7b", "mb1 fp32", 2),
    ("llama2-7b", "mb1 bf16", 2),
    ("llama2-7b", "dp4 mb1 zero1 bf16", 4),
    ("llama2-7b", "dp8 mb2 zero2 full bf16", 2),
    ("llama2-7b", "dp8 mb1 zero3 selective bf16", 2),
    ("llama2-7b", "dp2 tp4 mb1 zero1 bf16", 4),
    ("llama2-7b", "tp8 mb1 full bf16", 2),
    ("llama2-7b", "dp2 tp2 pp2 mb1 zero1 selective bf16", 4),
    ("llama2-7b", "dp2 pp4 mb1 zero1 fp16", 8),
    ("gpt2-xl", "dp8 mb4 bf16", 1),
    ("gpt2-xl", "dp2 mb4 zero3 full bf16", 2),
    ("gpt2-xl", "dp4 mb4 zero2 selective bf16", 2),
    ("gpt2-xl", "pp2 mb4 zbv v2 bf16", 8),
    ("gpt2-xl", "dp2 pp4 mb2 zero1 bf16", 8),
    ("gpt2-xl", "pp4 mb2 gpipe full bf16", 4),
    ("llama3.1-8b", "dp8 mb1 zero3 selective bf16", 2),
    ("llama3.1-8b", "dp4 tp2 mb1 zero2 bf16", 2),
    ("llama3.1-8b", "dp2 cp2 mb1 zero1 bf16", 2),
    ("llama3.1-8b", "cp2 tp4 mb1 zero1 full bf16", 2),
    ("llama3.1-8b", "tp4 pp4 mb1 v2 bf16", 8),
    ("llama3.1-8b", "dp2 tp2 pp2 mb1 zbh1 zero1 bf16", 4),
    ("llama3.1-8b", "dp4 cp2 mb1 zero3/4 full bf16", 2),
    ("mixtral-8x7b", "dp8 ep8 mb1 zero1 bf16", 2),
    ("mixtral-8x7b", "dp8 ep4 mb1 zero3 full bf16", 2),
    ("mixtral-8x7b", "dp4 ep4 tp2 mb1 zero1 bf16", 2),
    ("mixtral-8x7b", "dp2 pp2 ep2 mb1 zero1 selective bf16", 4),
    ("mixtral-8x7b", "dp2 mb1 zero3 full bf16", 2),
    ("frontier-175b", "tp8 mb1 zero1 dp2 full bf16", 4),
    ("frontier-175b", "dp2 tp4 pp4 mb1 zero1 full fp16", 8),
    ("frontier-175b", "dp2 tp8 pp4 mb1 zero1 selective bf16", 4),
    ("frontier-175b", "tp8 pp8 mb1 bf16", 16),
    ("frontier-175b", "tp4 pp4 mb2 v2 full bf16", 8),
    ("frontier-175b", "dp8 tp4 mb1 zero3 full bf16", 2),
)
"""Model, layout, micro-batches of a step."""


def run_of(model: str, sentence: str, micro_batches: int) -> Run:
    """A run of the model, cut short, on as many H100 as the layout says."""
    changes, sequence = MODELS[model]
    layout = Layout.model_validate(sentence)
    shape = entry(model).shape.model_copy(update=changes)
    return make_run(
        {
            "name": "compared",
            "model": shape.model_dump(exclude_none=True),
            "layout": sentence,
            "data": {
                "folder": "prepared",
                "sequence": sequence,
                "corpora": [{"name": "none", "sources": ["none"]}],
            },
            "cluster": {"device": "H100-SXM-80GB", "devices": layout.world},
            "schedule": {"global_batch": micro_batches * layout.data * layout.micro_batch},
            "budget": {"steps": 1000},
        }
    )


def ledgers_of(run: Run) -> tuple[Ledger, Ledger]:
    """Planned and rehearsed."""
    assert isinstance(run.layout, Layout)
    planned = price(question_of_run(run), [run.layout])[0].ledger
    return planned, rehearse(run).ledger


def share(planned: float | None, rehearsed: float | None, least: float = 0.0) -> float:
    """The difference as a share of what was rehearsed, or of `least` where that is more."""
    assert planned is not None and rehearsed is not None
    whole = max(rehearsed, least)
    return (planned - rehearsed) / whole if whole else float(planned > 0)


def fullest(stages: tuple[Memory, ...]) -> int:
    """The stage that needs most."""
    return max(range(len(stages)), key=lambda stage: stages[stage].total_bytes or 0.0)


def differences(planned: Ledger, rehearsed: Ledger) -> dict[str, float]:
    """Signed shares, by "flops", "sent <axis>" and, of the fullest stage, "memory <component>"."""
    stage = fullest(rehearsed.memory)
    ours, theirs = planned.memory[stage], rehearsed.memory[stage]
    tensors = sum(getattr(theirs, f"{part}_bytes") for part in PARTS)
    memory = {
        f"memory {part}": share(
            getattr(ours, f"{part}_bytes"), getattr(theirs, f"{part}_bytes"), SMALL * tensors
        )
        for part in PARTS
    }
    memory["memory all"] = share(sum(getattr(ours, f"{part}_bytes") for part in PARTS), tensors)
    sent = {
        f"sent {axis}": share(
            getattr(planned.sent, f"{axis}_bytes"), getattr(rehearsed.sent, f"{axis}_bytes")
        )
        for axis in AXES
    }
    flops = share(planned.hardware_flops_per_device, rehearsed.hardware_flops_per_device)
    return {"flops": flops, **sent, **memory}


def chosen(words: list[str]) -> Iterator[tuple[str, str, int]]:
    """The cases whose line has all words."""
    return (case for case in LAYOUTS if all(word in " ".join(map(str, case)) for word in words))


def worst(found: dict[str, float], prefix: str) -> tuple[str, float]:
    """The largest of some differences, and whose it is."""
    name = max((each for each in found if each.startswith(prefix)), key=lambda n: abs(found[n]))
    return name.partition(" ")[2], found[name]


def main() -> None:
    """Print a line per run, and the largest differences of all."""
    most: dict[str, float] = {}
    count, begun = 0, time.perf_counter()
    for model, sentence, micro_batches in chosen(sys.argv[1:]):
        planned, rehearsed = ledgers_of(run_of(model, sentence, micro_batches))
        found = differences(planned, rehearsed)
        axis, bytes_sent = worst(found, "sent")
        part, memory = worst(found, "memory")
        print(
            f"{model:14}{sentence:40}{micro_batches:4}  FLOPs {found['flops']:+8.3%}  "
            f"sent {bytes_sent:+8.2%} {axis if bytes_sent else '':9}"
            f"memory {found['memory all']:+7.2%}, {memory:+8.2%} {part}",
            flush=True,
        )
        count += 1
        for name, value in found.items():
            most[name] = max(most.get(name, 0.0), abs(value))
    print(f"{count} layouts in {time.perf_counter() - begun:.0f} s; largest differences:")
    print("  " + ", ".join(f"{name} {value:.2%}" for name, value in most.items()))


if __name__ == "__main__":
    main()
