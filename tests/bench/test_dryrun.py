"""What a guided step launches on a GPU, counted without one; what a graph could not capture fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import torch

from bench.dryrun.__main__ import main
from bench.dryrun.device import DEVICE, why_not
from bench.dryrun.gpus import GPUS
from bench.dryrun.memory import LARGE, MIB, Allocations
from bench.dryrun.networks import on_gpu
from bench.dryrun.record import DryRun, DryRunFault, Section, dry_run
from bench.dryrun.steps import guided_step
from bench.families import FAMILIES, TINY
from bench.roofline import step_work
from fastsd.kernels.layernorm import layernorm
from fastsd.model.layers import CrossAttention, GroupNorm, LayerNorm
from fastsd.model.unet import UNet

if why_not() is not None:
    pytest.skip(f"no dry run here: {why_not()}", allow_module_level=True)

# The most launches of a guided step of one image: UNet, guidance and update. Lower them with every launch that goes.
BUDGETS = {"sd15": 368, "sdxl": 927}


@pytest.fixture(scope="module", params=BUDGETS)
def step(request: pytest.FixtureRequest) -> tuple[str, Section]:
    with dry_run(GPUS["h100"]) as run:
        return request.param, guided_step(run, FAMILIES[request.param])


def test_a_step_keeps_its_budget(step: tuple[str, Section]) -> None:
    name, section = step
    launches = section.launches
    assert len(launches) <= BUDGETS[name], Counter(launch.kind for launch in launches)
    assert sum(launch.bytes for launch in launches) <= 1.1 * section.floors.bytes(2)
    assert not section.hidden


def test_an_image_prompt_is_an_attention_and_a_sum_for_each_cross_attention() -> None:
    with dry_run(GPUS["h100"]) as run:
        without, section = guided_step(run, TINY), guided_step(run, TINY, image_tokens=16)
    with torch.device("meta"):
        layers = sum(isinstance(module, CrossAttention) for module in UNet(TINY.unet).modules())
    more = Counter(launch.kind for launch in section.launches) - Counter(launch.kind for launch in without.launches)
    assert not section.hidden and sum(more.values()) == 2 * layers and more["attention"] == layers


def test_a_step_has_the_layers_and_the_products_of_its_unet(step: tuple[str, Section]) -> None:
    """The layers of the config, and the operations that the roofline counts for them without running anything."""
    name, section = step
    found = Counter(launch.layer for launch in section.launches if launch.kind == "convolution")
    assert len(found) == {"sd15": 52, "sdxl": 40}[name]
    work = step_work(FAMILIES[name], 1, FAMILIES[name].size)
    launches = section.launches
    doubled = sum(launch.flops for launch in launches if launch.kernel is not None and launch.kernel[1].get("UP") == 2)
    flops = sum(launch.flops for launch in launches) + doubled * 5 / 4  # four products in place of nine
    assert flops == pytest.approx(sum(w.flops for w in work), rel=1e-9)
    assert section.floors.bytes(2) == 2 * sum(w.elements for w in work)


def tiny_step(patches: dict[tuple[type, str], Any] | None = None) -> tuple[DryRun, Section]:
    """A step of the tiny model with methods of its layers replaced."""
    with dry_run(GPUS["h100"]) as run:
        patchers = [patch.object(owner, name, method) for (owner, name), method in (patches or {}).items()]
        for patcher in patchers:
            patcher.start()
        try:
            return run, guided_step(run, TINY)
        finally:
            for patcher in patchers:
                patcher.stop()


def after(owner: type, look: Callable[[torch.Tensor], Any]) -> dict[tuple[type, str], Any]:
    """The layer's forward, followed by `look` at its result."""
    forward = owner.forward  # type: ignore[attr-defined]

    def looked(self: Any, *args: Any, **named: Any) -> Any:
        out = forward(self, *args, **named)
        look(out[0] if isinstance(out, tuple) else out)
        return out

    return {(owner, "forward"): looked}


HOST_LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.isnan().any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "tolist": lambda x: x.flatten()[:2].tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream's": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("name", HOST_LOOKS)
def test_a_look_at_the_host_fails(name: str) -> None:
    with pytest.raises(DryRunFault):
        tiny_step(after(GroupNorm, HOST_LOOKS[name]))


MIXTURES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a map": lambda x: x + torch.zeros(x.shape),
    "a number": lambda x: x * torch.tensor(2.0),
    "copied": lambda x: torch.zeros(2).to(x.device),
    "in a kernel": lambda x: layernorm(x, torch.ones(x.shape[-1]), torch.ones(x.shape[-1]), 1e-5),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_tensor_of_the_host_fails(name: str) -> None:
    with pytest.raises(DryRunFault, match="host"):
        tiny_step(after(GroupNorm, MIXTURES[name]))


