"""Tensor parallelism with sequence parallel: what each rule of a decoder's table does.

Between modules, activations are this rank's part of the sequence, plain tensors (B, L/t, D).
Weights become DTensors over the tensor axis, so optimizer, norm and checkpoint know their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ridgeline.errors import LayoutError, nearest
from ridgeline.model.experts import MixtureOfExperts
from ridgeline.torch_compat import as_parameter_of
from ridgeline.train.vocabulary import divided_embedding


def rules_of(model: nn.Module, tensor: int) -> dict[str, ParallelStyle]:
    """What the model's `tensor_parallel` table does to each module it reaches, by its name.

    Raises LayoutError when the model has no table, the table has a rule that is none, or none of
    its rules reaches a parameter; `tensor` is the number of ranks asked for.
    """
    asked = f"tp{tensor} for a {type(model).__name__}"
    table: Mapping[str, str] | None = getattr(model, "tensor_parallel", None)
    if table is None:
        raise LayoutError(
            asked,
            "tensor parallelism needs a class attribute `tensor_parallel`: module names to rules",
            'tp1, or tensor_parallel = {"blocks.*.mlp.up": "columns", …}',
        )
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):  # its parts have rules
            continue
        if rule := next((table[each] for each in table if fnmatchcase(name, each)), None):
            styles[name] = _style(rule)
    for parameter, _ in model.named_parameters():
        module_name = parameter.rpartition(".")[0]
        if isinstance(styles.get(module_name), _Gather | None):
            raise LayoutError(
                asked,
                f"no rule of its `tensor_parallel` divides or copies {parameter}",
                f'a rule such as "{module_name}": "sequence"',
            )
    return styles


def divide_tensors(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply the model's `tensor_parallel` table over the one-dimensional `mesh`, in place.

    Raises LayoutError as `rules_of`.
    """
    embedding: Any = getattr(model, "embedding", None)
    head: Any = getattr(model, "head", None)
    tied = bool(embedding and head and embedding.weight is head.weight)
    for name, style in rules_of(model, mesh.size()).items():
        parallelize_module(model.get_submodule(name), mesh, style)
    if tied:
        head.weight = embedding.weight  # both are divided by rows


def _style(rule: str) -> ParallelStyle:
    styles: dict[str, ParallelStyle] = {
        "vocabulary": _Vocabulary(),
        "positions": _Positions(),
        "sequence": SequenceParallel(use_local_output=True),
        "gather": _Gather(),
        "columns": ColwiseParallel(),
        "heads": SequenceParallel(sequence_dim=2, use_local_output=True),
        "rows": RowwiseParallel(output_layouts=Shard(1)),
        "parts": _Parts(),
        "logits": ColwiseParallel(
            input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False
        ),
    }
    if rule not in styles:
        raise LayoutError(
            f"rule {rule!r} of a `tensor_parallel` table",
            f"rules are {', '.join(styles)}",
            nearest(rule, list(styles)),
        )
    return styles[rule]


class _Gather(ParallelStyle):
    """The first argument, a part of the sequence, is gathered; its gradient is summed back."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            part = DTensor.from_local(arguments[0], device_mesh, [Shard(1)], run_check=False)
            return part.redistribute(placements=[Replicate()]), *arguments[1:]

        module.register_forward_pre_hook(gather)
        return module


class _Vocabulary(ParallelStyle):
    """An embedding by rows; the sum over ranks leaves each its part of the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        module.weight = as_parameter_of(module.weight, device_mesh, [Shard(0)])

        def forward(tokens_BL: Tensor) -> Tensor:
            assert isinstance(module.weight, DTensor)
            terms_BLD = divided_embedding(tokens_BL, module.weight)
            whole = DTensor.from_local(terms_BLD, device_mesh, [Partial()], run_check=False)
            return whole.redistribute(placements=[Shard(1)]).to_local()

        module.forward = forward  # type: ignore[assignment]
        return module


class _Parts(ParallelStyle):
    """Weights kept whole on every rank, unless they are divided over experts already."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                setattr(module, name, as_parameter_of(parameter, device_mesh, [Replicate()]))
        return module


class _Positions(ParallelStyle):
    """An embedding of positions, looked up for this rank's part of the sequence alone."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        module.weight = as_parameter_of(module.weight, device_mesh, [Replicate()])
        module.register_forward_pre_hook(partial(self._divide, device_mesh))
        module.register_forward_hook(lambda module, arguments, out: out.to_local())
        return module

    @staticmethod
    def _divide(
        mesh: DeviceMesh, module: nn.Module, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        part = torch.tensor_split(arguments[0], mesh.size())[mesh.get_local_rank()]
        return (DTensor.from_local(part, mesh, [Shard(0)], run_check=False),)
