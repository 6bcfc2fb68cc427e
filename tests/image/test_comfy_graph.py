"""ComfyUI's graphs: those of one KSampler are read, others are named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.image.metadata import read_texts

# The graph that ComfyUI opens with, as its image holds it.
DEFAULT: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (glass:1.2) bottle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}
EXPECTED = {
    "like": "comfy",
    "prompt": "a (glass:1.2) bottle",
    "negative_prompt": "text, watermark",
    "seed": 156680208700286,
    "num_inference_steps": 20,
    "guidance_scale": 8,
    "sampler": "euler",
    "schedule": "default",
    "model": "v1-5-pruned-emaonly",
    "width": 512,
    "height": 768,
}


def read(graph: Any) -> tuple[dict[str, Any], dict[str, str]]:
    return read_texts({"prompt": json.dumps(graph), "workflow": "{}"})


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    return DEFAULT | {node: DEFAULT[node] | {"inputs": DEFAULT[node]["inputs"] | inputs}}


def test_the_default_graph() -> None:
    assert read(DEFAULT) == (EXPECTED, {})


def test_loras_and_clip_skip_stand_between() -> None:
    lora = {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors", "model": ["4", 0], "clip": ["4", 1]}}
    skip = {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["10", 1]}}
    graph = changed("3", model=["10", 0], sampler_name="dpmpp_2m_sde_gpu", scheduler="karras")
    graph |= {"10": lora, "11": skip, "6": changed("6", clip=["11", 0])["6"]}
    settings, others = read(graph)
    assert settings == EXPECTED | {"clip_skip": 2, "sampler": "dpmpp_2m_sde", "schedule": "karras"}
    assert list(others) == ["the LoRA ink.safetensors"]


def test_what_is_not_repeated_is_named() -> None:
    upscaler = {"class_type": "ImageUpscaleWithModel", "inputs": {"image": ["8", 0]}}
    settings, others = read(changed("5", batch_size=4) | {"10": upscaler})
    assert settings == EXPECTED | {"noise_count": 4}
    assert list(others) == ["its place in a batch of 4", "ImageUpscaleWithModel"]


def test_an_image_to_image_needs_its_image() -> None:
    encode = {"class_type": "VAEEncode", "inputs": {"pixels": ["11", 0], "vae": ["4", 2]}}
    load = {"class_type": "LoadImage", "inputs": {"image": "house.png"}}
    settings, others = read(changed("3", denoise=0.6) | {"5": encode, "11": load})
    assert settings["strength"] == 0.6 and "width" not in settings and others == {}


def test_values_of_other_nodes_are_followed() -> None:
    graph = changed(
        "3", seed=["20", 0], steps=["21", 0], cfg=["22", 0], sampler_name=["24", 0], scheduler="karras", denoise="1.0"
    )
    graph |= {
        "5": changed("5", width=["23", 0])["5"],
        "20": {"class_type": "Seed (rgthree)", "inputs": {"seed": 7}},
        "21": {"class_type": "PrimitiveInt", "inputs": {"value": 30, "control_after_generate": "increment"}},
        "22": {"class_type": "PrimitiveFloat", "inputs": {"value": "6.5"}},
        "23": {"class_type": "Reroute", "inputs": {"": ["25", 0]}},
        "24": {"class_type": "PrimitiveString", "inputs": {"value": "heun"}},
        "25": {"class_type": "PrimitiveInt", "inputs": {"value": 640}},
    }
    settings, others = read(graph)
    wanted = {"seed": 7, "num_inference_steps": 30, "guidance_scale": 6.5, "width": 640, "sampler": "heun"}
    assert settings == EXPECTED | wanted | {"schedule": "karras"} and others == {}


SUM = {"20": {"class_type": "SimpleMath+", "inputs": {"value": "a + 1", "a": 5}}}


@pytest.mark.parametrize(
    ("node", "key", "ours"),
    [
        ("3", "seed", "seed"),
        ("3", "steps", "num_inference_steps"),
        ("3", "cfg", "guidance_scale"),
        ("3", "sampler_name", "sampler"),
        ("3", "scheduler", "schedule"),
        ("4", "ckpt_name", "model"),
        ("5", "width", "width"),
        ("5", "height", "height"),
        ("5", "batch_size", "noise_count"),
    ],
)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (["20", 0], "comes from node 20, SimpleMath+"),
        (["99", 0], "comes from node 99, which is missing"),
        (None, "is missing"),
        ({"a": 1}, "is {'a': 1}"),
    ],
)
def test_a_setting_that_the_graph_leaves_open_is_named(node: str, key: str, ours: str, value: Any, reason: str) -> None:
    settings, others = read(changed(node, **{key: value}) | SUM)
    assert settings.pop("unread") == {ours: f"its '{key}' {reason}"}
    assert settings == {name: each for name, each in EXPECTED.items() if name != ours}
    assert list(others) == ([] if reason.endswith("+") else ["SimpleMath+"])


@pytest.mark.parametrize(("key", "value"), [("cfg", "abc"), ("seed", -1), ("steps", True)])
def test_what_is_no_number_is_none(key: str, value: Any) -> None:
    assert list(read(changed("3", **{key: value}))[0]["unread"].values()) == [f"its {key!r} is {value!r}"]


def test_a_text_that_is_put_together_is_left_open() -> None:
    joined = {"class_type": "StringConcatenate", "inputs": {"string_a": "a", "string_b": "b", "delimiter": ""}}
    settings, _ = read(changed("6", text=["20", 0]) | {"20": joined})
    assert settings["unread"] == {"prompt": "its 'positive text' comes from node 20, StringConcatenate"}
    assert "prompt" not in settings


@pytest.mark.parametrize(
    ("denoise", "said"), [(0.5, "is 0.5"), ("much", "is 'much'"), (["20", 0], "comes from node 20, SimpleMath+")]
)
def test_a_part_of_a_schedule_from_an_empty_latent_is_named(denoise: Any, said: str) -> None:
    settings, others = read(changed("3", denoise=denoise) | SUM)
    assert settings == EXPECTED and f"an empty latent's denoise, which {said}" in others


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (DEFAULT | {"10": DEFAULT["3"]}, "its samplers are: KSampler"),
        ({"5": DEFAULT["5"]}, "its samplers are: none"),
        (DEFAULT | {"3": {"class_type": "SamplerCustom", "inputs": {}}}, "its samplers are: SamplerCustom"),
        (changed("3", positive=["5", 0]), "CLIPTextEncode is its positive input, not EmptyLatentImage"),
        (changed("3", negative=None), "CLIPTextEncode is its negative input, not nothing"),
    ],
)
def test_other_graphs_are_one_line(graph: Any, said: str) -> None:
    with pytest.raises(FastsdError, match=said):
        read(graph)


def test_a_circle_ends() -> None:
    lora = {"class_type": "LoraLoader", "inputs": {"model": ["10", 0], "clip": ["10", 1]}}
    assert read(changed("3", model=["10", 0]) | {"10": lora})[0]["prompt"] == EXPECTED["prompt"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([["3", 0], ["4", 1]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(node=st.sampled_from(list(DEFAULT)), key=st.sampled_from([*DEFAULT["3"]["inputs"], "text", "clip"]), value=JUNK)
def test_junk_is_never_more_than_an_error_line(node: str, key: str, value: Any) -> None:
    for graph in (changed(node, **{key: value}), DEFAULT | {node: value}):
        try:
            read(graph)
        except FastsdError:
            pass
