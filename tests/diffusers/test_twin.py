"""What diffusers honours is honoured, by our networks or by its own code, which is said once."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastsd
from fastsd.diffusers.hosts import twin_of
from tests.support.families import Families
from tests.support.hosts import TOLERANCE, accelerated, make, networks, pixels, weights


@pytest.fixture
def pipe(families: Families) -> Iterator[Any]:
    """With networks of its own."""
    pipe = make(families, "StableDiffusionPipeline")
    for name, network in networks(pipe).items():
        setattr(pipe, name, copy.deepcopy(network))
    yield pipe


def own_code(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.name == "fastsd.diffusers"]


def with_ip_adapter(pipe: Any) -> dict[str, Any]:
    """Give the UNet an IP-Adapter; returns what its calls take."""
    torch.manual_seed(2)
    width, tokens, image = 32, 4, 16
    projection = {
        "proj.weight": torch.randn(width * tokens, image), "proj.bias": torch.randn(width * tokens),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    layers: dict[str, torch.Tensor] = {}
    for i, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            parent = pipe.unet.get_submodule(name.rpartition(".")[0])
            for kind in ("k", "v"):
                layers[f"{i}.to_{kind}_ip.weight"] = torch.randn(parent.to_q.out_features, width)
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, image)]}


def freeu(pipe: Any) -> dict[str, Any]:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return {}


def hooked(pipe: Any) -> dict[str, Any]:
    pipe.unet.mid_block.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return {}


def patched(pipe: Any) -> dict[str, Any]:
    block = pipe.unet.mid_block
    own = block.forward
    block.forward = lambda *a, **k: 0.5 * own(*a, **k)
    return {}


def other_layer(pipe: Any) -> dict[str, Any]:
    pipe.unet.conv_out = nn.Sequential(pipe.unet.conv_out, nn.Conv2d(4, 4, 1))
    return {}


def other_class(pipe: Any) -> dict[str, Any]:
    class Halved(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    pipe.unet.conv_out.__class__ = Halved
    return {}


def sliced(pipe: Any) -> dict[str, Any]:
    pipe.enable_attention_slicing(1)
    return {}


def wide(pipe: Any) -> dict[str, Any]:
    for network in networks(pipe).values():
        network.to(torch.float64)
    return {}


FOREIGN: list[tuple[Callable[[Any], dict[str, Any]], str]] = [
    (with_ip_adapter, "unet runs in diffusers' own code: it has MultiIPAdapterImageProjection (IP-Adapter)"),
    (freeu, "unet runs in diffusers' own code: FreeU is on"),
    (hooked, "unet runs in diffusers' own code: hooks are on its layers"),
    (patched, "unet runs in diffusers' own code: hooks are on its layers"),
    (other_layer, "unet runs in diffusers' own code: it lacks conv_out.weight"),
    (other_class, "unet runs in diffusers' own code: conv_out is a Halved"),
    (sliced, "unet runs in diffusers' own code: its attention is SlicedAttnProcessor"),
    (wide, "unet runs in diffusers' own code: its weights are float64 on cpu"),
]


@pytest.mark.parametrize(("change", "says"), FOREIGN, ids=[change.__name__ for change, _ in FOREIGN])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_only_diffusers_honours(
    change: Any, says: str, late: bool, pipe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fastsd"):
        plain = pixels(pipe)
        given = {}
        if late:
            fastsd.accelerate(pipe)
            pixels(pipe)
        given = change(pipe)
        if not late:
            fastsd.accelerate(pipe)
        found = [pixels(pipe, **given) for _ in range(2)]
        fastsd.restore(pipe)
        expected = pixels(pipe, **given)
    assert torch.equal(found[0], found[1])
    assert (found[0] - expected).abs().max() < TOLERANCE
    if change not in (sliced, wide):
        assert (found[0] - plain).abs().max() > 10 * TOLERANCE
    assert [line for line in own_code(caplog) if line.startswith("unet")] == [says]


def ending(state: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A callback that changes the latents and counts its calls."""

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        state["calls"] = state.get("calls", 0) + 1
        return {"latents": 0.9 * values["latents"]}

    return callback


