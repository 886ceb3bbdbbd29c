"""AdamW and clipping against PyTorch's or a formula; the norm of gradients that lie divided."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ridgeline.errors import NotLearnt
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.run import Optimizer
from ridgeline.torch_compat import as_parameter_of, forget_meshes
from ridgeline.train.optimizer import LossScale, adamw, clip, totals

NOTHING = torch.zeros(())


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = Path(tmp_path_factory.mktemp("alone")) / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    forget_meshes()


def _parameters(seed: int, scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last has no gradient


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), limit=st.floats(0.01, 10))
def test_clipping_is_pytorchs(seed: int, scale: float, limit: float) -> None:
    ours, theirs = _parameters(seed, scale), _parameters(seed, scale)
    norm, loss = totals(ours, torch.tensor(2.5), Layout())
    clip(ours, norm, limit)
    expected = nn.utils.clip_grad_norm_(theirs, limit)
    torch.testing.assert_close(norm, expected)
    assert float(loss) == 2.5
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (reference.grad is None)
        if mine.grad is not None and reference.grad is not None:
            torch.testing.assert_close(mine.grad, reference.grad)


def test_a_limit_of_zero_leaves_gradients() -> None:
    parameters, untouched = _parameters(0, 100.0), _parameters(0, 100.0)
    clip(parameters, totals(parameters, NOTHING, Layout())[0], 0.0)
    for mine, before in zip(parameters[:3], untouched[:3], strict=True):
        assert mine.grad is not None
        assert before.grad is not None
        assert torch.equal(mine.grad, before.grad)


@pytest.mark.parametrize("most", [0.0, 0.5, 1e9])
def test_what_the_loss_was_scaled_by_is_divided_out(most: float) -> None:
    plain, scaled = _parameters(0, 1.0), _parameters(0, 1024.0)
    norm, _ = totals(plain, NOTHING, Layout())
    again, _ = totals(scaled, NOTHING, Layout())
    clip(plain, norm, most)
    clip(scaled, again / 1024, most, 1024.0)
    for mine, reference in zip(scaled[:3], plain[:3], strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_an_overflow_halves_the_loss_scale_and_leaves_the_step_out() -> None:
    scale = LossScale()
    start = scale.factor
    assert [scale.accepts(torch.tensor(x)) for x in (1.0, math.inf, math.nan, 0.0)] == [
        True, False, False, True,
    ]  # fmt: skip
    assert scale.factor == start / 4


def test_many_steps_without_overflow_double_the_loss_scale() -> None:
    scale = LossScale()
    start = scale.factor
    for _ in range(LossScale.PATIENCE - 1):
        scale.accepts(torch.ones(()))
    scale.accepts(torch.tensor(math.inf))  # the counting starts anew
    for _ in range(LossScale.PATIENCE - 1):
        scale.accepts(torch.ones(()))
    assert scale.factor == start / 2
    scale.accepts(torch.ones(()))
    assert scale.factor == start


def test_a_parameter_that_another_chunk_counts_is_clipped_and_not_counted() -> None:
    parameters = _parameters(0, 100.0)
    matrix, row, number = (float(p.grad.norm()) for p in parameters if p.grad is not None)
    norm, _ = totals(parameters, NOTHING, Layout(), repeated=parameters[0])
    assert float(norm) == pytest.approx(math.hypot(row, number))
    clip(parameters, norm, 1.0)
    assert parameters[0].grad is not None
    assert float(parameters[0].grad.norm()) == pytest.approx(matrix / math.hypot(row, number))


SHAPES = ((6, 4), (5, 3), (1, 2))
"""Of three matrices; halves of the second are uneven, of the third one is empty."""
BOTH: list[list[Placement]] = [
    [Replicate(), Replicate()],
    [Shard(0), Replicate()],
    [Replicate(), Shard(1)],
    [Replicate(), Shard(0)],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
]
"""How four ranks, two by two, may hold a matrix."""


def whole_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def divided_totals(layout: Layout) -> list[tuple[float, float]]:
    """As each of four ranks: (norm, summed loss) for every way to hold the matrices, and where they
    are plain tensors that each rank holds."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    found = []
    for placements in [*BOTH, None]:
        parameters = []
        for gradient in whole_gradients():
            parameter, held = nn.Parameter(torch.zeros(gradient.shape)), gradient
            if placements is not None:
                parameter = as_parameter_of(parameter.detach(), mesh, placements)
                held = as_parameter_of(gradient, mesh, placements).detach()
            parameter.grad = held
            parameters.append(parameter)
        norm, loss = totals(parameters, torch.tensor(float(dist.get_rank())), layout)
        found.append((float(norm), float(loss)))
    dist.destroy_process_group()
    forget_meshes()
    return found


