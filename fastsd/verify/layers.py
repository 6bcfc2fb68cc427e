"""Layer by layer, then network by network: what the ops make together."""

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
from fastsd.model.clip import EncoderLayer
from fastsd.model.layers import Downsample, ResBlock, TransformerBlock, Upsample
from fastsd.model.vae import AttentionBlock
from fastsd.text.encode import added_conditioning, encode_text
from fastsd.text.parse import parse_text
from fastsd.verify.rule import Clock, Row, Tensors, attempted, exactly, judged, wider

if TYPE_CHECKING:
    from fastsd.pipeline import Pipeline

LAYERS = (ResBlock, TransformerBlock, AttentionBlock, Downsample, Upsample, EncoderLayer)
RELATIVE = 1e-5  # what fp32 is allowed beside the rule: the distance that networks keep from diffusers' everywhere
TIMESTEP = 500  # in the middle of the training schedule


def check_layers(pipe: Pipeline, run: Callable[[], Any], clock: Clock | None) -> list[Row]:
    """Do `run`, and compare every layer at its first call, on the inputs that the fast path gives it.

    The truth is the layer's specification in float64. Returns a row for each layer, in the order in which they ran.
    """
    rows: dict[str, Row] = {}

    def see(name: str, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], _: Any) -> None:
        if name not in rows:
            names = list(kwargs)
            row = Row("layer", name, _sizes(args[0]), dispatch.backend(args[0]))
            # `forward` and not a call, so that hooks are not told of what is done here.
            rows[name] = compare(
                row,
                layer,
                lambda m, *x: m.forward(*x[: len(args)], **dict(zip(names, x[len(args) :]))),
                (*args, *kwargs.values()),
                clock,
            )

    with _told(_networks(pipe), see):
        run()
    return list(rows.values())


@torch.inference_mode()
def check_networks(pipe: Pipeline, prompt: str, clock: Clock | None) -> list[Row]:
    """Text encoders, UNet, autoencoder, each by itself at the checkpoint's own size.

    The truth is the network's specification in the next wider precision. Latents and picture are random numbers.
    """
    parts, config = pipe.components, pipe.components.vae.config
    width, height = pipe.defaults["width"], pipe.defaults["height"]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(pipe.device, pipe.dtype)

    rows = []
    for i, (encoder, tokenizer) in enumerate(zip(parts.text_encoders, parts.tokenizers)):
        ids = tokenizer(prompt).to(pipe.device)
        rows.append(_network(f"text_encoder{i + 1}", encoder, lambda m, x: m(x), ids, clock, pipe.dtype))
    features = encode_text(parts, parse_text(parts, prompt), 1)
    added = added_conditioning(parts, features.pooled, False, width, height)
    latent = (height // config.downscale, width // config.downscale)
    # Whole numbers, so that the angles of the time embedding are the same in every precision.
    timestep = torch.full((1,), TIMESTEP, device=pipe.device)
    noisy = draw(2, *latent, parts.unet.config.in_channels)
    denoise = lambda m, x: m(x, timestep, features.context.to(x).expand(2, -1, -1), added)  # noqa: E731
    rows.append(_network("unet", parts.unet, denoise, noisy, clock, pipe.dtype))
    precision = next(parts.vae.parameters()).dtype
    if parts.vae.encoder is not None:
        picture = draw(1, height, width, config.in_channels).clamp(-1, 1).to(precision)
        rows.append(_network("vae.encode", parts.vae, lambda m, x: m.encode(x).mean, picture, clock, precision))
    inner = draw(1, *latent, config.latent_channels).to(precision) / config.scaling_factor
    rows.append(_network("vae.decode", parts.vae, lambda m, x: m.decode(x), inner, clock, precision))
    return rows


def _network(
    name: str, module: nn.Module, call: Callable[..., Any], x: torch.Tensor, clock: Clock | None, dtype: torch.dtype
) -> Row:
    return compare(Row("module", name, _sizes(x), dispatch.backend(x)), module, call, (x,), clock, wider(dtype))


def compare(
    row: Row,
    module: nn.Module,
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    clock: Clock | None,
    precision: torch.dtype = torch.float64,
) -> Row:
    """`call(module, *inputs)` by the rule, against the specification of `module` in `precision`."""

    def fast() -> Tensors:
        result = call(module, *inputs)
        return (result,) if isinstance(result, torch.Tensor) else tuple(result)

    def plain() -> Tensors:
        with dispatch.forced("torch"):
            return fast()

    def work() -> Row:
        with exactly():
            exact = call(copy.deepcopy(module).to(precision), *(_to(x, precision) for x in inputs))
        truth = (exact,) if isinstance(exact, torch.Tensor) else tuple(exact)
        result = fast()
        largest = max((x.abs().max().item() for x in truth), default=0.0)
        slack = RELATIVE * largest if result[0].dtype == torch.float32 else 0.0
        found = judged(row, result, plain(), truth, slack)
        if clock is None:
            return found
        seconds, torch_seconds = clock([fast, plain])
        return replace(found, seconds=seconds, torch_seconds=torch_seconds)

    return attempted(row, work)


def _networks(pipe: Pipeline) -> dict[str, nn.Module]:
    parts = pipe.components
    encoders = {f"text_encoder{i + 1}": encoder for i, encoder in enumerate(parts.text_encoders)}
    return {**encoders, "unet": parts.unet, "vae": parts.vae}


@contextmanager
def _told(networks: dict[str, nn.Module], see: Callable[..., None]) -> Iterator[None]:
    """Inside this context `see` is told of every call of a layer: name, layer, arguments, result."""
    handles = [
        layer.register_forward_hook(functools.partial(see, f"{network}.{name}"), with_kwargs=True)
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
