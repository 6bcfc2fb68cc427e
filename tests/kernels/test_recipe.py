"""The recipe for an op in docs/architecture.md: what it says to write is all that `fastsd verify` needs."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import fastsd.kernels
import fastsd.kernels.triton
from fastsd.kernels import dispatch
from fastsd.kernels.choice.call import Call
from fastsd.model import layers
from fastsd.verify import watch
from fastsd.verify.ops import backend_of, check_op
from tests.support.precision import rand

OP = '''
"""A gated SiLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastsd.kernels import dispatch


def gated_silu_ref(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The specification of `gated_silu`, in fp32."""
    x, wide_gate = dispatch.widen(x), dispatch.widen(gate)
    return (x * torch.sigmoid(x) * wide_gate).to(gate.dtype)


def gated_silu(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`silu(x) * gate` for `[..., C]` each, in the dtype of `x`.

    Raises:
        ValueError: x and gate differ in shape.
    """
    if x.shape != gate.shape:
        raise ValueError(f"gated_silu: x is {list(x.shape)}, gate is {list(gate.shape)}; the shapes must be equal")
    backend = dispatch.backend(x, gate)
    if backend == "reference":
        return gated_silu_ref(x, gate)
    if backend == "triton":
        from fastsd.kernels.triton import gated_silu as gated_silu_triton

        return gated_silu_triton.gated_silu(x, gate)
    return F.silu(x) * gate
'''

# Stands for a launcher. It computes in PyTorch, so that the recipe is followed where Triton is missing.
LAUNCHER = """
import torch


def gated_silu(x, gate):
    return (x.float() * torch.sigmoid(x.float()) * gate.float()).to(x.dtype)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are part of `fastsd.kernels`, and those in `triton/` of `fastsd.kernels.triton`."""
    (tmp_path / "triton").mkdir()
    packages = {fastsd.kernels: tmp_path, fastsd.kernels.triton: tmp_path / "triton"}
    for package, path in packages.items():
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(path)])
    watch.ops.cache_clear()
    yield tmp_path
    watch.ops.cache_clear()
    for package in packages:
        sys.modules.pop(f"{package.__name__}.gated_silu", None)
        vars(package).pop("gated_silu", None)


def add_op(folder: Path, launcher: str = LAUNCHER) -> ModuleType:
    (folder / "gated_silu.py").write_text(OP)
    (folder / "triton" / "gated_silu.py").write_text(launcher)
    importlib.invalidate_caches()
    return importlib.import_module("fastsd.kernels.gated_silu")


def example(dtype: torch.dtype = torch.float32) -> Call:
    return Call.bind(watch.ops()["gated_silu"], rand(3, 64, dtype=dtype), rand(3, 64, dtype=dtype, seed=1))


def test_verify_finds_the_op_by_its_name(folder: Path) -> None:
    before = set(watch.ops())
    watch.ops.cache_clear()
    module = add_op(folder)
    assert set(watch.ops()) - before == {"gated_silu"}
    assert watch.ops()["gated_silu"].run is module.gated_silu
    assert watch.has_kernel("gated_silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_passes_the_op_and_its_kernel(folder: Path, dtype: torch.dtype) -> None:
    add_op(folder)
    for name in ("onednn", "triton"):
        with dispatch.forced(name):
            call = example(dtype)
            assert backend_of(call) == name
            assert check_op(call, None).passed


@pytest.mark.parametrize("fault", ["gate.float() * 1.00001", "gate.float().sigmoid()", "gate.float()[:1]"])
def test_verify_fails_a_wrong_kernel(folder: Path, fault: str) -> None:
    add_op(folder, LAUNCHER.replace("gate.float()", fault))
    with dispatch.forced("triton"):
        assert check_op(example(), None).passed is False
    with dispatch.forced("onednn"):
        assert check_op(example(), None).passed


def test_verify_observes_the_op_in_the_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "gated_silu", add_op(folder).gated_silu, raising=False)
    calls: list[Call] = []
    with watch.observed(calls.append):
        layers.gated_silu(torch.ones(2, 4), torch.ones(2, 4))  # type: ignore[attr-defined]
    assert [call.op.name for call in calls] == ["gated_silu"]


def test_reference_only_makes_the_op_run_its_specification(folder: Path) -> None:
    module = add_op(folder)
    x, gate = rand(3, 64, dtype=torch.bfloat16), rand(3, 64, dtype=torch.bfloat16, seed=1)
    specified = module.gated_silu_ref(x, gate)
    assert not torch.equal(F.silu(x) * gate, specified)  # rounds twice: the two paths can be told apart
    with dispatch.forced("torch"):
        assert torch.equal(module.gated_silu(x, gate), F.silu(x) * gate)
    with dispatch.reference_only():
        assert torch.equal(module.gated_silu(x, gate), specified)


@pytest.mark.parametrize("name", sorted(watch.ops()))
def test_every_op_follows_the_recipe(name: str) -> None:
    module = sys.modules[watch.ops()[name].run.__module__]
    source = inspect.getsource(module)
    assert source.index(f"def {name}_ref(") < source.index(f"def {name}("), "the specification comes first"
    assert "`[" in str(watch.ops()[name].run.__doc__), "the docstring gives shapes"
    assert "dispatch.backend(" in inspect.getsource(watch.ops()[name].run)
    assert (Path(__file__).parent / f"test_{Path(str(module.__file__)).stem}.py").exists()
