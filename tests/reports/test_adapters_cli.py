"""What people reported of LoRAs and textual inversions in prompts and folders, through the command line."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastsd.errors import FastsdError
from fastsd.text.syntax import other_networks, take_loras, weigh
from tests.support.cli import pixels, refused, settings

pytestmark = pytest.mark.heavy
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v"


def write_lora(file: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{LAYER}.lora_down.weight": torch.randn(4, 32, generator=generator),
        f"{LAYER}.lora_up.weight": torch.randn(32, 4, generator=generator),
    }
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def used(path: Path) -> list[str]:
    return [str(lora["name"]) for lora in settings(path)["loras"]]


def test_a_lora_in_a_folder_is_named_with_its_folder(cli: Callable, model: Path, tmp_path: Path) -> None:
    """Two of one name are said; `<lora:folder/ink>` tells them apart, as in A1111."""
    first, second = (write_lora(tmp_path / "loras" / name / "ink.safetensors", i) for i, name in enumerate("ab"))
    base = ("-m", model, "--seed", "1", "--lora-dir", tmp_path / "loras")
    either = cli("-p", "a cat<lora:ink:1>", *base)
    assert "note: <lora:ink> is a/ink.safetensors; b/ink.safetensors has that name too" in either.err
    for name, file in (("a", first), ("b", second)):
        tagged = cli("-p", f"a cat<lora:{name}/ink:1>", *base)
        assert tagged.err == ""
        given = cli("-p", "a cat", "-m", model, "--seed", "1", "--lora", file)
        assert (pixels(tagged.paths[0]) == pixels(given.paths[0])).all()
    assert (pixels(either.paths[0]) == pixels(cli("-p", "a cat<lora:a/ink:1>", *base).paths[0])).all()


def test_lycos_are_loras_and_hypernetworks_are_refused_by_name(cli: Callable, model: Path, tmp_path: Path) -> None:
    """`<lyco:` was the tag of A1111's LyCORIS extension, which its LoRA extension reads too since 1.5."""
    file = write_lora(tmp_path / "loras" / "ink.safetensors")
    base = ("-m", model, "--seed", "1", "--lora-dir", file.parent)
    images = [pixels(cli("-p", f"a cat<{word}:ink:0.5>", *base).paths[0]) for word in ("lora", "lyco")]
    assert (images[0] == images[1]).all()
    refused(cli("-p", "a cat<hypernet:ink:0.5>", *base), "'<hypernet:ink:0.5>' is a hypernetwork")
    other = cli("-p", "a cat<wildcards:ink:0.5>", *base)
    assert "note: <wildcards:ink:0.5> has no effect: no such extra network" in other.err
    assert (pixels(other.paths[0]) == pixels(cli("-p", "a cat", *base).paths[0])).all()


def test_tags_of_other_networks() -> None:
    assert other_networks("a<aDd_on1:x:1.5:2> <b:c> <3:4> <lora:x:1> <x:y:z>") == ("<aDd_on1:x:1.5:2>",)
    assert take_loras("a<addon:x:1.5>b <b:c>")[0] == "ab <b:c>"
    with pytest.raises(FastsdError, match="hypernetwork"):
        take_loras("<hypernet:x>")


@pytest.mark.parametrize("text", ["ethics (reverse:1999)", "(reverse:1999)", "a (b:1e3), (c:101)"])
def test_a_danbooru_tag_with_a_number_suggests_escaped_brackets(text: str) -> None:
    if "1e3" in text:
        text = text.replace("1e3", "1000")
    with pytest.raises(FastsdError) as caught:
        weigh(text)
    assert "write \\( and \\)" in str(caught.value)


FORMS = ["NFC", "NFD"]


@pytest.mark.parametrize("on_disk", FORMS)
@pytest.mark.parametrize("in_prompt", FORMS)
def test_names_with_marks_are_found_however_they_are_composed(
    on_disk: str, in_prompt: str, cli: Callable, model: Path, tmp_path: Path
) -> None:
    """macOS stores and some archives hold file names decomposed (NFD); keyboards type them composed (NFC)."""
    stored, typed = (unicodedata.normalize(form, "été é") for form in (on_disk, in_prompt))
    write_lora(tmp_path / "loras" / f"{stored}.safetensors")
    (tmp_path / "ti").mkdir()
    save_file({"x": torch.randn(2, 32)}, tmp_path / "ti" / f"{stored}.safetensors")
    base = ("-m", model, "--lora-dir", tmp_path / "loras", "--embedding-dir", tmp_path / "ti")
    image = cli("-p", f"a cat {typed}<lora:{typed}:1>", *base)
    found = settings(image.paths[0])
    assert len(found["loras"]) == len(found["embeddings"]) == 1


def test_a_pickled_lora_needs_the_flag(cli: Callable, model: Path, tmp_path: Path) -> None:
    """`pytorch_lora_weights.bin`, alone and in its folder: read with the flag, else the line names the flag."""
    file = write_lora(tmp_path / "ink" / "pytorch_lora_weights.bin")
    safe = write_lora(tmp_path / "safe" / "ink.safetensors")
    base = ("-m", model, "-p", "a cat", "--seed", "1")
    expected = pixels(cli(*base, "--lora", safe).paths[0])
    for path in (file, file.parent):
        refused(cli(*base, "--lora", path), "a pickle", "--allow-pickle")
        assert (pixels(cli(*base, "--lora", path, "--allow-pickle").paths[0]) == expected).all()
    by_name = ("-m", model, "-p", "a<lora:pytorch_lora_weights>", "--lora-dir", tmp_path / "ink")
    refused(cli(*by_name), "a pickle", "--allow-pickle")


def test_an_embedding_of_the_original_trainer(cli: Callable, model: Path, tmp_path: Path) -> None:
    """textual_inversion's `embedding_manager.py` saves a torch.nn.ParameterDict, as A1111 reads it."""
    table = nn.ParameterDict({"*": nn.Parameter(torch.randn(2, 32))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, tmp_path / "toy.pt")
    base = ("-m", model, "-p", "a toy", "--embedding", tmp_path / "toy.pt")
    refused(cli(*base), "a pickle", "--allow-pickle")
    image = cli(*base, "--allow-pickle")
    assert [e["name"] for e in settings(image.paths[0])["embeddings"]] == ["toy.pt"]
