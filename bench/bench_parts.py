"""The parts of a generation: a guided step, VAE decode and encode, the text, the sampler update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench import models
from bench.families import family_of
from bench.measure import Candidate, rotation
from bench.options import COMPILED
from bench.profiling import profile_step
from bench.roofline import decode_work, encode_work, meta_unet_inputs, step_work, text_work
from bench.session import Session
from fastsd.cuda.cudnn import fixed_convolutions
from fastsd.generate.latents import CAPTURED
from fastsd.kernels import dispatch
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.sampling import advance
from fastsd.sampling.build import build

# Consecutive roundings, for the tolerances: the ops on the longest path through the network.
UNET_DEPTH, VAE_DEPTH, TEXT_DEPTH = 400, 80, 150
SETS = 3  # of inputs
COMPILE_SECONDS = 60.0  # the least time of torch.compile(mode="max-autotune") for a UNet on a GPU

Loader = Callable[[], tuple[nn.Module, Callable[[Any, int], torch.Tensor]]]


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` to `[N, H, W, C]`."""
    return x.permute(0, 2, 3, 1).contiguous()


def peers(bench: Session, load: Loader, method: str = "forward") -> tuple[list[Candidate], dict[str, str]]:
    """diffusers' candidates for one network, and the reasons of those that cannot take part.

    Args:
        load: returns diffusers' network, and a function that calls it on the i-th inputs; channels first.
        method: of the network that the function calls, for torch.compile.
    """
    names = [name for name in bench.options.peers if name.startswith("diffusers")]
    if not names:
        return [], {}
    try:
        network, call = load()
    except Exception as error:  # not installed, or diffusers does not support this model
        reason = f"missing: {type(error).__name__}: {str(error)[:120].partition(chr(10))[0]}"
        return [], dict.fromkeys(names, reason)
    candidates = []
    for name in names:
        if name == COMPILED:
            candidates.append(compiled_peer(load, bench.options.device, method))
            continue
        prepare = lambda last=name != "diffusers": models.channels_last(network, last)  # noqa: E731
        candidates.append(Candidate(name, lambda i: call(network, i), prepare))
    return candidates, {}


def compiled_peer(load: Loader, device: torch.device, method: str) -> Candidate:
    """A peer under torch.compile, with a separate network, since its CUDA graphs hold the addresses of the weights."""
    compiled: list[Any] = []  # the network and its call

    def prepare() -> None:
        if not compiled:
            network, call = load()
            models.channels_last(network, True)
            setattr(network, method, torch.compile(getattr(network, method), mode="max-autotune", fullgraph=True))
            compiled.extend([network, call])

    min_seconds = COMPILE_SECONDS if device.type == "cuda" else 0.0
    return Candidate(COMPILED, lambda i: compiled[1](compiled[0], i), prepare, min_seconds=min_seconds)


def on_pytorch(bench: Session, run: Callable[[int], torch.Tensor]) -> list[Candidate]:
    """fastsd's modules on PyTorch's ops, if `--peers` names them."""

    def forced(i: int) -> torch.Tensor:
        with dispatch.forced("torch"):
            return run(i)

    return [Candidate("pytorch", forced)] if "pytorch" in bench.options.peers else []


