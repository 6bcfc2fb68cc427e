"""What people reported of adapters (LoRA and its relatives), and of textual inversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.components import Components
from fastsd.weights import load_folder
from fastsd.weights.adapters.apply import Adapter, Adapters
from tests.support.adapter_writers import assert_equal_weights, lycoris_file, our_weights, peft_folder

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