def test_a_copy_that_nobody_asked_for_is_told() -> None:
    assert not tiny_step()[1].hidden
    copying = tiny_step(after(LayerNorm, lambda x: x.transpose(-1, -2).contiguous()))[1]
    assert {launch.name for launch in copying.hidden} == {"clone"}


def test_a_change_of_layout_is_told() -> None:
    """A weight or a map that is not channels-last: cuDNN would copy it in every step."""
    with dry_run(GPUS["h100"]) as run, torch.inference_mode():
        x = torch.empty(1, 8, 8, 16, device=DEVICE, dtype=torch.float16).permute(0, 3, 1, 2)
        weight = torch.empty(16, 16, 3, 3, device=DEVICE, dtype=torch.float16)
        torch.nn.functional.conv2d(x, weight)
        torch.nn.functional.conv2d(x.contiguous(), weight.contiguous(memory_format=torch.channels_last))
        a, b = (torch.empty(64, 64, device=DEVICE, dtype=torch.float16) for _ in range(2))
        torch.mm(a[:, ::2], b[:32])
        torch.mm(a.T, b)
    assert [launch.name for launch in run.of("").hidden] == [
        *("convolution: layout", "clone", "clone", "convolution: layout", "mm: layout")
    ]


def test_a_bias_of_cudnn_is_a_launch_of_its_own() -> None:
    with dry_run(GPUS["h100"]) as run, torch.inference_mode():
        half = {"device": DEVICE, "dtype": torch.float16}
        x, weight = torch.empty(1, 16, 8, 8, **half), torch.empty(32, 16, 1, 1, **half)
        torch.nn.functional.conv2d(x, weight, torch.empty(32, **half))
        torch.nn.functional.linear(x.flatten(0, 2), torch.empty(4, 8, **half), torch.empty(4, **half))
    assert [(launch.name, launch.kind) for launch in run.of("").launches] == [
        *(("convolution", "convolution"), ("add: bias", "bias"), ("addmm", "linear"))
    ]
    assert run.of("").launches[0].bytes == 2 * (16 * 64 + 16 * 32 + 32 * 64)
    assert run.of("").launches[1].bytes == 2 * (32 + 2 * 32 * 64)
    assert run.of("").launches[2].flops == 2 * 128 * 8 * 4


def test_layers_are_named_and_attention_is_a_launch() -> None:
    section = tiny_step()[1]
    attention = [launch for launch in section.launches if launch.kind == "attention"]
    assert {launch.layer.rsplit(".", 1)[1] for launch in attention} == {"attn1", "attn2"}
    assert all(launch.kernel is not None and launch.flops > 0 for launch in attention)


def test_memory_holds_the_weights_and_no_map_for_longer_than_it_lives() -> None:
    with dry_run(GPUS["h100"]) as run:
        unet = on_gpu(UNet, TINY.unet)
        weights = run.memory.live
        assert weights == sum(-(-2 * p.numel() // 512) * 512 for p in unet.parameters())
        x = torch.empty(2, 64, 64, 4, device=DEVICE)
        y = x.half()
        del x
        assert (run.memory.live - weights, run.memory.peak - weights) == (2 * y.numel(), 6 * y.numel())


def test_the_allocator_reuses_splits_and_joins() -> None:
    """As PyTorch's does: small blocks share a segment of 2 MiB, those below 10 MiB one of 20 MiB."""
    memory = Allocations()
    small = [memory.allocate(700) for _ in range(3)]
    assert (memory.live, memory.reserved) == (3 * 1024, 2 * MIB)
    large = [memory.allocate(4 * MIB) for _ in range(5)]
    assert memory.reserved == 22 * MIB
    own = memory.allocate(LARGE + 1)
    assert memory.reserved == 22 * MIB + 12 * MIB  # what is left of it, 1.99 MiB, is a block
    for block in (*small, *large, own):
        memory.release(block)
    assert memory.live == 0
    memory.allocate(19 * MIB)  # 20 MiB in one piece again
    assert memory.reserved == 34 * MIB
    with memory.pool("graphs"):
        memory.allocate(MIB)
    assert memory.reserved == 36 * MIB  # a pool of its own
    assert memory.peak == 3 * 1024 + 20 * MIB + LARGE + 512


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--model tiny --batch 0", "error: --batch is 0; it should be a whole number from 1 to"),
        ("--model tiny --size 0", "error: --size is 0; it should be"),
        ("--model tiny --size 100", "error: --size is 100; it should be a multiple of 8: 96 or 104"),
        ("--model tiny --batch x", "python -m bench.dryrun: error: argument --batch: invalid int value: 'x'"),
        ("--write-docs --model tiny", "--write-docs runs what the page shows; leave the other flags out"),
        ("", "--model is needed, or --write-docs"),
    ],
)
def test_a_wrong_flag_is_named_as_it_was_given(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2 and told in capsys.readouterr().err
