"""SD1.5's UNet step with guidance at 512 x 512, and its VAE decode, on the CPU: fastsd beside diffusers.

    python -m bench.cpu_step [--dtype bf16] [--rounds 5] [--threads 2] [--part unet|vae] [--cpu-time]

The weights are random: saved by diffusers into a temporary folder and loaded from there by fastsd. Outputs are compared
before anything is timed. The contestants then take turns, so that a busy machine disturbs all alike; the ratio is that
of the medians. Diffusers runs eagerly in both memory layouts. "fastsd, all of it" computes the time embeddings and the
text's keys and values in every call, as diffusers does; "fastsd" is a step of a run, which made them before its loop.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsd.config import SD15_UNET, SD_VAE, UNetConfig, VAEConfig
from fastsd.model.unet import UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.weights.load import find_files, load_module

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STEM = "diffusion_pytorch_model"
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contestant:
    """`run` is timed, `prepare` before it is not."""

    name: str
    run: Run
    prepare: Callable[[], None] = lambda: None


def diffusers_unet(config: UNetConfig) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 64,
        "cross_attention_dim": config.cross_attention_dim,
        "block_out_channels": config.block_out_channels,
        "attention_head_dim": config.num_attention_heads[0],
    }
    return UNet2DConditionModel(**settings)


def diffusers_vae(config: VAEConfig) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Other

    count = len(config.block_out_channels)
    settings: dict[str, Any] = {
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
    }
    return Other(**settings)


def save(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    model = model.to(dtype).eval().requires_grad_(False)
    model.save_pretrained(folder)
    return model


def peak_memory() -> float:
    """The process's largest resident size so far, in GiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def unet_contest(dtype: torch.dtype, folder: Path) -> list[Contestant]:
    other = save(diffusers_unet(SD15_UNET), folder, dtype)
    ours = load(lambda: UNet(SD15_UNET), folder, dtype)
    latent, context = torch.randn(2, 4, 64, 64).to(dtype), torch.randn(2, 77, SD15_UNET.cross_attention_dim).to(dtype)
    timestep, rows = torch.full((2,), 500.0), latent.permute(0, 2, 3, 1).contiguous()
    # Outside the loop of a run: what depends on the text and the timesteps alone.
    with torch.no_grad():
        times, key_values = ours.embed_time(timestep), ours.project_context(context)
    return [
        *in_both_layouts(other, lambda: other(latent, timestep, context).sample),
        Contestant("fastsd, all of it", lambda: ours(rows, timestep, context).permute(0, 3, 1, 2)),
        Contestant("fastsd", lambda: ours.denoise(rows, times, key_values).permute(0, 3, 1, 2)),
    ]


def vae_contest(dtype: torch.dtype, folder: Path) -> list[Contestant]:
    other = save(diffusers_vae(SD_VAE), folder, dtype)
    ours = load(lambda: AutoencoderKL(SD_VAE), folder, dtype)
    latent = torch.randn(1, 4, 64, 64).to(dtype)
    rows = latent.permute(0, 2, 3, 1).contiguous()
    theirs = in_both_layouts(other, lambda: other.decode(latent).sample)
    return [*theirs, Contestant("fastsd", lambda: ours.decode(rows).permute(0, 3, 1, 2))]


def load(build: Callable[[], nn.Module], folder: Path, dtype: torch.dtype) -> Any:
    start = time.perf_counter()
    model = load_module(build, find_files(folder, STEM, half=False), dtype, torch.device("cpu"))
    print(f"loaded and packed by fastsd in {time.perf_counter() - start:.1f} s")
    return model


def in_both_layouts(model: nn.Module, run: Run) -> list[Contestant]:
    def bring_into(layout: torch.memory_format) -> None:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    return [
        Contestant("diffusers, contiguous", run, lambda: bring_into(torch.contiguous_format)),
        Contestant("diffusers, channels-last", run, lambda: bring_into(torch.channels_last)),
    ]


@torch.no_grad()
def compare(title: str, contestants: list[Contestant], rounds: int, clock: Callable[[], float]) -> None:
    """Check that all agree (this warms them up, too), then time them in turn and print a table; fastsd is the last."""
    times: list[list[float]] = [[] for _ in contestants]
    first = None
    for i in range(1 + rounds):
        for contestant, values in zip(contestants, times):
            contestant.prepare()
            start = clock()
            output = contestant.run()
            values.append(clock() - start)
            if i == 0:
                output = output.float()
                first = output if first is None else first
                distance = ((output - first).norm() / first.norm()).item()
                print(f"{title}: {contestant.name}: relative distance to the first {distance:.1e}")
    ours = statistics.median(times[-1][1:])
    for contestant, values in zip(contestants, times):
        median, low, high = statistics.median(values[1:]), min(values[1:]), max(values[1:])
        row = f"{median:6.2f} s ({low:.2f} to {high:.2f}), {median / ours:.2f} x fastsd's time"
        print(f"{title}: {contestant.name:25} median {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part", choices=("unet", "vae", "both"), default="both")
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time, for a busy machine")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    contests = {"unet": unet_contest, "vae": vae_contest}
    for part in contests if arguments.part == "both" else (arguments.part,):
        with tempfile.TemporaryDirectory() as folder:
            contestants = contests[part](DTYPES[arguments.dtype], Path(folder))
        title = f"{part} {arguments.dtype}, {arguments.threads} threads"
        compare(title, contestants, arguments.rounds, clock)
    print(f"peak memory {peak_memory():.1f} GiB")


if __name__ == "__main__":
    main()
