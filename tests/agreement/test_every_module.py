"""Every module against the one of the same name in diffusers or transformers, on that one's recorded inputs.

Whole networks can agree although two modules err in opposite ways, or one has little weight; and where a network
disagrees, these tests name the module. A hundred fp32 roundings (6e-8 each) in another order can add up to 1e-5 of the
largest value; a wrong module is off by 1e-2 or more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fastsd.components import Components
from fastsd.model.clip import TextEncoder
from fastsd.model.layers import timestep_embedding
from fastsd.model.unet import AddedConditioning, UNet
from fastsd.weights import load_folder
from tests.support.matching import Maps, UNetRun, expected, nchw, nhwc, record, relative_error, run_layer

FAMILIES = ("sd1", "sd2", "inpainting", "sdxl", "refiner")
TOLERANCE = 1e-5
START, END = 49406, 49407


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, families: Any) -> tuple[Components, Any]:
    return load_folder(families.folder / request.param, torch.float32), families.pipelines[request.param]


def check_modules(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[[], Any],
    runner: Callable[[dict[str, Any]], Callable[..., Maps | None]],
    rename: Callable[[str], str] = str,
) -> None:
    """Compare every module, and check that each of our parameters is in a module that was compared.

    Args:
        ours, theirs: networks with the same weights.
        call: runs `theirs`.
        runner: from the recorded calls, a function that runs one of our modules on the same input.
        rename: from our name of a module to theirs.
    """
    calls, hooks = record(theirs)
    call()
    for hook in hooks:
        hook.remove()
    run = runner(calls)
    errors: dict[str, float] = {}
    for name, module in ours.named_modules():
        recorded = calls.get(rename(name))
        output = None if recorded is None else run(name, module, recorded)
        if output is None:
            continue
        their_output = expected(module, recorded.output)
        pairs = zip(output, their_output, strict=True) if isinstance(output, list) else [(output, their_output)]
        errors[name] = max(relative_error(a, b) for a, b in pairs)
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, f"of {len(errors)} modules: {wrong}"
    untested = [name for name, _ in ours.named_parameters() if not any(name.startswith(done + ".") for done in errors)]
    # Ours is one product for all blocks, theirs one in each block. It is checked with the blocks, which use its result.
    assert all(name.startswith("time_projections.") for name in untested), untested


def unet_inputs(model: UNet, height: int, width: int) -> dict[str, Any]:
    """Random inputs for diffusers' UNet."""
    config, generator = model.config, torch.Generator().manual_seed(height)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": normal(2, config.in_channels, height, width),
        "timestep": torch.tensor([3.0, 801.0]),
        "encoder_hidden_states": normal(2, 77, config.cross_attention_dim),
    }
    if config.addition_time_embed_dim:
        count = (config.projection_class_embeddings_input_dim - 24) // config.addition_time_embed_dim
        sizes = torch.rand(2, count, generator=generator) * 1024
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, 24), "time_ids": sizes}
    return inputs


def run_unet(model: UNet, inputs: dict[str, Any]) -> torch.Tensor:
    """Our UNet's output for `unet_inputs`, channels first."""
    added = inputs.get("added_cond_kwargs")
    conditioning = AddedConditioning(added["text_embeds"], added["time_ids"]) if added else None
    out = model(nhwc(inputs["sample"]), inputs["timestep"], inputs["encoder_hidden_states"], conditioning)
    return nchw(out)


@pytest.mark.parametrize("size", [(16, 16), (13, 15)], ids=["even", "odd at every level"])
def test_unet(pair: tuple[Components, Any], size: tuple[int, int]) -> None:
    ours, theirs = pair[0].unet, pair[1].unet
    inputs = unet_inputs(ours, *size)
    check_modules(
        ours,
        theirs,
        lambda: theirs(**inputs),
        lambda calls: UNetRun(ours, calls, inputs["encoder_hidden_states"]).run,
    )


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_autoencoder(families: Any, half: str) -> None:
    """Against theirs in float64: on maps of this size PyTorch's fp32 group norm is off by 1.4e-5."""
    ours = getattr(load_folder(families.folder / "sd1", torch.float32).vae, half)
    theirs = copy.deepcopy(getattr(families.pipelines["sd1"].vae, half)).double()
    # The first size uses the CPU's own attention and upsampling, the second is odd.
    sizes = [(3, 64, 96), (3, 40, 24)] if half == "encoder" else [(4, 36, 32), (4, 7, 13)]
    for channels, height, width in sizes:
        x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1)).double()
        check_modules(
            ours,
            theirs,
            lambda x=x: theirs(x),
            lambda calls: lambda name, module, call: run_layer(module, nhwc(call.get(0, "hidden_states")), call),
        )


