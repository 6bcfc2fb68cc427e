"""Every layer, then every network, against its specification."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastsd.kernels import dispatch
from fastsd.kernels.choice.rule import CheckResult, Clock, Tensors, exact_arithmetic, judge, note_out_of_memory, wider
from fastsd.model.clip import EncoderLayer
from fastsd.model.layers import Downsample, ResBlock, TransformerBlock, Upsample
from fastsd.model.vae import AttentionBlock
from fastsd.text.encode import added_conditioning, encode_text
from fastsd.text.parse import parse_text

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

LAYERS = (ResBlock, TransformerBlock, AttentionBlock, Downsample, Upsample, EncoderLayer)
FP32_SLACK = 1e-5  # relative, in addition to the rule; the tolerance of the comparisons with diffusers' networks
TIMESTEP = 500  # the middle of the training schedule


def check_layers(pipe: Pipeline, run: Callable[[], Any], clock: Clock | None) -> list[CheckResult]:
    """Execute `run`, and check every layer at its first call, on the inputs that the fast path gives it.

    The truth is the specification of the layer in float64. Returns a result for each layer, in order of execution.
    """
    results: dict[str, CheckResult] = {}

    def on_call(name: str, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], _: Any) -> None:
        if name not in results:
            names = list(kwargs)
            # `forward` instead of a call: the hooks must not observe the check itself.
            results[name] = compare(
                CheckResult("layer", name, _sizes(args[0]), dispatch.backend(args[0])),
                layer,
                lambda m, *x: m.forward(*x[: len(args)], **dict(zip(names, x[len(args) :]))),
                (*args, *kwargs.values()),
                clock,
            )

    with _hooked(_networks(pipe), on_call):
        run()
    return list(results.values())


@torch.inference_mode()
def check_networks(pipe: Pipeline, prompt: str, clock: Clock | None) -> list[CheckResult]:
    """Check the text encoders, the UNet and the autoencoder, each separately, at the default size of the checkpoint.

    The truth is the specification of the network in the next wider precision. Latents and image are random numbers.
    """
    parts, config = pipe.components, pipe.components.vae.config
    width, height = pipe.defaults["width"], pipe.defaults["height"]
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(pipe.device, pipe.dtype)

    results = []
    for i, (encoder, tokenizer) in enumerate(zip(parts.text_encoders, parts.tokenizers)):
        ids = tokenizer(prompt).to(pipe.device)
        results.append(_check_network(f"text_encoder{i + 1}", encoder, lambda m, x: m(x), ids, clock, pipe.dtype))
    features = encode_text(parts, parse_text(parts, prompt), 1)
    added = added_conditioning(parts, features.pooled, False, width, height)
    latent = (height // config.downscale, width // config.downscale)
    # A whole number: the angles of the time embedding are then the same in every precision.
    timestep = torch.full((1,), TIMESTEP, dtype=torch.float32, device=pipe.device)
    noisy = random(2, *latent, parts.unet.config.in_channels)
    denoise = lambda m, x: m(x, timestep, features.context.to(x).expand(2, -1, -1), added)  # noqa: E731
    results.append(_check_network("unet", parts.unet, denoise, noisy, clock, pipe.dtype))
    precision = next(parts.vae.parameters()).dtype
    if parts.vae.encoder is not None:
        image = random(1, height, width, config.in_channels).clamp(-1, 1).to(precision)
        results.append(_check_network("vae.encode", parts.vae, lambda m, x: m.encode(x).mean, image, clock, precision))
    unscaled = random(1, *latent, config.latent_channels).to(precision) / config.scaling_factor
    results.append(_check_network("vae.decode", parts.vae, lambda m, x: m.decode(x), unscaled, clock, precision))
    return results


def _check_network(
    name: str, module: nn.Module, call: Callable[..., Any], x: torch.Tensor, clock: Clock | None, dtype: torch.dtype
) -> CheckResult:
    unjudged = CheckResult("module", name, _sizes(x), dispatch.backend(x))
    return compare(unjudged, module, call, (x,), clock, wider(dtype))


def compare(
    unjudged: CheckResult,
    module: nn.Module,
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    clock: Clock | None,
    precision: torch.dtype = torch.float64,
) -> CheckResult:
    """Judge `call(module, *inputs)` by the rule, against the specification of `module` in `precision`."""

    def fast() -> Tensors:
        output = call(module, *inputs)
        return (output,) if isinstance(output, torch.Tensor) else tuple(output)

    def on_torch() -> Tensors:
        with dispatch.forced("torch"):
            return fast()

    def check() -> CheckResult:
        with exact_arithmetic():
            exact = call(copy.deepcopy(module).to(precision), *(_to(x, precision) for x in inputs))
        truth = (exact,) if isinstance(exact, torch.Tensor) else tuple(exact)
        outputs = fast()
        largest = max((x.abs().max().item() for x in truth), default=0.0)
        slack = FP32_SLACK * largest if outputs[0].dtype == torch.float32 else 0.0
        result = judge(unjudged, outputs, on_torch(), truth, slack)
        if clock is None:
            return result
        seconds, torch_seconds = clock([fast, on_torch])
        return replace(result, seconds=seconds, torch_seconds=torch_seconds)

    return note_out_of_memory(unjudged, check)


def _networks(pipe: Pipeline) -> dict[str, nn.Module]:
    parts = pipe.components
    encoders = {f"text_encoder{i + 1}": encoder for i, encoder in enumerate(parts.text_encoders)}
    return {**encoders, "unet": parts.unet, "vae": parts.vae}


@contextmanager
def _hooked(networks: dict[str, nn.Module], on_call: Callable[..., None]) -> Iterator[None]:
    """Inside this context `on_call` receives every call of a layer: name, layer, arguments, result."""
    handles = [
        layer.register_forward_hook(functools.partial(on_call, f"{network}.{name}"), with_kwargs=True)
        for network, model in networks.items()
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sizes(x: torch.Tensor) -> str:
    return "x".join(map(str, x.shape))


def _to(value: Any, precision: torch.dtype) -> Any:
    return value.to(precision) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
