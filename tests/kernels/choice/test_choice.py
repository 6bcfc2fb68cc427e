"""How long the choices of a new image size take: modelled, on a GPU of 100 TFLOP/s, 1 TB/s and 4 us a launch.

The calls are those of the real networks, on tensors without memory. What is modelled: a way takes its floating-point
operations and its bytes, each once; the specification in fp32 takes a quarter of the rate, and ten times the bytes; a
capture and what Python does for a way take 2 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton", reason="no Triton for this platform")

from bench.model_calls import ChannelsLast, built, empty
from fastsd import config
from fastsd.kernels import candidates, dispatch
from fastsd.kernels.candidates import GpuOp
from fastsd.kernels.choice.decide import ways_of
from fastsd.kernels.choice.machine import GRAPH, calls_in_graph
from fastsd.kernels.choice.measure import ROUNDS, SLOW, SLOW_ROUNDS
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.model.vae import AutoencoderKL

FLOPS, BYTES, LAUNCH, HOST = 100e12, 1e12, 4e-6, 2e-3
MOST = 6  # ways of a call at its first use

Calls = dict[tuple[Any, ...], tuple[GpuOp, tuple[Any, ...], float, float]]


def calls_of(networks: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every call with a key of its own, the seconds of one way, and those of the specification."""
    found: Calls = {}

    def run(op: GpuOp, *args: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = op.own.run(args)
        key = (op.name, *op.key_of(args))
        if key not in found:
            tensors = (*args, *(result if isinstance(result, tuple) else (result,)))
            moving = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)) / BYTES
            computing = counter.get_total_flops() / FLOPS
            found[key] = op, args, LAUNCH + max(computing, moving), 10 * LAUNCH + 4 * computing + 10 * moving
        return result

    monkeypatch.setattr(candidates, "run", run)
    with dispatch.forced("triton"), torch.no_grad(), ChannelsLast():
        networks()
    return found


def image(unet: Any, side: int, encoders: list[Any], dtype: torch.dtype) -> Callable[[], None]:
    """The networks of one guided image: text, a step, the decoder."""

    def networks() -> None:
        for settings in encoders:
            built(TextEncoder, settings)(empty(1, 77, dtype=torch.int64))
        added = AddedConditioning(empty(2, 1280), empty(2, 6)) if unet.addition_time_embed_dim else None
        context = empty(2, 77, unet.cross_attention_dim)
        built(UNet, unet)(empty(2, side, side, 4), empty(2, dtype=torch.float32), context, added)
        built(AutoencoderKL, config.SD_VAE, dtype).decode(empty(1, side, side, 4, dtype=dtype))

    return networks


IMAGES = {
    "SD1.5 512x512": image(config.SD15_UNET, 64, [config.CLIP_L], torch.float16),
    "SDXL 1024x1024": image(config.SDXL_UNET, 128, [config.CLIP_L, config.OPENCLIP_BIGG], torch.bfloat16),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", IMAGES)
def test_a_new_image_size_takes_less_than_two_seconds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    total = 0.0
    for op, args, seconds, specification in calls_of(IMAGES[name], monkeypatch).values():
        taking = [one for one in op.candidates if one.refuses(*args) is None]
        ways = ways_of(taking, args, thorough=False)
        assert len(ways) <= MOST, f"{op.name}: {[way.label for way in ways]}"
        if len(ways) == 1:
            continue
        calls = (
            calls_in_graph(seconds) if seconds < GRAPH else 1
        )  # of the two calls before, one is a slow way's first round
        rounds = ROUNDS if seconds < SLOW else SLOW_ROUNDS
        total += specification + len(ways) * (HOST + 2 * seconds + rounds * calls * seconds)
    print(total)
    assert 0.1 < total < 2.0, total