def on_reference(run: Callable[[int], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`run(0)` by the reference path."""

    def reference() -> torch.Tensor:
        with torch.inference_mode(), dispatch.reference_only():
            return run(0)

    return reference


def inference(candidates: list[Candidate]) -> list[Candidate]:
    """Disable gradients; for peers in the mode of diffusers' own pipelines, which torch.compile handles best."""
    modes = ((c, torch.no_grad() if c.name.startswith("diffusers") else torch.inference_mode()) for c in candidates)
    return [replace(c, run=mode(c.run)) for c, mode in modes]


def as_in_pipeline(run: Callable[[int], torch.Tensor], device: torch.device) -> Callable[[int], torch.Tensor]:
    """Select cuDNN's algorithms as a pipeline does."""

    def selected(i: int) -> torch.Tensor:
        with fixed_convolutions(device):
            return run(i)

    return selected


def step_inputs(unet: UNet, batch: int, size: int, side: int, device: torch.device, i: int) -> dict[str, Any]:
    """The i-th inputs of a guided step, in the layouts of fastsd and of diffusers; `side`: of the latent."""
    generator, dtype = torch.Generator().manual_seed(i), unet.conv_in.weight.dtype
    x, _, context, added = meta_unet_inputs(unet, 2 * batch, side, side)
    latent = torch.randn(x.shape, generator=generator).to(device, dtype)
    text = torch.randn(context.shape, generator=generator).to(device, dtype)
    timestep = torch.full((2 * batch,), 900.0 - 100.0 * i, device=device)
    if added is not None:
        pooled = torch.randn(added.pooled.shape, generator=generator).to(device, dtype)
        added = AddedConditioning(pooled, torch.full(added.sizes.shape, float(size), device=device))
    with torch.inference_mode():
        times, key_values = unet.embed_time(timestep, added), unet.project_context(text)
    return {
        "latent": latent, "latent_nchw": latent.permute(0, 3, 1, 2).contiguous(), "timestep": timestep, "text": text,
        "added": added, "times": times, "key_values": key_values,
    }  # fmt: skip


def bench_step(bench: Session, publish: Any, model: str, batch: int, dtype: torch.dtype) -> None:
    components = bench.components(model, dtype)
    unet, device = components.unet, bench.options.device
    size = bench.size(model, components)
    side = size // components.vae.config.downscale
    inputs = rotation(SETS, lambda i: step_inputs(unet, batch, size, side, device, i))

    def ours(i: int) -> torch.Tensor:
        g = inputs(i)
        return unet.denoise(g["latent"], g["times"], g["key_values"]).permute(0, 3, 1, 2)

    def unhoisted(i: int) -> torch.Tensor:
        g = inputs(i)
        return unet(g["latent"], g["timestep"], g["text"], g["added"]).permute(0, 3, 1, 2)

    def theirs(network: Any, i: int) -> torch.Tensor:
        g = inputs(i)
        named = {}
        if g["added"] is not None:
            named = {"added_cond_kwargs": {"text_embeds": g["added"].pooled, "time_ids": g["added"].sizes}}
        return network(g["latent_nchw"], g["timestep"], g["text"], return_dict=False, **named)[0]

    others, missing = peers(bench, lambda: (models.peer_unet(components), theirs))
    replayed = models.captured_step(unet, device)

    def by_graph(i: int) -> torch.Tensor:
        g = inputs(i)
        assert replayed is not None
        return replayed(g["latent"], g["times"], g["key_values"]).permute(0, 3, 1, 2)

    ours, unhoisted, by_graph = (as_in_pipeline(run, device) for run in (ours, unhoisted, by_graph))
    own = [Candidate("fastsd", ours)]
    if replayed is not None:  # a pipeline on a GPU replays a graph
        own = [Candidate("fastsd", by_graph), Candidate("fastsd, no graph", ours)]
    own += [*on_pytorch(bench, ours), Candidate("fastsd, nothing hoisted", unhoisted)]
    work = step_work(family_of(components), batch, size)
    outcomes = bench.run_benchmark(
        "step", on_reference(ours), inference(own + others), dtype, UNET_DEPTH, work,
        missing=missing, model=model, size=size, batch=batch,
    )  # fmt: skip
    publish(outcomes)
    if bench.options.profile and bench.options.measuring:
        replay = None if replayed is None else lambda: by_graph(0)
        bench.tables.append(profile_step(unet, lambda: ours(0), bench, dtype, f"{model}-b{batch}", replay))


def bench_decode(bench: Session, publish: Any, model: str, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    vae, size, dtype = components.vae, bench.size(model, components), models.vae_dtype(components)
    side = size // vae.config.downscale

    def make(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        latent = torch.randn(1, vae.config.latent_channels, side, side, generator=generator)
        latent = latent.to(device, vae.quant_conv.weight.dtype)
        return latent, to_nhwc(latent)

    inputs = rotation(SETS, make)
    ours = as_in_pipeline(lambda i: vae.decode(inputs(i)[1]).permute(0, 3, 1, 2), device)
    theirs = lambda network, i: network.decode(inputs(i)[0], return_dict=False)[0]  # noqa: E731
    others, missing = peers(bench, lambda: (models.peer_vae(components), theirs), "decode")
    own, replayed = [Candidate("fastsd", ours)], models.captured_decode(vae, device)
    if replayed is not None and size * size <= CAPTURED:  # a pipeline on a GPU replays a graph
        by_graph = as_in_pipeline(lambda i: replayed(inputs(i)[1]).permute(0, 3, 1, 2), device)
        own = [Candidate("fastsd", by_graph), Candidate("fastsd, no graph", ours)]
    outcomes = bench.run_benchmark(
        "decode", on_reference(ours), inference([*own, *on_pytorch(bench, ours), *others]),
        dtype, VAE_DEPTH, decode_work(family_of(components), 1, size), missing=missing, model=model, size=size, batch=1,
    )  # fmt: skip
    publish(outcomes)


def bench_encode(bench: Session, publish: Any, model: str, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    vae, size, dtype = components.vae, bench.size(model, components), models.vae_dtype(components)

    def make(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = 2 * torch.rand(1, vae.config.in_channels, size, size, generator=torch.Generator().manual_seed(i)) - 1
        image = image.to(device, vae.quant_conv.weight.dtype)
        return image, to_nhwc(image)

    inputs = rotation(SETS, make)
    ours = as_in_pipeline(lambda i: vae.encode(inputs(i)[1]).mode().permute(0, 3, 1, 2), device)
    theirs = lambda network, i: network.encode(inputs(i)[0]).latent_dist.mode()  # noqa: E731
    others, missing = peers(bench, lambda: (models.peer_vae(components), theirs))
    others = [c for c in others if c.name != COMPILED]  # once an image at most, and minutes to compile
    outcomes = bench.run_benchmark(
        "encode", on_reference(ours), inference([Candidate("fastsd", ours), *on_pytorch(bench, ours), *others]),
        dtype, VAE_DEPTH, encode_work(family_of(components), 1, size), missing=missing, model=model, size=size, batch=1,
    )  # fmt: skip
    publish(outcomes)


def bench_text(bench: Session, publish: Any, model: str, dtype: torch.dtype) -> None:
    components, device = bench.components(model, dtype), bench.options.device
    prompts = ["a lighthouse at dusk", "a red door in a white wall", "two cats"]
    ids = [[tokenizer(p).to(device) for tokenizer in components.tokenizers] for p in prompts]

    def ours(i: int) -> torch.Tensor:
        pairs = zip(components.text_encoders, ids[i % len(ids)])
        return torch.cat([encoder(tokens).hidden for encoder, tokens in pairs], dim=-1)

    def load() -> tuple[nn.Module, Callable[[Any, int], torch.Tensor]]:
        encoders = nn.ModuleList([models.peer_text_encoder(encoder) for encoder in components.text_encoders])

        def call(network: Any, i: int) -> torch.Tensor:
            pairs = zip(encoders, ids[i % len(ids)])
            return torch.cat([encoder(tokens).last_hidden_state for encoder, tokens in pairs], dim=-1)

        return encoders, call

    others, missing = peers(bench, load)
    others = [c for c in others if c.name == "diffusers"]  # the encoder has no convolutions, and runs once per image
    outcomes = bench.run_benchmark(
        "text", on_reference(ours), inference([Candidate("fastsd", ours), *others]), dtype, TEXT_DEPTH,
        text_work(family_of(components), 1), missing=missing, model=model, batch=1,
    )  # fmt: skip
    publish(outcomes)


def bench_update(bench: Session, publish: Any, model: str, batch: int, dtype: torch.dtype) -> None:
    """The sampler update alone: guidance, prediction, history, next model input."""
    components, device = bench.components(model, dtype), bench.options.device
    side = bench.size(model, components) // components.vae.config.downscale
    channels = components.vae.config.latent_channels
    noise = torch.randn(batch, side, side, channels, generator=torch.Generator().manual_seed(0)).to(device)
    outs = [torch.randn(2 * batch, side, side, channels, device=device).to(dtype) for _ in range(SETS)]
    table = build("dpm++2m", 20, components.scheduler)
    state = advance.begin(table, noise)

    def ours(i: int) -> torch.Tensor:
        if i == 0 or state.done:
            state.index = 0
            state.row.zero_()
            state.x.copy_(table.init * noise)
            state.history.zero_()
        advance.step(state, outs[i % SETS], 7.5)
        return state.x.clone() if i == 0 else state.x

    outcomes = bench.run_benchmark(
        "update", on_reference(ours), inference([Candidate("fastsd", ours)]), torch.float32, 8,
        model=model, size=side * components.vae.config.downscale, batch=batch,
    )  # fmt: skip
    publish(outcomes)
