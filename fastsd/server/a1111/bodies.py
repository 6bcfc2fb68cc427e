"""What clients send: A1111's field names, types and defaults.

Clients send fields that A1111 ignores, and null for "leave it"; so unknown fields and nulls are taken. A field that
A1111 has and fastsd does not is refused by name unless its value has no effect, see `REFUSED`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from fastsd.parameters.kinds import MAX_SEED, MAX_SIDE, MAX_STEPS
from fastsd.server.bad_body import check_depth
from fastsd.server.json_numbers import NumberField, WholeField
from fastsd.server.limits import MAX_PROMPT

Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT)]
Name = Annotated[str, StringConstraints(max_length=300)]
Seed = Annotated[WholeField, Field(ge=-1, le=MAX_SEED)]
Side = Annotated[WholeField, Field(ge=8, le=MAX_SIDE)]
SideOrNone = Annotated[WholeField, Field(ge=-1, le=MAX_SIDE)]  # 0 and -1: not set
Steps = Annotated[WholeField, Field(ge=1, le=MAX_STEPS)]
Share = Annotated[NumberField, Field(ge=0, le=1)]
Guidance = Annotated[NumberField, Field(ge=0, le=100)]
Count = Annotated[WholeField, Field(ge=1, le=1000)]
Named = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value == [] else value)]  # PHP writes {} as []
Flag = Annotated[WholeField, BeforeValidator(lambda value: int(value) if isinstance(value, bool) else value)]  # 0 or 1
Encoded = str  # an image: base64 or a data URI
TaskId = Annotated[str, StringConstraints(max_length=64, pattern=r"^[\w():.-]*$")]


# A1111's own always-on scripts, whose arguments are fields; they count where a request has both.
OWN_SCRIPTS: dict[str, tuple[str | None, ...]] = {
    "sampler": ("steps", "sampler_name", "scheduler"),
    "seed": ("seed", None, "subseed", "subseed_strength", "seed_resize_from_w", "seed_resize_from_h"),
    "refiner": (None, "refiner_checkpoint", "refiner_switch_at"),
}


def read_own_scripts(body: Any) -> Any:
    """The body with the arguments of A1111's own scripts as fields."""
    scripts = body.get("alwayson_scripts") if isinstance(body, dict) else None
    if not isinstance(scripts, dict):
        return body
    found, others = dict[str, Any](), dict[str, Any]()
    for name, script in scripts.items():
        args = script.get("args") if isinstance(script, dict) else None
        fields = OWN_SCRIPTS.get(str(name).lower(), ())
        if not isinstance(args, list) or not 0 < len(args) <= len(fields) or args[0] is False:
            others[name] = script
            continue
        if fields[0] == "seed" and not any(args[1:2]):  # the box for its other values is empty
            args = args[:1]
        found |= {field: value for field, value in zip(fields, args, strict=False) if field}
    return {**body, **found, "alwayson_scripts": others}


