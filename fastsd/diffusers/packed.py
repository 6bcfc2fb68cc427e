"""A convolution's weight that exists once, though two networks hold it: plain in the host, or packed in ours.

On the CPU our convolutions keep their weights in a layout of oneDNN's, from which the plain one is made again bit for
bit. While a weight is packed, the host's layer has the packed tensor; whoever asks the host's layer for its weight, by
name or by an operation on modules (`state_dict`, `to`, copies), gets the plain one, and our next call packs it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastsd.kernels.cpu import onednn
from fastsd.model.layers import Conv2d


class SharedConv2d(Conv2d):
    """Our convolution on the weight of a host's."""

    _host: nn.Module

    @staticmethod
    def adopt(conv: nn.Module, host: nn.Module) -> None:
        """Make our `conv` a shared one."""
        assert isinstance(conv, Conv2d)
        conv.__class__ = SharedConv2d
        conv.__dict__["_host"] = host

    def share(self, parameter: nn.Parameter) -> None:
        """Read the host's plain tensor; where ours is one, at our address, which a captured graph may hold."""
        own = self._parameters["weight"]
        if own is not None and not own.is_meta and self._alike(own, parameter) and not self.shares(parameter):
            own.detach().copy_(parameter.data)
            parameter.data = own.detach()
            return
        data = parameter.data
        if data.is_cuda and not data.is_contiguous(memory_format=torch.channels_last):
            parameter.data = data = data.contiguous(memory_format=torch.channels_last)
        self._set(data)

    def take(self, values: torch.Tensor) -> None:
        """Read `values`, in place where our weight is plain."""
        own, host = self._parameters["weight"], self._host._parameters["weight"]
        assert own is not None and host is not None
        if not self._alike(own, host):
            self._set(values.detach())
            return
        if self.shares(host):
            host.data = own.detach().clone(memory_format=torch.preserve_format)
        own.detach().copy_(values)

    @staticmethod
    def _alike(own: nn.Parameter, host: nn.Parameter) -> bool:
        return not own.is_mkldnn and own.dtype == host.dtype and own.device == host.device

    def shares(self, parameter: nn.Parameter) -> bool:
        """Whether our weight is the memory of this plain tensor."""
        own = self._parameters["weight"]
        if own is None or own.is_mkldnn or parameter.is_mkldnn:
            return False
        return own.data_ptr() == parameter.data_ptr() and own.dtype == parameter.dtype

    def pack(self, x: torch.Tensor, scale: int = 1) -> None:
        host = self._host._parameters["weight"]
        shared = host is not None and (self.shares(host) or is_held(self._host))
        super().pack(x, scale)
        own = self._parameters["weight"]
        if shared and own is not None and own.is_mkldnn:
            _hold(self._host, self, own)

    def _set(self, data: torch.Tensor) -> None:
        self._parameters["weight"] = nn.Parameter(data, requires_grad=False)
        self._packed_for = frozenset()


class HeldConv:
    """What a host's convolution is, before its own class, while its weight is packed."""

    _parameters: dict[str, nn.Parameter | None]

    @property
    def weight(self) -> Any:
        give_back(self)
        return self._parameters["weight"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            give_back(self)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        return give_back(self)._apply(fn, recurse)

    def _save_to_state_dict(self, *arguments: Any, **named: Any) -> None:
        give_back(self)._save_to_state_dict(*arguments, **named)

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        give_back(self)._load_from_state_dict(*arguments, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return give_back(self).__reduce_ex__(protocol)


class _Hold:
    """What a held convolution was."""

    def __init__(self, own_class: type, parameter: nn.Parameter, ours: SharedConv2d):
        self.own_class, self.parameter, self.ours, self.strides = own_class, parameter, ours, parameter.stride()


@functools.cache
def _held_class(own: Any) -> type:
    return type(own.__name__, (HeldConv, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def own_class(module: nn.Module) -> type:
    """The class of a host's layer, held or not."""
    own: Any = module.__dict__["_fastsd_hold"].own_class if is_held(module) else type(module)
    return own if not is_held(module) or type(module) is _held_class(own) else type(module)


def is_held(module: Any) -> bool:
    """Whether a host's layer has its weight packed."""
    return "_fastsd_hold" in module.__dict__


def _hold(host: nn.Module, ours: SharedConv2d, packed: nn.Parameter) -> None:
    """Let the host's layer have our packed weight, and no longer its own."""
    if not is_held(host):
        plain = host._parameters["weight"]
        assert plain is not None
        host.__dict__["_fastsd_hold"] = _Hold(type(host), plain, ours)
        own: Any = type(host)
        host.__class__ = _held_class(own)
        plain.data = torch.empty(0, dtype=plain.dtype, device=plain.device)
    host._parameters["weight"] = packed


def give_back(host: Any) -> Any:
    """The host's layer with its plain weight: the parameter that it had, with the numbers and the strides of then."""
    if not is_held(host):
        return host
    hold: _Hold = host.__dict__.pop("_fastsd_hold")
    own: Any = hold.own_class
    if type(host) is _held_class(own):  # someone else may have changed it since
        host.__class__ = own
    packed, parameter = host._parameters["weight"], hold.parameter
    with torch.inference_mode(False), torch.no_grad():
        dense = onednn.dense(packed.detach())
        if dense.stride() != hold.strides:
            dense = torch.empty_strided(dense.shape, hold.strides, dtype=dense.dtype).copy_(dense)
        parameter.data = dense
    host._parameters["weight"] = parameter
    hold.ours._set(parameter.data)
    return host
