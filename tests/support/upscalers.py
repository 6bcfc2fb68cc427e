"""Small ESRGAN-style networks as tables of tensors, in every layout of files; what they compute."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastsd.model.upscalers import CompactConfig, RRDBConfig, UpscalerConfig, make_network

State = dict[str, torch.Tensor]

TINY_RRDB = RRDBConfig(features=16, growth=8, blocks=1, doublings=2)
TINY_COMPACT = CompactConfig(features=16, convolutions=2, scale=2)


def random_state(config: UpscalerConfig, seed: int = 0) -> State:
    """Weights by Real-ESRGAN's names, with which maps neither vanish nor grow (He et al. 2015)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, parameter in make_network(config).state_dict().items():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1
        state[key] = torch.randn(parameter.shape, generator=generator) * scale
    return state


def in_layout(state: Mapping[str, torch.Tensor], layout: str) -> State:
    """An RRDB network's table by the names of "new" files (Real-ESRGAN), "middle" ones (BSRGAN) or "old" ones."""
    ups = [f"conv_up{i}" for i in range(1, 1 + sum(bool(re.match(r"conv_up\d\.weight", key)) for key in state))]
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    names = {"trunk_conv": "conv_body", "HRconv": "conv_hr"} | {name.replace("conv_up", "upconv"): name for name in ups}
    inner = r"RRDB_trunk.\1.RDB\2.\3"
    if layout == "old":
        names = {"model.0": "conv_first", f"model.1.sub.{blocks}": "conv_body"}
        names |= {f"model.{3 * (i + 1)}": name for i, name in enumerate(ups)}
        names |= {f"model.{3 * len(ups) + 2}": "conv_hr", f"model.{3 * len(ups) + 4}": "conv_last"}
        inner = r"model.1.sub.\1.RDB\2.\3.0"
    theirs, found = {ours: name for name, ours in names.items()}, {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        name = re.sub(r"body\.(\d+)\.rdb(\d)\.(conv\d)$", inner, theirs.get(layer, layer))
        name = re.sub(r"body\.(\d+)\.rdb(\d)\.(conv1x1)$", inner.removesuffix(".0"), name)
        found[key if layout == "new" else f"{name}.{kind}"] = tensor
    return found


def write_upscaler(path: Path, config: UpscalerConfig = TINY_COMPACT, seed: int = 0) -> Path:
    """A file of random weights."""
    save_file(random_state(config, seed), path)
    return path


def computed(config: UpscalerConfig, state: State, image: torch.Tensor) -> torch.Tensor:
    """What a network makes of `[B, C, H, W]`, in float64, after its paper's or its program's description."""
    weights = {key: tensor.double() for key, tensor in state.items()}
    x = image.double()
    return _compact(config, weights, x) if isinstance(config, CompactConfig) else _rrdb(config, weights, x)


def _conv(weights: State, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def _rrdb(config: RRDBConfig, weights: State, image: torch.Tensor) -> torch.Tensor:
    first = _conv(weights, "conv_first", F.pixel_unshuffle(image, config.unshuffle))
    trunk = first
    for block in range(config.blocks):
        inner = trunk
        for part in (1, 2, 3):
            name = f"body.{block}.rdb{part}.conv"
            maps = [inner]
            for i in (1, 2, 3, 4):
                y = F.leaky_relu(_conv(weights, f"{name}{i}", torch.cat(maps, 1)), 0.2)
                if config.plus and i == 2:
                    y = y + _conv(weights, f"{name}1x1", inner)
                if config.plus and i == 4:
                    y = y + maps[2]
                maps.append(y)
            inner = inner + 0.2 * _conv(weights, f"{name}5", torch.cat(maps, 1))
        trunk = trunk + 0.2 * inner
    x = first + _conv(weights, "conv_body", trunk)
    for i in range(1, config.doublings + 1):
        x = F.leaky_relu(_conv(weights, f"conv_up{i}", F.interpolate(x, scale_factor=2.0)), 0.2)
    return _conv(weights, "conv_last", F.leaky_relu(_conv(weights, "conv_hr", x), 0.2))


def _compact(config: CompactConfig, weights: State, image: torch.Tensor) -> torch.Tensor:
    x = _conv(weights, "body.0", image)
    for i in range(1, 2 * config.convolutions + 2, 2):
        x = _conv(weights, f"body.{i + 1}", F.prelu(x, weights[f"body.{i}.weight"]))
    return F.pixel_shuffle(x, config.scale) + F.interpolate(image, scale_factor=float(config.scale))
