"""A diffusers pipeline of SD1.5's real size on the CPU: as it is, channels-last, and accelerated, in turns.

    python -m bench.accelerate --rounds 3

Random weights in fp32, one thread, processor time. Each round runs the three ways one after another: text, one call of
the UNet for two samples (guidance), the decoder. The largest differences of their results are printed too, and the
memory of the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastsd

WAYS = ("diffusers", "diffusers, channels-last", "fastsd.accelerate")


def make_pipeline(size: str) -> Any:
    """Random networks in the shapes of SD1.5, or small ones ("tiny") to try this program."""
    import diffusers
    import transformers

    width, text_width, vae_width = {"sd15": (320, 768, 128), "tiny": (32, 32, 32)}[size]
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=text_width,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    heads = 12 if size == "sd15" else 2
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width, num_attention_heads=heads,
            num_hidden_layers=12, eos_token_id=49407, bos_token_id=49406,
        )
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=text.eval(), tokenizer=None, unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def prepare(pipe: Any, way: str) -> None:
    """Bring the pipeline into one of `WAYS`."""
    fastsd.restore(pipe)
    layout = torch.channels_last if way == WAYS[1] else torch.contiguous_format
    pipe.unet.to(memory_format=layout)
    pipe.vae.to(memory_format=layout)
    if way == WAYS[2]:
        fastsd.accelerate(pipe)


def parts(pipe: Any, side: int) -> dict[str, Callable[[], torch.Tensor]]:
    """What is measured, by name; `side` of the latents."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, side, side, generator=generator)
    context = torch.randn(2, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    ids = torch.randint(1000, 40000, (1, 77), generator=generator)
    return {
        "text": lambda: pipe.text_encoder(ids)[0],
        "step": lambda: pipe.unet(torch.cat([latents] * 2), torch.tensor(500), context, return_dict=False)[0],
        "decode": lambda: pipe.vae.decode(latents, return_dict=False)[0],
    }


def resident() -> int:
    """Bytes of this process that are in memory, on Linux; elsewhere 0."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


@torch.no_grad()
def measure(pipe: Any, rounds: int, side: int) -> dict[str, Any]:
    """Processor seconds of each part by way and round, the distances from the first way, resident bytes of each way."""
    runs = parts(pipe, side)
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in runs} for way in WAYS}
    results: dict[str, dict[str, torch.Tensor]] = {}
    memory: dict[str, int] = {}
    for number in range(rounds + 1):  # the first one warms up
        for way in WAYS:
            prepare(pipe, way)
            for name, run in runs.items():
                if number == 0 or way == WAYS[2]:
                    results.setdefault(way, {})[name] = run()  # packs the weights again
                if number:
                    start = time.process_time()
                    run()
                    seconds[way][name].append(time.process_time() - start)
            memory[way] = resident()
    distance = {
        name: {way: float((results[way][name] - results[WAYS[0]][name]).abs().max()) for way in WAYS[1:]}
        for name in runs
    }
    return {"seconds": seconds, "distance": distance, "resident": memory}


def table(found: dict[str, Any]) -> str:
    """Medians, and the ratio of diffusers' faster layout to ours."""
    lines = ["| | " + " | ".join(WAYS) + " | ratio |", "|---|" + "---|" * (len(WAYS) + 1)]
    for name in found["distance"]:
        medians = [statistics.median(found["seconds"][way][name]) for way in WAYS]
        ratio = min(medians[:2]) / medians[2]
        lines.append(f"| {name} | " + " | ".join(f"{m:.3f} s" for m in medians) + f" | {ratio:.2f} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    found = measure(make_pipeline(options.size), options.rounds, options.side)
    print(table(found))
    for name, by_way in found["distance"].items():
        print(f"{name}: largest difference from diffusers {max(by_way.values()):.2g}")
    print("resident: " + ", ".join(f"{way} {size / 2**20:.0f} MiB" for way, size in found["resident"].items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
