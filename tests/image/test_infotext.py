"""A1111's text of an image's settings: theirs are read, ours are what A1111 reads."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.image import infotext
from fastsd.sampling.samplers import SAMPLERS, SCHEDULES
from tests.support.infotext import FULL, HOSTILE

# A1111's texts, as found in its documentation, its tests and images made with it.
WORKED = {
    "the example of its source": (
        "girl with an artist's beret, determined, by Alphonse Mucha, ((eyeshadow)), intricate\n"
        "Negative prompt: ugly, fat, (((deformed))), [blurry], (extra_limb), messy drawing\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b",
        {
            "prompt": "girl with an artist's beret, determined, by Alphonse Mucha, ((eyeshadow)), intricate",
            "negative_prompt": "ugly, fat, (((deformed))), [blurry], (extra_limb), messy drawing",
            "num_inference_steps": 20,
            "sampler": "euler_a",
            "guidance_scale": 7.0,
            "seed": 965400086,
            "width": 512,
            "height": 512,
            "model_hash": "45dee52b",
        },
        {},
    ),
    "version 1.9, schedule apart": (
        "a cat\nSteps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 0, Size: 832x1216, "
        "Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 2, RNG: CPU, Version: v1.9.4",
        {
            "prompt": "a cat",
            "negative_prompt": "",
            "num_inference_steps": 30,
            "sampler": "dpm++2m",
            "schedule": "karras",
            "guidance_scale": 5.5,
            "seed": 0,
            "width": 832,
            "height": 1216,
            "model_hash": "31e35c80fc",
            "model": "sd_xl_base_1.0",
            "clip_skip": 2,
            "noise": "cpu",
        },
        {},
    ),
    "no negative prompt, several lines, quoted values": (
        "first line,\n second: line\n\nlast\nNegative prompt: bad\nworse\n"
        'Steps: 4, Sampler: LCM, CFG scale: 1, Seed: 12, Size: 64x64, Model: "a, b: \\"c\\"", '
        'Lora hashes: "x: 1ab2, y: 33", Version: v1.10.1',
        {
            "prompt": "first line,\nsecond: line\n\nlast",
            "negative_prompt": "bad\nworse",
            "num_inference_steps": 4,
            "sampler": "lcm",
            "guidance_scale": 1.0,
            "seed": 12,
            "width": 64,
            "height": 64,
            "model": 'a, b: "c"',
            "lora_hashes": {"x": "1ab2", "y": "33"},
        },
        {},
    ),
    "image-to-image": (
        "x\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 3, Size: 512x512, Denoising strength: 0.75, Mask blur: 4",
        {
            "prompt": "x",
            "negative_prompt": "",
            "num_inference_steps": 20,
            "sampler": "ddim",
            "guidance_scale": 7.0,
            "seed": 3,
            "width": 512,
            "height": 512,
            "strength": 0.75,
            "mask_blur": 4.0,
        },
        {},
    ),
    "the upscaling pass of text-to-image is no image-to-image": (
        "x\nSteps: 20, Sampler: DPM++ 2M Karras, Seed: 3, Denoising strength: 0.7, Hires upscale: 2, Hires steps: 10",
        {
            "prompt": "x",
            "negative_prompt": "",
            "num_inference_steps": 20,
            "sampler": "DPM++ 2M Karras",
            "seed": 3,
        },
        {"Denoising strength": "0.7", "Hires upscale": "2", "Hires steps": "10"},
    ),
    "the second pass by an upscaler that is known here": (
        "x\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 512x512, Denoising strength: 0.45, "
        "Hires upscale: 1.5, Hires steps: 10, Hires upscaler: Latent, Version: v1.9.4",
        {
            "prompt": "x",
            "negative_prompt": "",
            "num_inference_steps": 20,
            "sampler": "euler_a",
            "guidance_scale": 7.0,
            "seed": 3,
            "width": 512,
            "height": 512,
            "hires_scale": 1.5,
            "hires_strength": 0.45,
            "hires_steps": 10,
            "hires_upscaler": "latent",
        },
        {},
    ),
    "the second pass to a size of its own": (
        "x\nSteps: 20, Sampler: Euler a, Seed: 3, Denoising strength: 0.45, Hires resize: 640x960, "
        "Hires upscaler: Latent",
        {"prompt": "x", "negative_prompt": "", "num_inference_steps": 20, "sampler": "euler_a", "seed": 3},
        {"Denoising strength": "0.45", "Hires resize": "640x960", "Hires upscaler": "Latent"},
    ),
    "an extension's lines below": (
        "a\nNegative prompt: b\nSteps: 2, Sampler: Heun, CFG scale: 3, Seed: 4, Size: 8x8\n\nTemplate: a\n"
        "Negative Template: b",
        {
            "prompt": "a",
            "negative_prompt": "b",
            "num_inference_steps": 2,
            "sampler": "heun",
            "guidance_scale": 3.0,
            "seed": 4,
            "width": 8,
            "height": 8,
        },
        {},
    ),
    "a prompt alone": ("a cat, a dog: two", {"prompt": "a cat, a dog: two", "negative_prompt": ""}, {}),
    "values that make no sense": (
        "a\nSteps: many, Sampler: Euler, CFG scale: nan, Seed: 1e3, Size: 512, Clip skip: 1",
        {"prompt": "a", "negative_prompt": "", "sampler": "euler", "clip_skip": 1},
        {"Steps": "many", "CFG scale": "nan", "Seed": "1e3", "Size": "512"},
    ),
}


def test_the_text_is_a1111s() -> None:
    assert infotext.write_parameters(FULL) == (
        "a lighthouse at dusk, oil on canvas\n"
        "Negative prompt: fog, rain\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model: sd15, "
        "Denoising strength: 0.55, Clip skip: 2, Guidance rescale: 0.7, Device: cpu, Dtype: fp32, RNG: CPU, "
        "Version: fastsd 0.1.0"
    )


def test_hashes_are_where_a1111_has_them() -> None:
    """Lists of "name: hash", quoted as JSON for their colons and commas; a name loses its own."""
    digest = "0123456789abcdef" * 4
    more = {
        "model_hash": "6ce0161689",
        "vae": {"name": "kl-f8.safetensors", "path": "x", "hash": "c6a580b13a"},
        "loras": [
            {"name": "ink.safetensors", "sha256": digest, "strength": 0.5, "hash": "aaaabbbbcccc"},
            {"name": "a:b, c.safetensors", "sha256": digest, "strength": 1.0, "hash": "ddddeeeeffff"},
        ],
        "embeddings": [{"name": "face.pt", "token": "face", "sha256": digest}],
    }
    text = infotext.write_parameters(FULL | more)
    assert "Size: 512x768, Model hash: 6ce0161689, Model: sd15, VAE hash: c6a580b13a, VAE: kl-f8.safetensors, " in text
    assert ', Lora hashes: "ink: aaaabbbbcccc, ab c: ddddeeeeffff", TI hashes: "face: 0123456789ab", Device: ' in text
    refiner = FULL | {"refiner": {"name": "sd_xl_refiner_1.0.safetensors", "hash": "7440042bbd"}, "refiner_switch": 0.8}
    assert ", Refiner: sd_xl_refiner_1.0 [7440042bbd], Refiner switch at: 0.8, " in infotext.write_parameters(refiner)
    del refiner["refiner"]["hash"]
    assert ", Refiner: sd_xl_refiner_1.0, Refiner switch at: " in infotext.write_parameters(refiner)
    pairs = infotext.split_pairs(text.split("\n")[-1])
    assert pairs["Lora hashes"] == "ink: aaaabbbbcccc, ab c: ddddeeeeffff"
    assert infotext.write_parameters(FULL | {"loras": [], "embeddings": ["a name alone"], "vae": {}}) == (
        infotext.write_parameters(FULL)
    )


def test_a1111_would_find_every_pair() -> None:
    """Its rule, as its documentation gives it: word, colon, then a quoted text or anything up to a comma."""
    strange = FULL | {"model": 'my "best": a, b\\c\nd'}
    line = infotext.write_parameters(strange).split("\n")[-1]
    rule = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    found = dict(re.findall(rule, line))
    assert json.loads(found["Model"]) == strange["model"]
    assert found["Steps"] == "20" and found["Size"] == "512x768" and found["Version"] == "fastsd 0.1.0"
    assert len(found) == 14


@pytest.mark.parametrize("case", WORKED)
def test_a1111s_texts_are_read(case: str) -> None:
    text, expected, others = WORKED[case]
    if case != "a prompt alone":
        expected = {"schedule": "default", "like": "a1111"} | expected
    assert infotext.parse_parameters(text) == (expected, others)


def test_labels_of_samplers_and_schedules_are_read() -> None:
    for name, entry in SAMPLERS.items():
        assert infotext.parse_parameters(f"a\nSteps: 1, Sampler: {entry.label}, Seed: 1")[0]["sampler"] == name
    for name, label in SCHEDULES.items():
        assert infotext.parse_parameters(f"a\nSteps: 1, Schedule type: {label}, Seed: 1")[0]["schedule"] == name


@settings(max_examples=150, deadline=None)
@given(model=HOSTILE, scale=st.floats(0, 100), seed=st.integers(0, 2**64 - 1))
def test_a1111s_form_holds_any_value(model: str, scale: float, seed: int) -> None:
    given_settings = FULL | {"model": model, "guidance_scale": scale, "seed": seed}
    found, _ = infotext.parse_parameters(infotext.write_parameters(given_settings))
    assert (found["model"], found["guidance_scale"], found["seed"]) == (model, scale, seed)
    assert found["prompt"] == FULL["prompt"]


@pytest.mark.parametrize("junk", ["a" * 10**6, "a:" * 5 * 10**5, 'a: "\\' * 2 * 10**5, 'a: "x, ' * 10**5, " " * 10**6])
def test_long_junk_takes_linear_time(junk: str) -> None:
    started = time.process_time()
    infotext.parse_parameters(f"{junk}x")
    assert time.process_time() - started < 2.0  # quadratic time would be minutes


@given(run=st.integers(1, 150), hundredths=st.integers(1, 100))
def test_the_steps_of_the_second_pass_that_run(run: int, hundredths: int) -> None:
    """A1111's are those that run. Ours are a schedule's, as long as its, or by the remainder's one step longer."""
    strength = hundredths / 100
    more = f"Denoising strength: {strength}, Hires upscale: 2, Hires steps: {run}, Hires upscaler: Latent"
    line = f"Steps: 7, Sampler: Euler, {more}"
    found = infotext.parse_parameters(f"x\n{line}")[0]
    assert found["hires_steps"] == run
    assert infotext.parse_parameters(infotext.write_parameters(found))[0] == found | {"noise": "gpu"}
    found = infotext.parse_parameters(f"x\n{line}, Version: fastsd 0.1")[0]
    steps = found["hires_steps"]
    assert int(steps * strength) == min(run, int(1000 * strength))
    assert steps in (1000, int(run / strength), int(run / strength) + 1)
    ours = found | {"version": "0.1", "device": "cpu"}
    assert infotext.parse_parameters(infotext.write_parameters(ours))[0] == found | {"device": "cpu"}


