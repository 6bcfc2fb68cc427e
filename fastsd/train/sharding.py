"""Networks whose weights, averages and optimiser state are divided over the processes (FSDP2).

Every process keeps a share of each tensor. Before a network computes, the processes put its weights together, and drop
them after; gradients are summed up into the shares (Rajbhandari et al. 2020, "ZeRO", stage 3; Zhao et al. 2023,
"PyTorch FSDP"). A checkpoint holds whole tensors, as that of one process does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastsd.errors import FastsdError


def shard(module: nn.Module, device: torch.device, processes: int) -> None:
    """Divide the weights of a network, or of each network in a ModuleDict, over `processes`, in place.

    A network is one unit: its parts read one another's weights, such as the biases that `UNet.project_time` adds.

    Raises:
        FastsdError: PyTorch has no FSDP2.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise FastsdError("needs a PyTorch of 2.6 or newer with torch.distributed", argument="shard") from None
    mesh = init_device_mesh(device.type, (processes,))
    for network in module.children() if isinstance(module, nn.ModuleDict) else [module]:
        fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_divided(tensor: Any) -> bool:
    """Whether this process has but a share of a tensor (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def whole(value: Any, kept: bool = True) -> Any:
    """A divided tensor put together, on the CPU; of nested dicts and lists, every one, one after another. All
    processes have to call it; those that do not keep the result get None for each."""
    if is_divided(value):
        together = value.detach().full_tensor()
        return together.cpu() if kept else None
    if isinstance(value, dict):
        return {key: whole(inner, kept) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner, kept) for inner in value]
    return value


def divided(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor, where `like` is divided; all processes have the same `value`."""
    if not is_divided(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    layout: Any = like
    return distribute_tensor(value.to(like.device), layout.device_mesh, layout.placements, src_data_rank=None)


def divided_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """An optimiser's state of whole tensors, divided as its parameters are."""
    inner = {
        number: {
            name: divided(value, parameters[number]) if torch.is_tensor(value) and value.ndim else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {**state, "state": inner}
