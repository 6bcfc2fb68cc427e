"""Our kernels as they are chosen: each is compared with its specification at its first use, and is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.kernels import candidates
from fastsd.kernels.candidates import ChoiceMode, choosing
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.op import GPU_OPS
from fastsd.verify.watch import ops
from tests.support.played_gpu import PlayedGpu, played
from tests.support.precision import rand


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape, dtype=torch.float16, seed=seed)


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def wide(*shape: int) -> torch.Tensor:
    return rand(*shape, dtype=torch.float32)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


NORM, ONES = torch.ones(32).half(), torch.ones(1)
CALLS: dict[str, tuple[Any, ...]] = {
    "layernorm": (half(3, 32), NORM, NORM, 1e-5, (), ()),
    "groupnorm_silu": (half(2, 3, 4, 32), NORM, NORM, 8, 1e-5, True, None, None, None),
    "geglu": (half(2, 5, 32), half(64, 32, seed=1), half(64, seed=2)),
    "flash_attn": (half(1, 20, 2, 16), half(1, 20, 2, 16, seed=1), half(1, 20, 2, 16, seed=2), False),
    "linear": (half(2, 5, 32), half(64, 32, seed=1), half(64, seed=2), "silu", None, None),
    "conv2d": (half(1, 6, 5, 16), channels_last(half(32, 16, 3, 3)), half(32), 1, (1, 1, 1, 1), None, False),
    "upsample2x_conv": (half(1, 3, 4, 16), channels_last(half(32, 16, 3, 3)), half(32)),
    "advance": (
        wide(1, 2, 2, 4), zeros(1, 2, 2, 4).half(), half(2, 2, 2, 4), wide(3, 16), torch.zeros(1, dtype=torch.int64),
        zeros(1, 2, 2, 4), zeros(3, 1, 2, 2, 4), wide(2, 1, 2, 2, 4), ONES, None, None,
    ),
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is played")
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_right_by_the_rule_and_may_be_chosen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in ops()  # which imports it
    op, gpu = GPU_OPS[name], PlayedGpu()
    gpu.takes = 1e-5
    with played(tmp_path, gpu, monkeypatch), choosing(ChoiceMode(probe=False)), torch.inference_mode():
        candidates.run(op, *op.copied(CALLS[name]))
        (entry,) = (
            one for (which, _), one in decide.gpu_of(torch.device("cpu")).table.entries.items() if which == name
        )
    ours = [label for label in entry.microseconds if label.startswith("triton")]
    assert ours and not any("triton" in label for label in entry.excluded), entry
