"""FreeU, perturbed-attention guidance and DeepCache in whole calls: with graphs, beside all else, and refused.

What they compute is compared with diffusers in tests/agreement/test_options.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsd import FastsdError, Pipeline
from fastsd.generate.options import whole_rows
from fastsd.generate.samples import NEGATIVE, POSITIVE, RowSamples
from tests.support import tiny
from tests.support.pipelines import MASK, PHOTO, graphed_pipeline, latents, tiny_pipeline

FREEU = {"freeu": (1.5, 1.6, 0.9, 0.2)}
PAG = {"pag_scale": 3.0, "pag_layers": "down_blocks"}
CACHE = {"deepcache": 2, "deepcache_branch": 1}
STEPS = {"num_inference_steps": 5}
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "another scale": {"guidance_scale": 2.0, "freeu": (1.1, 1.2, 0.8, 0.7)},
    "other texts": {"prompt": "a [dog:cat:2]", "negative_prompt": "fog", "seed": 4},
    "an interval": {"guidance_start": 0.2, "guidance_end": 0.6},
    "an adaptive scale": {"pag_scale": 3.0, "pag_adaptive_scale": 0.005, "pag_layers": "up_blocks"},
    "a sampler with two calls a step": {"sampler": "heun"},
    "an image": {"image": PHOTO, "strength": 0.8},
    "two passes": {"hires_scale": 1.5, "hires_strength": 0.7},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_graphs_give_the_same(as_on_a_gpu: None, beside: str) -> None:
    pipe, _ = graphed_pipeline()
    plain = tiny_pipeline()
    settings: dict[str, Any] = {**STEPS, **FREEU, **PAG, **CACHE} | BESIDE[beside]
    assert torch.equal(latents(pipe, **settings), latents(plain, **settings))


def test_a_graph_for_the_whole_network_and_one_for_its_first_blocks(as_on_a_gpu: None) -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    for seed, interval in ((1, 2), (2, 3), (3, 5)):
        settings = {**STEPS, "seed": seed, "deepcache": interval}
        assert torch.equal(latents(pipe, **settings), latents(plain, **settings))
    assert recorder.recorded == 3  # the text, and the step twice
    streams = [pipe.stream("a cat", seed=k, output_type="latent", **STEPS, deepcache=3) for k in (1, 2)]
    last: Any = list(zip(*streams, strict=True))[-1]  # each batch keeps its own features
    for k, step in enumerate(last, 1):
        assert torch.equal(step.result.images, latents(plain, seed=k, **STEPS, deepcache=3))


def test_graphs_serve_every_weight_of_freeu(as_on_a_gpu: None) -> None:
    pipe, recorder = graphed_pipeline()
    plain = tiny_pipeline()
    found = [latents(pipe, freeu=(b, b, 0.9, 0.2)) for b in (1.1, 1.4)]
    assert recorder.recorded == 2 and not torch.equal(*found)
    assert torch.equal(found[1], latents(plain, freeu="1.4,1.4,0.9,0.2"))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_weights_of_one_and_an_interval_of_one_change_nothing(model: str) -> None:
    """But for the rounding of FreeU's sum, a few units in the last place of each map."""
    pipe = Pipeline(getattr(tiny, model)(), torch.device("cpu"), torch.float32)
    same: dict[str, Any] = {"num_inference_steps": 3, "width": 32, "height": 32}
    plain = latents(pipe, **same)
    assert torch.equal(latents(pipe, deepcache=1, **same), plain)
    assert torch.equal(latents(pipe, pag_scale=0.0, **same), plain)
    torch.testing.assert_close(latents(pipe, freeu=(1, 1, 1, 1), **same), plain, rtol=1e-4, atol=1e-4)


def test_the_whole_network_runs_where_other_samples_do() -> None:
    one, two = RowSamples((POSITIVE,)), RowSamples((NEGATIVE, POSITIVE), 4.0)
    assert whole_rows([two] * 7, 3) == {0, 3, 6}
    assert whole_rows([two, two, one, one, one, one, two], 3) == {0, 2, 5, 6}
    assert whole_rows([two] * 3, 1) == {0, 1, 2} and whole_rows([], 3) == frozenset()


def test_each_image_of_a_batch_is_as_alone() -> None:
    pipe = tiny_pipeline()
    settings: dict[str, Any] = {**STEPS, **FREEU, **PAG, **CACHE}
    found = latents(pipe, ["a cat", "a dog"], guidance_scale=[4.0, 1.0], **settings)
    alone = [
        latents(pipe, "a cat", guidance_scale=4.0, **settings),
        latents(pipe, "a dog", seed=2, guidance_scale=1.0, **settings),
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_inpainting_networks_read_their_image_in_every_sample() -> None:
    settings: dict[str, Any] = {**PAG, "image": PHOTO, "mask_image": MASK, "strength": 1.0}
    assert torch.isfinite(latents(tiny_pipeline(9), **settings)).all()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"pag_scale": 3.0, "pag_layers": "up_blocks.7"}, r"^pag_layers: no self-attention is in 'up_blocks\.7'"),
        ({"pag_layers": "mid"}, "^pag_layers: given without pag_scale"),
        ({"deepcache": 2, "deepcache_branch": 9}, "^deepcache_branch is 9; .* from 0 to 3: the model has 4 skip"),
        ({"deepcache_branch": 1}, "^deepcache_branch: given without deepcache"),
        ({"freeu": "1.5,1.6"}, "^freeu is '1.5,1.6'; it should be 4 numbers from 0 to 10: B1,B2,S1,S2"),
        ({"freeu": (1, 2, 3, float("nan"))}, "^freeu is "),
    ],
    ids=["layers", "layers alone", "branch", "branch alone", "two weights", "nan"],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(FastsdError, match=line):
        tiny_pipeline()("a cat", **given)
