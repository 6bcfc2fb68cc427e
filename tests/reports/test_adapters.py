"""What people reported of adapters (LoRA and its relatives), and of textual inversions."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.weights import load_folder
from fastsd.weights.adapters import peft_config
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.adapters.peft_config import check_config
from tests.support.adapter_writers import (
    assert_equal_weights,
    lycoris_file,
    our_weights,
    peft_folder,
    randomise,
    their_weights,
)

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("lycoris", reason="LyCORIS is not installed")
pytestmark = pytest.mark.heavy  # diffusers, transformers, peft and LyCORIS are imported

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
ALL = [*ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.support.families import Families

    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def components(pipeline: Any) -> Components:
    return load_folder(pipeline.folder / "sd1", torch.float32)


def check(components: Components, path: Path, expected: dict[str, torch.Tensor], network: str = "unet") -> None:
    """fastsd makes the weights that the writer makes, and takes them back to the bit."""
    base, adapters = our_weights(components, network), Adapters(components)
    adapters.set([Adapter(path)], allow_pickle=True)
    found = our_weights(components, network)
    adapters.set([])
    assert_equal_weights(found, expected, base)
    for key, value in our_weights(components, network).items():
        assert torch.equal(value, base[key]), key


PATTERNS = {
    "alpha_pattern": {"to_q": 1, "ff.net.2": 9, r"down_blocks\.\d+\.resnets\.0\.conv1": 7},
    "rank_pattern": {"to_k": 5, r"attn1\.to_.*": 2},
}
PEFT: dict[str, Any] = {
    "LoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5}),
    "LoRA patterns": ("LoraConfig", {"r": 3, "lora_alpha": 5, **PATTERNS}),
    "LoRA rslora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_rslora": True, **PATTERNS}),
    "LoRA DoRA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "LoRA bias all": ("LoraConfig", {"r": 3, "lora_alpha": 5, "bias": "all"}),
    "LoRA bias lora_only": ("LoraConfig", {"r": 3, "lora_alpha": 5, "bias": "lora_only"}),
    "LoRA lora_bias": ("LoraConfig", {"r": 3, "lora_alpha": 5, "lora_bias": True, "target_modules": ["to_out.0"]}),
    "LoRA modules_to_save": ("LoraConfig", {"r": 3, "lora_alpha": 5, "modules_to_save": ["conv_in", "conv_norm_out"]}),
    "LoRA gaussian": ("LoraConfig", {"r": 3, "lora_alpha": 5, "init_lora_weights": "gaussian"}),
    "LoRA layers": ("LoraConfig", {"r": 3, "layers_to_transform": [0], "layers_pattern": "transformer_blocks"}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "LoHa patterns": ("LoHaConfig", {"r": 3, "alpha": 5, **PATTERNS}),
    "LoHa Tucker": ("LoHaConfig", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 5}),
    "LoKr full": ("LoKrConfig", {"r": 64, "alpha": 16}),
    "LoKr full patterns": ("LoKrConfig", {"r": 64, "alpha": 16, **PATTERNS, "rank_pattern": {"to_q": 48}}),
    "LoKr both": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 8}),
    "LoKr Tucker": ("LoKrConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 4}),
    "OFT exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "OFT terms": ("OFTConfig", {"oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "OFT shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "OFT bounded": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    "IA3": ("IA3Config", {"feedforward_modules": ["ff.net.2", "conv2"], "target_modules": [*ALL, "ff.net.2"]}),
    "IA3 outputs": ("IA3Config", {"feedforward_modules": []}),
}


@pytest.mark.parametrize("case", PEFT)
def test_an_adapter_of_peft_has_the_strength_that_peft_gives_it(
    case: str, pipeline: Any, components: Components, tmp_path: Path
) -> None:
    """Right: what PEFT's own merge makes of the weights (`merge_and_unload`)."""
    name, options = PEFT[case]
    config = getattr(peft, name)(**{"target_modules": ALL} | options)
    check(components, tmp_path, peft_folder(pipeline.pipelines["sd1"].unet, config, tmp_path))


LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora rs": {"rs_lora": True},
    "lora scalar": {"use_scalar": True},
    "lora Tucker": {"use_tucker": True},
    "lora DoRA outputs": {"dora_wd": True, "wd_on_output": True},
    "lora DoRA inputs": {"dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha scalar": {"algo": "loha", "use_scalar": True},
    "loha Tucker": {"algo": "loha", "use_tucker": True},
    "loha DoRA": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr"},
    "lokr factor": {"algo": "lokr", "factor": 4},
    "lokr scalar": {"algo": "lokr", "factor": 4, "use_scalar": True},
    "lokr both": {"algo": "lokr", "factor": 8, "decompose_both": True, "linear_dim": 1, "conv_dim": 1},
    "lokr full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr unbalanced": {"algo": "lokr", "factor": 4, "unbalanced_factorization": True},
    "lokr Tucker": {"algo": "lokr", "factor": 4, "use_tucker": True, "linear_dim": 2, "conv_dim": 2},
    "lokr DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
    "glora": {"algo": "glora"},
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft bounded": {"algo": "diag-oft", "constraint": 0.02},
    "diag-oft rescaled": {"algo": "diag-oft", "rescaled": True},
    "boft": {"algo": "boft"},
    "boft rescaled": {"algo": "boft", "rescaled": True, "constraint": 0.02},
    "norms": {"train_norm": True},
}


@pytest.mark.parametrize("case", LYCORIS)
def test_a_file_of_lycoris_changes_the_weights_as_lycoris_does(
    case: str, pipeline: Any, components: Components, tmp_path: Path
) -> None:
    """Right: what LyCORIS's forward pass and, but for LoHa and LoKr, its `merge_to` make of the weights."""
    file = tmp_path / "x.safetensors"
    check(components, file, lycoris_file(pipeline.pipelines["sd1"].unet, file, **LYCORIS[case]))


def old_pairs(layers: list[torch.nn.Linear]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random up and down matrices of rank 2 for layers in their order; they are added to the layers' weights."""
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for layer in layers:
        up = 0.2 * torch.randn(layer.out_features, 2, generator=generator)
        down = 0.2 * torch.randn(2, layer.in_features, generator=generator)
        layer.weight.data += up @ down
        pairs.append((up, down))
    return pairs


@pytest.mark.parametrize("order", [("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"), ("attn1", "attn2")])
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_loras_of_cloneofsimos_program_name_no_layers(
    order: tuple[str, ...], ending: str, pipeline: Any, components: Components, tmp_path: Path
) -> None:
    """Right: the order of `extract_lora_ups_down` in cloneofsimo/lora, `lora_diffusion/lora.py`, over the modules of
    diffusers, whose transformer blocks had the feed-forward in the middle until 0.12."""
    unet = copy.deepcopy(pipeline.pipelines["sd1"].unet)
    layers = []
    for name, block in unet.named_modules():
        if re.search(r"transformer_blocks\.\d+$", name):
            for part in order:
                attention = getattr(block, part)
                own = [attention.net[0].proj] if part == "ff" else [*(attention.to_q, attention.to_k, attention.to_v)]
                layers += own if part == "ff" else [*own, attention.to_out[0]]
    pairs, file = old_pairs(layers), tmp_path / f"old{ending}"
    if ending == ".pt":
        torch.save([matrix for pair in pairs for matrix in pair], file)
    else:
        tensors = {f"unet:{i}:{role}": m for i, pair in enumerate(pairs) for role, m in zip(("up", "down"), pair)}
        tensors["<s1>"] = torch.ones(1, 32)
        save_file(tensors, file, {"unet": '["CrossAttention"]', "unet:0:rank": "2", "<s1>": "<embed>"})
    check(components, file, their_weights(unet))
    if ending == ".safetensors":
        adapters = Adapters(components)
        adapters.set([Adapter(file)])
        assert components.embeddings["<s1>"].vectors[0].tolist() == torch.ones(1, 32).tolist()
        adapters.set([])
        assert "<s1>" not in components.embeddings


def test_a_lora_of_cloneofsimos_program_for_the_text_encoder(
    pipeline: Any, components: Components, tmp_path: Path
) -> None:
    """Right: the order of CLIPAttention's modules in transformers: k, v, q, out."""
    encoder = copy.deepcopy(pipeline.pipelines["sd1"].text_encoder)
    layers = [m for name, m in encoder.named_modules() if re.search(r"self_attn\.\w+_proj$", name)]
    assert [name for name, _ in encoder.named_modules() if "self_attn." in name][0].endswith("k_proj")
    torch.save([matrix for pair in old_pairs(layers) for matrix in pair], tmp_path / "x.text_encoder.pt")
    check(components, tmp_path / "x.text_encoder.pt", their_weights(encoder), "text_encoder")


TEXT_LAYERS = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.mark.parametrize("network", ["text_encoder", "text_encoder_2"])
def test_pefts_folder_of_a_text_encoder(network: str, pipeline: Any, tmp_path: Path) -> None:
    """Right: PEFT's merge. SDXL's two encoders have the same names, and here the same sizes; the class tells."""
    family = "sdxl" if network == "text_encoder_2" else "sd1"
    encoder = getattr(pipeline.pipelines[family], network)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=TEXT_LAYERS)
    expected = peft_folder(encoder, config, tmp_path)
    check(load_folder(pipeline.folder / family, torch.float32), tmp_path, expected, network)


