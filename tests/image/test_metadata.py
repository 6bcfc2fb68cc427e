"""The settings in an image: any prompt comes back, and junk is one line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.image import infotext, metadata
from tests.support.infotext import FULL, HOSTILE


def test_our_text_is_read_without_our_chunk() -> None:
    found, others = metadata.read_texts({"parameters": infotext.write_parameters(FULL)})
    assert others == {}
    assert found == {key: value for key, value in FULL.items() if key not in ("eta", "version")}


@settings(max_examples=150, deadline=None)
@given(prompt=HOSTILE, negative=HOSTILE, model=HOSTILE, scale=st.floats(0, 100), seed=st.integers(0, 2**64 - 1))
def test_every_setting_comes_back(prompt: str, negative: str, model: str, scale: float, seed: int) -> None:
    given_settings = FULL | {
        "prompt": prompt,
        "negative_prompt": negative,
        "model": model,
        "guidance_scale": scale,
        "seed": seed,
    }
    assert metadata.read_texts(metadata.write_texts(given_settings)) == (given_settings, {})


@settings(max_examples=300, deadline=None)
@given(parameters=HOSTILE, own=HOSTILE)
def test_junk_is_never_more_than_an_error_line(parameters: str, own: str) -> None:
    try:
        found, others = metadata.read_texts({"parameters": parameters, "fastsd": own})
    except FastsdError:
        return
    assert all(isinstance(value, metadata.stored_types()[key]) for key, value in found.items())
    assert all(isinstance(value, str) for value in others.values())


@pytest.mark.parametrize(
    "own",
    [
        "",
        "[]",
        "null",
        '{"seed": 3}',
        '{"prompt": 3}',
        "[" * 100_000,
        '{"prompt": "a", "seed": true, "guidance_scale": NaN, "width": "8", "height": 8.5, "image": [], "x": 1}',
    ],
)
def test_a_damaged_chunk_is_passed_over(own: str) -> None:
    found, _ = metadata.read_texts({"fastsd": own, "parameters": "a\nSteps: 1, Sampler: Euler, Seed: 1"})
    assert found["prompt"] == "a" and "width" not in found and "guidance_scale" not in found


def test_no_settings_at_all() -> None:
    for texts in ({}, {"parameters": ""}, {"Software": "GIMP"}, {"parameters": "Screenshot"}):
        with pytest.raises(FastsdError, match="no settings"):
            metadata.read_texts(texts)


@pytest.mark.parametrize(
    "text", ["Screenshot", "a cat, a dog: two", "ISO: 100, Flash: on, Lens: 50mm", "x\ny: z", "{}"]
)
def test_a_text_that_is_no_settings_counts_as_none(text: str) -> None:
    with pytest.raises(FastsdError, match="^no settings are stored"):
        metadata.read_texts({"parameters": text})


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"Software": "NovelAI", "Comment": '{"steps": 28}'}, "NovelAI"),
        ({"invokeai_metadata": "{}"}, "InvokeAI"),
        ({"prompt": "a cat", "seed": "1", "use_stable_diffusion_model": "sd-v1-5"}, "Easy Diffusion"),
        ({"Dream": "a cat -s 50"}, "InvokeAI"),
        ({"parameters": '{"sui_image_params": {}}'}, "SwarmUI"),
        ({"parameters": '{"base_model": "x"}', "fooocus_scheme": "fooocus"}, "Fooocus"),
    ],
)
def test_other_programs_are_named(texts: dict[str, str], program: str) -> None:
    with pytest.raises(FastsdError, match=f"^its settings are {program}'s, which fastsd does not read"):
        metadata.read_texts(texts)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"workflow": "{}"}, "^it holds only ComfyUI's workflow; the graph .* is missing"),
        ({"workflow": "{}", "prompt": '{"3": {"class_type": "KSam'}, "^ComfyUI's graph in it .* is damaged"),
    ],
)
def test_without_its_graph_an_image_of_comfyui_says_so(texts: dict[str, str], said: str) -> None:
    with pytest.raises(FastsdError, match=said):
        metadata.read_texts(texts)


def test_an_empty_prompt_is_a_prompt() -> None:
    found, _ = metadata.read_texts({"parameters": "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"})
    assert found["prompt"] == "" and found["seed"] == 1
    text = "Negative prompt: fog\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"
    found, _ = metadata.read_texts({"parameters": text})
    assert (found["prompt"], found["negative_prompt"]) == ("", "fog")


def test_a_text_of_a_million_characters_is_refused_unread() -> None:
    with pytest.raises(FastsdError, match="has 1000011 characters; at most 262144"):
        metadata.read_texts({"parameters": "x\nSteps: 20" + " " * 10**6})


def test_numbers_of_hundreds_of_digits_are_no_settings_of_a_second_pass() -> None:
    many = "9" * 400
    text = f"x\nSteps: {many}, Denoising strength: 0.5, Hires upscale: 2, Size: {many}x1, Hires resize: 1x{many}"
    found, others = metadata.read_texts({"parameters": text})
    assert "hires_steps" not in found and {"Denoising strength", "Hires upscale"} <= others.keys()
