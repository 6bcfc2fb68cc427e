"""The least work of a model, and the least time it takes on a device: the floor of every benchmark.

    python -m bench.roofline [--models sd15,sd21,sdxl] [--dtype bf16]

The work of a network follows from its config alone: it runs on the meta device, which has shapes but no values, and a
hook of each layer adds the work of that layer. The floor of an op is the largest of three times: its floating-point
operations at the rate of large matrix products, its bytes at the memory bandwidth, its exponentials at the rate of the
special function units. Each tensor counts as read or written once; a tensor between two ops is written by the first and
read by the second. The floor of a step is the sum over its ops.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from bench.ceilings import Ceilings, measure_ceilings
from bench.families import FAMILIES, ModelFamily, choose
from fastsd.model import clip, layers
from fastsd.model.clip import TextEncoder
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.model.vae import AutoencoderKL
from fastsd.runtime.devices import DTYPES

KINDS = ("conv", "linear", "attention", "norm")


@dataclass(frozen=True)
class Work:
    """One op: its kind (of `KINDS`), floating-point operations, elements moved, exponentials."""

    kind: str
    flops: float
    elements: float
    exps: float = 0.0

    def floor(self, ceilings: Ceilings, itemsize: int) -> float:
        """The least time of the op in seconds."""
        return max(self.floors(ceilings, itemsize).values())

    def floors(self, ceilings: Ceilings, itemsize: int) -> dict[str, float]:
        """The least times of its operations, bytes and exponentials in seconds."""
        return {
            "flops": self.flops / ceilings.flops,
            "bytes": self.elements * itemsize / ceilings.bytes,
            "exps": self.exps / ceilings.exps,
        }


@dataclass(frozen=True)
class Total:
    """The work of many ops, and the sum of their floors in seconds."""

    flops: dict[str, float]  # by kind
    bytes: float
    exps: float
    floor: float


def binding(work: list[Work], ceilings: Ceilings, itemsize: int) -> str:
    """The resource that limits the work as a whole: "flops", "bytes" or "exps", by their shares of the floor."""
    seconds = dict.fromkeys(("flops", "bytes", "exps"), 0.0)
    for op in work:
        floors = op.floors(ceilings, itemsize)
        limit = max(floors, key=floors.__getitem__)
        seconds[limit] += floors[limit]
    return max(seconds, key=seconds.__getitem__)


def total(work: list[Work], ceilings: Ceilings, itemsize: int) -> Total:
    """The sum of the work."""
    flops = {kind: sum(w.flops for w in work if w.kind == kind) for kind in KINDS}
    moved = sum(w.elements for w in work) * itemsize
    return Total(flops, moved, sum(w.exps for w in work), sum(w.floor(ceilings, itemsize) for w in work))


def linear_work(rows: int, k: int, n: int, residual: bool = False, exps: float = 0.0) -> Work:
    """`[rows, k] @ [k, n]`, plus an optional residual `[rows, n]`."""
    return Work("linear", 2 * rows * k * n, rows * k + k * n + rows * n * (2 if residual else 1), exps)


def conv_work(inputs: int, outputs: int, weight: torch.Size, residual: bool = False) -> Work:
    """A convolution with `inputs` input and `outputs` output elements; each output is a sum over the kernel."""
    flops = 2 * outputs * prod(weight[1:])
    return Work("conv", flops, inputs + prod(weight) + outputs * (2 if residual else 1))


def attention_work(batch: int, queries: int, keys: int, channels: int, heads: int, causal: bool = False) -> Work:
    """Two products per head, one exponential per score; causal attention has half of the scores."""
    scores = batch * heads * queries * keys * (0.5 if causal else 1.0)
    elements = 2 * batch * (queries + keys) * channels
    return Work("attention", 4 * scores * (channels // heads), elements, scores)


def attention_gradients_work(batch: int, queries: int, keys: int, channels: int, heads: int) -> Work:
    """Both passes: two products and five more, and the exponentials in each.

    q, k and v are read twice, the result and its gradient once; the result and three gradients are written.
    """
    forward = attention_work(batch, queries, keys, channels, heads)
    return Work("attention", 3.5 * forward.flops, 3 * forward.elements, 2 * forward.exps)


def norm_work(elements: int, exps: bool) -> Work:
    """One read and one write per element, and an exponential for SiLU. Its operations never limit it."""
    return Work("norm", 0.0, 2 * elements, elements if exps else 0.0)


def _linear(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    n, k = layer.weight.shape
    exps = out.numel() if named.get("activation", "none") != "none" else 0.0
    residual = any(named.get(name) is not None for name in ("residual", "into"))
    return linear_work(out.numel() // n, k, n, residual, exps)


def _conv(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    residual = named.get("residual") is not None
    if layer.weight.shape[2:] == (1, 1):
        return linear_work(out.numel() // len(layer.weight), layer.weight.shape[1], len(layer.weight), residual)
    return conv_work(args[0].numel(), out.numel(), layer.weight.shape, residual)


def _upsample(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work | None:
    """At exactly twice the size, one op upsamples and convolves, and the hook of the convolution is not called."""
    x, size = args[0], args[1] if len(args) > 1 else None
    doubled = size is None or tuple(size) == (2 * x.shape[1], 2 * x.shape[2])
    return conv_work(x.numel(), out.numel(), layer.conv.weight.shape) if doubled else None


def _self_attention(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    tokens = prod(out.shape[1:-1])
    return attention_work(len(out), tokens, tokens, out.shape[-1], layer.heads)


def _causal_attention(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    batch, tokens, channels = out.shape
    return attention_work(batch, tokens, tokens, channels, layer.heads, causal=True)


def _cross_attention(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    batch, tokens, channels = out.shape
    given = args[1] if isinstance(args[1], tuple) else (args[1],)  # with image prompts: the text's, theirs, their masks
    works = [attention_work(batch, tokens, one.shape[1], channels, layer.heads) for one in given if one.ndim == 5]
    return Work("attention", *(sum(getattr(work, name) for work in works) for name in ("flops", "elements", "exps")))


def _geglu(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    n, k = layer.proj.weight.shape
    rows = out.numel() // out.shape[-1]
    return Work("linear", 2 * rows * k * n, rows * k + k * n + out.numel(), out.numel())


def _group_norm(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    return norm_work(out.numel(), layer.silu)


def _layer_norm(layer: Any, args: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> Work:
    return norm_work(out.numel(), False)


Count = Callable[[Any, tuple[Any, ...], dict[str, Any], torch.Tensor], Work | None]
COUNTS: dict[type[nn.Module], Count] = {
    layers.Linear: _linear,
    layers.Conv2d: _conv,
    layers.Upsample: _upsample,
    layers.SelfAttention: _self_attention,
    layers.CrossAttention: _cross_attention,
    clip.CausalAttention: _causal_attention,
    layers.GEGLU: _geglu,
    layers.GroupNorm: _group_norm,
    layers.LayerNorm: _layer_norm,
}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[Work]]:
    """Inside this context every layer of `model` adds its work to the list when it runs."""
    work: list[Work] = []

    def hook(count: Count) -> Callable[..., None]:
        def add(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            layer_work = count(layer, args, named, out)
            work.extend([layer_work] if layer_work is not None else [])

        return add

    handles = []
    for module in model.modules():
        kind = next((cls for cls in type(module).__mro__ if cls in COUNTS), None)
        if kind is not None:
            handles.append(module.register_forward_hook(hook(COUNTS[kind]), with_kwargs=True))
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def meta_unet_inputs(
    unet: UNet, batch: int, height: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AddedConditioning | None]:
    """Arguments of `UNet.forward` on the meta device, for `batch` samples and latents of `height` x `width`."""
    config = unet.config
    with torch.device("meta"):
        added = None
        if config.addition_time_embed_dim:
            sizes = 6
            pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
            added = AddedConditioning(torch.empty(batch, pooled), torch.empty(batch, sizes))
        x = torch.empty(batch, height, width, config.in_channels)
        return x, torch.empty(batch), torch.empty(batch, 77, config.cross_attention_dim), added


@torch.no_grad()
def step_work(family: ModelFamily, batch: int, size: int) -> list[Work]:
    """One guided step: `UNet.denoise` for 2 * `batch` samples at `size` x `size` pixels."""
    side = size // family.vae.downscale
    with torch.device("meta"):
        unet = UNet(family.unet)
    x, timestep, context, added = meta_unet_inputs(unet, 2 * batch, side, side)
    time, key_values = unet.embed_time(timestep, added), unet.project_context(context)
    with counted(unet) as work:
        unet.denoise(x, time, key_values)
    return work


@torch.no_grad()
def decode_work(family: ModelFamily, batch: int, size: int) -> list[Work]:
    """VAE decode to images of `size` x `size`."""
    side = size // family.vae.downscale
    with torch.device("meta"):
        vae, latent = AutoencoderKL(family.vae), torch.empty(batch, side, side, family.vae.latent_channels)
    with counted(vae) as work:
        vae.decode(latent)
    return work


@torch.no_grad()
def encode_work(family: ModelFamily, batch: int, size: int) -> list[Work]:
    """VAE encode of images of `size` x `size`."""
    with torch.device("meta"):
        vae, image = AutoencoderKL(family.vae), torch.empty(batch, size, size, family.vae.in_channels)
    with counted(vae) as work:
        vae.encode(image)
    return work


@torch.no_grad()
def text_work(family: ModelFamily, texts: int) -> list[Work]:
    """All text encoders, for `texts` prompts."""
    total_work: list[Work] = []
    for config in family.text:
        with torch.device("meta"):
            encoder = TextEncoder(config)
            ids = torch.zeros(texts, config.max_position_embeddings, dtype=torch.int64)
        with counted(encoder) as work:
            encoder(ids)
        total_work += work
    return total_work


def table(names: list[str], ceilings: Ceilings | None, itemsize: int) -> str:
    """Markdown: the work of a guided step and of a decode, and their floors if `ceilings` are given."""
    lines = [
        "| | conv | linear | attention | all, GFLOP | GB moved | 10⁹ exps |" + (" floor, ms |" if ceilings else ""),
        "|---|---|---|---|---|---|---|" + ("---|" if ceilings else ""),
    ]
    for name in names:
        family = FAMILIES[name]
        size = family.size
        parts = {
            f"{family.title} {size}², guided step": step_work(family, 1, size),
            f"{family.title} {size}², VAE decode": decode_work(family, 1, size),
        }
        for title, work in parts.items():
            t = total(work, ceilings or Ceilings(1.0, 1.0, 1.0), itemsize)
            kinds = " | ".join(f"{t.flops[kind] / 1e9:.0f}" for kind in KINDS[:3])
            row = (
                f"| {title} | {kinds} | {sum(t.flops.values()) / 1e9:.0f} | {t.bytes / 1e9:.2f} | {t.exps / 1e9:.2f} |"
            )
            lines.append(row + (f" {1e3 * t.floor:.2f} |" if ceilings else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sd15,sd21,sdxl")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--no-device", action="store_true", help="only count the work; measure no ceilings, print no floors"
    )
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    ceilings = None
    if not arguments.no_device:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ceilings = measure_ceilings(device, dtype)
        figures = (
            f"{ceilings.flops / 1e12:.2f} TFLOP/s, {ceilings.bytes / 1e9:.0f} GB/s, {ceilings.exps / 1e9:.1f} 10⁹ exp/s"
        )
        print(f"{device}, {arguments.dtype}: {figures}\n")
    print(table(choose(arguments.models), ceilings, dtype.itemsize))


if __name__ == "__main__":
    main()