@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "generator": [torch.Generator(), torch.Generator()]},
        {"height": 72, "width": 88},
        {"guidance_rescale": 0.7, "eta": 1.0},
        {"timesteps": [900, 500, 10]},
    ],
    ids=lambda call: ", ".join(call),
)
def test_options_of_a_call(call: dict[str, Any], pipe: Any) -> None:
    def run() -> torch.Tensor:
        for one in call.get("generator", []):
            one.manual_seed(4)
        return pixels(pipe, **call)

    if "timesteps" in call:
        import diffusers

        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = run()
    with accelerated(pipe):
        found = run()
    assert found.shape == expected.shape and (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["UniPCMultistep", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverSinglestep"])
def test_schedulers(name: str, pipe: Any) -> None:
    import diffusers

    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    expected = pixels(pipe, num_inference_steps=4)
    with accelerated(pipe):
        assert (pixels(pipe, num_inference_steps=4) - expected).abs().max() < TOLERANCE


def test_callbacks_and_what_a_call_returns(pipe: Any) -> None:
    counts: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    expected = pixels(pipe, callback_on_step_end=ending(counts[0]))
    kinds = ("latent", "np", "pil")
    outputs = [pipe("a cat", num_inference_steps=1, output_type=kind, width=64, height=64).images for kind in kinds]
    with accelerated(pipe):
        found = pixels(pipe, callback_on_step_end=ending(counts[1]))
        again = [pipe("a cat", num_inference_steps=1, output_type=kind, width=64, height=64).images for kind in kinds]
    assert counts[0] == counts[1] == {"calls": 2}
    assert (found - expected).abs().max() < TOLERANCE
    assert [type(one) for one in again] == [type(one) for one in outputs]
    assert again[0].stride() == outputs[0].stride() and again[2][0].size == (64, 64)


def test_tiling_and_slicing_of_the_autoencoder(pipe: Any) -> None:
    """Its tiles are diffusers' own, so the image is that of its tiles, which is another than without them."""
    whole = pixels(pipe, width=128, height=128)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 64, 8
    expected = pixels(pipe, width=128, height=128, num_images_per_prompt=2)
    assert (expected[:1] - whole).abs().max() > 10 * TOLERANCE
    with accelerated(pipe):
        found = pixels(pipe, width=128, height=128, num_images_per_prompt=2)
    assert (found - expected).abs().max() < TOLERANCE


def test_a_textual_inversion_loaded_later(pipe: Any) -> None:
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    plain = pixels(pipe)
    with accelerated(pipe):
        pixels(pipe)
        vectors = {"<cat-toy>": 3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))}
        pipe.load_textual_inversion(vectors)
        found = pipe.encode_prompt("a <cat-toy>", "cpu", 1, False)[0].detach()
        with torch.no_grad():
            ours = pipe.encode_prompt("a <cat-toy>", "cpu", 1, False)[0]
    with torch.no_grad():
        expected = pipe.encode_prompt("a <cat-toy>", "cpu", 1, False)[0]
        other = pipe.encode_prompt("a cat", "cpu", 1, False)[0]
    assert torch.allclose(ours, expected, atol=1e-4) and torch.allclose(found, expected, atol=1e-4)
    assert (ours - other).abs().max() > 0.1
    assert (pixels(pipe) - plain).abs().max() < TOLERANCE


def test_gradients_are_diffusers_own(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    pipe.unet.requires_grad_()
    pipe.unet(x, 5, text).sample.sum().backward()
    expected = pipe.unet.conv_in.weight.grad.clone()
    pipe.unet.zero_grad()
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        pixels(pipe)  # packs the weight
        pipe.unet(x, 5, text).sample.sum().backward()
        assert torch.equal(pipe.unet.conv_in.weight.grad, expected)
        with torch.no_grad():
            latent = x.clone().requires_grad_()
        pipe.unet.requires_grad_(False)
        pipe.unet(latent, 5, text).sample.sum().backward()
        assert latent.grad is not None
    assert own_code(caplog) == ["unet runs in diffusers' own code: gradients are asked for"]


def test_weights_that_change_are_followed(pipe: Any) -> None:
    with accelerated(pipe):
        first = pixels(pipe)
        state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict({name: 1.1 * tensor for name, tensor in state.items()})
        second = pixels(pipe)
        with torch.no_grad():
            pipe.unet.mid_block.resnets[0].conv1.weight.mul_(-1)
            pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(-1)
        third = pixels(pipe)
        pipe.unet.conv_in.weight = nn.Parameter(2 * pipe.unet.conv_in.weight.detach())
        fourth = pixels(pipe)
        pipe.unet.to(torch.bfloat16).to(torch.float32)  # rounds the weights
        fifth = pixels(pipe)
    images = (first, second, third, fourth, fifth)
    assert all((a - b).abs().max() > TOLERANCE for a, b in zip(images, images[1:]))
    assert (pixels(pipe) - fifth).abs().max() < TOLERANCE
    pipe.unet.load_state_dict(state)
    assert (pixels(pipe) - first).abs().max() < TOLERANCE


def test_copies_and_pickles_are_plain(pipe: Any) -> None:
    kind, numbers = type(pipe.unet), weights(pipe)
    with accelerated(pipe):
        pixels(pipe)
        buffer = io.BytesIO()
        torch.save(pipe.unet, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(pipe.unet),
            pickle.loads(pickle.dumps(pipe.unet)),
            torch.load(buffer, weights_only=False),
        )
        expected = pixels(pipe)
        assert twin_of(pipe.unet) is not None
    for one in copies:
        assert type(one) is kind and twin_of(one) is None
        assert {type(part) for part in one.modules()} == {type(part) for part in pipe.unet.modules()}
        assert all(torch.equal(tensor, numbers["unet", name]) for name, tensor in one.state_dict().items())
        pipe.unet = one
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE


def test_saving_writes_the_same_files(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "plain")
    with accelerated(pipe):
        pixels(pipe)
        pipe.save_pretrained(tmp_path / "accelerated")
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert (tmp_path / "accelerated" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes(), path


def test_offloading(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A whole module that moves before its calls is ours; single layers that move are diffusers' own."""
    import accelerate
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Moves(ModelHook):
        def pre_forward(self, module: Any, *arguments: Any, **named: Any) -> Any:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone() if not parameter.is_mkldnn else parameter.data
            return arguments, named

    expected = pixels(pipe)
    with caplog.at_level(logging.WARNING, "fastsd"), accelerated(pipe):
        add_hook_to_module(pipe.unet, Moves())
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE
        assert not own_code(caplog)
        remove_hook_from_module(pipe.unet)
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        assert (pixels(pipe) - expected).abs().max() < TOLERANCE
        assert own_code(caplog) == ["unet runs in diffusers' own code: hooks are on its layers"]
    with pytest.raises(fastsd.FastsdError, match="pipe.unet: it is offloaded; call accelerate first"):
        fastsd.accelerate(pipe)
