"""The programs that write adapters, here as references: each saves a file and says what it makes of the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from fastsd.components import Components
from fastsd.weights.layouts.names import sources

Weights = dict[str, torch.Tensor]
# Sums of at most 128 terms, rounded in fp32, against weights and changes of the size of 1.
ROUNDING = 128 * 2.0**-23


def randomise(parameters: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def our_weights(components: Components, network: str) -> Weights:
    """The stored tensors of a network as they are now, by the keys of a folder."""
    module = components.unet if network == "unet" else components.text_encoders[int(network.endswith("_2"))]
    found = {}
    for _, parameter, parts in sources(module):
        for part in parts:
            found[part.key] = parameter.detach()[part.rows].float().clone().contiguous()
    return found


def their_weights(module: Any) -> Weights:
    """The same of a module of diffusers or transformers."""
    return {key: value.detach().float().clone() for key, value in module.state_dict().items()}


def assert_equal_weights(found: Weights, expected: Weights, base: Weights) -> None:
    """Equal up to rounding, and not the base weights."""
    changed = 0
    for key, value in found.items():
        theirs = expected.get(key, expected.get(key.removeprefix("text_model.")))
        assert theirs is not None, key
        error = (value - theirs.reshape(value.shape)).abs().max()
        assert error <= ROUNDING * max(1.0, float(theirs.abs().max())), f"{key} differs by {float(error):g}"
        changed += not torch.equal(value, base[key])
    assert changed, "the adapter changes nothing"


def small_lora() -> Weights:
    """A LoRA of rank 1 for one layer of the tiny model's UNet and one of its text encoder."""
    layers = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 32,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 32,
    }
    pairs = [(f"{name}.lora_{part}.weight", width, part) for name, width in layers.items() for part in "AB"]
    return {key: torch.full((1, width) if part == "A" else (width, 1), 0.1) for key, width, part in pairs}


def peft_folder(module: Any, config: Any, folder: Path) -> Weights:
    """A random adapter of PEFT in a folder, and the weights that PEFT makes with it."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(module), config)
    randomise(p for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return their_weights(model.merge_and_unload())


def lycoris_file(unet: Any, file: Path, preset: dict[str, Any] | None = None, **options: Any) -> Weights:
    """A random adapter of LyCORIS in a file, and the weights that LyCORIS makes with it."""
    import lycoris
    from safetensors.torch import save_file

    unet = copy.deepcopy(unet)
    settings: dict[str, Any] = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0} | options
    lycoris.LycorisNetwork.apply_preset(preset or {"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]})
    net = lycoris.create_lycoris(unet, 1.0, preset=preset or "full", **settings)
    net.apply_to()
    kept = {name for name, _ in net.named_parameters() if "dora" in name or "rescale" in name or "scalar" in name}
    randomise(p for name, p in net.named_parameters() if name not in kept)
    for name, parameter in net.named_parameters():
        if "rescale" in name or "scalar" in name:
            parameter.data = parameter.data + 0.3
    save_file({key: value.contiguous().clone() for key, value in net.state_dict().items()}, file)
    net.restore()
    for lora in net.loras:
        if lora.name not in ("loha", "kron"):
            lora.merge_to(1.0)
            continue
        # `merge_to` of these two multiplies by alpha / rank twice in LyCORIS 4; their forward pass does so once.
        weight = lora.org_module[0].weight
        merged = weight.data + lora.get_weight(weight.shape) * lora.scalar
        weight.data = (lora.apply_weight_decompose(merged, 1) if lora.wd else merged).detach()
    return their_weights(unet)