def test_every_number_counts_once_whatever_divides_it(pool: Pool) -> None:
    expected = math.sqrt(sum(float(each.square().sum()) for each in whole_gradients()))
    layout = Layout.model_validate("dp2 tp2 zero1")
    for by_placement in pool.run(divided_totals, (layout,), 4):
        assert len(by_placement) == len(BOTH) + 1
        for norm, loss in by_placement:
            assert norm == pytest.approx(expected, rel=1e-6)
            assert loss == 0 + 1 + 2 + 3


def stage_totals(layout: Layout) -> tuple[float, float]:
    """As each rank: (norm, loss) where every pipeline stage has one gradient of its own."""
    dist.init_process_group("gloo")
    stage = dist.get_rank() // (layout.world // layout.pipeline)
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = whole_gradients()[stage][:1, :2].expand(2, 2).clone()
    norm, loss = totals([parameter], torch.tensor(1.0), layout)
    dist.destroy_process_group()
    return float(norm), float(loss)


@pytest.mark.parametrize("sentence", ["pp2", "pp3", "dp2 pp2"])
def test_stages_add_up(sentence: str, pool: Pool) -> None:
    layout = Layout.model_validate(sentence)
    stages = whole_gradients()[: layout.pipeline]
    expected = math.sqrt(sum(2 * float(each[:1, :2].square().sum()) for each in stages))
    for norm, loss in pool.run(stage_totals, (layout,), layout.world):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert loss == layout.world


def test_adamw_decays_matrices_only_and_follows_its_formula() -> None:
    """arXiv:1711.05101, algorithm 2, after one step: m / (1 - beta1) is the gradient itself."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    settings = Optimizer(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    optimizer = adamw(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        expected = before[name] * kept - 0.1 * 2.0 / (2.0 + 1e-3)
        torch.testing.assert_close(parameter.detach(), expected)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


def test_parameters_of_two_meshes_are_updated_alike() -> None:
    """Experts lie on a mesh of their own; one fused call takes DTensors of one mesh."""
    model = nn.Sequential(*(nn.Linear(3, 2, bias=False) for _ in range(3)))
    for layer, shape in zip(model, [None, (1,), (1, 1)], strict=True):
        weight = torch.ones(2, 3)
        if shape is None:
            layer.weight = nn.Parameter(weight)
        else:
            mesh = init_device_mesh("cpu", shape)
            layer.weight = as_parameter_of(weight, mesh, [Replicate()] * len(shape))
        layer.weight.grad = torch.full_like(layer.weight, 2.0)
    optimizer = adamw(model, Optimizer(lr=0.1, eps=1e-3, weight_decay=0.5))
    optimizer.step()
    for parameter in model.parameters():
        value = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        expected = torch.full((2, 3), 1 - 0.1 * 0.5 - 0.1 * 2.0 / (2.0 + 1e-3))
        torch.testing.assert_close(value.detach(), expected)
    assert len(optimizer.param_groups) == 3


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (group,) = adamw(model, Optimizer()).param_groups
    assert [p.ndim for p in group["params"]] == [1]


def test_a_loss_that_diverges_in_fp16_is_told_and_not_skipped_for_ever() -> None:
    scale, diverged = LossScale(), torch.tensor(math.nan)
    steps = 0
    with pytest.raises(NotLearnt, match="diverges"):
        while not scale.accepts(diverged):
            steps += 1
    assert steps == math.log2(LossScale.START / LossScale.LEAST)
    assert scale.factor == LossScale.LEAST