# Every key of A1111's `create_infotext` and of what its samplers, scripts and settings add, with a value of each, and
# what it becomes; None: it is named as not repeated.
KEYS = {
    "Variation seed: 9, Variation seed strength: 0.2": {"subseed": 9, "subseed_strength": 0.2},
    "Seed resize from: 512x768": {"seed_resize_from": "512x768"},
    "Seed resize from: -1x-1": None,
    "ENSD: 31337": {"ensd": 31337},
    "RNG: CPU": {"noise": "cpu"},
    "RNG: NV": {"noise": "gpu"},
    "RNG: GPU": {"noise": "gpu"},
    "Emphasis: No norm": {"emphasis": "no_norm"},
    "Emphasis: None": {"emphasis": "none"},
    "Emphasis: Ignore": {"emphasis": "ignore"},
    "Emphasis: Original": {"emphasis": "original"},
    "Clip skip: 2": {"clip_skip": 2},
    "Eta DDIM: 0.5": {"eta": 0.5},
    "Image CFG scale: 1.5": {"image_guidance_scale": 1.5},
    "Hires upscale: 2, Denoising strength: 0.5, Hires upscaler: Latent": {
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_upscaler": "latent",
    },
    "Hires resize: 128x96, Denoising strength: 0.5, Hires upscaler: Lanczos, Hires sampler: Euler": {
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_upscaler": "lanczos",
    },
    "Hires upscale: 2, Denoising strength: 0.5, Hires upscaler: ESRGAN_4x": {
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_upscaler": "ESRGAN_4x",  # a file, which is asked for
    },
    "Hires upscale: 2, Denoising strength: 0.5, Hires upscaler: Latent (antialiased)": {
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_upscaler": "latent-antialiased",
    },
    "Hires upscale: 2, Denoising strength: 0.5, Hires upscaler: None": {
        "hires_scale": 2.0,
        "hires_strength": 0.5,
        "hires_upscaler": "lanczos",  # A1111's `resize_image` without an upscaler
    },
    "Schedule type: Karras": {"schedule": "karras"},
    "Refiner switch at: 0.8": {"refiner_switch": 0.8},
    'Lora hashes: "a: 1", TI hashes: "b: 2", Init image hash: 3, Styles: x, Batch size: 2, Batch pos: 1': {
        "lora_hashes": {"a": "1"},
        "embedding_hashes": {"b": "2"},
    },
} | dict.fromkeys(
    (
        "Face restoration: CodeFormer",
        "Conditional mask weight: 0.5",
        "Tiling: True",
        "Token merging ratio: 0.5",
        "NGMS: 1.5",
        "Sigma churn: 0.1",
        "Sigma noise: 1.1",
        "Schedule max sigma: 10",
        "Discard penultimate sigma: True",
        "Downcast alphas_cumprod: True",
        "Noise Schedule: Zero Terminal SNR",
        "SGM noise multiplier: True",
        "Extra noise: 0.1",
        "Noise multiplier: 0.9",
        "Old prompt editing timelines: True",
        "Pad conds: True",
        "VAE Decoder: TAESD",
        "FP8 weight: Enable",
        "Hypernet: x",
        "Hires prompt: x",
        "Hires sampler: Heun",
        "Skip Early CFG: 0.1",
        "ADetailer model: face",
        "Hires resize: 100x96, Denoising strength: 0.5, Hires upscaler: Latent",
    )
)


