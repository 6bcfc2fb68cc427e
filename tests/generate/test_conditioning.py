"""Prompts in whole runs: when a schedule switches, what weights and lengths do, what embeddings change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.generate import batch, conditioning
from fastsd.graph import Graphs
from fastsd.model.clip import TextEncoder
from fastsd.pipeline import Pipeline
from fastsd.text.parse import ParsedText
from tests.support import tiny
from tests.support.tape import TapeRecorder

CPU = torch.device("cpu")
STEPS = 6


@pytest.fixture(scope="module")
def sd1() -> Pipeline:
    return Pipeline(tiny.sd1(), CPU, torch.float32)


@pytest.fixture(scope="module")
def sdxl() -> Pipeline:
    return Pipeline(tiny.sdxl(), CPU, torch.float32)


@pytest.fixture(params=["sd1", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return request.getfixturevalue(request.param)


def generate(pipe: Pipeline, prompt: Any, **arguments: Any) -> np.ndarray:
    given = {"seed": 1, "num_inference_steps": STEPS, "sampler": "euler", "width": 32, "height": 32}
    return pipe(prompt, **(given | {"output_type": "latent"} | arguments)).images.numpy()


def conditioned_texts(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, prompt: str, **arguments: Any) -> list[str]:
    """The positive text whose keys, values and time every call of the UNet got, worked out from what it got."""
    texts: dict[bytes, str] = {}
    calls: list[str] = []
    unet = pipe.components.unet
    project, denoise, encode = unet.project_context, unet.denoise, conditioning.encode_text
    last: list[str] = []

    def encoded(components: Any, text: ParsedText, *rest: Any) -> Any:
        last[:] = [text.text]
        return encode(components, text, *rest)

    def projected(context: torch.Tensor) -> Any:
        layers = project(context)
        texts[layers[0][0].numpy().tobytes()] = last[0]
        return layers

    def denoised(x: torch.Tensor, time: torch.Tensor, key_values: Any, *rest: Any) -> torch.Tensor:
        calls.append(texts[key_values[0][-1].contiguous().numpy().tobytes()])
        return denoise(x, time, key_values, *rest)

    monkeypatch.setattr(conditioning, "encode_text", encoded)
    monkeypatch.setattr(unet, "project_context", projected)
    monkeypatch.setattr(unet, "denoise", denoised)
    generate(pipe, prompt, **arguments)
    return calls


SCHEDULES = [
    # (prompt, arguments, text of each call of the UNet)
    ("[a:b:0.5]", {}, ["a"] * 3 + ["b"] * 3),
    ("[a:b:2]", {}, ["a"] * 2 + ["b"] * 4),
    ("[a|b]", {}, ["a", "b"] * 3),
    ("x[ y::0.34]", {}, ["x y"] * 2 + ["x"] * 4),
    ("[a|[b|c]:d:3]", {}, ["a|b", "a|c", "a|b"] + ["d"] * 3),
    ("[a:b:0.5]", {"guidance_scale": 1.0}, ["a"] * 3 + ["b"] * 3),
    # both calls of a step have the step's text; the last step of Heun is one call
    ("[a:b:2]", {"sampler": "heun", "num_inference_steps": 3}, ["a"] * 4 + ["b"]),
    # image to image: counted from the first step that runs, a share is of all steps
    ("[a:b:2]", {"image": True, "strength": 0.5}, ["a", "a", "b"]),
    ("[a:b:0.5]", {"image": True, "strength": 0.67}, ["a", "a", "a", "b"]),
]


@pytest.mark.parametrize(("prompt", "arguments", "expected"), SCHEDULES, ids=[str(i) for i in range(len(SCHEDULES))])
def test_the_text_of_every_call(
    sd1: Pipeline, monkeypatch: pytest.MonkeyPatch, prompt: str, arguments: dict[str, Any], expected: list[str]
) -> None:
    if "image" in arguments:
        arguments = arguments | {"image": Image.new("RGB", (32, 32), "red")}
    assert conditioned_texts(sd1, monkeypatch, prompt, **arguments) == expected


def test_a_schedule_is_the_one_image_up_to_its_step(pipe: Pipeline) -> None:
    def states(prompt: str) -> list[torch.Tensor]:
        steps = pipe.stream(prompt, seed=1, num_inference_steps=STEPS, sampler="euler", width=32, height=32)
        return [step.latents for step in steps]

    one, other, both = states("a cat"), states("a dog"), states("a [cat:dog:4]")
    for i in range(STEPS):
        assert torch.equal(both[i], one[i]) == (i < 4)
    assert not torch.equal(both[-1], other[-1])
    for same, texts in ((other, "a [cat:dog:0]"), (one, "a [cat:dog:1.0]"), (one, "a [cat|cat]")):
        assert all(torch.equal(a, b) for a, b in zip(states(texts), same, strict=True))


def test_a_negative_prompt_has_a_script_too(pipe: Pipeline) -> None:
    plain, late = generate(pipe, "a cat", negative_prompt="fog"), generate(pipe, "a cat", negative_prompt="[fog:0.5]")
    assert (plain != late).any() and (late != generate(pipe, "a cat")).any()
    np.testing.assert_array_equal(generate(pipe, "a cat", negative_prompt="[fog::1.0]"), plain)


@pytest.mark.parametrize("prompt", ["(a cat:1.0)", "((a cat:2):0.5)", "a cat<lora:x:1>", "[a cat|a cat]", "a c\\at"])
def test_what_says_the_same_generates_the_same(pipe: Pipeline, prompt: str) -> None:
    np.testing.assert_array_equal(generate(pipe, prompt), generate(pipe, "a cat"))
    np.testing.assert_array_equal(generate(pipe, "a cat", prompt_syntax="plain"), generate(pipe, "a cat"))


@pytest.mark.heavy
def test_weights_and_length_matter(pipe: Pipeline) -> None:
    base = generate(pipe, "a cat")
    for other in ("a (cat:1.3)", "a [cat]", "a BREAK cat", "a cat" + ", red" * 80, "a cat" + ", red" * 79):
        assert (generate(pipe, other) != base).any(), other
    assert (generate(pipe, "a (cat:1.3)", prompt_syntax="plain") != generate(pipe, "a (cat:1.3)")).any()


LONG = "a red cat on a mat, " * 20


@pytest.mark.heavy
def test_an_image_does_not_depend_on_longer_neighbours(pipe: Pipeline) -> None:
    prompts = ["a cat", LONG, "a [dog|BREAK] x", "a dog", LONG + LONG, "(a) bird"]
    negatives = ["", "", "fog", LONG, "", "[fog:0.5]"]
    together = generate(pipe, prompts, negative_prompt=negatives)
    in_twos = generate(pipe, prompts, negative_prompt=negatives, batch_size=2)
    np.testing.assert_array_equal(together, in_twos)
    for i, (prompt, negative) in enumerate(zip(prompts, negatives)):
        np.testing.assert_array_equal(generate(pipe, prompt, negative_prompt=negative, seed=1 + i)[0], together[i])


@pytest.mark.heavy
def test_a_second_pass_whose_texts_fill_more_chunks(pipe: Pipeline) -> None:
    """A schedule may come to a longer text only in the second pass, which has steps of its own."""
    prompts = [f"a [dog:{LONG}:2]", "a cat", "a bird"]
    for arguments in ({"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"negative_prompt": f"[fog:{LONG}:1]"}):
        settings = {"num_inference_steps": 1, "hires_scale": 1.5, "hires_steps": 6, "output_type": "latent"} | arguments
        together = pipe(prompts, seed=1, **settings).images
        for i, prompt in enumerate(prompts):
            assert torch.equal(pipe(prompt, seed=1 + i, **settings).images[0], together[i])


def test_the_shorter_of_prompt_and_negative_is_padded(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, ...]] = []
    denoise = sd1.components.unet.denoise

    def denoised(x: torch.Tensor, time: torch.Tensor, key_values: Any, *rest: Any) -> torch.Tensor:
        lengths.append(tuple(layer.shape[1] for layer in key_values))
        return denoise(x, time, key_values, *rest)

    monkeypatch.setattr(sd1.components.unet, "denoise", denoised)
    for prompt, negative, chunks in (("a", LONG, 2), (LONG, "", 2), ("a", "", 1), ("[a:" + LONG + ":3]", "", 2)):
        lengths.clear()
        generate(sd1, prompt, negative_prompt=negative)
        assert {n for layers in lengths for n in layers} == {77 * chunks}
    lengths.clear()
    generate(sd1, "a", negative_prompt=LONG, guidance_scale=1.0)  # a negative prompt that is not used pads nothing
    assert {n for layers in lengths for n in layers} == {77}


def test_each_text_is_encoded_once(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = conditioning.encode_text

    def recorded(components: Any, text: ParsedText, *rest: Any) -> Any:
        encoded.append(text.text)
        return encode(components, text, *rest)

    monkeypatch.setattr(conditioning, "encode_text", recorded)
    generate(sd1, "[a|b] x", num_images_per_prompt=3, negative_prompt="b x")
    assert sorted(encoded) == ["a x", "b x", "b x"]  # as a prompt and as a negative prompt


def test_keys_and_values_are_the_same_while_the_text_is(sd1: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same tuple, by which a graph knows that it has nothing to copy."""
    seen: list[Any] = []
    denoise = batch.denoise_row

    def recorded(unet: Any, inputs: Any, row: int) -> torch.Tensor:
        seen.append(inputs.conditioning.key_values)
        return denoise(unet, inputs, row)

    monkeypatch.setattr(batch, "denoise_row", recorded)
    generate(sd1, "[a:b:2] x")
    assert [before is after for before, after in zip(seen, seen[1:])] == [True, False, True, True, True]


