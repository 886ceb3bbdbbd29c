"""Experts spread over processes are the experts of one process; a router evens its load.

Run as a program, this file is four processes under gloo, which write what they got into a folder.
Axes: B batch, L sequence, D hidden, E experts.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ridgeline.model.decoder import make_mlp
from ridgeline.model.experts import MixtureOfExperts
from ridgeline.model.shape import ExpertShape, ModelShape
from ridgeline.torch_compat import shard
from ridgeline.train.checkpoint import model_tensors
from ridgeline.train.experts import (
    count_whole_sequences,
    divide_experts,
    mixtures,
    set_loss_scale,
    update_router_bias,
)

RANKS, BATCH, LENGTH, HIDDEN = 4, 4, 12, 16
CASES = ["ep2", "ep4", "ep4 crowded", "ep4 in parts"]
"""Expert parallel over 2 (each part held by two ranks and sharded over them) and over 4; all visits
to two experts, so that two ranks get none; and every sequence in four parts."""


def made() -> MixtureOfExperts:
    shape = ModelShape(
        layers=1, hidden=HIDDEN, heads=2, vocab=40,
        experts=ExpertShape(
            count=8, top_k=2, ffn_hidden=24, shared=1, routing="sigmoid", scale=1.5,
            balance_weight=4.0, bias_rate=0.01,
        ),
    )  # fmt: skip
    mixture = make_mlp(shape, 0)
    assert isinstance(mixture, MixtureOfExperts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return mixture


def step(mixture: MixtureOfExperts, case: str, x_BLD: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the tokens, moved bias; parameters keep their gradients."""
    if "crowded" in case:
        mixture.selection_bias[[1, 2]] = 9.0
    set_loss_scale([mixture], 1 / (BATCH * LENGTH))
    x_BLD = x_BLD.clone().requires_grad_()
    out_BLD = mixture(x_BLD)
    torch.autograd.backward(out_BLD.square().sum() / (BATCH * LENGTH))
    update_router_bias([mixture], over_ranks)
    assert x_BLD.grad is not None and mixture.visits.sum() == 0
    return {"out": out_BLD.detach(), "x": x_BLD.grad, "bias": mixture.selection_bias}


def over_ranks(visits_ME: Tensor) -> Tensor:
    dist.all_reduce(visits_ME)
    return visits_ME


def tokens() -> Tensor:
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(5))


def one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    for case in CASES:
        expert = int(case[2])
        mesh = init_device_mesh(
            "cpu", (RANKS // expert, expert, 1), mesh_dim_names=("replica", "expert", "tensor")
        )
        mixture = made()
        in_parts = "in parts" in case
        divide_experts(mixture, mesh)
        if in_parts:
            assert dist.group.WORLD is not None
            count_whole_sequences(mixture, [dist.group.WORLD])
        shard(mixture.experts, mesh["replica"], MixedPrecisionPolicy(), reshard=True)
        part_BLD = tokens().chunk(RANKS, dim=1 if in_parts else 0)[rank]
        found = step(mixture, case, part_BLD)
        for name, parameter in mixture.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            if isinstance(gradient, DTensor):
                found[name] = gradient.full_tensor()
            else:
                dist.all_reduce(gradient)
                found[name] = gradient
        whole: dict[str, Tensor] = {}
        for name, value in found.items():
            if name in ("out", "x"):
                parts = [torch.empty_like(value) for _ in range(RANKS)]
                dist.all_gather(parts, value.contiguous())
                value = torch.cat(parts, dim=1 if in_parts else 0)
            whole[name] = value
        save_file(whole, f"{folder}/{case}.{rank}.safetensors")
    dist.destroy_process_group()


def all_ranks(folder: str) -> int:
    """Fork the ranks, so that torch is imported once; the worst exit status."""
    context: Any = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(int(process.exitcode)) for process in processes)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that four processes wrote."""
    folder = tmp_path_factory.mktemp("four")
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    """A process group of this process alone."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_four_processes_are_one(case: str, four: Path, alone: None) -> None:
    """Outputs, gradients of tokens, router, experts and shared experts, and the moved bias."""
    mixture = made()
    expected = step(mixture, case, tokens())
    expected |= {n: p.grad for n, p in mixture.named_parameters() if p.grad is not None}
    assert len(expected) == 3 + 1 + 3 + 3
    for rank in range(RANKS):
        found = load_file(four / f"{case}.{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            apart = (found[name] - value).abs().max()
            assert float(apart) <= 1e-5 * float(value.abs().max()), name


def test_the_cases_hold_what_they_are_for(alone: None) -> None:
    """Crowded: only experts 1 and 2, on the first of four ranks and none on others; without the
    auxiliary loss the router's gradient is another."""
    mixture = made()
    mixture.selection_bias[[1, 2]] = 9.0
    mixture(tokens())
    assert mixture.visits.nonzero().flatten().tolist() == [1, 2]
    gradients = []
    for scale in (0.0, 1 / (BATCH * LENGTH)):
        mixture = made()
        set_loss_scale([mixture], scale)
        loss = mixture(tokens()).square().sum() / (BATCH * LENGTH)
        gradients.append(torch.autograd.grad(loss, mixture.router.weight)[0])
    assert (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[0].norm()


def test_a_bias_moves_by_its_rate_against_the_load(alone: None) -> None:
    mixture = made()
    mixture.visits.copy_(torch.tensor([7, 5, 5, 5, 5, 5, 5, 3]))  # the mean is 5
    update_router_bias([mixture], over_ranks)
    expected = torch.tensor([-0.01, 0, 0, 0, 0, 0, 0, 0.01])
    torch.testing.assert_close(mixture.selection_bias, expected)
    update_router_bias([mixture], over_ranks)  # nobody visited since
    torch.testing.assert_close(mixture.selection_bias, expected)


def test_a_bias_evens_out_a_skewed_router(alone: None) -> None:
    """From 41% of all visits for one of eight experts down to 15%; no weight moves."""
    mixture = made()
    x_BLD = tokens().repeat(8, 1, 1)
    x_BLD += torch.randn(x_BLD.shape, generator=torch.Generator().manual_seed(6))
    x_BLD[..., 0] = 1.0  # a part that all tokens share, and that the router likes unevenly
    with torch.no_grad():
        mixture.router.weight[:, 0] = torch.linspace(-3.0, 3.0, 8)
    crowding = []
    for _ in range(150):
        mixture(x_BLD)
        crowding.append(float(mixture.visits.max() / mixture.visits.sum()))
        update_router_bias([mixture], over_ranks)
    assert crowding[0] > 0.4
    assert max(crowding[-10:]) < 0.16


def test_a_model_without_experts_has_no_bias_to_move() -> None:
    """Without a process group: nothing is asked of other ranks."""
    dense = torch.nn.Linear(2, 2)
    assert mixtures([dense]) == []
    update_router_bias([dense], over_ranks)


def test_a_checkpoint_holds_the_bias_and_not_the_count_of_visits() -> None:
    names = set(model_tensors(made()))
    assert "model.selection_bias" in names and "model.experts.down.weight" in names
    assert "model.visits" not in names


if __name__ == "__main__":
    sys.exit(all_ranks(sys.argv[1]))
