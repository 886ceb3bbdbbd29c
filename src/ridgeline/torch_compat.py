"""Every private or version-bound PyTorch import, each with the versions it was tested on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

# In-process store of a one-member group, and the store behind env://; re-exported by
# torch.distributed only conditionally. Tested on 2.11.0 and 2.13.0.
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

# A process group by its name. Private name. Tested on 2.11.0 and 2.13.0.
from torch._C._distributed_c10d import _resolve_process_group as group_named

# Tensors with shapes and no values, and what they raise when a program asks for one. Private path.
# Tested on 2.11.0 and 2.13.0.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed import ProcessGroup, Work

# FSDP2's replicate: DDP semantics on FSDP2's engine, with its mixed precision. Private path.
# Tested on 2.11.0 and 2.13.0.
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule
from torch.distributed._composable.replicate_with_fsdp import replicate as _replicate

# The all-to-all that autograd and the compiler know. Private path. Tested on 2.11.0 and 2.13.0.
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

# What DTensor remembers between calls. Private paths. Tested on 2.11.0 and 2.13.0.
from torch.distributed.tensor import DTensor, Shard, _redistribute, distribute_tensor
from torch.distributed.tensor._collective_utils import MeshTopoInfo

# Where DTensor learns what an operation gives out. Private path. Tested on 2.11.0 and 2.13.0.
from torch.distributed.tensor._sharding_prop import ShardingPropagator

# Which part of a DTensor is here. Private path. Tested on 2.11.0 and 2.13.0.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HashStore",
    "PrefixStore",
    "Store",
    "TCPStore",
    "Unfilled",
    "all_to_all",
    "as_parameter_of",
    "attend_block",
    "attend_block_backward",
    "backward_node",
    "compiled_graphs",
    "drop_gathered",
    "fake_process_group",
    "forget_meshes",
    "forward_number",
    "group_named",
    "in_backward",
    "input_half",
    "local_offset",
    "local_part",
    "multiplies_bf16",
    "multiplies_fp8",
    "name_of",
    "pci_address",
    "peak_memory_bytes",
    "reduce_now",
    "replicate",
    "selective_contexts",
    "settle_shards",
    "shapes_only",
    "shard",
    "sharded_parameters",
    "unshard",
    "weight_half",
    "whole",
    "work_of",
]


def replicate(module: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    """Replicate `module` over the one-dimensional `mesh`; gradients are summed, not averaged."""
    replicated: Any = _replicate(module, mesh=mesh, mp_policy=precision)
    replicated.set_gradient_divide_factor(1.0)


def shard(
    module: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy, reshard: bool
) -> None:
    """Shard `module` over the last dimension of `mesh`, replicate it over one before it.

    Gradients are summed. `reshard`: whether parameters are given back after a forward pass.
    """
    fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no average


def forget_meshes() -> None:
    """Drop what DTensor remembers of meshes whose process groups are gone.

    A later mesh of the same ranks equals the earlier one, so its messages would go to groups that
    were destroyed. Private names. Tested on 2.11.0 and 2.13.0.
    """
    # Imported here, because it loads the compiler.
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    _redistribute._gen_transform_infos.cache_clear()
    MeshTopoInfo.build_from_mesh.cache_clear()


def input_half(
    made: Tensor, gradient: Tensor | None, given: Tensor, weights: Iterator[nn.Parameter]
) -> tuple[Tensor, Any]:
    """Backward of `made` for its input `given` alone, and what the weights' half needs.

    torch.distributed.pipelining's own, imported here because it loads the compiler. Private path.
    Tested on 2.11.0 and 2.13.0.
    """
    from torch.distributed.pipelining._backward import stage_backward_input

    gradients = None if gradient is None else [gradient]
    (found,), groups = stage_backward_input([made], gradients, [given], weights)
    assert found is not None
    return found, groups


def weight_half(weights: Iterator[nn.Parameter], groups: Any) -> None:
    """The other half: gradients of the weights are added to their `grad`."""
    from torch.distributed.pipelining._backward import stage_backward_weight

    stage_backward_weight(weights, groups)


def compiled_graphs() -> tuple[int, int]:
    """Graphs that this process compiled so far, and places where it had to break one.

    PyTorch's own counters: what was meant to be compiled and was not counts nothing.
    """
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def in_backward() -> bool:
    """Whether a backward pass runs this, as what it recomputes; the compiler cannot trace it.

    As FSDP2 asks. Private name. Tested on 2.11.0 and 2.13.0.
    """
    return torch._C._current_graph_task_id() != -1


def backward_node() -> Any:
    """The node that a backward pass is at, or None. Private. Tested on 2.11.0 and 2.13.0."""
    return torch._C._current_autograd_node()


def forward_number() -> int:
    """The number of autograd's next node; they ascend. Private. Tested on 2.11.0 and 2.13.0."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


