"""What a run on a fake GPU launches, in order, and what a captured graph could not do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.dryrun import cost
from bench.dryrun.device import DEVICE, fake_cuda
from bench.dryrun.gpus import Gpu
from bench.dryrun.memory import Allocations

T = TypeVar("T")

KERNELS = str(Path(__file__).parents[2] / "fastsd" / "kernels")
aten = torch.ops.aten
COMPOSITE = "CompositeImplicitAutograd"
# Composite operations that are one launch on a GPU: what they are composed of elsewhere does not count.
WHOLE = (aten.scaled_dot_product_attention.default,)
# Operations that launch nothing, besides views.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_"),
    *("resize_", "device", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_same_size"),
}


class NotOnADevice(RuntimeError):
    """Something that a captured graph cannot do, or that would wait for the host."""


@dataclass(frozen=True)
class TensorMeta:
    """A tensor of a launch."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: torch.Tensor) -> TensorMeta:
        return TensorMeta(tuple(x.shape), tuple(x.stride()), x.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}{list(self.shape)}"


@dataclass(frozen=True)
class RecordedLaunch:
    """One launch.

    Attributes:
        name: of PyTorch's operation, or of our kernel.
        kind: one of `cost.KINDS`.
        op: the file of `fastsd/kernels` that launches it, or "".
        layer: the module that called the op, by its name in the network.
        section: the captured work that it is part of: "step", "decode" and so on; "" outside of all.
        tensors: inputs, then outputs.
        bytes: read and written.
        flops, exps: floating-point operations of products; exponentials.
        hidden: a copy that nobody asked for, of an operand in another layout.
        kernel: the kernel and its arguments, where it is ours: tensors, numbers, constants, compiler options.
    """

    name: str
    kind: str
    op: str
    layer: str
    section: str
    tensors: tuple[TensorMeta, ...]
    bytes: int
    flops: float = 0.0
    exps: float = 0.0
    hidden: bool = False
    kernel: tuple[Any, dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        work = f"{self.bytes / 1e6:9.2f} MB {self.flops / 1e9:9.2f} GFLOP"
        return f"{self.kind:12} {self.name:28} {work}  {self.layer}  {' '.join(map(str, self.tensors))}"


class DryRun(TorchDispatchMode):
    """Records the launches on the fake GPU. Work on CPU tensors is done as ever.

    What reads the GPU from the host gets zeros, or True; inside a section it raises `NotOnADevice`.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.launches: list[RecordedLaunch] = []
        self.memory = Allocations()
        self._section = ""
        self._layers: list[str] = []
        self._names: dict[int, str] = {}

    def of(self, section: str) -> list[RecordedLaunch]:
        """The launches of a section."""
        return [launch for launch in self.launches if launch.section == section]

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Inside this context everything could be captured in a CUDA graph, or raises."""
        before, self._section = self._section, name
        try:
            yield
        finally:
            self._section = before

    def name(self, prefix: str, module: nn.Module) -> None:
        """Let launches of the module's layers have their names."""
        self._names.update({id(layer): f"{prefix}.{name}".rstrip(".") for name, layer in module.named_modules()})

    def enter_layer(self, module: nn.Module, args: Any) -> None:
        """A hook."""
        self._layers.append(self._names.get(id(module), self._layers[-1] if self._layers else ""))

    def leave_layer(self, module: nn.Module, args: Any, result: Any) -> None:
        """A hook."""
        self._layers.pop()

    def refuse(self, what: str) -> None:
        """Raise if this is a section: a graph cannot do that."""
        if self._section:
            raise NotOnADevice(f"{self._section}, {self._layers[-1] if self._layers else 'no layer'}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        to_gpu = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if not fakes and not to_gpu:
            return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # into what its C++ composes it of, as on a GPU
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.refuse("the host reads a number from the device")
            return True if fakes[0].dtype == torch.bool else 0
        hosts = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        if func is aten._to_copy.default and kwargs.get("device", DEVICE).type == "cpu":
            self.refuse("a copy to the host")
            return torch.zeros(fakes[0].shape, dtype=kwargs.get("dtype") or fakes[0].dtype)
        if hosts:
            self.refuse(f"{func} is given a tensor of the host, {TensorMeta.of(hosts[0])}")
            args, kwargs = tree_map_only(torch.Tensor, self._on_fake, (args, kwargs))
        return self._run(func, args, kwargs)

    def _on_fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        with self.fake:
            out = func(*args, **kwargs)
            if func is aten.convolution.default:
                out = self._convolution(out, *args)
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        self.memory.see(results)
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE or not any(x.numel() for x in (*fakes, *results)):
            return out
        self._before(name, args)
        written = [
            x for x, a in zip(args, func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        written += [x for key, x in kwargs.items() if key in ("out",)]
        outputs = {cost.place(x): x for x in (*tree_leaves(written), *results) if isinstance(x, FakeTensor)}
        inputs = {cost.place(x): x for x in fakes if not (name in cost.OVERWRITES and cost.place(x) in outputs)}
        hidden = name in cost.HIDDEN and (name != "_to_copy" or results[0].dtype == fakes[0].dtype)
        self._add(name, inputs.values(), outputs.values(), cost.aten_flops(name, args, results), hidden=hidden)
        return out

    def _convolution(self, out: FakeTensor, x: FakeTensor, weight: FakeTensor, *rest: Any) -> FakeTensor:
        """cuDNN's result is channels-last if an operand is. The fake one is not, in a build without cuDNN."""
        last = torch.channels_last
        if out.ndim == 4 and any(t.is_contiguous(memory_format=last) for t in (x, weight)):
            return torch.empty_like(out, memory_format=last)
        return out

    def _before(self, name: str, args: Any) -> None:
        """The copies and passes that a GPU's library adds to an operation."""
        for x in cost.rearranged(name, args):
            self._add(f"{name}: layout", [x], [x], hidden=True)

    def _add(
        self, name: str, inputs: Any, outputs: Any, work: cost.Operations = cost.NOTHING, *, hidden: bool = False,
        kernel: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        inputs, outputs = list(inputs), list(outputs)
        moved = sum(map(cost.size, (*inputs, *outputs)))
        op = _calling_op()
        if name == "convolution" and len(inputs) == 3:  # cuDNN's result is read and written again for its bias
            self._add(name, inputs[:2], outputs, work)
            self._add("add: bias", [inputs[2], outputs[0]], outputs)
            return
        self.launches.append(
            RecordedLaunch(
                name=name,
                kind=cost.kind_of(name, op, hidden, inputs),
                op=op,
                layer=self._layers[-1] if self._layers else "",
                section=self._section,
                tensors=tuple(TensorMeta.of(x) for x in (*inputs, *outputs)),
                bytes=moved,
                flops=work.flops,
                exps=work.exps,
                hidden=hidden,
                kernel=kernel,
            )
        )

    def launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A launch of a Triton kernel."""
        name = kernel.fn.__name__
        values = dict(zip((parameter.name for parameter in kernel.params), args)) | options
        inputs, outputs = [], []
        for key, through in cost.pointers(kernel, values).items():
            if not isinstance(values[key], FakeTensor):
                raise NotOnADevice(f"{name}: {key} is a tensor of the host, {TensorMeta.of(values[key])}")
            inputs += [values[key]] if "load" in through else []
            outputs += [values[key]] if "store" in through else []
        read = {cost.place(x): x for x in inputs}  # a tensor given twice is read once
        self._add(name, read.values(), outputs, cost.kernel_operations(name, values), kernel=(kernel, _frozen(values)))


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments without their tensors, which would stay in memory."""
    return {key: cost.Pointer.of(x) if isinstance(x, torch.Tensor) else x for key, x in values.items()}


def _calling_op() -> str:
    """The op whose file is on the stack, the outermost one."""
    frame, found = sys._getframe(2), ""
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/")
        if folder == KERNELS:
            found = file.removesuffix(".py")
        frame = frame.f_back
    return found


class HostReads(TorchFunctionMode):
    """Arrays of tensors on the fake GPU: refused in a section; elsewhere only what was copied to the host has any."""

    def __init__(self, run: DryRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist) and isinstance(
            args[0], FakeTensor
        ):
            self.run.refuse(f"{func.__name__} reads the device from the host")
            if func is torch.Tensor.tolist:
                return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
            raise TypeError("a CUDA tensor has no array; copy it to the host first")
        return func(*args, **(kwargs or {}))


class DryRecorder:
    """A `fastsd.graph.Recorder`: a capture is a call in a section, and so is each replay."""

    def __init__(self, run: DryRun) -> None:
        self.run = run

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        owner = getattr(function, "__self__", None)
        section = "step" if type(owner).__name__ == "CapturedStep" else _name(owner)

        def replay() -> T:
            with self.run.section(section):
                return function()

        return replay

    def free(self) -> None:
        """Nothing is kept."""


def _name(owner: Any) -> str:
    function = getattr(owner, "function", owner)
    return str(getattr(function, "__name__", None) or type(function).__name__)


@contextmanager
def dry_run(gpu: Gpu) -> Iterator[DryRun]:
    """Inside this context `DEVICE` exists, and what is launched on it is recorded instead."""
    with fake_cuda(gpu) as fake, ExitStack() as stack:
        run = DryRun(fake)

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            run.launch(kernel, args, options)

        stack.enter_context(patch.object(triton.JITFunction, "run", launch))
        hooks = torch.nn.modules.module
        stack.callback(hooks.register_module_forward_pre_hook(run.enter_layer).remove)
        stack.callback(hooks.register_module_forward_hook(run.leave_layer, always_call=True).remove)
        stack.enter_context(run)
        stack.enter_context(HostReads(run))
        yield run
