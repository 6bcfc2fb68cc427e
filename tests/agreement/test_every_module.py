"""Every module by itself against the one of the same name in diffusers or transformers, on what that one was given.

Whole networks may agree although two modules are wrong in opposite ways, or a wrong one is hardly heard; and where a
network disagrees, this says which module is to blame. 1e-5 of the largest value is what a hundred fp32 roundings (6e-8
each) in another order may add up to; a wrong module is off by 1e-2 and more.
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
from tests.support.matching import Maps, UNetRun, expected, nchw, nhwc, record, run_layer

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


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference in units of the largest value; inf where shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check_modules(
    ours: nn.Module,
    theirs: nn.Module,
    call: Callable[[], Any],
    runner: Callable[[dict[str, Any]], Callable[..., Maps | None]],
    rename: Callable[[str], str] = str,
) -> None:
    """Compare module by module, and that every parameter of ours belongs to a module that was compared.

    Args:
        ours, theirs: networks with the same weights.
        call: runs `theirs`.
        runner: given the calls of their modules, what runs one of ours on the same input.
        rename: our name of a module to theirs.
    """
    calls, hooks = record(theirs)
    call()
    for hook in hooks:
        hook.remove()
    run = runner(calls)
    errors: dict[str, float] = {}
    for name, module in ours.named_modules():
        theirs_here = calls.get(rename(name))
        mine = None if theirs_here is None else run(name, module, theirs_here)
        if mine is None:
            continue
        wanted = expected(module, theirs_here.output)
        pairs = zip(mine, wanted, strict=True) if isinstance(mine, list) else [(mine, wanted)]
        errors[name] = max(error(a, b) for a, b in pairs)
    bad = {name: found for name, found in errors.items() if not found < TOLERANCE}
    assert not bad, f"of {len(errors)} modules: {bad}"
    untested = [name for name, _ in ours.named_parameters() if not any(name.startswith(done + ".") for done in errors)]
    # One product for all blocks here, one in each block there: checked with the blocks, which read its result.
    assert all(name.startswith("time_projections.") for name in untested), untested


def unet_inputs(model: UNet, height: int, width: int) -> dict[str, Any]:
    """What diffusers' UNet takes, at random."""
    config, generator = model.config, torch.Generator().manual_seed(height)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": normal(2, config.in_channels, height, width),
        "timestep": torch.tensor([3.0, 801.0]),
        "encoder_hidden_states": normal(2, 77, config.cross_attention_dim),
    }
    if config.addition_time_embed_dim:
        numbers = (config.projection_class_embeddings_input_dim - 24) // config.addition_time_embed_dim
        sizes = torch.rand(2, numbers, generator=generator) * 1024
        inputs["added_cond_kwargs"] = {"text_embeds": normal(2, 24), "time_ids": sizes}
    return inputs


def run_unet(model: UNet, inputs: dict[str, Any]) -> torch.Tensor:
    """Our UNet on the inputs of theirs."""
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
    """Against theirs in float64: on maps of this size PyTorch's group norm in fp32 is itself off by 1.4e-5."""
    ours = getattr(load_folder(families.folder / "sd1", torch.float32).vae, half)
    theirs = copy.deepcopy(getattr(families.pipelines["sd1"].vae, half)).double()
    # The first reaches the CPU's own attention and upsampling, the second is odd.
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
    """Texts that end early, at the last place and at the first, and one with a second end after padding."""
    ids = torch.randint(0, 49000, (4, 77), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = START
    for row, end in enumerate((9, 76, 1, 30)):
        ids[row, end] = END
    ids[3, 40:] = END
    return ids


def text_pairs(pair: tuple[Components, Any]) -> list[tuple[TextEncoder, Any]]:
    theirs = [getattr(pair[1], name, None) for name in ("text_encoder", "text_encoder_2")]
    return list(zip(pair[0].text_encoders, [e for e in theirs if e is not None], strict=True))


def test_text_encoders(pair: tuple[Components, Any]) -> None:
    ids = text_ids()
    for ours, theirs in text_pairs(pair):
        prefixed = hasattr(theirs, "text_model")  # transformers 5 holds a plain text model without it

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
        found, wanted = ours(ids), theirs(ids)
        pooled = wanted.text_embeds if ours.text_projection is not None else wanted.pooler_output
        assert error(found.pooled, pooled) < TOLERANCE  # wherever the text ends
        assert error(ours(ids[:, :31]).hidden, theirs(ids[:, :31]).last_hidden_state) < TOLERANCE


def test_the_end_of_a_text_in_old_configs(families: Any) -> None:
    """eos_token_id = 2 is a slip of old configs; the end is then the largest id, wherever a 2 may stand."""
    components = load_folder(families.folder / "sd1", torch.float32)
    ours, theirs = components.text_encoders[0], copy.deepcopy(families.pipelines["sd1"].text_encoder)
    ids = text_ids()
    ids[:, 5] = 2
    assert error(ours(ids).pooled, theirs(ids).pooler_output) < TOLERANCE
    ours.config, theirs.eos_token_id = replace(ours.config, eos_token_id=2, eos_is_largest_id=True), 2
    if hasattr(theirs, "text_model"):
        theirs.text_model.eos_token_id = 2
    assert error(ours(ids).pooled, theirs(ids).pooler_output) < TOLERANCE


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("channels", [32, 320])
def test_timestep_embedding(channels: int, shift: int, flip: bool) -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0.0, 0.5, 1.0, 500.25, 999.0])
    theirs = get_timestep_embedding(times, channels, flip, downscale_freq_shift=shift)
    ours = timestep_embedding(times, channels, flip, shift)
    assert error(ours, theirs) < 1e-6  # rounding the frequencies in another way would move t = 999 by 3e-5
    exact = timestep_embedding(times.double(), channels, flip, shift)
    assert (ours - exact).abs().max() < 999 * 4 * 2**-24  # an angle of 999, of a few roundings


def test_double_precision_reaches_every_layer(families: Any) -> None:
    """In float64 the agreement tightens by the ratio of the roundings: no layer falls back to fp32."""
    components = load_folder(families.folder / "sdxl", torch.float32)
    unet, vae = components.unet.double(), components.vae.double()
    their_unet, their_vae = (copy.deepcopy(getattr(families.pipelines["sdxl"], n)).double() for n in ("unet", "vae"))
    inputs = unet_inputs(unet, 8, 12)
    inputs = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    # diffusers computes sinusoids in fp32; of zero they are exact.
    inputs["timestep"] = torch.zeros(2, dtype=torch.float64)
    inputs["added_cond_kwargs"] = {
        "text_embeds": inputs["added_cond_kwargs"]["text_embeds"].double(),
        "time_ids": torch.zeros(2, 6, dtype=torch.float64),
    }
    assert error(run_unet(unet, inputs), their_unet(**inputs).sample) < 1e-12
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert error(nchw(vae.decode(nhwc(latent))), their_vae.decode(latent).sample) < 1e-12


def test_added_conditioning_is_asked_for(families: Any) -> None:
    unet = load_folder(families.folder / "sdxl", torch.float32).unet
    inputs = unet_inputs(unet, 4, 4)
    del inputs["added_cond_kwargs"]
    with pytest.raises(ValueError, match="added conditioning"):
        run_unet(unet, inputs)