def text_ids() -> torch.Tensor:
    """Texts that end early, at the last position and at the first, and one with a second end token after padding."""
    ids = torch.randint(0, 49000, (4, 77), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = START
    for row, end in enumerate((9, 76, 1, 30)):
        ids[row, end] = END
    ids[3, 40:] = END
    return ids


def text_pairs(pair: tuple[Components, Any]) -> list[tuple[TextEncoder, Any]]:
    encoders = [getattr(pair[1], name, None) for name in ("text_encoder", "text_encoder_2")]
    return list(zip(pair[0].text_encoders, [encoder for encoder in encoders if encoder is not None], strict=True))


def test_text_encoders(pair: tuple[Components, Any]) -> None:
    ids = text_ids()
    for ours, theirs in text_pairs(pair):
        prefixed = hasattr(theirs, "text_model")  # transformers 5 has no prefix in a plain text model

        def run(name: str, module: nn.Module, call: Any) -> Maps | None:
            if name.endswith("embeddings"):
                return module(ids)
            return run_layer(module, call.x, call) if "layer" in name or name == "text_projection" else None

        check_modules(
            ours,
            theirs,
            lambda theirs=theirs: theirs(ids),
            lambda calls: run,
            str if prefixed else lambda name: name.removeprefix("text_model."),
        )
        their_output = theirs(ids)
        pooled = their_output.text_embeds if ours.text_projection is not None else their_output.pooler_output
        assert relative_error(ours(ids).pooled, pooled) < TOLERANCE
        assert relative_error(ours(ids[:, :31]).hidden, theirs(ids[:, :31]).last_hidden_state) < TOLERANCE


def test_the_end_of_a_text_with_an_old_config(families: Any) -> None:
    """Old configs have the wrong eos_token_id = 2. The largest id then marks the end, even if a text has a token 2."""
    components = load_folder(families.folder / "sd1", torch.float32)
    ours, theirs = components.text_encoders[0], copy.deepcopy(families.pipelines["sd1"].text_encoder)
    ids = text_ids()
    ids[:, 5] = 2
    assert relative_error(ours(ids).pooled, theirs(ids).pooler_output) < TOLERANCE
    ours.config, theirs.eos_token_id = replace(ours.config, eos_token_id=2, eos_is_largest_id=True), 2
    if hasattr(theirs, "text_model"):
        theirs.text_model.eos_token_id = 2
    assert relative_error(ours(ids).pooled, theirs(ids).pooler_output) < TOLERANCE


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("channels", [32, 320])
def test_timestep_embedding(channels: int, shift: int, flip: bool) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0.0, 0.5, 1.0, 500.25, 999.0])
    theirs = get_timestep_embedding(times, channels, flip, downscale_freq_shift=shift)
    ours = timestep_embedding(times, channels, flip, shift)
    assert relative_error(ours, theirs) < 1e-6  # another rounding of the frequencies would move t = 999 by 3e-5
    exact = timestep_embedding(times.double(), channels, flip, shift)
    assert (ours - exact).abs().max() < 999 * 4 * 2**-24  # a few roundings of an angle of 999


def test_double_precision_reaches_every_layer(families: Any) -> None:
    """In float64 the error shrinks by the ratio of the roundings: no layer falls back to fp32."""
    components = load_folder(families.folder / "sdxl", torch.float32)
    unet, vae = components.unet.double(), components.vae.double()
    their_unet, their_vae = (copy.deepcopy(getattr(families.pipelines["sdxl"], n)).double() for n in ("unet", "vae"))
    inputs = unet_inputs(unet, 8, 12)
    inputs = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    # diffusers computes sinusoids in fp32; those of zero are exact.
    inputs["timestep"] = torch.zeros(2, dtype=torch.float64)
    inputs["added_cond_kwargs"] = {
        "text_embeds": inputs["added_cond_kwargs"]["text_embeds"].double(),
        "time_ids": torch.zeros(2, 6, dtype=torch.float64),
    }
    assert relative_error(run_unet(unet, inputs), their_unet(**inputs).sample) < 1e-12
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert relative_error(nchw(vae.decode(nhwc(latent))), their_vae.decode(latent).sample) < 1e-12


def test_missing_added_conditioning_raises(families: Any) -> None:
    unet = load_folder(families.folder / "sdxl", torch.float32).unet
    inputs = unet_inputs(unet, 4, 4)
    del inputs["added_cond_kwargs"]
    with pytest.raises(ValueError, match="added conditioning"):
        run_unet(unet, inputs)