def test_pefts_lora_of_the_token_embeddings(pipeline: Any, components: Components, tmp_path: Path) -> None:
    """Right: PEFT's merge of an embedding layer; the file also holds the layer's own weight."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["token_embedding", "q_proj"])
    expected = peft_folder(pipeline.pipelines["sd1"].text_encoder, config, tmp_path)
    check(components, tmp_path, expected, "text_encoder")


def test_a_folder_that_holds_peft_folders_of_each_network(pipeline: Any, tmp_path: Path) -> None:
    """As training scripts leave it: unet/, text_encoder/ and text_encoder_2/."""
    components, expected = load_folder(pipeline.folder / "sdxl", torch.float32), {}
    for network in ("unet", "text_encoder", "text_encoder_2"):
        targets = ATTENTION if network == "unet" else TEXT_LAYERS
        module = getattr(pipeline.pipelines["sdxl"], network)
        expected[network] = peft_folder(module, peft.LoraConfig(r=2, target_modules=targets), tmp_path / network)
    for network, weights in expected.items():
        check(components, tmp_path, weights, network)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_diffusers_saves(family: str, safe: bool, pipeline: Any, tmp_path: Path) -> None:
    """Right: PEFT's merge, for all networks of `save_lora_weights`, with the configs in the file's metadata."""
    import peft.utils as utils

    own, layers, expected = pipeline.pipelines[family], {}, {}
    for network in ("unet", "text_encoder") + (("text_encoder_2",) if family == "sdxl" else ()):
        targets = ATTENTION if network == "unet" else TEXT_LAYERS
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, rank_pattern={"to_k": 2} if safe else {})
        model = peft.get_peft_model(copy.deepcopy(getattr(own, network)), config)
        randomise(p for p in model.parameters() if p.requires_grad)
        state = utils.get_peft_model_state_dict(model)
        layers[f"{network}_lora_layers"] = {
            key.removeprefix("base_model.model."): value.contiguous() for key, value in state.items()
        }
        if safe:
            layers[f"{network}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        expected[network] = their_weights(model.merge_and_unload())
    type(own).save_lora_weights(tmp_path, safe_serialization=safe, **layers)
    components = load_folder(pipeline.folder / family, torch.float32)
    for network, weights in expected.items():
        check(components, tmp_path, weights, network)


@pytest.mark.parametrize("style", ["comfy", "kohya", "kohya original", "original"])
def test_the_names_that_other_programs_give_sdxls_layers(style: str, pipeline: Any, tmp_path: Path) -> None:
    """Right: the keys of ComfyUI's `comfy/lora.py` (`model_lora_keys_clip`, `model_lora_keys_unet`) and of kohya's
    `networks/lora.py`."""
    from fastsd.weights.layouts.ldm_names import unet_key, unet_table

    components, tensors = load_folder(pipeline.folder / "sdxl", torch.float32), {}
    texts = {
        "comfy": ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
        "original": ("clip_l.transformer.", "clip_g.transformer."),
    }.get(style, ("lora_te1_", "lora_te2_"))
    expected, table = {}, unet_table(components.unet.config)
    for network, prefix in zip(("unet", "text_encoder", "text_encoder_2"), ("", *texts)):
        expected[network] = our_weights(components, network)
        for key, weight in expected[network].items():
            layer = key.removesuffix(".weight")
            if not key.endswith(".weight") or weight.ndim != 2 or "embedding" in key:
                continue
            if network == "unet" and style != "kohya":
                layer = unet_key(table, key).key.removesuffix(".weight")
            if network == "unet":
                prefix = {"comfy": "diffusion_model.", "original": "model.diffusion_model."}.get(style, "lora_unet_")
            name = prefix + (layer.replace(".", "_") if style.startswith("kohya") else layer)
            up, down = torch.full((len(weight), 1), 0.1), torch.full((1, weight.shape[1]), 0.5)
            tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            expected[network][key] = weight + up @ down
    save_file(tensors, tmp_path / "x.safetensors")
    for network, weights in expected.items():
        check(components, tmp_path / "x.safetensors", weights, network)


def test_a_lora_that_brings_an_embedding(components: Components, tmp_path: Path) -> None:
    """Right: A1111's `networks.py`: `bundle_emb.NAME.string_to_param.*` is an embedding of that name."""
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_up.weight": torch.ones(32, 1), f"{layer}.lora_down.weight": torch.ones(1, 32)}
    file, values = tmp_path / "x.safetensors", torch.randn(3, 32)
    save_file(tensors | {"bundle_emb.myna.string_to_param.*": values}, file)
    adapters = Adapters(components)
    adapters.set([Adapter(file)])
    assert torch.equal(components.embeddings["myna"].vectors[0], values)
    adapters.set([])
    assert "myna" not in components.embeddings