@contextmanager
def shapes_only(aside: Callable[[bool], None]) -> Iterator[None]:
    """Tells `aside` when DTensor tries an operation on whole shapes, and when it has.

    It does so for each new one, in the same fake mode that holds a rehearsal's tensors, so memory
    and FLOPs of the whole model would count. Private name. Tested on 2.11.0 and 2.13.0.
    """
    plain: Any = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(*arguments: Any) -> Any:
        aside(True)
        try:
            return plain(*arguments)
        finally:
            aside(False)

    hidden: Any = ShardingPropagator
    hidden._propagate_tensor_meta_non_cached = propagate
    try:
        yield
    finally:
        hidden._propagate_tensor_meta_non_cached = plain


@contextmanager
def fake_process_group(rank: int, world: int) -> Iterator[None]:
    """A process group of `world` ranks of which only `rank` is there; its messages go nowhere.

    Private path, imported here because it loads PyTorch's testing tools. Tested on 2.11.0 and
    2.13.0.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # a process group puts its rank before every line of an error
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_meshes()
        sys.excepthook = hook


def unshard(module: nn.Module) -> None:
    """Gather the parameters of the forward pass, which a split backward pass looks for by name."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.unshard()


def reduce_now(module: nn.Module) -> None:
    """Reduce gradients that were written beside autograd, as a split backward does.

    What FSDP2's own hooks do after a backward pass; torch.distributed.pipelining calls the same.
    """
    state: Any = _state_of(module)
    for each in state._state_ctx.all_states:
        for group in _groups_of(each):
            group.post_backward()
    state._root_post_backward_final_callback()


