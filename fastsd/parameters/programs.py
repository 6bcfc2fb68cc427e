"""The rows of `fastsd.parameters` by which a call follows another program: its rules, its noise, its Python call; and
those of loading that say how a GPU computes."""

from __future__ import annotations

from fastsd.parameters.kinds import (
    HOW,
    MAX_IMAGES,
    MAX_SEED,
    RANDOM_SEED,
    SHARE,
    WHERE,
    Choice,
    File,
    Function,
    Name,
    Number,
    Pair,
    Parameter,
    Switch,
    Value,
    Whole,
)

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
        Whole(low=RANDOM_SEED, high=MAX_SEED),
        "a second noise, mixed into that of the seed; the next image has one more, but {noise} batch or comfy the "
        "same; -1: random",
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

# What Python alone takes, with diffusers' names and meanings.
PYTHON_ROWS: tuple[Parameter, ...] = (
    Parameter("latents", Value(), "starting noise `[N, C, h, w]`, unit variance"),
    Parameter(
        "prompt_embeds",
        Value(),
        "features in place of {prompt}, `[N, L, D]`, as diffusers' `encode_prompt` gives them",
        excludes=("prompt", "give one of the two"),
    ),
    Parameter(
        "negative_prompt_embeds",
        Value(),
        "features in place of {negative_prompt}, `[N, L, D]`; or one for all, `[1, L, D]`",
        excludes=("negative_prompt", "give one of the two"),
    ),
    Parameter(
        "pooled_prompt_embeds",
        Value(),
        "SDXL: the pooled text of {prompt_embeds}, `[N, P]`",
        needs=("prompt_embeds", "the features that it belongs to"),
    ),
    Parameter(
        "negative_pooled_prompt_embeds",
        Value(),
        "SDXL: the pooled text of {negative_prompt_embeds}, `[N, P]`",
        needs=("negative_prompt_embeds", "the features that it belongs to"),
    ),
    Parameter(
        "generator",
        Value(),
        "a `torch.Generator` that draws the noise and moves on, or a list with one for each image",
        excludes=("seed", "a generator has one"),
    ),
    Parameter("callback_on_step_end", Function(), "a function of (pipe, step, timestep, tensors), after each step"),
    Parameter(
        "callback_on_step_end_tensor_inputs",
        Value(),
        "the names of its tensors: latents",
        default=("latents",),
    ),
    Parameter("return_dict", Switch(stored=None), "False: a tuple, as diffusers returns", default=True),
    Parameter("original_size", Pair(), "SDXL: (height, width) of the training image that is meant"),
    Parameter("crops_coords_top_left", Pair(), "SDXL: (top, left) of its crop"),
    Parameter("target_size", Pair(), "SDXL: (height, width) of its crop"),
    Parameter("negative_original_size", Pair(), "the same for the negative prompt"),
    Parameter("negative_crops_coords_top_left", Pair(), "the same for the negative prompt"),
    Parameter("negative_target_size", Pair(), "the same for the negative prompt"),
    Parameter("aesthetic_score", Number(low=0, high=10, stored=None), "SDXL's refiner: of the prompt", default=6.0),
    Parameter(
        "negative_aesthetic_score", Number(low=0, high=10, stored=None), "SDXL's refiner: of the negative", default=2.5
    ),
    Parameter(
        "output_type",
        Choice(options=("pil", "np", "pt", "latent"), stored=None),
        "the form of the images: pil, np, pt or latent",
        default="pil",
    ),
)

# What loading takes beside the model, the device and the precision.
LOAD_ROWS: tuple[Parameter, ...] = (
    Parameter(
        "graphs",
        Switch(stored=None, value=False),
        "CUDA: without graphs, each kernel is launched alone, slower",
        ("--no-graphs",),
        WHERE,
        True,
        of="load",
        rare=True,
    ),
    Parameter(
        "reproducible",
        Switch(stored=None),
        "GPU: of the ways to compute an op, those that come with fastsd; nothing is timed",
        ("--reproducible",),
        WHERE,
        False,
        of="load",
        rare=True,
    ),
    Parameter(
        "probe",
        Switch(stored=None, value=False),
        "a GPU never seen before: run kernels here, not in a process of their own first",
        ("--no-probe",),
        WHERE,
        True,
        of="load",
        rare=True,
    ),
    Parameter(
        "preview",
        File(metavar="PATH"),
        "TAESD, which decodes the previews in almost no time",
        ("--preview-decoder",),
        WHERE,
        of="load",
        needs=("preview_every", "which says how often"),
        rare=True,
    ),
)
