"""The rows of `fastsd.parameters` by which a call follows another program: its noise, and its other rules."""

from __future__ import annotations

from fastsd.kinds import HOW, MAX_IMAGES, MAX_SEED, SHARE, Choice, Name, Parameter, Whole

LIKE = ("none", "a1111", "comfy", "diffusers")
EMPHASIS = ("original", "no_norm", "none", "ignore", "comfy")
NOISE = ("cpu", "gpu", "batch", "comfy")
_SIDE = r"(?:[89]|[1-9]\d{1,4})"  # 8 pixels or more

PROGRAM_ROWS: tuple[Parameter, ...] = (
    Parameter(
        "like",
        Choice(options=LIKE),
        "the rules of another program: a1111, comfy, diffusers",
        ("--like",),
        HOW,
        "none",
        label="Like",
    ),
    Parameter(
        "noise",
        Choice(options=NOISE),
        "cpu: a generator for each image; gpu: A1111's; batch: one for all images; comfy: ComfyUI's (default: cpu, or "
        "that of {like})",
        ("--noise",),
        HOW,
        rare=True,
    ),
    Parameter(
        "subseed_strength",
        SHARE,
        "the share of the second noise",
        ("--subseed-strength",),
        HOW,
        label="Variation seed strength",
        rare=True,
    ),
    Parameter(
        "subseed",
        Whole(low=0, high=MAX_SEED),
        "a second noise, mixed into that of the seed; the next image has one more",
        ("--subseed",),
        HOW,
        needs=("subseed_strength", "the share of it"),
        label="Variation seed",
        rare=True,
    ),
    Parameter(
        "seed_resize_from",
        Name(metavar="WxH", pattern=_SIDE + "x" + _SIDE, expected="a width and a height, as in 512x512"),
        "put the noise of an image of this size into the middle",
        ("--seed-resize-from",),
        HOW,
        label="Seed resize from",
        rare=True,
    ),
    Parameter(
        "ensd",
        Whole(low=0, high=2**32),
        "added to the seed for the samplers' noise (A1111's eta noise seed delta)",
        ("--ensd",),
        HOW,
        label="ENSD",
        rare=True,
    ),
    Parameter(
        "noise_index",
        Whole(low=0, high=MAX_IMAGES - 1),
        "the image's place in noise that is drawn for several",
        ("--noise-index",),
        HOW,
        label="Noise index",
        rare=True,
    ),
    Parameter(
        "noise_count",
        Whole(low=1, high=MAX_IMAGES),
        "for how many images such noise is drawn",
        ("--noise-count",),
        HOW,
        label="Noise count",
        rare=True,
    ),
    Parameter(
        "emphasis",
        Choice(options=EMPHASIS),
        "what weights in prompts do: original, no_norm, none and ignore are A1111's, comfy is ComfyUI's (default: "
        "original, or that of {like})",
        ("--emphasis",),
        HOW,
        rare=True,
    ),
)
