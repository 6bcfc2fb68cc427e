"""A step of LoRA training, beside that of peft and diffusers: processor time and memory.

    python -m bench.lora_step                      # a small UNet
    python -m bench.lora_step --model sd15 --rounds 1 --steps 1

Each program runs in a process of its own, one after the other, round by round. A step is the forward pass, the backward
pass and AdamW, on one thread, in fp32, with random weights; the LoRA has rank 16 on attention, feed-forward and
projections, so that both train the same layers. That both compute the same gradients is a test
(tests/agreement/test_written_adapters.py).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from fastsd.config import SD15_UNET, SchedulerConfig, UNetConfig
from fastsd.model.unet import UNet

SMALL = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=1,
    transformer_layers_per_block=(1, 1),
    num_attention_heads=(4, 8),
    cross_attention_dim=256,
)
MODELS = {"small": (SMALL, 32), "sd15": (SD15_UNET, 64)}  # the UNet, and the side of its latent
PROGRAMS = ("fastsd", "peft", "fastsd, recomputed", "peft, recomputed")
RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # latents, timesteps, context


def ours(config: UNetConfig, recompute: bool) -> tuple[Forward, list[torch.nn.Parameter]]:
    """fastsd's UNet with a LoRA in training."""
    from fastsd.components import Components
    from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter

    unet = UNet(config).requires_grad_(False).train()
    nothing: Any = None
    components = Components(unet, nothing, (), (), SchedulerConfig(sampler="ddim"), 64)
    adapter = TrainableAdapter(components, AdapterSettings(rank=RANK, alpha=RANK), seed=0)
    adapter.attach()
    unet.recompute_blocks(recompute)
    return lambda x, t, context: unet(x, t, context), list(adapter.parameters())


def theirs(config: UNetConfig, recompute: bool) -> tuple[Forward, list[torch.nn.Parameter]]:
    """diffusers' UNet with peft's LoRA."""
    import diffusers
    import peft

    from fastsd.weights.layouts.unet_config import write_unet

    unet = diffusers.UNet2DConditionModel.from_config(write_unet(config, 64)).requires_grad_(False).train()
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    if recompute:
        unet.enable_gradient_checkpointing()
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    return lambda x, t, context: unet(x.permute(0, 3, 1, 2), t, context).sample.permute(0, 2, 3, 1), parameters


def measure(program: str, model: str, steps: int) -> dict[str, float]:
    """The median processor time of a step in seconds, and the most memory that the process had, in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, side = MODELS[model]
    make = ours if program.startswith("fastsd") else theirs
    forward, parameters = make(config, "recomputed" in program)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    x, noise = torch.randn(2, 1, side, side, 4).unbind()
    context, t = torch.randn(1, 77, config.cross_attention_dim), torch.tensor([500.0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps + 1):  # the first is not counted
        started = time.process_time()
        (forward(x, t, context) - noise).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(parameter.numel() for parameter in parameters)
    return {"seconds": statistics.median(seconds[1:]), "mb": (peak - before) / 1024, "parameters": count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each process in a round")
    parser.add_argument("--program", choices=PROGRAMS, help="measure this one alone, here, and print JSON")
    options = parser.parse_args()
    if options.program is not None:
        print(json.dumps(measure(options.program, options.model, options.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    for _ in range(options.rounds):
        for program in PROGRAMS:
            command = [sys.executable, "-m", "bench.lora_step", "--model", options.model, "--steps", str(options.steps)]
            done = subprocess.run([*command, "--program", program], capture_output=True, text=True, check=True)
            found[program].append(json.loads(done.stdout.splitlines()[-1]))
    for program, results in found.items():
        seconds, memory = (statistics.median(result[name] for result in results) for name in ("seconds", "mb"))
        parameters = results[0]["parameters"]
        print(f"{program:20} {seconds:8.3f} s a step  {memory:8.0f} MB over the model  {parameters:,.0f} parameters")


if __name__ == "__main__":
    main()
