"""Moving a pipeline to another device or precision, copying and pickling it."""

from __future__ import annotations

import threading
from typing import Any, NoReturn, TypeVar

import torch

from fastsd.components import Components
from fastsd.cuda.capture import CudaRecorder
from fastsd.errors import FastsdError
from fastsd.generate.batch import Engine
from fastsd.generate.interrupt import Interruptible, Run
from fastsd.generate.latents import Codec
from fastsd.graph import Graphs
from fastsd.model.fp8 import quantize_unet
from fastsd.model.taesd import TAESD
from fastsd.runtime.devices import autoencoder_dtype, resolve_device, resolve_dtype, undisturbed
from fastsd.weights.adapters.apply import Adapters

Self = TypeVar("Self", bound="Portable")
REBUILT = ("graphs", "_engine", "_preview_codec", "_lock", "_runs", "_thread")


class Portable(Interruptible):
    """What a pipeline keeps, and what is made anew around it: graphs, the lock, the engine.

    Attributes:
        components, refiner: the checkpoints.
        device, dtype: where they are.
        graphs: captured on this device.
        adapters: in the weights.
        fp8: layers of the UNets compute in fp8.
    """

    components: Components
    refiner: Components | None
    device: torch.device
    dtype: torch.dtype
    graphs: Graphs
    adapters: Adapters
    fp8: bool = False
    _preview: TAESD | None
    _changes: int = 0  # of the weights

    def _assemble(self, graphs: Graphs) -> None:
        """Everything that is neither copied nor moved."""
        self.graphs = graphs
        self._engine = Engine(self.components, self.device, self.dtype, graphs, self.refiner)
        self._preview_codec = self._engine.codec if self._preview is None else Codec(self._preview, graphs)
        self._lock = threading.RLock()  # one call works at a time: graphs share their buffers
        self._runs: list[Run] = []  # streams between their first step and their last

    def _in_fp8(self: Self) -> Self:
        """Bring products of the UNets into fp8 (docs/fp8.md); returns the pipeline."""
        for model in (self.components, self.refiner):
            if model is not None:
                quantize_unet(model.unet)
        self.fp8 = True
        return self

    def _change(self, what: str) -> None:
        """Before the weights change: refuse while a stream reads them; streams not yet begun are void."""
        if self._runs:
            raise FastsdError(
                f"{what} while a stream is under way would give an image of neither; finish the stream or close it"
            )
        self._changes += 1
        self.graphs.in_order(self.device)  # what the weights' readers were given, on whichever stream, comes first

    def to(self: Self, *arguments: Any, **named: Any) -> Self:
        """Move the networks to a device and a precision, as `torch.nn.Module.to` is called; returns the pipeline.

        Adapters and embeddings stay. As in loading, an autoencoder that overflows in fp16 gets another dtype. Graphs
        are captured again.

        Raises:
            FastsdError: no such device or dtype; a stream is under way.
        """
        device, dtype = read_target(arguments, named)
        with self._lock, undisturbed(), torch.no_grad():
            place = self.device if device is None else resolve_device(device)
            if self.fp8 and dtype is not None:
                raise FastsdError("its weights are fp8: load it again with that dtype", argument="to", value=str(dtype))
            precision = resolve_dtype(self.dtype if dtype is None else dtype, place)
            self._change("moving")
            active = self.adapters.active
            self.adapters.set([])
            for model in (self.components, self.refiner):
                for name, network in () if model is None else model.networks():
                    overflows = name == "vae" and self.components.vae.config.force_upcast
                    network.to(place, autoencoder_dtype(precision, place, overflows))
            if self._preview is not None:
                self._preview.to(place, precision)
            self.graphs.forget()
            wanted = self.graphs.recorder is not None or (self.device.type == "cpu" and place.type == "cuda")
            recorder = CudaRecorder(place) if wanted and place.type == "cuda" else None
            self.device, self.dtype = place, precision
            self.adapters = Adapters(self.components)
            lock, graphs = self._lock, Graphs(recorder, self.graphs.max_graphs)
            self._assemble(graphs)
            self._lock = lock
            graphs.in_order(place)
            self.adapters.set(active, allow_partial=True, allow_pickle=True)
        return self

    def __copy__(self) -> NoReturn:
        raise FastsdError(
            "a copy that shares the weights would change with it: use copy.deepcopy, or call one from all"
        )

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            kept = {name: value for name, value in vars(self).items() if name not in REBUILT}
            return kept | {"graphs": (self.graphs.recorder is not None, self.graphs.max_graphs)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        captures, count = state.pop("graphs")
        vars(self).update(state)
        recorder = CudaRecorder(self.device) if captures and self.device.type == "cuda" else None
        self._assemble(Graphs(recorder, count))


def read_target(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """The device and the dtype in the arguments of `torch.nn.Module.to`; None where none is given.

    Raises:
        FastsdError: there is neither, or something else.
    """
    device, dtype = named.pop("device", None), named.pop("dtype", named.pop("torch_dtype", None))
    for one in arguments:
        if isinstance(one, torch.dtype) or one in ("fp32", "fp16", "bf16"):
            dtype = one
        elif isinstance(one, torch.device | str):
            device = one
        elif isinstance(one, int) and not isinstance(one, bool):
            device = f"cuda:{one}"
        else:
            raise FastsdError("it takes a device and a dtype, as .to('cuda', torch.float16)", argument="to", value=one)
    ignored = {"non_blocking", "silence_dtype_warnings", "copy"}
    if (device is None and dtype is None) or set(named) - ignored:
        unknown = ", ".join(sorted(set(named) - ignored)) or "nothing"
        raise FastsdError("it takes a device and a dtype, as .to('cuda', torch.float16)", argument="to", value=unknown)
    return device, dtype