class Generation(BaseModel):
    """What txt2img and img2img share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Prompt | None = ""
    negative_prompt: Prompt | None = ""
    styles: list[Name] | None = Field(None, max_length=100)
    seed: Seed | None = -1
    subseed: Seed | None = -1
    subseed_strength: Share | None = 0
    seed_resize_from_w: SideOrNone | None = -1
    seed_resize_from_h: SideOrNone | None = -1
    sampler_name: Name | None = None
    sampler_index: Name | None = None
    scheduler: Name | None = None
    batch_size: Count | None = 1
    n_iter: Count | None = 1
    steps: Steps | None = None
    cfg_scale: Guidance | None = None
    width: Side | None = None
    height: Side | None = None
    eta: Share | None = None
    refiner_checkpoint: Name | None = None
    refiner_switch_at: Share | None = None
    override_settings: Named | None = None
    override_settings_restore_afterwards: bool | None = True
    alwayson_scripts: Named | None = None
    script_name: Name | None = None
    script_args: list[Any] | None = None
    send_images: bool | None = True
    save_images: bool | None = False
    force_task_id: TaskId | None = None
    denoising_strength: Share | None = None

    _scripts = model_validator(mode="before")(read_own_scripts)
    _depth = model_validator(mode="before")(check_depth)  # the later one runs first

    @property
    def unknown(self) -> list[str]:
        """Fields that neither A1111 nor fastsd has; those of `REFUSED` are looked at by themselves."""
        return [name for name in self.model_extra or {} if name not in REFUSED and name not in HARMLESS]


class TextToImage(Generation):
    """The body of txt2img."""

    enable_hr: bool | None = False
    hr_scale: Annotated[NumberField, Field(ge=1, le=8)] | None = 2.0
    hr_upscaler: Name | None = None
    hr_second_pass_steps: Annotated[WholeField, Field(ge=0, le=MAX_STEPS)] | None = 0
    hr_resize_x: SideOrNone | None = 0
    hr_resize_y: SideOrNone | None = 0
    hr_checkpoint_name: Name | None = None
    hr_sampler_name: Name | None = None
    hr_scheduler: Name | None = None
    hr_prompt: Prompt | None = ""
    hr_negative_prompt: Prompt | None = ""


class ImageToImage(Generation):
    """The body of img2img. The defaults of inpainting are A1111's, which differ from those of its page."""

    init_images: list[Encoded] | None = Field(None, max_length=16)
    resize_mode: Annotated[WholeField, Field(ge=0, le=3)] | None = 0
    image_cfg_scale: Guidance | None = None
    mask: Encoded | None = None
    mask_blur: Annotated[NumberField, Field(ge=0, le=256)] | None = None
    mask_blur_x: Annotated[NumberField, Field(ge=0, le=256)] | None = None
    mask_blur_y: Annotated[NumberField, Field(ge=0, le=256)] | None = None
    inpainting_fill: Annotated[WholeField, Field(ge=0, le=3)] | None = 0
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[WholeField, Field(ge=0, le=MAX_SIDE)] | None = 0
    inpainting_mask_invert: Annotated[Flag, Field(ge=0, le=1)] | None = 0
    include_init_images: bool | None = False


# Fields that A1111 acts on and fastsd does not: the values without effect, and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "restore_faces": ((False,), "faces are not restored"),
    "tiling": ((False,), "images that tile are not generated"),
    "disable_extra_networks": ((False,), "leave the tags out of the prompt"),
    "s_churn": ((0,), "samplers run without churn"),
    "s_tmin": ((0,), "samplers run without churn"),
    "s_tmax": ((0,), "samplers run without churn"),  # 0 stands for infinity
    "s_noise": ((1, 0), "the samplers' noise is as it is"),
    "s_min_uncond": ((0,), "both prompts count in every step"),
    "script_name": (("",), "scripts are not run"),
    "firstphase_width": ((0,), "say {width}"),
    "firstphase_height": ((0,), "say {height}"),
    "hr_checkpoint_name": (("", "Use same checkpoint"), "the second pass has the model of the first"),
    "hr_sampler_name": (("", "Use same sampler"), "the second pass has the sampler of the first"),
    "hr_scheduler": (("", "Use same scheduler", "automatic", "Automatic"), "the second pass has that of the first"),
    "hr_prompt": (("",), "the second pass has the prompt of the first"),
    "hr_negative_prompt": (("",), "the second pass has the negative prompt of the first"),
    "initial_noise_multiplier": ((1,), "noise is not multiplied"),
    "infotext": (("",), "send the settings as fields"),
    "latent_mask": (("",), "send a mask"),
}
# Fields that need nothing here: what is saved by A1111, and what belongs to its own page.
HARMLESS = frozenset(
    ("do_not_save_samples", "do_not_save_grid", "comments", "override_settings_restore_afterwards", "firstpass_image")
)


class EncodedImage(BaseModel):
    """The body of png-info."""

    image: Encoded


class Upscaling(BaseModel):
    """The body of extra-single-image."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    image: Encoded
    resize_mode: Annotated[WholeField, Field(ge=0, le=1)] | None = 0
    upscaling_resize: Annotated[NumberField, Field(gt=0, le=8)] | None = 2.0
    upscaling_resize_w: Annotated[WholeField, Field(ge=1, le=MAX_SIDE)] | None = 512
    upscaling_resize_h: Annotated[WholeField, Field(ge=1, le=MAX_SIDE)] | None = 512
    upscaling_crop: bool | None = True
    upscaler_1: Name | None = "None"
    upscaler_2: Name | None = "None"
    extras_upscaler_2_visibility: Share | None = 0
    gfpgan_visibility: Share | None = 0
    codeformer_visibility: Share | None = 0

    @property
    def unknown(self) -> list[str]:
        """Fields that neither A1111 nor fastsd has."""
        return [name for name in self.model_extra or {} if name not in HARMLESS_BESIDE_UPSCALING]


HARMLESS_BESIDE_UPSCALING = frozenset(("show_extras_results", "codeformer_weight", "upscale_first"))
