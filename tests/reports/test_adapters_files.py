"""What people reported of files that are refused, or refused for the wrong reason."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.weights import load_single_file, save_folder
from fastsd.weights.adapters.apply import Adapter, Adapters
from fastsd.weights.adapters.embeddings import load_embedding
from fastsd.weights.adapters.roles import ROLES
from fastsd.weights.convert import convert
from fastsd.weights.formats.open_file import read_tensors
from fastsd.weights.formats.safetensors_file import EIGHT_BITS
from tests.support import original
from tests.support.tiny import all_weights, sd1

pytestmark = pytest.mark.heavy
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def components() -> Components:
    return sd1()


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_files_of_8_bit_floats_are_whole_files(dtype: torch.dtype, components: Components, tmp_path: Path) -> None:
    """Right: the values that PyTorch's own conversion gives; a LoRA and an embedding."""
    generator = torch.Generator().manual_seed(0)
    up, down, vectors = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((32, 2), (2, 32), (3, 32)))
    save_file({f"{LAYER}.lora_B.weight": up, f"{LAYER}.lora_A.weight": down}, tmp_path / "x.safetensors")
    before = all_weights(components)["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv.weight"].clone()
    adapters = Adapters(components)
    adapters.set([Adapter(tmp_path / "x.safetensors")])
    after = all_weights(components)["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv.weight"].clone()
    adapters.set([])
    assert torch.allclose(after[:32], before[:32] + up.float() @ down.float(), atol=1e-5)
    save_file({"emb_params": vectors}, tmp_path / "toy.safetensors")
    (found,) = load_embedding(tmp_path / "toy.safetensors", components.text_encoders).vectors
    assert torch.equal(found, vectors.float())


@pytest.mark.parametrize("marker", ["plain", "scaled_fp8", "comfy_quant"])
def test_checkpoints_of_8_bit_floats_are_read(marker: str, tmp_path: Path) -> None:
    """Right: the weights times ComfyUI's `scale_weight` (comfy/ops.py), where there is one."""
    save_folder(original.components("sd1"), tmp_path / "folder", torch.float32)
    tensors, expected = original.file_tensors(tmp_path / "folder", "sd1"), {}
    for key, value in list(tensors.items()):
        if value.ndim != 2 or not key.startswith("model.diffusion_model."):
            expected[key] = value
            continue
        scale = 1.0 if marker == "plain" else 0.5
        tensors[key] = (value / scale).to(torch.float8_e4m3fn)
        expected[key] = tensors[key].float() * scale
        stem = key.removesuffix("weight")
        if marker == "scaled_fp8":
            tensors |= {f"{stem}scale_weight": torch.tensor(scale), f"{stem}scale_input": torch.tensor(1.0)}
        elif marker == "comfy_quant":
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors |= {f"{stem}weight_scale": torch.tensor(scale)}
            tensors |= {f"{stem}comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}
    if marker == "scaled_fp8":
        tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "small.safetensors")
    save_file(expected, tmp_path / "large.safetensors")
    small, large = (
        all_weights(load_single_file(tmp_path / f"{name}.safetensors", torch.float32)) for name in ("small", "large")
    )
    for key, value in large.items():
        assert torch.equal(small[key], value), key
    convert(tmp_path / "small.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for key, value in expected.items():
        if key in again:
            assert torch.equal(again[key].float(), value.float()), key


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("a.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("a.weight.absmax", "bitsandbytes"),
        ("a.qweight", "GPTQ or AWQ"),
        ("a.weight_scale_2", "NVFP4"),
        ("a.weight._data", "quanto"),
    ],
)
def test_other_quantisations_are_named(key: str, said: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=f"weights quantised by {said}"):
        read_tensors(tmp_path / "x.safetensors")


def test_a_format_of_comfyui_that_is_no_8_bit_float_is_named(tmp_path: Path) -> None:
    text = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file({"a.weight": torch.ones(2, 2), "a.comfy_quant": text}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match="ComfyUI's format 'nvfp4'"):
        read_tensors(tmp_path / "x.safetensors")


def header(value: Any, data: int = 0) -> Callable[[Path], None]:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda path: None if path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data)) else None


def cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save_file({"x": torch.ones(100)}, path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def cut_pickle(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_old_pickle(path: Path) -> None:
    torch.save({"x": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])


def zip_of_images(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"x")


def one(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


AGAIN = "download it again"
WAYS: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "empty": (lambda path: path.write_bytes(b""), "is empty", True),
    "cut in its length": (lambda path: path.write_bytes(b"\1\0\0"), "header is longer", True),
    "cut in its header": (cut(0.1), "header is longer", True),
    "cut in its data": (cut(0.9), "beyond the file", True),
    "a pickle cut short": (cut_pickle, "not a complete file of torch.save", True),
    "whole": (header(one(), 8), "", False),
    "an old pickle cut short": (cut_old_pickle, "an old file of torch.save that is", True),
    "a zip": (zip_of_images, "no data.pkl|holds no checkpoint", False),
    "a web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html>" + bytes(99)), "a web page", False),
    "an answer in JSON": (lambda path: path.write_bytes(b'{"error": "Unauthorized", "x": 1}'), "JSON text", False),
    "an LFS pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "git lfs pull",
        False,
    ),
    "an image": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "a PNG image", False),
    "a GGUF file": (lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(99)), "a GGUF file", False),
    "text": (lambda path: path.write_text("just some words in a file of text"), "not a safetensors file", False),
    "half a byte": (header({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, 2), "dtype F4", False),
    "no such dtype": (header(one(dtype="F12"), 8), "'F12'", False),
    "not JSON": (header(b"{" + b"x" * 20), "not JSON", False),
    "a hole": (header(one(data_offsets=[8, 16]), 16), "leaves a hole", False),
    "bytes after the last tensor": (header(one(), 16), "accounts for", False),
    "metadata of numbers": (header({"__metadata__": {"a": 1}}), "table of strings", False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_file_is_to_be_fetched_again_only_if_it_is_cut_short(way: str, tmp_path: Path) -> None:
    write, said, again = WAYS[way]
    path = tmp_path / "x.safetensors"
    write(path)
    if not said:
        assert list(read_tensors(path)[0]) == ["x"]
        return
    with pytest.raises(FastsdError, match=said) as caught:
        read_tensors(path, allow_pickle=True)
    assert (AGAIN in str(caught.value)) == again and "\n" not in str(caught.value)


def test_a_pickle_under_another_name_is_read(components: Components, tmp_path: Path) -> None:
    torch.save({"<toy>": torch.ones(2, 32)}, tmp_path / "toy.safetensors")
    with pytest.raises(FastsdError, match=r"a pickle.*\{?allow_pickle"):
        load_embedding(tmp_path / "toy.safetensors", components.text_encoders)
    found = load_embedding(tmp_path / "toy.safetensors", components.text_encoders, allow_pickle=True)
    assert len(found.vectors[0]) == 2
    save_file({"<toy>": torch.ones(3, 32)}, tmp_path / "toy.pt")
    assert len(load_embedding(tmp_path / "toy.pt", components.text_encoders).vectors[0]) == 3


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64]
DTYPES += [torch.uint8, torch.bool, torch.complex64, torch.uint16]
SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 32]), max_size=5).filter(lambda shape: sum(n == 32 for n in shape) < 3)
FORMS = [
    *(["down", "up"], ["down", "up", "alpha"], ["down", "up", "mid"], ["down", "up", "magnitude"]),
    *(["down", "up", "magnitude_of_outputs"], ["w1_a", "w1_b", "w2_a", "w2_b"], ["w1_a", "w1_b", "w2_a", "w2_b", "t1"]),
    *(["w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2", "alpha"], ["kron_w1", "kron_w2"], ["kron_w1_a", "kron_w1_b"]),
    *(["kron_w1", "kron_w2_a", "kron_w2_b"], ["kron_w1", "kron_w2_a", "kron_w2_b", "kron_t2"], ["oft_blocks"]),
    *(["oft_blocks", "alpha", "rescale"], ["glora_a1", "glora_a2", "glora_b1", "glora_b2"], ["factors"]),
    *(["glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_mid", "alpha"], ["oft_vectors"], ["replacement"]),
    *(["difference"], ["bias_difference"], ["difference", "bias_difference"], ["embedding_up", "embedding_down"]),
    *(["down", "up", "bias_up_bias"], ["on_input"], ["alpha"], ["down"], ["magnitude"]),
]
SUFFIX = {role: suffix for suffix, role in ROLES.items()}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_tensor_of_any_rank_and_dtype_in_any_place_of_an_adapter_is_one_line(
    components: Components, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Either the adapter is applied, or a FastsdError of one line says why not; nothing else is raised."""
    form = data.draw(st.sampled_from(FORMS))
    layer = data.draw(st.sampled_from([LAYER, "unet.conv_in", "unet.conv_norm_out", LAYER.replace("to_q", "to_out.0")]))
    tensors = {
        f"{layer}.{SUFFIX[role]}": torch.ones(data.draw(SHAPE)).to(data.draw(st.sampled_from(DTYPES))) for role in form
    }
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file(tensors, file)
    adapters = Adapters(components)
    try:
        adapters.set([Adapter(file)])
        adapters.set([])
    except FastsdError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    assert not adapters._base


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_tensor_of_any_rank_and_dtype_in_an_embedding_is_one_line(
    components: Components, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    keys = data.draw(st.sampled_from([["emb_params"], ["*"], ["clip_l"], ["clip_g"], ["clip_l", "clip_g"], ["a", "b"]]))
    tensors = {key: torch.ones(data.draw(SHAPE)).to(data.draw(st.sampled_from(DTYPES))) for key in keys}
    safe = data.draw(st.booleans())
    file = tmp_path_factory.getbasetemp() / ("any.safetensors" if safe else "any.pt")
    if safe:
        save_file(tensors, file)
    else:
        torch.save(data.draw(st.sampled_from([tensors, {"string_to_param": tensors}])), file)
    try:
        load_embedding(file, components.text_encoders, allow_pickle=True)
    except FastsdError as error:
        assert "\n" not in str(error) and str(file) in str(error)
