"""Features in place of prompts: the image is that of the texts they were made of, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd import Control, FastsdError, Pipeline
from fastsd.components import Components
from fastsd.config import ControlNetConfig
from fastsd.model.controlnet import ControlNet
from fastsd.text.encode import encode_text
from fastsd.text.parse import parse_text
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline

MODES: dict[str, dict[str, Any]] = {
    "text": {},
    "unguided": {"guidance_scale": 1},
    "image": {"image": PHOTO, "strength": 0.7},
    "mask": {"image": PHOTO, "mask_image": MASK, "strength": 0.7},
    "hires": {"hires_scale": 1.5, "hires_strength": 0.7, "hires_steps": 4},
    "a1111": {"like": "a1111"},
}
LONG = "fog over hills " * 30  # two chunks


@torch.no_grad()
def encoded(components: Components, *texts: str, length: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    found = [encode_text(components, parse_text(components, text, "a1111"), 1, length=length) for text in texts]
    return torch.cat([one.context for one in found]), torch.cat([one.pooled for one in found])


def embeds(components: Components, *texts: str, length: int = 1, negative: bool = False) -> dict[str, torch.Tensor]:
    """The arguments that stand for texts."""
    context, pooled = encoded(components, *texts, length=length)
    sign = "negative_" if negative else ""
    found = {f"{sign}prompt_embeds": context}
    return found | {f"{sign}pooled_prompt_embeds": pooled} if components.xl else found


def xl_pipeline() -> Pipeline:
    components = tiny.sdxl()
    components.defaults = {"num_inference_steps": 2}
    return Pipeline(components, torch.device("cpu"), torch.float32)


def generated(pipe: Pipeline, **arguments: Any) -> torch.Tensor:
    return pipe(seed=1, output_type="latent", **arguments).images


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_that_of_its_texts(mode: str) -> None:
    pipe = tiny_pipeline()
    expected = latents(pipe, "a cat", negative_prompt="fog", **MODES[mode])
    both = embeds(pipe.components, "a cat") | embeds(pipe.components, "fog", negative=True)
    assert torch.equal(generated(pipe, **both, **MODES[mode]), expected)
    if mode != "unguided":
        other = embeds(pipe.components, "a dog")
        assert not torch.equal(generated(pipe, **both | other, **MODES[mode]), expected)


def test_an_image_of_sdxl_is_that_of_its_texts() -> None:
    """Without a negative prompt too, which is zeros there; diffusers' `encode_prompt` makes them of any length."""
    pipe = xl_pipeline()
    both = embeds(pipe.components, "a cat") | embeds(pipe.components, "fog", negative=True)
    assert torch.equal(generated(pipe, **both), latents(pipe, "a cat", negative_prompt="fog"))
    pipe.components.zeros_for_empty_prompt = True
    one = embeds(pipe.components, "a cat")
    assert torch.equal(generated(pipe, **one), latents(pipe, "a cat"))
    short = one | {"prompt_embeds": one["prompt_embeds"][:, :50]}
    zeros = {f"negative_{name}": torch.zeros_like(x) for name, x in short.items()}
    assert torch.equal(generated(pipe, **short), generated(pipe, **short, **zeros))


