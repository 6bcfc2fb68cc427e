"""TAESD with random weights, in every form that its files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

FORMS = ("folder", "diffusers", "both", "two files", "two files, given the encoder", "pickles", "in a checkpoint")


def make(width: int = 8, **config: Any) -> Any:
    """diffusers' AutoencoderTiny, initialised so that activations neither vanish nor grow: every weight matters."""
    import diffusers

    widths = {f"{side}_block_out_channels": (width,) * 4 for side in ("encoder", "decoder")}
    model = diffusers.AutoencoderTiny(**widths | config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else (0.3 / parameter[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False)


def as_author(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights by the keys of the author's sequences, rebuilt here as his README describes them.

    The decoder starts with a clamp; upsampling and ReLU layers are numbered too.
    """
    width, latents = model.config.decoder_block_out_channels[0], model.config.latent_channels

    def conv(inputs: int, outputs: int, **options: Any) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, padding=1, **options)

    def blocks(count: int) -> list[nn.Module]:
        return [Block(*(conv(width, width) for _ in range(3))) for _ in range(count)]

    encoder: list[nn.Module] = [conv(3, width), *blocks(1)]
    for _ in range(3):
        encoder += [conv(width, width, stride=2, bias=False), *blocks(3)]
    encoder.append(conv(width, latents))
    decoder: list[nn.Module] = [nn.Tanh(), conv(latents, width), nn.ReLU()]
    for _ in range(3):
        decoder += [*blocks(3), nn.Upsample(scale_factor=2), conv(width, width, bias=False)]
    decoder += [*blocks(1), conv(width, 3)]
    halves = {}
    for name, layers in (("encoder", encoder), ("decoder", decoder)):
        keys = nn.Sequential(*layers).state_dict()
        weights = getattr(model, name).state_dict().values()  # in the same order
        halves[name] = dict(zip(keys, weights, strict=True))
    return halves


class Block(nn.Module):
    """Holds the convolutions under the author's names."""

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module):
        super().__init__()
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


def write(model: Any, form: str, folder: Path) -> Path:
    """Write `model` and return the path for `--vae`."""
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    halves = as_author(model)
    both = {f"{side}.{key}": value for side, half in halves.items() for key, value in half.items()}
    if form == "folder":
        model.save_pretrained(folder)
        return folder
    if form == "diffusers":
        save_file(model.state_dict(), path)
    elif form == "both":
        save_file(both, path)
    elif form == "in a checkpoint":
        save_file({f"first_stage_model.{key}": value for key, value in both.items()}, path)
    else:
        for side, half in halves.items():
            if form == "pickles":
                torch.save(half, folder / f"taesd_{side}.pth")
            else:
                save_file(half, folder / f"taesd_{side}.safetensors")
        side = "encoder" if form.endswith("encoder") else "decoder"
        return folder / f"taesd_{side}.{'pth' if form == 'pickles' else 'safetensors'}"
    return path
