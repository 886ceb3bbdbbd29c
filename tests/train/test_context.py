"""Context parallelism is attention over the whole sequence, in value and in every gradient.

Four processes are started once, by this file as a script, and run every case: over all four or
as two groups of two. Axes: B batch, L the sequence, N query heads, K key/value heads, H head_dim.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

from ridgeline.layout.context import ContextKind, context_positions
from ridgeline.train.context import ContextAttention

RANKS = 4
SEQUENCE = 24
HEAD_DIM = 8
NAMES = ("output", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    context: int
    kind: ContextKind
    heads: int
    kv_heads: int
    batch: int
    placed: ContextKind
    dtype: str = "float32"

    def __str__(self) -> str:
        words = (self.kind, self.heads, self.kv_heads, self.batch, self.placed, self.dtype)
        return f"cp{self.context} " + " ".join(map(str, words))


SHAPES: list[tuple[ContextKind, int, int, int]] = [
    ("heads", 4, 4, 1),
    ("heads", 8, 4, 2),  # grouped queries
    ("heads", 8, 2, 2),  # with four ranks: fewer key/value heads than ranks
    ("heads", 4, 1, 1),
    ("ring", 4, 4, 1),
    ("ring", 6, 2, 2),
    ("ring", 3, 3, 2),  # heads that neither two nor four ranks divide
    ("ring", 3, 1, 1),
]
EQUAL = [
    Case(context, kind, heads, kv_heads, batch, kind)
    for context in (2, RANKS)
    for kind, heads, kv_heads, batch in SHAPES
]
KINDS: list[tuple[ContextKind, ContextKind]] = [("heads", "ring"), ("ring", "heads")]
BF16 = [Case(RANKS, kind, 8, 4, 2, kind, "bfloat16") for kind, _ in KINDS]
MISPLACED = [Case(ranks, kind, 4, 4, 1, placed) for ranks in (2, RANKS) for kind, placed in KINDS]


def whole_tensors(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(case.batch, SEQUENCE, heads, HEAD_DIM, generator=generator).to(
            getattr(torch, case.dtype)
        )
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]


def expected(case: Case) -> list[Tensor]:
    """Output and gradients of plain attention over the whole sequence, in float64."""
    *inputs, grad_BLNH = (x.double() for x in whole_tensors(case))
    q_BLNH, k_BLKH, v_BLKH = (x.requires_grad_() for x in inputs)
    q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    out_BNLH = functional.scaled_dot_product_attention(
        q_BNLH, k_BKLH, v_BKLH, is_causal=True, enable_gqa=True
    )
    out_BLNH = out_BNLH.transpose(1, 2)
    return [out_BLNH, *torch.autograd.grad(out_BLNH, (q_BLNH, k_BLKH, v_BLKH), grad_BLNH)]


def differences(case: Case, group: dist.ProcessGroup) -> list[float]:
    """The largest differences of this rank's output, dq, dk and dv from those expected."""
    ranges = context_positions(SEQUENCE, case.context, group.rank(), case.placed)
    positions = torch.cat([torch.arange(held.start, held.stop) for held in ranges])
    *inputs, grad_BLNH = (x[:, positions] for x in whole_tensors(case))
    q_BLNH, k_BLKH, v_BLKH = (x.requires_grad_() for x in inputs)
    out_BLNH = ContextAttention(group, case.kind)(q_BLNH, k_BLKH, v_BLKH)
    gradients = torch.autograd.grad(out_BLNH, (q_BLNH, k_BLKH, v_BLKH), grad_BLNH)
    assert {x.dtype for x in (out_BLNH, *gradients)} == {q_BLNH.dtype}
    whole = [x[:, positions] for x in expected(case)]
    return [
        (mine.double() - reference).detach().abs().max().item()
        for mine, reference in zip((out_BLNH, *gradients), whole, strict=True)
    ]


def run_cases(rank: int, folder: Path) -> None:
    """What one of the processes does."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    pairs = [dist.new_group(list(ranks)) for ranks in ((0, 1), (2, 3))]
    groups = {2: pairs[rank // 2], RANKS: dist.group.WORLD}
    found = {}
    for case in EQUAL + BF16 + MISPLACED:
        group = groups[case.context]
        assert isinstance(group, dist.ProcessGroup)
        found[str(case)] = differences(case, group)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Of each case, by rank, the largest difference of each result."""
    folder = tmp_path_factory.mktemp("context")
    words = [sys.executable, __file__, str(folder)]
    script = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = script.communicate(timeout=120)
        assert script.returncode == 0, said
    finally:  # with its four processes, should they hang
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    cases = map(str, EQUAL + BF16 + MISPLACED)
    return {case: [dict(zip(NAMES, by[case], strict=True)) for by in ranks] for case in cases}


@pytest.mark.parametrize("case", EQUAL, ids=str)
def test_output_and_gradients_are_those_of_the_whole_sequence(
    case: Case, found: dict[str, list[dict[str, float]]]
) -> None:
    for differs in found[str(case)]:
        assert max(differs.values()) < 1e-5, differs


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_differs_by_its_own_rounding(
    case: Case, found: dict[str, list[dict[str, float]]]
) -> None:
    """Half a unit in the last of 8 bits is 2^-9 of a value; a gradient passes a few roundings."""
    largest = dict(zip(NAMES, (x.abs().max().item() for x in expected(case)), strict=True))
    for differs in found[str(case)]:
        assert all(differs[name] < 2**-6 * largest[name] for name in NAMES), (differs, largest)


@pytest.mark.parametrize("case", MISPLACED, ids=str)
def test_tokens_held_by_the_other_kinds_rule_are_noticed(
    case: Case, found: dict[str, list[dict[str, float]]]
) -> None:
    for name in NAMES:
        assert max(differs[name] for differs in found[str(case)]) > 0.1


if __name__ == "__main__":
    # A fork, since nothing has run here yet: torch is imported once, and not in the tests' process.
    arguments = (Path(sys.argv[1]),)
    start_processes(run_cases, arguments, RANKS, start_method="fork")  # type: ignore[no-untyped-call]
