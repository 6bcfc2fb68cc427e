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
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.dryrun import cost
from bench.dryrun.device import DEVICE, fake_cuda
from bench.dryrun.floor import Floors
from bench.dryrun.gpus import Gpu
from bench.dryrun.memory import EAGER, GRAPHS, Allocations
from bench.intercept import intercepted, without_memory
from fastsd.generate.batch import Batch
from fastsd.kernels import candidates

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


class DryRunFault(BaseException):
    """Something that a captured graph cannot do, or that waits for the device. No `except Exception` may hide it."""


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
        tensors: what it reads, then what it writes.
        bytes: read and written.
        flops, exps: floating-point operations of products; exponentials.
        hidden: a copy that nobody asked for, of an operand in another layout.
        kernel: the kernel and its arguments, where it is ours: pointers, numbers, constants, compiler options.
    """

    name: str
    kind: str
    op: str
    layer: str
    tensors: tuple[TensorMeta, ...]
    bytes: int
    flops: float = 0.0
    exps: float = 0.0
    hidden: bool = False
    kernel: tuple[Any, dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        work = f"{self.bytes / 1e6:9.2f} MB {self.flops / 1e9:9.2f} GFLOP"
        return f"{self.kind:12} {self.name:28} {work}  {self.layer}  {' '.join(map(str, self.tensors))}"


@dataclass(eq=False)
class Section:
    """Work that a graph captures once, or, with the name "", what runs outside of graphs.

    Attributes:
        name: "step", "text", "encode", "decode".
        launches: of one replay.
        floors: the least work of its layers.
        replays: how often it ran.
    """

    name: str
    launches: list[RecordedLaunch] = field(default_factory=list)
    floors: Floors = field(default_factory=Floors)
    replays: int = 0

    @property
    def hidden(self) -> list[RecordedLaunch]:
        """The copies that nobody asked for."""
        return [launch for launch in self.launches if launch.hidden]


class DryRun(TorchDispatchMode):
    """Records the launches on the fake GPU. Work on CPU tensors is done as ever.

    What reads the GPU from the host gets zeros, or True. In a section, and anywhere in a row of the loop, it raises
    `DryRunFault`.

    Attributes:
        sections: in the order of their capture; the first is what runs outside of them.
        in_loop: a row of the loop is under way.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.memory = Allocations()
        self.sections = [Section("")]
        self.in_loop = False
        self._current = self.sections[0]
        self._layers: list[tuple[nn.Module, str]] = []
        self._names: dict[int, str] = {}

    def of(self, name: str) -> Section:
        """The first section of that name."""
        return next(section for section in self.sections if section.name == name)

    @contextmanager
    def section(self, section: Section, pool: str = GRAPHS) -> Iterator[None]:
        """Inside this context launches belong to `section`, and memory to `pool`."""
        before, self._current = self._current, section
        try:
            with self.memory.pool(pool):
                yield
        finally:
            self._current = before

    def name(self, prefix: str, module: nn.Module) -> None:
        """Let launches of the module's layers have their names."""
        self._names.update({id(layer): f"{prefix}.{name}".rstrip(".") for name, layer in module.named_modules()})

    @property
    def layer(self) -> str:
        """The name of the layer that runs."""
        return self._layers[-1][1] if self._layers else ""

    def enter_layer(self, module: nn.Module, args: Any) -> None:
        """A hook."""
        self._layers.append((module, self._names.get(id(module), self.layer)))

    def leave_layer(self, module: nn.Module, args: Any, named: dict[str, Any], result: Any) -> None:
        """A hook."""
        self._layers.pop()
        first = result[0] if isinstance(result, tuple) else result  # a norm's second result is no work of its own
        if isinstance(first, torch.Tensor) and isinstance(first, FakeTensor):
            self._current.floors.add(module, args, named, first)

    def refuse(self, what: str, loop: bool = True) -> None:
        """Raise if a graph is captured, or with `loop` a row of the loop is under way."""
        if self._current.name or (loop and self.in_loop):
            raise DryRunFault(f"{self._current.name or 'between two replays'}: {self.layer or 'no layer'}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        to_gpu = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if func.namespace == "prim" or not (fakes or to_gpu):
            return func(*args, **kwargs)
        if func not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # into what its C++ composes it of, as on a GPU
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.refuse("the host reads a number from the device")
            return True if fakes[0].dtype == torch.bool else 0
        if func is aten._to_copy.default and not to_gpu and kwargs.get("device", DEVICE).type == "cpu":
            self.refuse("a copy to the host")
            return torch.zeros(fakes[0].shape, dtype=kwargs.get("dtype") or fakes[0].dtype)
        hosts = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        if hosts:
            pinned = all(x.ndim == 0 or getattr(x, "pinned_in_dry_run", False) for x in hosts)
            self.refuse(f"{func} is given a tensor of the host, {TensorMeta.of(hosts[0])}", loop=not pinned)
            args, kwargs = tree_map_only(torch.Tensor, self._on_fake, (args, kwargs))
        return self._run(func, args, kwargs)

    def _on_fake(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        with self.fake:
            try:
                out = func(*args, **kwargs)
            except (DynamicOutputShapeException, DataDependentOutputException):
                raise DryRunFault(
                    f"{self._current.name}: {self.layer}: {func} reads the device from the host"
                ) from None
            if func is aten.convolution.default:
                # A build without cuDNN would keep channels first.
                out = torch.empty_like(out, memory_format=cost.layout_of_cudnn(*args[:2]))
        results = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        self.memory.see(results)
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE or not any(x.numel() for x in (*fakes, *results)):
            return out
        for x in cost.rearranged(name, args):
            self._add(f"{name}: layout", [x], [x], hidden=True)
        written = [
            x for x, a in zip(args, func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        written += [kwargs[key] for key in ("out",) if key in kwargs]
        outputs = {cost.place(x): x for x in (*tree_leaves(written), *results) if isinstance(x, FakeTensor)}
        inputs = {cost.place(x): x for x in fakes if not (name in cost.OVERWRITES and cost.place(x) in outputs)}
        work = cost.aten_operations(name, args, results)
        if name == "convolution" and len(inputs) == 3:  # cuDNN's result is read and written again for its bias
            x, weight, bias = inputs.values()
            self._add(name, [x, weight], outputs.values(), work)
            self._add(cost.BIAS, [bias, *outputs.values()], outputs.values())
        else:
            hidden = name in cost.HIDDEN and (name != "_to_copy" or results[0].dtype == fakes[0].dtype)
            self._add(name, inputs.values(), outputs.values(), work, hidden=hidden)
        return out

    def _add(
        self,
        name: str,
        inputs: Any,
        outputs: Any,
        work: cost.Operations = cost.NOTHING,
        *,
        kind: str = "",
        hidden: bool = False,
        kernel: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:
        inputs, outputs = list(inputs), list(outputs)
        op = _calling_op()
        launch = RecordedLaunch(
            name=name,
            kind=kind or cost.kind_of(name, op, hidden, inputs),
            op=op,
            layer=self.layer,
            tensors=tuple(TensorMeta.of(x) for x in (*inputs, *outputs)),
            bytes=sum(map(cost.size, (*inputs, *outputs))),
            flops=work.flops,
            exps=work.exps,
            hidden=hidden,
            kernel=kernel,
        )
        self._current.launches.append(launch)

    def launch(self, kernel: Any, values: dict[str, Any]) -> None:
        """A launch of a Triton kernel."""
        try:
            used, work = cost.pointers(kernel, values), cost.kernel_operations(kernel, values)
        except ValueError as error:
            raise DryRunFault(str(error)) from None
        tensors = {key: x for key in used if (x := cost.tensor_of(values[key])) is not None}
        for key, x in tensors.items():
            if not isinstance(x, FakeTensor):
                raise DryRunFault(f"{kernel.fn.__name__}: {key} is a tensor of the host, {TensorMeta.of(x)}")
        read = {cost.place(tensors[key]): tensors[key] for key, how in used.items() if "load" in how}
        written = {cost.place(tensors[key]): tensors[key] for key, how in used.items() if "store" in how}
        kind = cost.kind_of_kernel(kernel, _calling_op(), values)
        given = kernel, without_memory(values)
        self._add(kernel.fn.__name__, read.values(), written.values(), work, kind=kind, kernel=given)


def _calling_op() -> str:
    """The op whose file is on the stack, the outermost one."""
    frame, found = sys._getframe(2), ""
    while frame is not None:
        folder, _, file = frame.f_code.co_filename.rpartition("/")
        if folder == KERNELS and file != "candidates.py":
            found = file.removesuffix(".py")
        frame = frame.f_back
    return found


class HostCalls(TorchFunctionMode):
    """Methods of tensors that the dispatcher does not see: arrays, addresses, pinned memory.

    Of a tensor on the fake GPU an array is refused everywhere; its address is a number of its own.
    """

    def __init__(self, run: DryRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            args[0].pinned_in_dry_run = True
            return args[0]
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], FakeTensor):
            raise DryRunFault(f"{self.run.layer}: a CUDA tensor has no array; it is copied to the host first")
        if func is torch.Tensor.data_ptr and isinstance(args[0], FakeTensor):
            return args[0].untyped_storage()._cdata + args[0].storage_offset() * args[0].element_size()
        return func(*args, **(kwargs or {}))


class DryRecorder:
    """A `fastsd.graph.Recorder`: a warm-up, a capture that is recorded, and replays that are counted."""

    def __init__(self, run: DryRun) -> None:
        self.run = run

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        name = _section_of(function)
        with self.run.section(Section(name), EAGER):
            function()
        section = Section(name)
        self.run.sections.append(section)
        with self.run.section(section):
            outputs = function()

        def replay() -> T:
            section.replays += 1
            return outputs

        return replay

    def free(self) -> None:
        """Nothing is kept."""


def _section_of(function: Any) -> str:
    """What a captured callable does: "step", "text", "encode", "decode"."""
    inner = getattr(function.__self__, "function", None)  # `FunctionOnBuffers` holds one
    if inner is None:
        return "step"
    return "text" if inner.__module__.startswith("fastsd.text") else str(inner.__name__)


@contextmanager
def dry_run(gpu: Gpu) -> Iterator[DryRun]:
    """Inside this context `DEVICE` exists, and what is launched on it is recorded instead."""
    made: list[DryRun] = []

    def wait() -> None:
        for one in made:
            one.refuse("the host waits for the device")

    with fake_cuda(gpu, wait) as fake, ExitStack() as stack:
        run = DryRun(fake)
        made.append(run)
        candidates.forget()
        stack.callback(candidates.forget)

        denoise = Batch.denoise

        def watched(batch: Batch) -> Any:
            run.in_loop = True
            try:
                return denoise(batch)
            finally:
                run.in_loop = False

        stack.enter_context(intercepted(run.launch))
        stack.enter_context(patch.object(Batch, "denoise", watched))
        hooks = nn.modules.module
        stack.callback(hooks.register_module_forward_pre_hook(run.enter_layer).remove)
        leave = hooks.register_module_forward_hook(run.leave_layer, with_kwargs=True, always_call=True)
        stack.callback(leave.remove)
        stack.enter_context(run)
        stack.enter_context(HostCalls(run))
        yield run
