"""Silent corruption: a flipped bit is found and named, and a device that computes wrongly."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import ridgeline
from ridgeline.errors import CorruptionError
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Optimizer, Run
from ridgeline.train import corruption
from ridgeline.train.build import make_job
from ridgeline.train.checkpoint import model_tensors
from ridgeline.train.corruption import checksum, compare_copies, self_test, wrong_products
from ridgeline.train.loop import train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.optimizer import adamw
from ridgeline.train.telemetry import Observation
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group, work

MakeRun = Callable[..., Run]
HOST = socket.gethostname()
EXPERTS = {
    "layers": 2,
    "experts": {"count": 4, "top_k": 2, "ffn_hidden": 16, "shared": 1, "bias_rate": 0.1},
}


class Faulty(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A device whose products have one wrong bit, the last of one number."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            flip(out, 5)
        return out


def flip(tensor: Tensor, at: int) -> None:
    """Flip the last bit of a number."""
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.detach().view(-1).view(kind)[at] ^= 1


def here(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


Answers = list[tuple[int, list[str]]]


def compared(run: Run, rank: int, names: list[str]) -> tuple[int, list[str]]:
    """As each rank: how many tensors it has copies of, and what is said when a bit of each of
    `names` in turn is flipped on `rank`."""
    totals: list[Tensor] = []

    def observe(seen: Observation) -> None:
        totals[:] = seen.loss, seen.grad_norm

    said = []
    with process_group() as (device, control):
        job = make_job(run, Decoder, token_loss, adamw, device, control, lambda: False)
        train_loop(job, Progress(), observe, lambda *_: (False, None))
        count = compare_copies(job, totals, control)
        held = {name: t for chunk in job.chunks for name, t in model_tensors(chunk).items()}
        held |= {"the loss": totals[0]}
        for name in names:
            mine = name in held and int(os.environ["RANK"]) == rank
            if mine:
                flip(here(held[name]), 0)
            with pytest.raises(CorruptionError) as error:
                compare_copies(job, totals, control)
            said.append(error.value.rule)
            if mine:
                flip(here(held[name]), 0)
        assert compare_copies(job, totals, control) == count
    return count, said


NORM, GATE = "model.norm.weight", "model.blocks.0.mlp.gate.weight"
ROUTED = "model.blocks.1.mlp.experts.gate.weight"
BIAS = "model.blocks.1.mlp.selection_bias"


@pytest.mark.parametrize(
    ("layout", "model", "rank", "found"),
    [
        ("dp4 mb2", {}, 2, {NORM: [2], "the loss": [2]}),
        ("dp2 tp2 mb2 zero1", {}, 1, {NORM: [0, 1], "the loss": [1]}),
        ("dp2 tp2 mb2", {}, 3, {NORM: [3], GATE: [1, 3]}),
        ("dp4 mb2 zero3/2", {}, 1, {NORM: [1, 3]}),
        ("dp2 pp2 mb2", {}, 3, {NORM: [2, 3]}),
        ("dp4 ep2 mb2", EXPERTS, 2, {ROUTED: [0, 2], BIAS: [2]}),
    ],
)
def test_a_flipped_bit_is_named_with_its_ranks_by_all_of_them(
    layout: str,
    model: dict[str, Any],
    rank: int,
    found: dict[str, list[int]],
    tiny_run: MakeRun,
    pool: Pool,
) -> None:
    run = tiny_run(layout=f"{layout} fp32", model=model, budget={"steps": 1})
    answers: Answers = pool.run(compared, (run, rank, list(found)), 4)
    assert all(count > 2 for count, _ in answers)
    for said in zip(*(rules for _, rules in answers), strict=True):
        assert len(set(said)) == 1
    for (name, ranks), rule in zip(found.items(), answers[0][1], strict=True):
        who = ", ".join(f"rank {each} on {HOST}" for each in ranks)
        rest = "the other 3 holders" if len(ranks) == 1 else "one another"
        assert rule == f"copies must be alike bit by bit. {name}: {who} unlike {rest}"


def test_where_nothing_is_held_twice_the_totals_alone_are_compared(
    tiny_run: MakeRun, pool: Pool
) -> None:
    run = tiny_run(layout="dp4 mb2 zero3 fp32", budget={"steps": 1})
    answers: Answers = pool.run(compared, (run, 0, ["the loss"]), 4)
    assert [count for count, _ in answers] == [2] * 4


def decaying(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW on a machine that flips a bit of rank 1 in the third step."""
    optimizer, steps = adamw(model, settings), iter(range(1, 99))

    def after(*_: Any) -> None:
        if next(steps) == 3 and os.environ["RANK"] == "1":
            flip(here(next(model.parameters())), 0)

    optimizer.register_step_post_hook(after)
    return optimizer


def test_a_run_ends_before_what_was_corrupted_is_saved(tiny_run: MakeRun, pool: Pool) -> None:
    run = tiny_run(
        layout="dp4 mb2 fp32",
        checkpoint={"every_steps": 2},
        faults={"compare_every_steps": 100},  # and before each checkpoint
    )
    run.path.mkdir(parents=True)
    with pytest.raises(CorruptionError, match=rf"rank 1 on {HOST} unlike the other 3 holders"):
        pool.run(work, (run, Decoder, token_loss, decaying), 4)
    kept = [path.name for path in (run.path / "checkpoints").iterdir()]
    assert kept == ["step-00000002"]


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40),
    data=st.data(),
)
def test_a_checksum_sees_every_bit_and_every_place(values: list[int], data: st.DataObject) -> None:
    words = torch.tensor(values, dtype=torch.int32)
    before = corruption.PIECE
    corruption.PIECE = 16
    try:
        one = checksum(words.view(torch.float32))
        assert torch.equal(one, checksum(words.clone().view(torch.float32)))
        at, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 30))
        flipped = words.clone()
        flipped[at] ^= 1 << bit
        assert not torch.equal(one, checksum(flipped))
        turned = words.roll(1)
        assert torch.equal(one, checksum(turned)) == torch.equal(words, turned)
    finally:
        corruption.PIECE = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_exact_product_is_exact_in_every_precision_and_one_wrong_bit_is_counted(
    dtype: torch.dtype,
) -> None:
    assert wrong_products(torch.device("cpu"), dtype) == 0
    if dtype != torch.float64:
        with Faulty():
            assert wrong_products(torch.device("cpu"), dtype) == corruption.ROUNDS


def self_tested(rank: int) -> str:
    """As each rank: what the self-test says when the device of `rank` computes wrongly."""
    layout = Layout.model_validate("dp2 bf16")
    with process_group() as (device, control):
        self_test(device, layout, control)
        with pytest.raises(CorruptionError) as error:
            if int(os.environ["RANK"]) == rank:
                with Faulty():
                    self_test(device, layout, control)
            else:
                self_test(device, layout, control)
    return error.value.rule


def test_a_wrong_device_is_named_by_rank_and_host_on_all_ranks(pool: Pool) -> None:
    rule = "numbers of an exact product that came out wrong: rank 1 on "
    assert pool.run(self_tested, (1,), 2) == [f"{rule}{HOST} ({corruption.ROUNDS})"] * 2


def test_a_run_on_a_wrong_device_ends_before_its_first_step(tiny_run: MakeRun) -> None:
    run = tiny_run()
    with Faulty(), pytest.raises(CorruptionError, match="the self-test of 1 devices"):
        ridgeline.train(run)
    assert not (run.path / "metrics.jsonl").exists()
