"""The loss is PyTorch's cross-entropy, on one rank and over a divided vocabulary.

Shapes: B batch, L sequence, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ridgeline.launch.pool import Pool
from ridgeline.torch_compat import as_parameter_of, forget_meshes, local_part
from ridgeline.train.vocabulary import CHUNK_TOKENS, IGNORED, divided_embedding, token_loss

CASES = [
    # B, L, V, precision; two ranks hold 6 and 5 of 11, and 1 and 1 of 2
    (2, 5, 10, "float32"),
    (2, 5, 11, "float32"),
    (1, 7, 2, "float32"),
    (3, CHUNK_TOKENS // 2, 11, "float32"),  # one and a half chunks
    (2, CHUNK_TOKENS, 6, "float32"),  # two, exactly
    (3, CHUNK_TOKENS // 2, 11, "bfloat16"),
    (2, 33, 12, "bfloat16"),
]
cases = pytest.mark.parametrize(("batch", "length", "vocab", "precision"), CASES)


def made(batch: int, length: int, vocab: int, precision: str) -> tuple[Tensor, Tensor]:
    """Logits (B, L, V), and targets (B, L) of which about a fifth counts nothing."""
    generator = torch.Generator().manual_seed(batch * length + vocab)
    logits_BLV = 3 * torch.randn(batch, length, vocab, generator=generator)
    targets_BL = torch.randint(0, vocab, (batch, length), generator=generator)
    targets_BL[torch.rand(batch, length, generator=generator) < 0.2] = IGNORED
    targets_BL[0, :2] = torch.tensor([vocab - 1, IGNORED])
    return logits_BLV.to(getattr(torch, precision)).requires_grad_(), targets_BL


def expected(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[float, Tensor]:
    """Sum of PyTorch's cross-entropy in float64, and the gradient of a hundredth of it."""
    exact_BLV = logits_BLV.detach().double().requires_grad_()
    loss = functional.cross_entropy(
        exact_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum", ignore_index=IGNORED
    )
    return float(loss.detach()), torch.autograd.grad(loss / 100, exact_BLV)[0]


def check(loss: Tensor, gradient_BLV: Tensor, logits_BLV: Tensor, targets_BL: Tensor) -> None:
    """Loss and gradient are those expected: float32 rounding, and for the gradient that of the
    logits' own precision (half of the last of bf16's 8 bits is 2^-9 of a value)."""
    value, exact_BLV = expected(logits_BLV, targets_BL)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(value, rel=2e-6)
    assert gradient_BLV.dtype == logits_BLV.dtype
    rounding = 1e-5 if logits_BLV.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gradient_BLV.double(), exact_BLV, rtol=rounding, atol=1e-8)
    assert not gradient_BLV[targets_BL == IGNORED].any()


@cases
def test_the_loss_and_its_gradient_are_pytorchs(
    batch: int, length: int, vocab: int, precision: str
) -> None:
    logits_BLV, targets_BL = made(batch, length, vocab, precision)
    loss = token_loss(logits_BLV, targets_BL)
    (gradient_BLV,) = torch.autograd.grad(loss / 100, logits_BLV)
    check(loss, gradient_BLV, logits_BLV, targets_BL)


def test_the_loss_is_the_sum_of_nats_over_targets_that_count() -> None:
    logits_BLV = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]))
    loss = token_loss(logits_BLV, torch.tensor([[1, 2, IGNORED]]))
    assert float(loss) == pytest.approx(-math.log(0.25) - math.log(0.8), rel=1e-6)


def test_a_batch_of_ignored_targets_adds_nothing() -> None:
    logits_BLV = torch.randn(1, 3, 7, requires_grad=True)
    loss = token_loss(logits_BLV, torch.full((1, 3), IGNORED))
    (gradient_BLV,) = torch.autograd.grad(loss, logits_BLV)
    assert float(loss.detach()) == 0
    assert not gradient_BLV.any()


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that an operation makes on this rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                here = value.to_local() if isinstance(value, DTensor) else value
                self.elements = max(self.elements, here.numel())
        return result


def divided_losses() -> list[int]:
    """As each of two ranks: every case over a divided vocabulary; the largest tensors made."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    largest = []
    for case in CASES:
        logits_BLV, targets_BL = made(*case)
        divided_BLV = distribute_tensor(logits_BLV.detach(), mesh, [Shard(2)]).requires_grad_()
        with Largest() as seen:
            loss = token_loss(divided_BLV, targets_BL)
            (gradient_BLV,) = torch.autograd.grad(loss / 100, divided_BLV)
        assert isinstance(gradient_BLV, DTensor)
        check(loss, gradient_BLV.full_tensor(), logits_BLV, targets_BL)
        largest.append(seen.elements)
    dist.destroy_process_group()
    forget_meshes()
    return largest


def test_over_two_ranks_the_loss_is_the_same_and_logits_stay_divided(pool: Pool) -> None:
    for largest in pool.run(divided_losses, (), 2):
        for (batch, length, vocab, _), elements in zip(CASES, largest, strict=True):
            # this rank's logits, or the few numbers that each token has
            assert elements <= batch * length * max(-(-vocab // 2), 2)


def divided_embeddings() -> list[int]:
    """As each of two ranks: embeddings of 32 and 33 entries; the largest tensor of a backward."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    largest = []
    for vocab in (32, 33):
        generator = torch.Generator().manual_seed(vocab)
        whole_VD = nn.Parameter(torch.randn(vocab, 8, generator=generator))
        tokens_BL = torch.tensor([[0, vocab - 1, 16, 3], [3, 15, 17, vocab - 1]])
        weight_VD = as_parameter_of(whole_VD.detach(), mesh, [Shard(0)])
        assert isinstance(weight_VD, DTensor)
        terms_BLD = divided_embedding(tokens_BL, weight_VD)
        summed_BLD = terms_BLD.detach().clone()
        dist.all_reduce(summed_BLD)
        out_BLD = functional.embedding(tokens_BL, whole_VD)
        assert torch.equal(summed_BLD, out_BLD)

        upstream_BLD = torch.randn(out_BLD.shape, generator=generator)
        with Largest() as seen:
            torch.autograd.backward(terms_BLD, upstream_BLD)
        torch.autograd.backward(out_BLD, upstream_BLD)
        gradient_VD = weight_VD.grad
        assert isinstance(gradient_VD, DTensor) and whole_VD.grad is not None
        expected_VD = local_part(whole_VD.grad, weight_VD)
        torch.testing.assert_close(gradient_VD.to_local(), expected_VD)
        largest.append(seen.elements)
    dist.destroy_process_group()
    forget_meshes()
    return largest


def test_the_gradient_of_a_divided_embedding_is_never_whole(pool: Pool) -> None:
    """32 entries of 8 numbers over two ranks, and 33."""
    first, second = pool.run(divided_embeddings, (), 2)
    assert first == [16 * 8, 17 * 8]
    assert second == [16 * 8, 16 * 8]
