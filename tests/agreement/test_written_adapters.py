"""Adapters in training compute, and write, what diffusers, PEFT and LyCORIS read and compute."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastsd.components import Components
from fastsd.model.unet import AddedConditioning
from fastsd.train.adapters.adapter import AdapterSettings, TrainableAdapter
from fastsd.weights import load_folder
from fastsd.weights.adapters.embeddings import write_embedding
from fastsd.weights.adapters.write import write_adapter
from tests.support.matching import nchw, nhwc, relative_error

peft = pytest.importorskip("peft", reason="peft is not installed")

ALL = ("linear", "convolution")
# Both sides round every product of a network a dozen layers deep, of at most 1000 terms each; five standard deviations
# of such noise are far below this share of the largest value, and a wrong scale or a missing layer far above.
ROUNDING = 2e-5


def inputs(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "x": torch.randn(1, 8, 8, 4, generator=generator),
        "t": torch.tensor([301.0]),
        "ids": torch.randint(0, 1000, (1, 77), generator=generator),
        "sizes": torch.arange(6.0)[None],
    }


def ours(
    components: Components, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    xl = components.xl
    texts = [encoder(ids, -2 if xl else -1) for encoder in components.text_encoders]
    added = AddedConditioning(texts[-1].pooled, sizes) if xl else None
    return components.unet(x, t, torch.cat([text.hidden for text in texts], dim=-1), added)


def theirs(pipe: Any, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    added = None
    if hasattr(pipe, "text_encoder_2"):
        texts = [encoder(ids, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        context = torch.cat([text.hidden_states[-2] for text in texts], dim=-1)
        added = {"text_embeds": texts[1][0], "time_ids": sizes}
    else:
        context = pipe.text_encoder(ids)[0]
    return nhwc(pipe.unet(nchw(x), t, context, added_cond_kwargs=added).sample)


def random_adapter(components: Components, **settings: Any) -> TrainableAdapter:
    networks = ("unet", "text_encoder", "text_encoder_2")[: 1 + len(components.text_encoders)]
    fields = {"rank": 3, "alpha": 2.0, "networks": networks, "targets": ALL, "ranks": ("attn2.to_k=5",)} | settings
    adapter = TrainableAdapter(components, AdapterSettings(**fields), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.2 * noise
    return adapter


@torch.no_grad()
def output(components: Components, adapter: TrainableAdapter, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The adapted network's output, which differs from its own by much more than rounding."""
    plain = ours(components, **given)
    adapter.attach()
    changed = ours(components, **given)
    adapter.detach()
    assert relative_error(plain, changed) > 1000 * ROUNDING
    return changed


