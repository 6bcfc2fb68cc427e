"""The rules of other programs, each against what that program's own code says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastsd.cli import flags
from fastsd.components import Components
from fastsd.config import SchedulerConfig
from fastsd.generate.conditioning import schedule_conditioning, texts_by_row
from fastsd.generate.like import LIKE
from fastsd.generate.request import Pass, plan
from fastsd.generate.tables import make_table
from fastsd.graph import Graphs
from fastsd.parameters import check_call
from fastsd.pipeline import Pipeline
from fastsd.sampling import advance
from tests.support import tiny
from tests.support.pipelines import PHOTO, latents, tiny_components, tiny_pipeline

CPU = torch.device("cpu")
LONG = "a cat, sitting on a mat, " * 14  # two chunks


def contexts(components: Components, like: str, prompt: str, negative: str) -> list[torch.Tensor]:
    """What the first cross-attention reads: of the negative prompt, then of the prompt; `[1, tokens, ...]`."""
    request = plan(components, DEFAULTS, {"prompt": prompt, "negative_prompt": negative, "like": like, "seed": 1})
    schedule = schedule_conditioning(components, request.passes[0], slice(0, 1), range(1), Graphs(), CPU)
    return [schedule.key_values[0][text][0] for text in schedule.texts[0]]


DEFAULTS = {
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "width": 64,
    "height": 64,
    "sampler": "euler",
    "schedule": "default",
}


def test_what_the_caller_gives_precedes_the_rules() -> None:
    components = tiny_components()
    for name, rules in LIKE.items():
        settings = plan(components, DEFAULTS, {"prompt": "x", "like": name}).settings
        assert all(settings[key] == value for key, value in rules.settings.items())
    given = {"noise": "cpu", "emphasis": "no_norm", "prompt_syntax": "a1111"}
    settings = plan(components, DEFAULTS, {"prompt": "x", "like": "comfy", **given}).settings
    assert {key: settings[key] for key in given} == given


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(("like", "pure"), [("none", True), ("a1111", False), ("comfy", False), ("diffusers", True)])
def test_a_fill_counts_at_full_strength_unless_the_run_starts_from_noise_alone(
    like: str, pure: bool, channels: int
) -> None:
    """Also with a UNet made for inpainting: A1111's `sample_img2img` and ComfyUI's KSampler add noise to the image."""
    pipe = tiny_pipeline(in_channels=channels)
    settings = {"image": PHOTO, "mask_image": Image.new("L", PHOTO.size, 255), "strength": 1.0, "like": like}
    found = [latents(pipe, num_inference_steps=2, inpaint_fill=fill, **settings) for fill in ("original", "blank")]
    assert torch.equal(*found) == pure


@pytest.mark.parametrize("like", ["a1111", "comfy"])
def test_texts_of_unequal_lengths_are_repeated_where_those_programs_keep_them_apart(like: str) -> None:
    """A1111 calls the UNet for each (`CFGDenoiser.forward`, tensor.shape[1] != uncond.shape[1]); ComfyUI repeats
    (comfy/conds.py, `CONDCrossAttn.concat`: "padding with repeat doesn't change result")."""
    components = tiny_components()
    negative, positive = contexts(components, like, LONG, "fog")
    alone, _ = contexts(components, like, "x", "fog")
    assert positive.shape[1] == negative.shape[1] == 2 * alone.shape[1]
    assert torch.equal(negative, torch.cat([alone, alone], dim=1))
    padded, _ = contexts(components, "none", LONG, "fog")
    assert not torch.equal(padded, negative)


def test_a_repeated_text_counts_as_it_does_alone() -> None:
    """The UNet's output agrees to rounding: softmax sums twice as many terms, each half as large."""
    components = tiny_components()
    x = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 77, components.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    unet = components.unet
    time = unet.embed_time(torch.tensor([500.0]), None)[:, None]
    with torch.inference_mode():
        one, three = (unet.denoise(x, time[0], unet.project_context(text.repeat(1, n, 1))) for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("like", "zeros"), [("none", None), ("a1111", True), ("comfy", False), ("diffusers", None)])
@pytest.mark.parametrize("says", [True, False])
def test_sdxls_empty_negative_prompt(like: str, zeros: bool | None, says: bool) -> None:
    """A1111: zeros always (modules/sd_models_xl.py, `force_zero_negative_prompt`). ComfyUI: the encoding of "".
    diffusers:
    as model_index.json says (`force_zeros_for_empty_prompt`). fastsd follows diffusers."""
    components = replace(tiny.sdxl(), zeros_for_empty_prompt=says)
    negative, _ = contexts(components, like, "a cat", "")
    wanted, _ = contexts(replace(components, zeros_for_empty_prompt=says if zeros is None else zeros), "none", "a", "")
    assert torch.equal(negative, wanted)


