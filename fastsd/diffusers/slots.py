"""Weights that two networks hold together: diffusers' (the host's) and ours.

A slot is a stored tensor of the host and the rows of our parameter that hold the same numbers. Where our network stacks
several matrices in one, the host's become views of it. So both read, and change, the same memory. A slot is apart while
an adapter is in our rows and not in the host's; then the host's numbers lie elsewhere, and ours stay where they were,
since a captured graph may hold their address.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastsd.diffusers.packed import SharedConv2d, give_back, is_held
from fastsd.weights.layouts.names import Source, sources


@dataclass(eq=False)
class Slot:
    """One stored tensor of the host.

    Attributes:
        owner, name: our layer, and its parameter.
        rows: of that parameter.
        host: the layer of the host that has the parameter, below its adapters.
        kind: the parameter's name there.
        key: the name by which the host stores it.
        strides: those that the host's tensor had.
        apart: the host's numbers lie elsewhere.
    """

    owner: nn.Module
    name: str
    rows: slice
    host: nn.Module
    kind: str
    key: str
    strides: tuple[int, ...]
    apart: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The host's."""
        found = self.host._parameters[self.kind]
        assert found is not None
        return found

    def ours(self) -> torch.Tensor:
        """Our rows, in the host's shape; our weight must not be packed."""
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter.detach()[self.rows].view(self.parameter.shape)

    def unite(self) -> None:
        """The host's numbers in our rows, and the host's tensor a view of them."""
        if isinstance(self.owner, SharedConv2d) and self.name == "weight":
            give_back(self.host)
            self.owner.share(self.parameter)
        else:
            rows = self.ours()
            if rows.data_ptr() != self.parameter.data_ptr():
                rows.copy_(self.parameter.data)
                self.parameter.data = rows
        self.apart = False

    def part(self, values: torch.Tensor) -> None:
        """`values` in our rows alone."""
        if isinstance(self.owner, SharedConv2d) and self.name == "weight":
            give_back(self.host)
            self.owner.take(values)
        else:
            rows = self.ours()
            if not self.apart:
                self.parameter.data = rows.clone()
            rows.copy_(values)
        self.apart = True

    def fits(self) -> bool:
        """Whether the host's tensor can be the one of this slot, wherever its numbers lie."""
        parameter, own = self.host._parameters.get(self.kind), self.owner._parameters[self.name]
        assert own is not None
        if parameter is None or parameter.dtype != own.dtype or parameter.device != own.device:
            return False
        return parameter.numel() == own[self.rows].numel() if own.ndim < 4 else parameter.shape == own.shape

    def holds(self) -> bool:
        """Whether the host's tensor is still the one that this slot knows."""
        parameter = self.host._parameters.get(self.kind)
        if parameter is None:
            return False
        if isinstance(self.owner, SharedConv2d) and self.name == "weight":
            return self.apart or is_held(self.host) or self.owner.shares(parameter)
        own = self.owner._parameters[self.name]
        assert own is not None
        if parameter.dtype != own.dtype or parameter.device != own.device:
            return False
        return self.apart or parameter.data_ptr() == self._address(own)

    def _address(self, own: nn.Parameter) -> int:
        return own.data_ptr() + (self.rows.start or 0) * own.stride(0) * own.element_size()

    def leave(self) -> None:
        """Give the host a tensor of its own, in the memory layout that it had."""
        give_back(self.host)
        parameter = self.parameter
        alone = parameter.data.untyped_storage().nbytes() == parameter.nbytes
        if not alone or parameter.stride() != self.strides:
            parameter.data = torch.empty_strided(
                parameter.shape, self.strides, dtype=parameter.dtype, device=parameter.device
            ).copy_(parameter.data)


def share(net: nn.Module, layers: dict[str, nn.Module]) -> list[Slot]:
    """Give `net`, on the meta device, the weights of a host.

    Args:
        net: ours; its convolutions become shared ones.
        layers: the host's layers, below their adapters, by their names in `sources`.

    Raises:
        LookupError: the host lacks a parameter, has another one, or one of another shape; the message names it.
    """
    found: list[tuple[str, nn.Parameter, list[tuple[Source, nn.Module, str]]]] = []
    for name, parameter, parts in sources(net):
        stored = [(part, *_find(layers, part)) for part in parts]
        found.append((name, parameter, stored))
    unknown = _others(layers, {(id(host), kind) for _, _, stored in found for _, host, kind in stored})
    if unknown is not None:
        raise LookupError(f"{unknown} is a layer that fastsd's network lacks")
    slots = []
    for name, parameter, stored in found:
        path, _, kind = name.rpartition(".")
        owner = net.get_submodule(path)
        fresh = [
            Slot(owner, kind, part.rows, host, own, part.key, _of(host, own).stride()) for part, host, own in stored
        ]
        if parameter.ndim == 4:
            SharedConv2d.adopt(owner, fresh[0].host)
        elif len(fresh) == 1:
            _alias(fresh[0])
        else:
            first = fresh[0].parameter
            owner._parameters[kind] = nn.Parameter(
                torch.empty(parameter.shape, dtype=first.dtype, device=first.device), requires_grad=False
            )
        for slot in fresh:
            slot.unite()
        slots += fresh
    return slots


def covers(slots: list[Slot], layers: dict[str, nn.Module]) -> bool:
    """Whether these slots are still all of a host's layers and tensors."""
    same = all(layers.get(slot.key.rpartition(".")[0]) is slot.host and slot.fits() for slot in slots)
    return same and _others(layers, {(id(slot.host), slot.kind) for slot in slots}) is None


def _others(layers: dict[str, nn.Module], known: set[tuple[int, str]]) -> str | None:
    """The first layer with a parameter that is not known."""
    for path, layer in layers.items():
        if any(p is not None and (id(layer), kind) not in known for kind, p in layer._parameters.items()):
            return path
    return None


def _of(host: nn.Module, kind: str) -> nn.Parameter:
    give_back(host)
    found = host._parameters[kind]
    assert found is not None
    return found


def _alias(slot: Slot) -> None:
    """Our parameter as another view of the host's tensor; a copy only where that is no plain matrix."""
    expected = slot.owner._parameters[slot.name]
    assert expected is not None
    data = slot.parameter.data
    shape = data.shape if expected.ndim == data.ndim else expected.shape  # a table of tokens may have grown
    try:
        shared = data.view(shape)
    except RuntimeError:
        shared = data.reshape(shape)
    if expected.ndim != 4:
        shared = shared.contiguous()
    slot.owner._parameters[slot.name] = nn.Parameter(shared, requires_grad=False)


def _find(layers: dict[str, nn.Module], part: Source) -> tuple[nn.Module, str]:
    path, _, kind = part.key.rpartition(".")
    layer = layers.get(path)
    parameter = None if layer is None else layer._parameters.get(kind)
    if layer is None or parameter is None:
        raise LookupError(f"it lacks {part.key}")
    stored, expected = tuple(parameter.shape), part.shape
    table = len(expected) == 2 and isinstance(layer, nn.Embedding)
    same = stored == expected or (len(expected) == 2 and stored == (*expected, 1, 1))
    if not same and not (table and stored[1] == expected[1]):
        raise LookupError(f"{part.key} is {list(stored)}, not {list(expected)}")
    return layer, kind
