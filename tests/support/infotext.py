"""Settings of an image, and texts that look like A1111's form of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

FULL: dict[str, Any] = {
    "prompt": "a lighthouse at dusk, oil on canvas",
    "negative_prompt": "fog, rain",
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "guidance_rescale": 0.7,
    "width": 512,
    "height": 768,
    "seed": 1,
    "sampler": "dpm++2m",
    "schedule": "karras",
    "eta": 0.0,
    "clip_skip": 2,
    "strength": 0.55,
    "model": "sd15",
    "device": "cpu",
    "dtype": "fp32",
    "version": "0.1.0",
}

# Texts that look like the form itself, beside any text at all.
HOSTILE = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["\n", "Negative prompt:", "Steps: 20", ", ", "Seed: 1", "Size: 1x1", '"', "\\", " ", "a", "\r"]
        )
    ).map("".join),
)