@pytest.mark.heavy
def test_digits_follow_a_schedule_and_chunks_of_their_own_length() -> None:
    pipe = Pipeline.from_pretrained(dtype="fp32")
    size = {"num_inference_steps": 4, "width": 64, "height": 64}
    eight, three = generate(pipe, "a thick eight", **size), generate(pipe, "a three", **size)
    np.testing.assert_array_equal(generate(pipe, "a [thick eight:three:1.0]", **size), eight)
    np.testing.assert_array_equal(generate(pipe, "a [thick eight:three:0]", **size), three)
    np.testing.assert_array_equal(generate(pipe, "a (three:1)", **size), three)
    both = generate(pipe, "a [thick eight:three:2]", **size)
    assert (both != eight).any() and (both != three).any()
    long = pipe("a thick eight " * 11, **size, seed=1)
    assert long.notes == [] and np.isfinite(np.asarray(long.images[0])).all()
    assert pipe("a (thick:1.2) [eight:three:2]", **size, seed=1).notes == []
    assert "'purple'" in pipe("a [purple:three:2]", **size, seed=1).notes[0]


@pytest.mark.heavy
def test_an_embedding_changes_the_prompts_that_name_it(tmp_path: Path) -> None:
    for make, widths in ((tiny.sd1, {"x": 32}), (tiny.sdxl, {"clip_l": 32, "clip_g": 32})):
        pipe = Pipeline(make(), CPU, torch.float32)
        save_file({key: torch.randn(2, width) for key, width in widths.items()}, tmp_path / "ink-style.safetensors")
        named, other = generate(pipe, "a cat, ink-style"), generate(pipe, "a cat, ink")
        assert "ink-style" in pipe.load_embedding(tmp_path / "ink-style.safetensors")
        assert (generate(pipe, "a cat, ink-style") != named).any()
        np.testing.assert_array_equal(generate(pipe, "a cat, ink"), other)
        assert pipe.load_embedding(str(tmp_path / "ink-style.safetensors"), token="<ink>") == ("<ink>",)
        np.testing.assert_array_equal(generate(pipe, "a cat, <ink>"), generate(pipe, "a cat, Ink-Style"))
        result = pipe("a <ink>", seed=1, num_inference_steps=1, negative_prompt="ink-style", output_type="latent")
        assert sorted(result.parameters["embeddings"]) == ["<ink>", "ink-style"]


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl after its refiner"])
def test_a_refiner_reads_embeddings_too(tmp_path: Path, family: str) -> None:
    """Its text encoders are as many as the model's, or the last of them, or more."""
    keys = ("x",) if family == "sd1" else ("clip_l", "clip_g")
    save_file({key: torch.randn(2, 32) for key in keys}, tmp_path / "ink-style.safetensors")
    model, refiner = ((tiny.sd1 if family == "sd1" else tiny.sdxl)() for _ in range(2))
    refiner.unet.conv_in.weight.data.mul_(1.5)
    if "after" in family:
        model = replace(model, text_encoders=model.text_encoders[1:], tokenizers=model.tokenizers[1:])
        model.unet = tiny.sdxl(32).unet
    pipe = Pipeline(model, CPU, torch.float32, refiner=refiner)
    only_refined = {"refiner_switch": 0.0}
    before = generate(pipe, "a cat, ink-style", **only_refined)
    pipe.load_embedding(tmp_path / "ink-style.safetensors")
    assert (generate(pipe, "a cat, ink-style", **only_refined) != before).any()