def test_texts_beside_features_fill_as_many_tokens() -> None:
    pipe = tiny_pipeline()
    expected = latents(pipe, LONG, negative_prompt="fog")
    assert torch.equal(generated(pipe, **embeds(pipe.components, LONG), negative_prompt="fog"), expected)
    fog = embeds(pipe.components, "fog", length=2, negative=True)
    assert torch.equal(generated(pipe, prompt=LONG, **fog), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_of_several_is_as_alone(batch_size: int) -> None:
    """`[N, L, D]` are N prompts, and `num_images_per_prompt` of each follow each other, as with texts."""
    pipe = tiny_pipeline()
    several = {"num_images_per_prompt": 2, "batch_size": batch_size}
    expected = latents(pipe, ["a cat", "a dog"], negative_prompt="fog", **several)
    given = embeds(pipe.components, "a cat", "a dog") | embeds(pipe.components, "fog", negative=True)
    result = pipe(seed=1, output_type="latent", **given, **several)
    assert torch.equal(result.images, expected) and result.seeds == [1, 2, 3, 4]
    assert result.parameters["prompts"] == [""] * 4
    assert {note.split(" is not stored")[0] for note in result.notes} >= {"prompt_embeds", "negative_prompt_embeds"}


def test_a_controlnet_reads_them_too() -> None:
    pipe = tiny_pipeline()
    torch.manual_seed(3)
    net = ControlNet(ControlNetConfig(pipe.components.unet.config, (8, 8, 8, 8)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    same: dict[str, Any] = {"controls": [Control(net, PHOTO)], "negative_prompt": "fog"}
    assert torch.equal(generated(pipe, **embeds(pipe.components, "a cat"), **same), latents(pipe, "a cat", **same))


def test_graphs_serve_them() -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    given = [embeds(plain.components, text) for text in ("a cat", "a dog")]
    odd = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(2))
    given.append({"prompt_embeds": odd, "negative_prompt_embeds": -odd})
    for one in given * 2:
        assert torch.equal(generated(pipe, **one), generated(plain, **one))


def test_the_callers_tensors_are_copied_and_left_alone() -> None:
    """A stream runs later than it is made; tensors may have gradients, and another dtype."""
    pipe = tiny_pipeline()
    given = embeds(pipe.components, "a cat")["prompt_embeds"]
    expected = generated(pipe, prompt_embeds=given)
    wide = given.double().requires_grad_()
    stream = pipe.stream(prompt_embeds=wide, seed=1, output_type="latent")
    wide.data.zero_()
    last = list(stream)[-1].result
    assert last is not None and torch.equal(last.images, expected)
    assert wide.dtype == torch.float64 and not wide.any()


GOOD = torch.ones(2, 77, 32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "^prompt: it should be a text"),
    "both": ({"prompt": "x", "prompt_embeds": GOOD}, "^prompt_embeds: given with prompt; give one"),
    "both negative": (
        {"prompt": "x", "negative_prompt": "", "negative_prompt_embeds": GOOD},
        "^negative_prompt_embeds: given with negative_prompt",
    ),
    "no tensor": ({"prompt_embeds": [1]}, r"^prompt_embeds: .*shape \[N, L, 32\] is needed, not list"),
    "width": ({"prompt_embeds": GOOD[..., :8]}, r"^prompt_embeds: .*not \[2, 77, 8\]"),
    "one text": ({"prompt_embeds": GOOD[0]}, r"^prompt_embeds: .*not \[77, 32\]"),
    "no tokens": ({"prompt_embeds": GOOD[:, :0]}, r"^prompt_embeds: .*not \[2, 0, 32\]"),
    "whole": ({"prompt_embeds": GOOD.int()}, "^prompt_embeds: a floating-point tensor .*torch.int32"),
    "infinite": ({"prompt_embeds": GOOD / 0}, "^prompt_embeds: it holds NaN or infinite"),
    "long": ({"prompt_embeds": GOOD[:, :1].expand(2, 7701, 32)}, "^prompt_embeds: 7701 tokens"),
    "lengths": (
        {"prompt_embeds": GOOD, "negative_prompt_embeds": GOOD[:, :70]},
        "^negative_prompt_embeds: it has 70 tokens and prompt_embeds 77",
    ),
    "counts": (
        {"prompt": "x", "negative_prompt_embeds": GOOD},
        "^negative_prompt_embeds: 2 texts for 1 prompts; give 1 or as many",
    ),
    "not chunks": ({"prompt_embeds": GOOD[:, :70]}, "^prompt_embeds: .*give negative_prompt_embeds too"),
    "text too long": (
        {"prompt": LONG, "negative_prompt_embeds": GOOD[:1]},
        "^negative_prompt_embeds: it has 77 tokens and the text beside it 154; give prompt_embeds too",
    ),
    "pooled of sd1": (
        {"prompt_embeds": GOOD, "pooled_prompt_embeds": GOOD[:, 0]},
        "^pooled_prompt_embeds: this model reads no pooled text",
    ),
    "pooled alone": ({"prompt": "x", "pooled_prompt_embeds": GOOD[:, 0]}, "^pooled_prompt_embeds: given without"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    arguments, line = REFUSED[case]
    with pytest.raises(FastsdError, match=line):
        tiny_pipeline()(**arguments)


def test_sdxl_needs_the_pooled_text() -> None:
    pipe = xl_pipeline()
    given = embeds(pipe.components, "a cat")
    pooled = given.pop("pooled_prompt_embeds")
    with pytest.raises(FastsdError, match="^prompt_embeds: .*give pooled_prompt_embeds"):
        pipe(**given)
    with pytest.raises(FastsdError, match="^pooled_prompt_embeds: .*shape"):
        pipe(**given, pooled_prompt_embeds=pooled[:, :5])


def test_a_refiner_needs_texts() -> None:
    pipe = tiny_pipeline()
    two = Pipeline(pipe.components, pipe.device, pipe.dtype, refiner=pipe.components)
    with pytest.raises(FastsdError, match="^prompt_embeds: the refiner has text encoders of its own"):
        two(**embeds(pipe.components, "a cat"))


def test_what_has_no_effect_is_said() -> None:
    pipe = tiny_pipeline()
    given = embeds(pipe.components, "a cat") | embeds(pipe.components, "fog", negative=True)
    notes = pipe(**given, guidance_scale=1, clip_skip=2).notes
    assert any(note.startswith("negative_prompt_embeds has no effect") for note in notes)
    assert any(note.startswith("clip_skip has no effect") for note in notes)
