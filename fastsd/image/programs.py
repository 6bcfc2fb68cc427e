"""Programs that store settings in images, and what their keys mean here."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Keys of A1111 and its kin that change nothing here, or that say what is known anyway: from other keys, or from tags in
# the prompt.
HARMLESS = frozenset(
    (
        "Version",
        "RNG",
        "Device",
        "Dtype",
        "Batch size",
        "Batch pos",
        "VAE hash",
        "TI",
        "Init image hash",
        "Styles",
        "Template",
        "Negative Template",
        "sv_prompt",
        "sv_negative",
        "User",
        "Created Date",
        "Hashes",
        "Backend",
        "Operations",
        "Parser",
        "Pipeline",
        "Diffusion in Low Bits",
        "Module 1",
        "Module 2",
        "Module 3",
    )
)
# A1111's names of the rules of emphasis (modules/sd_emphasis.py); the last is ours.
EMPHASIS = {"original": "Original", "no_norm": "No norm", "none": "None", "ignore": "Ignore", "comfy": "Comfy"}
# Its names of the generators (`randn_source` in modules/shared_options.py), which it writes unless it is the GPU's.
RNG = {"GPU": "gpu", "NV": "gpu", "CPU": "cpu"}
# A line of settings holds one of these; a text without them, such as a phone's "Screenshot", is none.
ESSENTIAL = frozenset(("Steps", "Sampler", "CFG scale", "Seed", "Size"))

# Texts by which other programs are known: the key, a word in it, the program.
SIGNS = (
    ("Software", "NovelAI", "NovelAI"),
    ("Title", "NovelAI", "NovelAI"),
    ("invokeai_metadata", "", "InvokeAI"),
    ("invokeai_graph", "", "InvokeAI"),
    ("sd-metadata", "", "InvokeAI"),
    ("Dream", "", "InvokeAI"),
    ("fooocus_scheme", "", "Fooocus"),
    ("workflow", "", "ComfyUI"),
    ("prompt", "class_type", "ComfyUI"),
    ("sui_image_params", "", "SwarmUI"),
    ("parameters", "sui_image_params", "SwarmUI"),
    ("XML:com.adobe.xmp", "DrawThings", "Draw Things"),
    ("Comment", '"sampler"', "NovelAI"),
    ("use_stable_diffusion_model", "", "Easy Diffusion"),
)


def program_of(texts: Mapping[str, str]) -> str | None:
    """The program that stored these texts, where it is one whose settings are not read; None: unknown."""
    return next((name for key, word, name in SIGNS if key in texts and word in texts[key]), None)


def rules_of(pairs: Mapping[str, str]) -> str:
    """The row of `fastsd.generate.like.LIKE` that a line of settings follows, by its version.

    A1111 writes "v1.9.4", its forks and Forge "f2.0.1...", older ones nothing; ComfyUI's nodes that write this form
    "ComfyUI".
    """
    version = pairs.get("Version", "")
    if "Like" in pairs or version.startswith("fastsd ") or "App" in pairs:
        return "none"
    if version.startswith("ComfyUI"):
        return "comfy"
    return "a1111" if re.fullmatch(r"|(v|f)?\d.*|[0-9a-f]{7,40}", version) else "none"
