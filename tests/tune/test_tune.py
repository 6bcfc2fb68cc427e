"""`fastsd tune` without a GPU, and the tuning of a kernel in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsd.cli import main
from fastsd.kernels.choice.table import TableEntry
from fastsd.tune import tell

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [[], ["--export", "table.json"], ["--device", "cpu"]])
def test_without_a_gpu_the_error_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err
    assert "needs a CUDA GPU" in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--export", "table.json"]])
@pytest.mark.parametrize(
    ("device", "told"),
    [("cuda:9", "has 1 CUDA devices"), ("cudax", "auto, cpu, cuda or cuda:N"), ("cpu", "a CUDA GPU")],
)
def test_a_gpu_that_is_not_there_is_named(
    device: str, told: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["tune", "--device", device, *words]) == 2
    error = capsys.readouterr().err
    assert f"--device is '{device}'; " in error and told in error and error.count("\n") == 1


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "inf"])
def test_minutes_that_are_no_time_are_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", f"--minutes={minutes}"]) == 2
    assert "it should be a number of minutes above 0" in capsys.readouterr().err


def test_a_choice_is_a_line_and_what_was_left_out_another(capsys: pytest.CaptureFixture[str]) -> None:
    entry = TableEntry("torch", None, {"triton": 12.5, "torch": 9.25}, True, {"sdpa flash": "No kernel"})
    tell(("flash_attn", "float16 2x4096x8x40"), entry)
    assert capsys.readouterr().out == (
        "flash_attn (float16 2x4096x8x40): torch 9.2 us, triton 12.5 us\n    left out: sdpa flash: No kernel\n"
    )


TUNE = """
import sys, torch
from fastsd.kernels.candidates import ChoiceMode
from fastsd.kernels.choice import decide
from tests.support.played_gpu import PlayedGpu
from fastsd.kernels.triton import layernorm as ours
from fastsd.kernels.layernorm import layernorm
from fastsd.kernels.candidates import choosing

gpu = decide.machine = PlayedGpu()
tried, correct = [], ours.layernorm
def observed(*args, launch=None, **rest):
    tried.append(launch)
    gpu.takes = 2.0 if launch is None else launch.block_rows + launch.warps / 100
    return correct(*args, launch=launch, **rest) * (1.01 if launch and launch.warps == 2 else 1)
ours.layernorm = observed
def torchs(*args, **rest):
    gpu.takes = 5.0
    return own(*args, **rest)
own, torch.nn.functional.layer_norm = torch.nn.functional.layer_norm, torchs
x, w = torch.randn(3, 40), torch.ones(40)
told = []
with choosing(ChoiceMode(probe=False, thorough=True, tell=lambda *one: told.append(one))):
    layernorm(x, w, w, 1e-5)
((place, entry),) = told
assert place[0] == "layernorm" and place[1].startswith("float32 3x40"), place
assert len(set(tried)) > 5, tried
assert entry.launch["block_rows"] == 1 and entry.launch["warps"] == 1, entry
assert any("it is wrong" in reason for reason in entry.excluded.values()), entry
print("tuned")
"""


GRADIENTS = """
import torch
from fastsd.kernels.candidates import ChoiceMode
from fastsd.kernels.choice import decide
from fastsd.kernels.choice.call import Call
from fastsd.kernels.flash_attn import GRADIENTS, flash_attn
from fastsd.kernels.triton import flash_attn_gradients as ours
from fastsd.tune import note_attention, tune_gradients
from fastsd.verify.watch import ops
from tests.support.played_gpu import PlayedGpu

gpu = decide.machine = PlayedGpu()
tried, correct = [], ours.backward
def observed(*args):
    tried.append(args[-1])
    gpu.takes = args[-1].of_queries.keys + args[-1].of_keys.warps
    return correct(*args)
ours.backward = observed
backward, torch.autograd.grad = torch.autograd.grad, lambda *args: (setattr(gpu, "takes", 99.0), backward(*args))[1]
candidate = GRADIENTS.candidates[0]
few = [one for i, one in enumerate(candidate.launches(True, *[torch.zeros(1, 20, 2, 16)] * 3)) if i % 16 == 0]
object.__setattr__(candidate, "launches", lambda thorough, *args: few if thorough else few[:1])
q, k, v = torch.randn(1, 20, 3, 2, 16).half().unbind(2)
found, told = {}, []
for width in (16, 16, 8):
    note_attention(Call.bind(ops()["flash_attn"], q[..., :width], k[..., :width], v[..., :width], key_length=17), found)
note_attention(Call.bind(ops()["linear"], q[0, 0], k[0, 0]), found)
assert len(found) == 2, found
mode = ChoiceMode(probe=False, thorough=True, tell=lambda *one: told.append(one))
tune_gradients(list(found.values())[:1], torch.device("cpu"), mode)
((place, entry),) = told
assert place[0] == "flash_attn_gradients" and place[1].startswith("float16 1x20x2x16 strides"), place
assert set(few) <= set(tried) and not entry.excluded, entry
best = min(few, key=lambda one: one.of_queries.keys + one.of_keys.warps)
assert entry.way(GRADIENTS).launch == best, entry
tried.clear()
flash_attn(q.detach().requires_grad_(), k, v, key_length=17).sum().backward()
assert tried == [best], tried
print("tuned")
"""


@pytest.mark.heavy
@pytest.mark.parametrize("script", [TUNE, GRADIENTS], ids=["forward", "gradients"])
def test_the_launches_of_a_kernel_are_searched(script: str, tmp_path: Path) -> None:
    """In the interpreter, in a separate process, with a clock that is played; of the forward one a launch is wrong."""
    pytest.importorskip("triton", reason="no Triton for this platform")
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FASTSD_CACHE": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", script]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.stdout == "tuned\n", process.stderr