def lora_of(layer: str, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(1, 32), f"{layer}.lora_B.weight": torch.ones(32, 1)} | extra


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "VERA"}, "PEFT's VERA; fastsd reads LORA, LOHA, LOKR, OFT, IA3"),
        ({"peft_type": "BOFT"}, "PEFT's BOFT"),
        ({"peft_type": "ADALORA"}, "PEFT's ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.*changed base weights"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_alpha": "much"}, "alpha of .*to_q is 'much'"),
        ({"lora_alpha": 10**400}, "NaN or infinite"),
        ({"alpha_pattern": {"(a+)+": 3}}, "repeats a group; name the layers"),
        ({"alpha_pattern": {"(": 3}}, "a bracket that is not closed"),
    ],
    ids=str,
)
def test_a_setting_of_peft_that_cannot_be_honoured_is_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path, components: Components
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1} | config))
    save_file(lora_of(f"base_model.model.{Q}", {}), tmp_path / "adapter_model.safetensors")
    with pytest.raises(FastsdError, match=said) as caught:
        Adapters(components).set([Adapter(tmp_path)])
    assert "\n" not in str(caught.value)


def test_every_setting_of_peft_has_a_meaning_here() -> None:
    """No field of a config that PEFT writes is unknown: at its default it is neutral, and no note is made of it."""
    for kind in ("LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config"):
        config = getattr(peft, kind)(target_modules=["to_q"]).to_dict()
        config = json.loads(json.dumps(config, default=str))
        assert check_config(Path("x"), config) == [], kind
        known = {*peft_config._USED, *peft_config._WITHOUT_EFFECT, *peft_config._REFUSED, "init_lora_weights"}
        assert set(config) <= known, kind


def test_a_setting_that_a_later_peft_brings_is_noted_by_name(tmp_path: Path, components: Components) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "use_wavelets": "db4", "use_nothing": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(lora_of(f"base_model.model.{Q}", {}), tmp_path / "adapter_model.safetensors")
    adapters = Adapters(components)
    (note,) = adapters.set([Adapter(tmp_path)])
    adapters.set([])
    assert "use_wavelets ('db4') is not known" in note


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (f"{Q}.lora_E", "AdaLoRA"),
        (f"{Q}.boft_R", "BOFT as PEFT writes it"),
        ("lora_unet_x.lambda_layer", "T-LoRA"),
        ("base_model.vera_A", "VeRA"),
        (f"{Q}.reshape_weight", "a change of a layer's shape"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weigh", "Flux"),
    ],
)
def test_a_kind_of_adapter_that_fastsd_lacks_is_named(
    key: str, said: str, tmp_path: Path, components: Components
) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=said):
        Adapters(components).set([Adapter(tmp_path / "x.safetensors")])