def loaded(pipeline: Any, adapter: Path) -> Any:
    """A copy of a pipeline of diffusers with an adapter."""
    networks = ("unet", "text_encoder", "text_encoder_2")
    copies = {name: copy.deepcopy(part) if name in networks else part for name, part in pipeline.components.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = type(pipeline)(**copies)
        pipe.load_lora_weights(str(adapter))
    return pipe


@pytest.mark.parametrize("family, dora", [("sd1", True), ("sdxl", False), ("sdxl", True)])
def test_diffusers_opens_its_own_form(family: str, dora: bool, families: Any, tmp_path: Path) -> None:
    components = load_folder(families.folder / family, torch.float32)
    adapter = random_adapter(components, dora=dora)
    expected = output(components, adapter, inputs(family))
    write_adapter(tmp_path, "diffusers", adapter.stored(), components, dtype="fp32")
    with torch.no_grad():
        found = theirs(loaded(families.pipelines[family], tmp_path), **inputs(family))
    assert relative_error(found, expected) < ROUNDING


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_diffusers_opens_kohyas_form(family: str, families: Any, tmp_path: Path) -> None:
    """Without DoRA: of kohya's form, diffusers leaves out the magnitudes, with a warning."""
    components = load_folder(families.folder / family, torch.float32)
    adapter = random_adapter(components)
    expected = output(components, adapter, inputs(family))
    file = write_adapter(tmp_path / "a.safetensors", "kohya", adapter.stored(), components, dtype="fp32")
    with torch.no_grad():
        found = theirs(loaded(families.pipelines[family], file), **inputs(family))
    assert relative_error(found, expected) < ROUNDING


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_peft_opens_its_own_form(kind: str, families: Any, tmp_path: Path) -> None:
    components = load_folder(families.folder / "sd1", torch.float32)
    adapter = random_adapter(components, kind="lokr" if kind == "lokr" else "lora", dora=kind == "dora")
    expected = output(components, adapter, inputs("sd1"))
    write_adapter(tmp_path, "peft", adapter.stored(), components, dtype="fp32")
    pipe = copy.copy(families.pipelines["sd1"])
    for network in ("unet", "text_encoder"):
        module = copy.deepcopy(getattr(pipe, network))
        setattr(pipe, network, peft.PeftModel.from_pretrained(module, tmp_path / network))
    with torch.no_grad():
        assert relative_error(theirs(pipe, **inputs("sd1")), expected) < ROUNDING


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_lycoris_opens_kohyas_form(kind: str, dora: bool, families: Any, tmp_path: Path) -> None:
    """The UNet alone: LyCORIS's prefix of a wrapped network stands for kohya's."""
    lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed")
    components = load_folder(families.folder / "sd1", torch.float32)
    adapter = random_adapter(components, kind=kind, dora=dora, networks=("unet",), targets=("transformer", "conv1"))
    expected = output(components, adapter, inputs("sd1"))
    file = write_adapter(tmp_path / "a.safetensors", "kohya", adapter.stored(), components, dtype="fp32")
    renamed = {key.replace("lora_unet_", "lycoris_"): value for key, value in load_file(file).items()}
    pipe = copy.copy(families.pipelines["sd1"])
    pipe.unet = copy.deepcopy(pipe.unet)
    net, _ = lycoris.create_lycoris_from_weights(1.0, None, pipe.unet, weights_sd=renamed)
    assert len(net.loras) == len(list(adapter.stored()))
    net.apply_to()
    with torch.no_grad():
        assert relative_error(theirs(pipe, **inputs("sd1")), expected) < ROUNDING


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_are_pefts(dora: bool, families: Any, tmp_path: Path) -> None:
    """DoRA's norm counts as a constant, as in PEFT and in the paper's section 4.3."""
    components = load_folder(families.folder / "sd1", torch.float32)
    adapter = random_adapter(
        components, dora=dora, networks=("unet",), targets=("transformer", "conv1"), ranks=(), alpha=3.0
    )
    write_adapter(tmp_path, "peft", adapter.stored(), components, dtype="fp32")
    pipe = copy.copy(families.pipelines["sd1"])
    unet = copy.deepcopy(pipe.unet)
    pipe.unet = peft.PeftModel.from_pretrained(unet, tmp_path / "unet", is_trainable=True)
    theirs(pipe, **inputs("sd1")).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in pipe.unet.named_parameters() if parameter.grad is not None}
    adapter.attach()
    ours(components, **inputs("sd1")).square().mean().backward()
    roles = {
        "lora_A.default.weight": "down",
        "lora_B.default.weight": "up",
        "lora_magnitude_vector.default.weight": "m",
    }
    layers = dict(zip([layer.name for layer in adapter.stored()], [rows for _, rows in adapter._targets]))
    compared = 0
    for name, gradient in expected.items():
        role = next((role for suffix, role in roles.items() if name.endswith(suffix)), None)
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if role is None or layer not in layers:
            continue
        rows = layers[layer]
        parameter = rows.magnitude if role == "m" else getattr(rows.change, role)
        assert parameter is not None and parameter.grad is not None
        assert relative_error(parameter.grad.reshape(gradient.shape), gradient) < ROUNDING * 10, name
        compared += 1
    assert compared == (3 if dora else 2) * len(layers)


def test_diffusers_opens_a_textual_inversion(families: Any, tmp_path: Path) -> None:
    """The token's two vectors stand in the table of the text encoder, under the token and its second name."""
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    write_embedding(tmp_path / "new.safetensors", "<new>", (vectors,))
    parts = dict(families.pipelines["sd1"].components)
    parts |= {name: copy.deepcopy(parts[name]) for name in ("text_encoder", "tokenizer")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = type(families.pipelines["sd1"])(**parts)
        pipe.load_textual_inversion(str(tmp_path / "new.safetensors"))
    ids = pipe.tokenizer.convert_tokens_to_ids(["<new>", "<new>_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids].detach(), vectors)