def _groups_of(state: Any) -> list[Any]:
    """Several groups per module since 2.12, one before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    found = groups if groups is not None else [state._fsdp_param_group]
    return [group for group in found if group is not None]


def _state_of(module: nn.Module) -> Any:
    kind: Any = _replicate if isinstance(module, ReplicateModule) else fully_shard
    return kind.state(module)


def settle_shards(module: nn.Module) -> None:
    """Do what FSDP2 does once, before the first forward pass: an uneven part gets its padding.

    Private name. Tested on 2.11.0 and 2.13.0.
    """
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()


class ShardedParameter(NamedTuple):
    """What data parallelism holds of one parameter at a moment, beside its part."""

    gathered: list[Tensor]
    gradients: list[Tensor]


def sharded_parameters(module: nn.Module) -> Iterator[ShardedParameter]:
    """Those of FSDP2 within `module`. Private names. Tested on 2.11.0 and 2.13.0."""
    for part in module.modules():
        if not isinstance(part, FSDPModule):
            continue
        for group in _groups_of(part._get_fsdp_state()):
            for each in group.fsdp_params:
                whole = getattr(each, "_unsharded_param", None)
                gradients = [each.unsharded_accumulated_grad, None if whole is None else whole.grad]
                found = [gradient for gradient in gradients if gradient is not None]
                yield ShardedParameter(list(each.all_gather_outputs), found)


def local_offset(tensor: DTensor) -> int:
    """Where this rank's part begins along the one dimension by which `tensor` is divided."""
    ((axis, placement),) = (
        (axis, each) for axis, each in enumerate(tensor.placements) if isinstance(each, Shard)
    )
    length, mesh = tensor.shape[placement.dim], tensor.device_mesh
    return min(mesh.get_local_rank(axis) * -(-length // mesh.size(axis)), length)


def local_part(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of the whole `value`, divided as the DTensor `like` is; without messages."""
    if not isinstance(like, DTensor):
        return value
    shape, offsets = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    return value[tuple(slice(at, at + size) for at, size in zip(offsets, shape, strict=True))]


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered from the ranks that hold its parts: a collective call.

    Where two axes divide one dimension, PyTorch advises on every rank to gather over both at once;
    that is for programs that gather in every step. Logger's name: tested on 2.13.0.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    logger = logging.getLogger(_redistribute.__name__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return tensor.full_tensor()
    finally:
        logger.setLevel(before)


def as_parameter_of(
    value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]
) -> nn.Parameter:
    """A parameter over `mesh` of which this rank keeps its part; without messages."""
    return nn.Parameter(distribute_tensor(value, mesh, placements, src_data_rank=None))


def drop_gathered(module: nn.Module) -> None:
    """Drop the copies of parameters that a forward pass without backward leaves behind.

    They would hide the float32 parameters from a checkpoint, and be stale after the next update.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.linear.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
)


def selective_contexts() -> Any:
    """What selective recomputation runs a forward pass in, and its repetition.

    It counts operations of a kind and refuses more than at first. FSDP2 marks its work for the
    profiler, and within a block (experts) marks more in a repetition, of which it takes the unit
    for a root. Tested on 2.11.0 and 2.13.0.
    """
    marks = torch.ops.profiler
    SAC_IGNORED_OPS.update(
        {
            marks._record_function_enter_new.default,
            marks._record_function_exit._RecordFunction,
        }
    )
    return create_selective_checkpoint_contexts(_keeps_in_selective)  # type: ignore[no-untyped-call]


def _keeps_in_selective(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Kept are products, and what tensor parallelism gathers and sums; the rest is recomputed."""
    keep = operation in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Unfilled(TorchFunctionMode):
    """While it is active, modules are built without their default values.

    On the meta device those go nowhere, and the first random one imports the compiler (1 s).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Leave a tensor as it is where torch.nn.init would fill it."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory PyTorch's allocator held on an accelerator; None on CPU. Since PyTorch 2.9."""
    if device.type == "cpu":
        return None
    return torch.accelerator.max_memory_allocated()


def pci_address(device: torch.device) -> str | None:
    """Where an accelerator sits, as 0000:c1:00.0; None where its module does not tell."""
    properties = torch.get_device_module(device).get_device_properties(device)
    names = [f"pci_{part}_id" for part in ("domain", "bus", "device")]
    if not all(hasattr(properties, name) for name in names):
        return None
    domain, bus, place = (getattr(properties, name) for name in names)
    return f"{domain:04x}:{bus:02x}:{place:02x}.0"


def name_of(device: torch.device) -> str:
    """What an accelerator calls itself, by its module's own word; empty for a CPU."""
    if device.type == "cpu":
        return ""
    return str(torch.get_device_module(device).get_device_name(device))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bf16 natively, by its module's own word (cuda, xpu)."""
    module = torch.get_device_module(device)
    return bool(module.is_bf16_supported()) if hasattr(module, "is_bf16_supported") else False


def all_to_all(x_C: Tensor, group: ProcessGroup) -> Tensor:
    """Row i of `x_C` to rank i; row j of the result is from rank j. Contiguous; differentiable."""
    received_C: Tensor = all_to_all_single_autograd(x_C, None, None, group)
    return received_C


def attend_block(
    q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one block of keys by PyTorch's flash kernels, outside of autograd.

    Returns the output (B, N, L, H) and the float32 log-sum-exp (B, N, L) of the scaled scores.
    CPU: tested on 2.11.0 and 2.13.0. Accelerators: never run on one, only as shapes on the meta
    device; CUDA's kernels take bf16 and fp16 only, and an H that is a multiple of 8.
    """
    if q_BNLH.device.type == "cpu":
        out_BNLH, lse_BNL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNLH, k_BNSH, v_BNSH, is_causal=causal
        )
    else:
        out_BNLH, lse_BNL, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BNLH, k_BNSH, v_BNSH, is_causal=causal
        )
    return out_BNLH, lse_BNL


def attend_block_backward(
    q_BNLH: Tensor,
    out_BNLH: Tensor,
    lse_BNL: Tensor,
    grad_BNLH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from one block of keys; out, lse and grad are those of all blocks.

    Tested as `attend_block`. The accelerators' kernels read lse without its strides, and the random
    state only for dropout; sequences of one length have no table of cumulative lengths.
    """
    aten = torch.ops.aten
    saved = (grad_BNLH, q_BNLH, k_BNSH, v_BNSH, out_BNLH, lse_BNL.contiguous())
    if q_BNLH.device.type == "cpu":
        dq_BNLH, dk_BNSH, dv_BNSH = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *saved, 0.0, causal
        )
    else:
        lengths = (None, None, q_BNLH.shape[2], k_BNSH.shape[2])
        unread = lse_BNL.new_zeros(2)
        dq_BNLH, dk_BNSH, dv_BNSH = aten._scaled_dot_product_flash_attention_backward(
            *saved, *lengths, 0.0, causal, unread, unread
        )
    return dq_BNLH, dk_BNSH, dv_BNSH


def multiplies_fp8(device: torch.device) -> bool:
    """Whether an accelerator multiplies 8-bit floats: NVIDIA from 8.9 on, AMD from gfx94 on.

    Written from the vendors' documentation, not run on either.
    """
    module = torch.get_device_module(device)
    if torch.version.hip:
        return str(module.get_device_properties(device).gcnArchName) >= "gfx94"
    return hasattr(module, "get_device_capability") and module.get_device_capability() >= (8, 9)


def work_of(result: Any) -> Work | None:
    """The handle that a c10d operation gives out, as a dispatch mode sees it; None: it has none.

    The same object as the caller of the collective gets, while it lives. Private name. Tested on
    2.11.0 and 2.13.0.
    """
    last = result[-1] if isinstance(result, tuple) else result
    if not isinstance(last, torch.ScriptObject):
        return None
    work: Work = Work.unbox(last)
    return work
