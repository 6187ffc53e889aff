"""Weights of which each rank keeps a part: full tuning on several devices, by PyTorch's FSDP2.

A rank holds a part of every weight, of its gradient and of the optimizer's state, as a DTensor.
FSDP2 gathers the weights of a layer for its passes, and sums the gradients over the ranks. All
ranks must therefore make the same passes. The functions here work on plain tensors too, which they
return unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from backfire.train.ranks import Ranks


def shard(model: PreTrainedModel, ranks: Ranks) -> None:
    """Keep a part of every weight of the model on each rank; a layer is gathered at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # DTensor's caches give back the mesh of an earlier process group if the two are equal, and with
    # it the rank of this process there; a name tells them apart.
    name = f"rank {ranks.rank}"
    mesh = init_device_mesh(ranks.device.type, (ranks.size,), mesh_dim_names=(name,))
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed: losses are already means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way
    plain = [name for name, p in model.named_parameters() if not is_sharded(p)]
    assert not plain, f"not sharded: {plain}"
    ranks.sharded = True


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this rank holds."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all ranks, which must call this together."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, which each rank has as a whole, sharded as `like` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    given = tensor.detach().to(like.device)
    return cast(Tensor, distribute_tensor(given, mesh, placements, src_data_rank=None))


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors in main memory, one at a time; none are kept on ranks that do not need them."""
    out = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            out[name] = full.cpu() if is_sharded(tensor) else full
    return out


def state_of(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The model's whole state; tied weights are one tensor."""
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    once = gathered({name: state[name] for name in first.values()}, keep=keep)
    return {name: once[first[id(tensor)]] for name, tensor in state.items()} if keep else {}


def parts_like(new: Any, old: Any) -> Any:
    """A tree of whole tensors, such as an optimizer's state, sharded as those of another are."""
    if isinstance(new, Tensor):
        return part_of(new, old) if isinstance(old, Tensor) else new
    if isinstance(new, dict):
        return {key: parts_like(value, old.get(key)) for key, value in new.items()}
    return new


def gathered_tree(tree: Any, *, keep: bool) -> Any:
    """A tree, such as an optimizer's state, with whole tensors in main memory."""
    if isinstance(tree, Tensor) and is_sharded(tree):
        full = whole(tree.detach())
        return full.cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered_tree(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered_tree(value, keep=keep) for value in tree]
    return tree
