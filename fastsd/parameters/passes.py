"""The rows of `fastsd.parameters` for the hires fix and for a refiner: a run in two passes, or by two models."""

from __future__ import annotations

from fastsd.parameters.kinds import HOW, MAX_STEPS, SHARE, Enlarger, File, Number, Parameter, Whole

HIRES = ("hires_scale", "which says by how much to enlarge")
REFINER_SWITCH = 0.8
# Those of latents and those of images, as A1111 has them; an ESRGAN's file may stand in their place.
LATENT_UPSCALERS = (
    "latent",
    "latent-antialiased",
    "latent-bicubic",
    "latent-bicubic-antialiased",
    "latent-nearest",
    "latent-nearest-exact",
)
IMAGE_UPSCALERS = ("lanczos", "nearest")

PASS_ROWS: tuple[Parameter, ...] = (
    Parameter(
        "hires_scale",
        Number(low=1, high=8),
        "hires fix: enlarge the image by this, 1 to 8, then a second pass",
        ("--hires",),
        HOW,
        excludes=("image", "the second pass belongs to text-to-image"),
        label="Hires upscale",
    ),
    Parameter("hires_strength", SHARE, "how much that pass changes", ("--hires-strength",), HOW, 0.5, needs=HIRES),
    Parameter(
        "hires_steps",
        Whole(low=1, high=MAX_STEPS),
        "steps of the second pass, which runs that share of them (default: {num_inference_steps})",
        ("--hires-steps",),
        HOW,
        needs=HIRES,
        rare=True,
    ),
    Parameter(
        "hires_upscaler",
        Enlarger(options=LATENT_UPSCALERS + IMAGE_UPSCALERS),
        "a way to enlarge latents, or images: lanczos, nearest or an ESRGAN",
        ("--hires-upscaler",),
        HOW,
        "latent",
        needs=HIRES,
    ),
    Parameter(
        "refiner",
        File(metavar="PATH", stored=dict),
        "a model that does the last steps: SDXL's refiner",
        ("--refiner",),
        HOW,
        of="load",
    ),
    Parameter(
        "refiner_switch",
        SHARE,
        f"the share of the noise levels done before it, 0 to 1 (default: {REFINER_SWITCH:g})",
        ("--refiner-switch",),
        HOW,
        needs=("refiner", "the model that does the last steps"),
        label="Refiner switch at",
    ),
)