@pytest.mark.parametrize("like", ["a1111", "comfy", "diffusers"])
def test_an_image_of_each(like: str) -> None:
    """Each runs, repeats, and is an image of its own."""
    pipe = Pipeline(tiny_components(), CPU, torch.float32)
    arguments = {"sampler": "euler_a", "negative_prompt": "fog", "num_images_per_prompt": 2}
    found = latents(pipe, "a (red:1.4) cat", like=like, **arguments)
    assert torch.equal(found, latents(pipe, "a (red:1.4) cat", like=like, batch_size=1, **arguments))
    assert not torch.equal(found, latents(pipe, "a (red:1.4) cat", **arguments))


def shown(stage: Pass) -> str:
    """The text of each row, a letter each."""
    return "".join(texts[-1][0].text[0] for texts in texts_by_row(stage, slice(0, 1)))


@pytest.mark.parametrize(
    ("sampler", "prompt", "a1111", "own"),
    [
        ("euler", "[a:b:0.5]", "aaabb", "aabbb"),  # int(0.5 * 5) = 2: the calls 0, 1 and 2
        ("euler", "[a:b:4]", "aaaaa", "aaaab"),
        ("euler", "[a|b|c]", "aabca", "abcab"),
        ("heun", "[a:b:0.5]", "aaaaaabbb", "aaaabbbbb"),  # of 10 calls, of which 9 are made
        ("heun", "[a:b:4]", "aaaaabbbb", "aaaaaaaab"),
    ],
)
def test_schedules_in_prompts_count_calls_in_a1111(sampler: str, prompt: str, a1111: str, own: str) -> None:
    """modules/prompt_parser.py: `get_learned_conditioning_prompt_schedules` numbers steps from 1,
    `reconstruct_cond_batch` takes the first with current_step <= end_at_step, and the denoiser counts its calls from 0.
    The steps of samplers of the second order are two (modules/sd_samplers_common.py, `total_steps`)."""
    arguments = {"prompt": prompt, "num_inference_steps": 5, "sampler": sampler, "schedule": "default"}
    for like, expected in (("a1111", a1111), ("none", own)):
        assert shown(plan(tiny_components(), DEFAULTS, {**arguments, "like": like}).passes[0]) == expected


def test_schedules_go_on_in_the_second_pass_of_a1111() -> None:
    """The same function since 1.6: with hires_steps, whole numbers lose the first pass's steps, fractions 1."""
    hires = {"hires_scale": 2, "hires_strength": 0.5, "hires_steps": 4, "num_inference_steps": 5, "sampler": "euler"}
    expected = {"[a:b:0.5]": "bbbb", "[a:b:1.5]": "aaab", "[a:b:7]": "aaab", "[a:b:5]": "bbbb"}
    for prompt, letters in expected.items():
        stage = plan(tiny_components(), DEFAULTS, {"prompt": prompt, "like": "a1111", **hires}).passes[1]
        assert shown(stage) == letters, prompt


@pytest.mark.parametrize("schedule", ["default", "karras"])
def test_keeping_the_image_in_the_latent_or_in_the_prediction_is_the_same_with_euler(schedule: str) -> None:
    """A1111, `CFGDenoiser.forward`: denoised = init_latent * mask + nmask * denoised. fastsd and diffusers restore the
    latent after the step. With a hard mask both keep x = image + sigma noise there, and the network sees the same."""
    settings = check_call({}).replace(like="a1111", sampler="euler", schedule=schedule, spacing="linspace", eta=0.0)
    table = make_table(settings, SchedulerConfig(), 8, 8)
    image, noise = torch.randn(2, 1, 4, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.arange(16).reshape(1, 4, 4, 1) % 3 == 0).double()

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x).roll(1, dims=1) + 0.3 * x  # what is kept reaches what is not

    state = advance.begin(table, noise, image)
    sigmas = [table.mix[1], *table.keep[:-1, 1], 0.0]
    x = image + sigmas[0] * noise
    for row, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        out = network(x / (sigma**2 + 1) ** 0.5)
        denoised = (1 - mask) * image + mask * (x - sigma * out)
        x = x + (after - sigma) * (x - denoised) / sigma
        advance.step(state, network(advance.model_input(state)))
        advance.restore_known(state, image, noise, mask)
        torch.testing.assert_close(state.x, x, rtol=1e-9, atol=1e-9, msg=f"row {row}")


ROOT = Path(__file__).parent.parent.parent


def test_each_difference_of_the_page_has_its_test() -> None:
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    table = page.split("## The differences")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), (path, test)


def test_each_flag_of_the_page_exists() -> None:
    """The first cell of a row may hold another program's."""
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    page = re.sub(r"^\| [^|]* \|", "|", page, flags=re.M)
    known = {flag for row in flags.known() for flag in row.flags}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= known | {"--help-all"}