@pytest.mark.parametrize("pairs", KEYS)
def test_every_key_of_a1111_is_used_or_said(pairs: str) -> None:
    line = f"Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x48, {pairs}, Version: v1.10.1"
    found, others = infotext.parse_parameters(f"x\n{line}")
    base = infotext.parse_parameters("x\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x48")[0]
    expected = KEYS[pairs]
    if expected is None:
        assert found == base and others == infotext.split_pairs(pairs)
    else:
        assert others == {} and found == base | expected


def test_the_favourite_schedule_of_a_sampler_is_written_or_old() -> None:
    """A1111 from 1.9 on writes the schedule of "Automatic" where the sampler has one; before, it stood in its name."""
    text = "x\nSteps: 2, Seed: 1, Sampler: "
    assert infotext.parse_parameters(f"{text}DPM++ 2M")[0]["schedule"] == "default"
    assert infotext.parse_parameters(f"{text}DPM++ 2M, Schedule type: Karras")[0]["schedule"] == "karras"
    assert "schedule" not in infotext.parse_parameters(f"{text}DPM++ 2M, Schedule type: Automatic")[0]


@pytest.mark.parametrize("like", ["a1111", "comfy"])
def test_the_second_passes_own_steps_all_run_by_the_rules_of(like: str) -> None:
    """`fastsd.generate.like`: the text states the steps that run, and they come back as they were."""
    hires = {"hires_scale": 2.0, "hires_strength": 0.5, "hires_steps": 10, "hires_upscaler": "latent"}
    text = infotext.write_parameters(FULL | hires | {"like": like})
    assert "Hires steps: 10," in text
    assert infotext.parse_parameters(text)[0]["hires_steps"] == 10


def test_sdnexts_default_sampler_is_the_models_own() -> None:
    text = "a cat\nSteps: 9, Size: 64x64, Sampler: Default, Seed: 5, CFG scale: 6"
    found, ignored = infotext.parse_parameters(f"{text}, App: SD.Next, Version: abc")
    assert "sampler" not in found and "Sampler" not in ignored
    assert infotext.parse_parameters(text)[0]["sampler"] == "Default"
