"""Folders in the diffusers layout: every form in which people have them, and what is wrong with those that are not."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastsd.components import Components
from fastsd.errors import FastsdError
from fastsd.weights import load_folder, save_folder
from fastsd.weights.formats.safetensors_file import TensorEntry
from tests.support.tiny import UNET, sd1, sdxl, tensors

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sd1"
    save_folder(sd1(), folder, torch.float32)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(original, tmp_path / "sd1")
    return tmp_path / "sd1"


def same(found: Components, wanted: Components) -> bool:
    ours, theirs = tensors(found), tensors(wanted)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)


def rename(file: Path, new: Callable[[str], str]) -> None:
    rewrite(file, lambda stored: {new(key): value for key, value in stored.items()})


@pytest.mark.parametrize("make", [sd1, sdxl])
def test_what_is_saved_is_loaded_to_the_bit(make: Callable[[], Components], tmp_path: Path) -> None:
    components = make()
    save_folder(components, tmp_path, torch.float32)
    loaded = load_folder(tmp_path, torch.float32)
    assert same(loaded, components)
    for name in ("scheduler", "sample_size", "zeros_for_empty_prompt", "aesthetic_score"):
        assert getattr(loaded, name) == getattr(components, name), name
    assert loaded.unet.config == components.unet.config and loaded.vae.config == components.vae.config
    assert [e.config for e in loaded.text_encoders] == [e.config for e in components.text_encoders]


def test_half_precision_survives_saving(tmp_path: Path) -> None:
    components = sd1()
    for module in (components.unet, components.vae, *components.text_encoders):
        module.bfloat16()
    save_folder(components, tmp_path, torch.bfloat16)
    assert same(load_folder(tmp_path, torch.bfloat16), components)
    assert load_file(tmp_path / UNET_FILE)["conv_in.weight"].dtype == torch.bfloat16


def test_weights_are_converted_once_and_like_torch_does(original: Path) -> None:
    wanted = {key: value.to(torch.bfloat16) for key, value in tensors(sd1()).items()}
    found = tensors(load_folder(original, torch.bfloat16))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def shard(file: Path, parts: int, index: Path) -> None:
    stored = load_file(file)
    file.unlink()
    names = {key: f"part-{i % parts}.safetensors" for i, key in enumerate(sorted(stored))}
    for name in set(names.values()):
        save_file({key: stored[key] for key in stored if names[key] == name}, file.parent / name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize(
    "index", ["{}.safetensors.index.json", "{}.safetensors.index.fp16.json", "{}.fp16.safetensors.index.json"]
)
def test_shards(folder: Path, index: str) -> None:
    shard(folder / UNET_FILE, 3, folder / "unet" / index.format("diffusion_pytorch_model"))
    shard(folder / TEXT_FILE, 2, folder / "text_encoder" / index.format("model"))
    assert same(load_folder(folder, torch.float32), sd1())


def test_the_half_precision_variant_is_taken_where_half_is_asked_for(folder: Path) -> None:
    half = folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    save_file({k: (v + 1).half() for k, v in load_file(folder / UNET_FILE).items()}, half)
    plain, key = sd1().unet.conv_in.weight, "unet.conv_in.weight"
    assert torch.equal(tensors(load_folder(folder, torch.float32))[key], plain)
    assert torch.equal(tensors(load_folder(folder, torch.float16))[key], (plain + 1).half())
    (folder / UNET_FILE).unlink()  # the variant is all there is
    assert torch.equal(tensors(load_folder(folder, torch.float32))[key], (plain + 1).half().float())


def test_old_names_of_the_vaes_attention(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def new(key: str) -> str:
        for now, then in old.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        return key

    rename(folder / VAE_FILE, new)
    assert any(".proj_attn." in key for key in load_file(folder / VAE_FILE))
    assert same(load_folder(folder, torch.float32), sd1())


def test_text_encoders_without_the_prefix_and_with_position_numbers(folder: Path) -> None:
    rename(folder / TEXT_FILE, lambda key: key.removeprefix("text_model."))
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(folder / TEXT_FILE, lambda stored: stored | ids)
    assert same(load_folder(folder, torch.float32), sd1())


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.json and merges.txt"])
def test_either_form_of_the_vocabulary(folder: Path, kept: str) -> None:
    """transformers 5 writes tokenizer.json alone, older ones the two files."""
    import transformers

    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    if kept == "tokenizer.json":
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    else:
        vocabulary = sd1().tokenizers[0]
        vocabulary.save(folder / "tokenizer")
        (folder / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    ours, wanted = load_folder(folder, torch.float32).tokenizers[0], sd1().tokenizers[0]
    for text in ("a cat, 1234 naïve 猫", "", "word " * 100):
        assert torch.equal(ours(text), wanted(text))


def test_each_tensor_is_read_once(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[tuple[Path, int]] = Counter()
    read = TensorEntry.read

    def counted(entry: TensorEntry, *buffer: torch.Tensor | None) -> torch.Tensor:
        reads[entry.path, entry.start] += 1
        return read(entry, *buffer)

    monkeypatch.setattr(TensorEntry, "read", counted)
    load_folder(original, torch.float32)
    stored = sum(len(load_file(original / file)) for file in (UNET_FILE, VAE_FILE, TEXT_FILE))
    assert len(reads) == stored and set(reads.values()) == {1}


def test_skips_that_are_added(tmp_path: Path) -> None:
    """The config value that small models may use: runs, has gradients everywhere, and survives a folder."""
    components = sd1(replace(UNET, skip="add"))
    unet = components.unet
    concatenated = sum(p.numel() for p in sd1().unet.parameters())
    assert sum(p.numel() for p in unet.parameters()) < concatenated
    x, context = torch.randn(2, 8, 8, 4), torch.randn(2, 5, 32)
    out = unet(x, torch.tensor([3.0, 700.0]), context)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in unet.parameters())
    save_folder(components, tmp_path, torch.float32)
    loaded = load_folder(tmp_path, torch.float32)
    assert loaded.unet.config.skip == "add" and same(loaded, components)
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(x, torch.tensor([3.0, 700.0]), context), out.detach())


def without(key: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda stored: {k: v for k, v in stored.items() if k != key}


BAD_WEIGHTS = {
    "missing": (without("conv_in.weight"), r"the key conv_in.weight \[32, 4, 3, 3\] is missing"),
    "missing part of a fused matrix": (
        without("mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"),
        r"attn1.to_k.weight \[64, 64\] is missing",
    ),
    "extra": (lambda s: s | {"conv_in.lora": torch.ones(3)}, r"conv_in.lora \[3\] matches no parameter"),
    "shape": (
        lambda s: s | {"conv_in.weight": torch.ones(32, 9, 3, 3)},
        r"conv_in.weight is \[32, 9, 3, 3\]; the config expects \[32, 4, 3, 3\]",
    ),
    "transposed": (
        lambda s: s | {"time_embedding.linear_1.weight": torch.ones(32, 128)},
        r"linear_1.weight is \[32, 128\]; the config expects \[128, 32\]",
    ),
    "whole numbers": (
        lambda s: s | {"conv_in.bias": torch.ones(32, dtype=torch.int64)},
        "conv_in.bias is torch.int64; it should be a floating-point tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_keys_that_do_not_fit_are_named_with_file_and_shapes(folder: Path, case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    rewrite(folder / UNET_FILE, change)
    with pytest.raises(FastsdError, match=message) as error:
        load_folder(folder, torch.float32)
    assert "diffusion_pytorch_model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_key_in_two_shards(folder: Path) -> None:
    shard(folder / UNET_FILE, 2, folder / "unet/diffusion_pytorch_model.safetensors.index.json")
    stored = load_file(folder / "unet/part-0.safetensors")
    other = folder / "unet/part-1.safetensors"
    rewrite(other, lambda s: s | dict([next(iter(stored.items()))]))
    with pytest.raises(FastsdError, match="appears twice"):
        load_folder(folder, torch.float32)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: not a JSON object"),
    "index is cut": (lambda f: cut(f / "model_index.json", 20), "model_index.json: not JSON"),
    "index is binary": (lambda f: (f / "model_index.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "the folder unet/ is missing"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "no text_encoder folder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "no weights": (lambda f: (f / UNET_FILE).unlink(), "no weights; expected diffusion_pytorch_model.safetensors"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "config.json: cannot be read"),
    "weights are a git-lfs pointer": (
        lambda f: (f / UNET_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "not a complete safetensors file",
    ),
    "weights are cut": (lambda f: cut(f / UNET_FILE, 40_000), "diffusion_pytorch_model.safetensors"),
    "weights are empty": (lambda f: (f / UNET_FILE).write_bytes(b""), "not a complete safetensors file"),
    "weights are too long": (
        lambda f: (f / UNET_FILE).write_bytes((f / UNET_FILE).read_bytes() + b"more"),
        "its header accounts for",
    ),
    "unknown block": (
        lambda f: edit_json(f / "unet/config.json", down_block_types=["DownBlock2D", "AttnDownBlock2D"]),
        "down_block_types is",
    ),
    "heads do not divide": (lambda f: edit_json(f / "unet/config.json", attention_head_dim=[3, 4]), "multiple of its"),
    "unknown activation": (lambda f: edit_json(f / "text_encoder/config.json", hidden_act="relu"), "hidden_act"),
    "unknown scheduler": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", _class_name="PixelScheduler"),
        "_class_name is 'PixelScheduler'",
    ),
    "another text encoder": (
        lambda f: edit_json(f / "unet/config.json", cross_attention_dim=48),
        "give 32 features, the UNet reads 48",
    ),
    "a UNet of other latents": (
        lambda f: edit_json(f / "unet/config.json", in_channels=8),
        "the UNet reads 8 channels and gives 4; with this autoencoder it should read 4 (or 9, for inpainting)",
    ),
    "absurd size": (lambda f: edit_json(f / "unet/config.json", in_channels=2**40), "in_channels is"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_what_is_wrong_with_a_folder_is_one_line(folder: Path, case: str) -> None:
    change, message = BAD_FOLDERS[case]
    change(folder)
    with pytest.raises(FastsdError) as error:
        load_folder(folder, torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_added_conditioning_of_another_width(tmp_path: Path) -> None:
    """SDXL's UNet reads the pooled text and six sizes; the refiner's reads five."""
    save_folder(sdxl(), tmp_path, torch.float32)
    edit_json(tmp_path / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(FastsdError, match="give 64 added features, the UNet reads 72"):
        load_folder(tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "sub/part.safetensors"])
def test_a_shard_is_a_file_beside_its_index(folder: Path, name: str) -> None:
    (folder / UNET_FILE).unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
    with pytest.raises(FastsdError, match="is not the name of a file in the same folder"):
        load_folder(folder, torch.float32)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_an_index_of_shards_that_is_none(folder: Path, text: str) -> None:
    (folder / UNET_FILE).unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(FastsdError, match=r"index\.json: (weight_map is missing|not a JSON object|not JSON)"):
        load_folder(folder, torch.float32)


def test_a_shard_that_is_not_there(folder: Path) -> None:
    shard(folder / UNET_FILE, 2, folder / "unet/diffusion_pytorch_model.safetensors.index.json")
    (folder / "unet/part-1.safetensors").unlink()
    with pytest.raises(FastsdError, match=r"part-1.safetensors: missing, though .*index.json names it"):
        load_folder(folder, torch.float32)


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FastsdError, match="no such model"):
        load_folder(tmp_path / "nowhere", torch.float32)
    with pytest.raises(FastsdError, match="the folder is empty"):
        load_folder(tmp_path, torch.float32)
