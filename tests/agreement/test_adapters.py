"""Adapters change a network as peft and LyCORIS do, from files as these and other programs write them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.components import Components
from fastsd.weights import load_folder
from fastsd.weights.adapters.apply import Adapter, Adapters
from tests.support.families import TOLERANCE
from tests.support.matching import nchw, nhwc, relative_error

peft = pytest.importorskip("peft", reason="peft is not installed")
lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTION = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return {"sample": x, "timestep": torch.tensor([301.0]), "encoder_hidden_states": context}


@pytest.fixture(scope="module")
def components(families: Any) -> Components:
    return load_folder(families.folder / "sd1", torch.float32)


@torch.no_grad()
def theirs(unet: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return unet(**inputs).sample


@torch.no_grad()
def ours(components: Components, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return nchw(components.unet(nhwc(inputs["sample"]), inputs["timestep"], inputs["encoder_hidden_states"]))


def randomise(parameters: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def snapshot(components: Components) -> dict[str, torch.Tensor]:
    """A copy of the weights that adapters change."""
    parts = {"unet": components.unet, **{f"text{i}": m for i, m in enumerate(components.text_encoders)}}
    return {f"{part}.{k}": v.clone() for part, m in parts.items() for k, v in m.state_dict().items()}


def assert_same(before: dict[str, torch.Tensor], components: Components) -> None:
    for key, value in snapshot(components).items():
        assert torch.equal(value, before[key]), key


def check(components: Components, file: Path, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """The adapter gives `expected`, which differs from the network's own output, and can be removed to the bit."""
    before, plain = snapshot(components), ours(components, inputs)
    assert relative_error(plain, expected) > 50 * TOLERANCE  # the adapter matters
    adapters = Adapters(components)
    assert adapters.set([Adapter(file)]) == []
    assert relative_error(ours(components, inputs), expected) < TOLERANCE
    adapters.set([])
    assert_same(before, components)


