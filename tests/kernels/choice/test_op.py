"""No op can be slower than PyTorch's own by a kernel of ours: PyTorch's is among what is timed, for every op.

An op of `fastsd.kernels` that has a kernel states its candidates; the last of them is PyTorch's, launches nothing of
ours, takes every call, and is timed at a first use and while tuning.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")

import triton

import fastsd
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import ChoiceMode, GpuOp, OpCandidate, choosing
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.op import GPU_OPS, key_text
from fastsd.kernels.linear_fp8 import quantize
from fastsd.verify.watch import ops
from tests.support.played_gpu import PlayedGpu, played
from tests.support.precision import rand

PACKAGE = Path(str(fastsd.__file__)).parent
TRITON = "fastsd.kernels.triton"
SAME = (1, 1, 1, 1)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape, dtype=torch.bfloat16, seed=seed)


def taps(outputs: int, inputs: int) -> torch.Tensor:
    return maps(outputs, 3, 3, inputs).permute(0, 3, 1, 2)


def fp8_taps(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize(maps(outputs, 9 * inputs))
    return values.view(outputs, 3, 3, inputs).permute(0, 3, 1, 2), scale


def update() -> tuple[Any, ...]:
    """A latent, the network's input and output, a table of four rows, a row's number, three sums and guidance."""
    wide = [
        rand(*shape, dtype=torch.float32) for shape in ((1, 4, 4, 4), (1, 4, 4, 4), (3, 1, 4, 4, 4), (2, 1, 4, 4, 4))
    ]
    x, saved, history, noise = wide
    half = maps(1, 4, 4, 4), maps(2, 4, 4, 4)
    row = rand(4, 16, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
    return x, *half, *row, saved, history, noise, 7.5, None, None


HEADS = (2, 9, 2, 16)
# All arguments of a call of each op.
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "add_product": lambda: (maps(2, 6, 16), maps(2, 6, 24), maps(16, 24)),
    "advance": update,
    "conv2d": lambda: (maps(1, 5, 4, 16), taps(24, 16), maps(24), 1, SAME, maps(1, 5, 4, 24), False),
    "conv2d_fp8": lambda: (maps(1, 5, 4, 16), *fp8_taps(24, 16), maps(24), 1, SAME, maps(1, 5, 4, 24)),
    "flash_attn": lambda: (maps(*HEADS), maps(*HEADS, seed=1), maps(*HEADS, seed=2), False),
    "flash_attn_gradients": lambda: (maps(*HEADS), maps(*HEADS, seed=1), maps(*HEADS, seed=2), False),
    "geglu": lambda: (maps(6, 16), maps(32, 16), maps(32)),
    "geglu_fp8": lambda: (maps(6, 32), *quantize(maps(32, 32)), maps(32)),
    "groupnorm_silu": lambda: (maps(1, 3, 4, 16), maps(16), maps(16), 4, 1e-5, True, None, None, None),
    "layernorm": lambda: (maps(6, 16), maps(16), maps(16), 1e-5, (), ()),
    "linear": lambda: (maps(6, 16), maps(24, 16), maps(24), "silu", maps(6, 24), None),
    "linear_fp8": lambda: (maps(6, 32), *quantize(maps(24, 32)), maps(24), "none", maps(6, 24), None),
    "upsample2x_conv": lambda: (maps(1, 3, 4, 16), taps(24, 16), maps(24)),
}


def gpu_ops() -> dict[str, GpuOp]:
    """Those of the package, without what tests add."""
    ops()  # imports every module
    return {name: op for name, op in GPU_OPS.items() if op.reference.__module__.startswith("fastsd.")}


def imports_kernels(file: Path) -> bool:
    source = file.read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(source)) if TRITON in source else ()
    return any(isinstance(node, ast.ImportFrom) and str(node.module).startswith(TRITON) for node in nodes)


def test_only_ops_with_candidates_reach_the_kernels() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "kernels" / "triton" not in file.parents]
    found = {
        file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        for file in files
        if imports_kernels(file)
    }
    modules = {op.reference.__module__.removeprefix("fastsd.") for op in gpu_ops().values()}
    assert "kernels.conv2d_fp8" in found and found <= modules, found - modules


def test_every_op_has_a_call_here() -> None:
    assert set(CALLS) == set(gpu_ops())


@pytest.mark.parametrize("name", CALLS)
def test_the_last_candidate_is_pytorchs_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(kernel: Any, *args: Any, **options: Any) -> None:
        raise AssertionError(f"{name}: PyTorch's own op launches {kernel.fn.__name__}")

    monkeypatch.setattr(triton.JITFunction, "run", launched)
    op, args = gpu_ops()[name], CALLS[name]()
    own = op.own.candidate
    assert own.name == "torch" and not (own.partial or own.measured or own.tuned) and own.launches is None
    assert own.refuses(*args) is None and own.refuses is OpCandidate("any", own.run).refuses
    assert [one.name for one in op.candidates].count("torch") == 1
    with dispatch.forced("torch"):  # of an op within it too
        results = op.outputs(op.own, args)
    wanted = op.copied(args)
    specified = op.reference(*wanted)
    expected = tuple(wanted[i] for i in op.in_place) if op.in_place else specified
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in expected]


@pytest.mark.parametrize("thorough", [False, True], ids=["first use", "tuning"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_timed_and_a_slower_kernel_is_not_chosen(
    name: str, thorough: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other candidates are played: they compute what PyTorch does, in a stated time."""
    gpu, op = PlayedGpu(), gpu_ops()[name]
    own = op.own.candidate.run

    def taking(seconds: float) -> Callable[..., Any]:
        def run(*args: Any, launch: Any = None) -> Any:
            with dispatch.forced("torch"):
                result = own(*args)
            gpu.takes = seconds
            return result

        return run

    for ours in (0.5e-5, 2e-5):
        others = [replace(one, run=taking(ours), refuses=OpCandidate("any", own).refuses) for one in op.candidates[:-1]]
        played_op = replace(op, candidates=(*others, OpCandidate("torch", taking(1e-5))))
        args = CALLS[name]()
        with played(tmp_path / f"{ours}", gpu, monkeypatch), choosing(ChoiceMode(probe=False, thorough=thorough)):
            candidates.chosen(played_op, *args)
            entry = decide.gpu_of(args[0].device).table.entries[name, key_text(op.key_of(args))]
        assert entry.microseconds["torch"] == 10.0 and set(entry.microseconds) > {"torch"}
        assert (entry.candidate == "torch") == (ours > 1e-5)
    GPU_OPS[name] = op
