"""Our network beside a host's: bound to its weights, asked in its place, put aside where it does not know better."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastsd.cuda.capture import CudaRecorder
from fastsd.diffusers import adapters
from fastsd.diffusers.packed import own_class
from fastsd.diffusers.slots import Slot, covers, share
from fastsd.graph import Graphs
from fastsd.runtime.devices import undisturbed

log = logging.getLogger("fastsd.diffusers")
LIBRARIES = ("torch", "diffusers", "transformers")  # whose layers compute what their names say
FUSED = ("to_qkv", "to_kv")  # what `unfuse_qkv_projections` leaves behind; an attention that reads them is not plain


@dataclass(eq=False)
class Bound:
    """Our network on the weights of a host, and what they were when it was bound."""

    net: nn.Module
    slots: list[Slot]
    tree: list[tuple[nn.Module, type, tuple[nn.Module | None, ...]]]  # the host's modules with their children
    adapted: dict[nn.Module, list[Slot]]  # by PEFT's layer
    states: dict[nn.Module, Hashable]  # of the adapters that are in our weights

    def is_current(self) -> bool:
        """Whether the host still has the same layers and tensors."""
        for module, kind, children in self.tree:
            if own_class(module) is not kind or tuple(module._modules.values()) != children:
                return False
        return all(slot.holds() for slot in self.slots)


class Twin:
    """What answers a host's calls.

    Attributes:
        host: diffusers' module.
        name: of the component, in messages.
        lock: calls take turns.
    """

    def __init__(self, host: Any, name: str, make: Callable[[], nn.Module]):
        """make: makes our network; called under `torch.device("meta")`."""
        self.host: Any = host
        self.name, self._make = name, make
        self._bound: Bound | None = None
        self._said: set[str] = set()
        self.changes = 0  # of the weights, as far as they were seen
        self.lock = threading.RLock()
        self.graphs = Graphs()

    def answer(self, arguments: dict[str, Any], call: Callable[[], Any]) -> Any:
        """The result of a call of the host.

        Args:
            arguments: of the call, by name.
            call: diffusers' own code.
        """
        with self.lock:
            reason, result = self.attempt(arguments)
        if reason is None:
            return result
        self.say(reason)
        return call()

    def attempt(self, arguments: dict[str, Any]) -> tuple[str | None, Any]:
        """None and our network's result; or why it has none."""
        current = self._bound is not None and self._bound.is_current()
        reason = self._hindered(arguments, current) or self.refuses(arguments)
        if reason is not None:
            return reason, None
        with undisturbed(), torch.no_grad():
            reason = self._update(current)
            if reason is not None:
                return reason, None
            assert self._bound is not None
            return None, self.compute(self._bound.net, arguments)

    def compute(self, net: nn.Module, arguments: dict[str, Any]) -> Any:
        """The result of a call, by our network."""
        raise NotImplementedError

    def refuses(self, arguments: dict[str, Any]) -> str | None:
        """Why our network cannot compute a call with these arguments; None: it can."""
        return None

    def say(self, reason: str) -> None:
        """Once, that diffusers' own code runs."""
        if reason not in self._said:
            self._said.add(reason)
            log.warning("%s runs in diffusers' own code: %s", self.name, reason)

    def _hindered(self, arguments: dict[str, Any], current: bool) -> str | None:
        """Something that only the host's own code honours."""
        if torch.compiler.is_compiling():
            return "it is being compiled"
        grad = torch.is_grad_enabled()
        if grad and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments.values()):
            return "gradients are asked for"
        modules = [m for m, _, _ in self._bound.tree] if self._bound and current else list(self.host.modules())
        for module in modules:
            if module is not self.host and _is_watched(module):
                return "hooks are on its layers"
            if module.training and getattr(module, "p", 0.0):
                return "its dropout is on (training mode)"
            if grad and any(p is not None and p.requires_grad for p in module._parameters.values()):
                return "gradients are asked for"
        return None

    def _update(self, current: bool) -> str | None:
        """Bring our network to the host's present layers, weights and adapters; why that cannot be, or None."""
        if not current:
            try:
                self._bind()
            except LookupError as error:
                self._release()
                return str(error.args[0])
        assert self._bound is not None
        try:
            self._adapt(self._bound)
        except Exception as error:  # PEFT's own, of kinds of adapters that cannot be merged
            self._release()
            return f"PEFT cannot merge an adapter of it ({str(error).strip().partition(chr(10))[0]})"
        return None

    def _bind(self) -> None:
        """Our network on the host's present layers: the one that there is, where they are the same below adapters."""
        layers: dict[str, nn.Module] = {}
        wrapped: dict[nn.Module, nn.Module] = {}
        inside: set[nn.Module] = set()
        for path, module in self.host.named_modules():
            if module in inside or path.rpartition(".")[2] in FUSED:
                continue
            base = adapters.base_of(module)
            if base is not module:
                inside |= set(module.modules())
                wrapped[base] = module
            layers[self.canonical(path)] = base
            if module is not self.host and own_class(base).__module__.split(".")[0] not in LIBRARIES:
                raise LookupError(f"{path} is a {own_class(base).__name__}")
        before = self._bound
        if before is not None and covers(before.slots, layers):
            net, slots = before.net, before.slots
        else:
            self._leave()
            self._check(layers)
            with torch.device("meta"):
                net = self._make()
            slots = share(net.eval().requires_grad_(False), layers)
        adapted: dict[nn.Module, list[Slot]] = {layer: [] for layer in wrapped.values()}
        for slot in slots:
            if slot.host in wrapped:
                adapted[wrapped[slot.host]].append(slot)
            if not slot.holds() or (slot.apart and slot.host not in wrapped):
                slot.unite()
        tree = [(m, own_class(m), tuple(m._modules.values())) for m in self.host.modules()]
        known = {} if before is None or net is not before.net else before.states
        self.changes += 1
        self._bound = Bound(net, slots, tree, adapted, {layer: known.get(layer) for layer in adapted})
        self._graphs_for(next(net.parameters()).device)

    def _check(self, layers: dict[str, nn.Module]) -> None:
        """Refuse weights that our networks do not compute with."""
        kinds = {(p.dtype, p.device) for layer in layers.values() for p in layer._parameters.values() if p is not None}
        if len(kinds) != 1:
            raise LookupError("its weights are of several dtypes or on several devices")
        ((dtype, device),) = kinds
        if dtype not in (torch.float32, torch.float16, torch.bfloat16) or device.type not in ("cpu", "cuda"):
            raise LookupError(f"its weights are {str(dtype).removeprefix('torch.')} on {device.type}")

    def canonical(self, path: str) -> str:
        """The name by which our network knows a layer of the host."""
        return path

    def _graphs_for(self, device: torch.device) -> None:
        recorder = self.graphs.recorder
        if device.type == "cuda" and (not isinstance(recorder, CudaRecorder) or recorder.device != device):
            self.graphs = Graphs(CudaRecorder(device))
        elif device.type != "cuda" and isinstance(recorder, CudaRecorder):
            self.graphs = Graphs()

    def _adapt(self, bound: Bound) -> None:
        """The host's adapters into our weights, layer by layer where they have changed."""
        for layer, slots in bound.adapted.items():
            state = adapters.state_of(layer)
            if state == bound.states[layer]:
                continue
            bound.states[layer], self.changes = None, self.changes + 1
            if state is None:
                for slot in slots:
                    slot.unite()
                continue
            values = adapters.merged(layer)
            for slot in slots:
                slot.part(values[slot.kind])
            bound.states[layer] = state

    def _leave(self) -> None:
        """Give the host its weights back, each with a tensor of its own."""
        bound, self._bound = self._bound, None
        if bound is not None:
            for slot in bound.slots:
                if slot.holds():
                    slot.leave()

    def _release(self) -> None:
        self._leave()
        self.graphs.forget()

    def end(self) -> None:
        """The host has its weights to itself."""
        with self.lock:
            self._release()


def _is_watched(module: nn.Module) -> bool:
    """Whether calling this layer does more than its class says. transformers leaves hooks that collect what our network
    returns by itself."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = (h for h in hooks if not getattr(h, "__module__", "").startswith("transformers."))
    return "forward" in module.__dict__ or any(True for _ in others)
