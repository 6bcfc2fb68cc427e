"""The measured time of a step and of a decode by kind of op, added to the records of `bench_parts.py`."""

from __future__ import annotations

import pytest
import torch

from bench.bench_parts import step_inputs
from bench.breakdown import measured_kinds
from bench.models import captured_decode, captured_step, vae_dtype
from bench.session import Session
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.generate.latents import CAPTURED
from fastsd.runtime.devices import dtype_name


@pytest.mark.parametrize("part", ["step", "decode"])
def bench_kinds(bench: Session, model: str, part: str, dtype: torch.dtype) -> None:
    """Profile fastsd, on a GPU the replay of its graph, and apply the shares to the measured time."""
    components, device = bench.components(model, dtype), bench.options.device
    unet, vae, size = components.unet, components.vae, bench.size(model, components)
    side, batch = size // vae.config.downscale, min(bench.options.batches) if part == "step" else 1
    if part == "step":
        inputs = step_inputs(unet, batch, size, side, device, 0)
        arguments = inputs["latent"], inputs["times"], inputs["key_values"]
        step = captured_step(unet, device)
        with fixed_convolutions(device):
            shares = measured_kinds(
                unet, lambda: unet.denoise(*arguments), device, None if step is None else lambda: step(*arguments)
            )
    else:
        dtype = vae_dtype(components)
        latent = torch.randn(1, side, side, vae.config.latent_channels, generator=torch.Generator().manual_seed(0))
        latent = latent.to(device, dtype)
        decode = captured_decode(vae, device) if size * size <= CAPTURED else None
        with fixed_convolutions(device):
            shares = measured_kinds(
                vae, lambda: vae.decode(latent), device, None if decode is None else lambda: decode(latent)
            )
    assert {"conv", "attention", "norm"} <= shares.keys() and abs(sum(shares.values()) - 1) < 1e-6
    labels = {"benchmark": part, "model": model, "size": size, "batch": batch, "dtype": dtype_name(dtype)}
    title = f"{part} by kind model={model} size={size} batch={batch} {dtype_name(dtype)}"
    bench.tables.append(f"{title}\n  " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    if bench.options.measuring and not bench.add_kinds(labels | {"candidate": "fastsd"}, shares):
        bench.tables.append(f"  not saved: the result file has no time of a {part}; bench_parts.py measures it")