def test_a_refiner_with_another_text_encoder_reads_the_name(tmp_path: Path) -> None:
    wider = tiny.sd1(replace(tiny.UNET, cross_attention_dim=64))
    wider.text_encoders = (TextEncoder(replace(tiny.CLIP, hidden_size=64)),)
    pipe = Pipeline(tiny.sd1(), CPU, torch.float32, refiner=wider)
    save_file({"x": torch.randn(2, 32)}, tmp_path / "ink-style.safetensors")
    before = generate(pipe, "ink-style", refiner_switch=0.0)
    pipe.load_embedding(tmp_path / "ink-style.safetensors")
    np.testing.assert_array_equal(generate(pipe, "ink-style", refiner_switch=0.0), before)


BAD = [
    ("prompt", "(a:101)"),
    ("prompt", "[(" * 200),
    ("prompt", "<lora:x:much>"),
    ("prompt", "a, " * 5000),
    ("negative_prompt", "(a:101)"),
    ("negative_prompt", "x" * 200_000),
    ("prompt_syntax", "invoke"),
    ("prompt_syntax", 3),
    ("prompt_syntax", ["plain"]),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_prompts_get_one_line(sd1: Pipeline, name: str, value: Any) -> None:
    with pytest.raises(FastsdError, match=f"^{name}") as caught:
        sd1(**{"prompt": "a cat", name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_lora_tags_are_named(sd1: Pipeline) -> None:
    result = sd1("a cat <lora:ink:0.8>", seed=1, num_inference_steps=1, width=32, height=32)
    assert any("<lora:ink>" in note for note in result.notes)
    assert result.parameters["prompts"] == ["a cat <lora:ink:0.8>"]


@pytest.mark.heavy
def test_graphs_follow_a_script(sd1: Pipeline) -> None:
    recorder = TapeRecorder()
    graphed = Pipeline(sd1.components, CPU, torch.float32, Graphs(recorder))
    for prompt in ("a [cat:dog:2]", "[a|b] x", "a [x:" + LONG + ":3]", "a (cat:1.3)", "a [cat:dog:2]"):
        np.testing.assert_array_equal(generate(graphed, prompt), generate(sd1, prompt), prompt)