@pytest.mark.parametrize(
    "options",
    [
        {"algo": "lora"},
        {"algo": "lora", "use_tucker": True},
        {"algo": "loha"},
        {"algo": "loha", "use_tucker": True},
        {"algo": "lokr", "factor": 4},
        {"algo": "lokr", "factor": 4, "use_tucker": True},
        {"algo": "lokr", "factor": 4, "decompose_both": True},
        {"algo": "lokr", "factor": 4, "full_matrix": True},
        {"algo": "full"},
        {"algo": "lora", "dora_wd": True, "wd_on_output": True},
        {"algo": "lora", "dora_wd": True, "wd_on_output": False},
        {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()),
)
def test_lycoris(
    options: dict[str, Any], families: Any, components: Components, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Linear layers and convolutions, with the names of kohya's trainer."""
    unet = copy.deepcopy(families.pipelines["sd1"].unet)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention", "FeedForward", "ResnetBlock2D"]})
    net = lycoris.create_lycoris(unet, 1.0, linear_dim=3, linear_alpha=2.0, conv_dim=3, conv_alpha=2.0, **options)
    net.apply_to()
    magnitudes = {name for name, _ in net.named_parameters() if "dora" in name}
    randomise(parameter for name, parameter in net.named_parameters() if name not in magnitudes)
    expected = theirs(unet, inputs)
    stored = {
        key.replace("lycoris_", "lora_unet_"): value.contiguous().clone() for key, value in net.state_dict().items()
    }
    save_file(stored, tmp_path / "adapter.safetensors")
    check(components, tmp_path / "adapter.safetensors", inputs, expected)


def with_peft(unet: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Add a random LoRA to `unet`; returns its tensors."""
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=ATTENTION + CONVOLUTION, **options))
    lora = [parameter for name, parameter in unet.named_parameters() if "lora_A" in name or "lora_B" in name]
    randomise(lora)
    return {key: value.contiguous() for key, value in peft.get_peft_model_state_dict(unet).items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 1.0, "ff.net.2": 9.0}}],
    ids=str,
)
def test_peft(
    options: dict[str, Any], families: Any, components: Components, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As diffusers saves it, with PEFT's config in the header."""
    import diffusers

    unet = copy.deepcopy(families.pipelines["sd1"].unet)
    layers = with_peft(unet, **options)
    metadata = unet.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    check(components, tmp_path / "pytorch_lora_weights.safetensors", inputs, theirs(unet, inputs))


def test_a_peft_folder(families: Any, components: Components, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=ATTENTION)
    model = peft.get_peft_model(copy.deepcopy(families.pipelines["sd1"].unet), config)
    randomise(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    check(components, tmp_path, inputs, theirs(model, inputs))


def test_diffusers_files_from_before_peft(
    families: Any, components: Components, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """diffusers' attention processors: the same tensors under other names, without an alpha."""
    unet = copy.deepcopy(families.pipelines["sd1"].unet)
    unet.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    randomise(p for name, p in unet.named_parameters() if "lora_" in name)
    old = {}
    for key, value in peft.get_peft_model_state_dict(unet).items():
        key = key.replace(".to_out.0.", ".to_out.").replace(".lora_A.", "_lora.down.").replace(".lora_B.", "_lora.up.")
        for name in ("to_q", "to_k", "to_v", "to_out"):
            key = key.replace(f".{name}_lora", f".processor.{name}_lora")
        old[f"unet.{key}"] = value.contiguous()
    save_file(old, tmp_path / "old.safetensors")
    check(components, tmp_path / "old.safetensors", inputs, theirs(unet, inputs))


def test_text_encoder(families: Any, components: Components, tmp_path: Path) -> None:
    """The text encoder's layers have the same adapter under the names of PEFT, kohya and old diffusers."""
    encoder = copy.deepcopy(families.pipelines["sd1"].text_encoder)
    ids = components.tokenizers[0]("a cat")
    encoder.add_adapter(peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj", "out_proj", "fc1"]))
    randomise(p for name, p in encoder.named_parameters() if "lora_" in name)
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
    adapters = Adapters(components)
    before = snapshot(components)
    stored = {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(encoder).items()}

    def rename(key: str, style: str) -> str:
        key = "text_model." + key.removeprefix("text_model.")
        if style == "peft":
            return f"text_encoder.{key}"
        layer, _, role = key.partition(".lora_")
        down = "down" if role.startswith("A") else "up"
        if style == "kohya":
            return f"lora_te_{layer.replace('.', '_')}.lora_{down}.weight"
        return f"text_encoder.{layer}.lora_linear_layer.{down}.weight"

    for style in ("peft", "kohya", "old"):
        file = tmp_path / f"{style}.safetensors"
        save_file({rename(key, style): value for key, value in stored.items()}, file)
        adapters.set([Adapter(file)])
        with torch.no_grad():
            assert relative_error(components.text_encoders[0](ids).hidden, expected) < TOLERANCE, style
    adapters.set([Adapter(tmp_path / "peft.safetensors", unet=1.0, text=0.0)])
    adapters.set([])
    assert_same(before, components)


def test_norms_and_biases(
    families: Any, components: Components, inputs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """LyCORIS's differences of a norm, a bias and a convolution."""
    unet = copy.deepcopy(families.pipelines["sd1"].unet)
    generator = torch.Generator().manual_seed(9)
    block, stored = unet.down_blocks[0].resnets[0], {}
    for role, parameter in (
        ("norm1.w_norm", block.norm1.weight),
        ("norm1.b_norm", block.norm1.bias),
        ("conv2.diff", block.conv2.weight),
        ("conv2.diff_b", block.conv2.bias),
    ):
        change = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data += change
        stored[f"lora_unet_down_blocks_0_resnets_0_{role}"] = change
    save_file(stored, tmp_path / "differences.safetensors")
    check(components, tmp_path / "differences.safetensors", inputs, theirs(unet, inputs))


@pytest.fixture
def files(families: Any, tmp_path: Path) -> list[Path]:
    """Two random LoRAs that share the layer to_q; each has layers that the other does not."""
    paths = []
    for seed, targets in ((1, ["to_q", "to_v", "conv1"]), (2, ["to_q", "to_k", "ff.net.2"])):
        unet = copy.deepcopy(families.pipelines["sd1"].unet)
        unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        randomise((p for name, p in unet.named_parameters() if "lora_" in name), seed)
        layers = {f"unet.{k}": v.contiguous() for k, v in peft.get_peft_model_state_dict(unet).items()}
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(layers, paths[-1])
    return paths


def test_several_at_once_with_strengths(
    families: Any, components: Components, inputs: dict[str, torch.Tensor], files: list[Path]
) -> None:
    unet = copy.deepcopy(families.pipelines["sd1"].unet)
    for name, file in zip(("one", "two"), files):
        stored = {k.removeprefix("unet."): v for k, v in load_file(file).items()}
        targets = sorted({k.split(".lora_")[0] for k in stored})
        unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
        peft.set_peft_model_state_dict(unet, stored, adapter_name=name)
    unet.set_adapters(["one", "two"], [0.7, -0.4])
    expected = theirs(unet, inputs)
    before, adapters = snapshot(components), Adapters(components)
    adapters.set([Adapter(files[0], unet=0.7), Adapter(files[1], unet=-0.4)])
    assert relative_error(ours(components, inputs), expected) < TOLERANCE
    adapters.set([])
    assert_same(before, components)
