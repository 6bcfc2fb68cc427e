"""A1111's fields to the arguments of a call."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image, ImageOps

from fastsd.errors import FastsdError
from fastsd.generate.sizes import resized_note
from fastsd.image.infotext import UPSCALERS, upscaler_named
from fastsd.image.programs import EMPHASIS, RNG
from fastsd.parameters import check_call
from fastsd.parameters.kinds import MAX_STEPS
from fastsd.sampling.samplers import SAMPLERS, resolve
from fastsd.server.a1111.bodies import REFUSED, Generation, ImageToImage, TextToImage
from fastsd.server.a1111.controlnet import read_controls
from fastsd.server.a1111.idle import OPTIONS_OF_FILES, REFUSED_OPTIONS, is_idle
from fastsd.server.catalogue import Catalogue
from fastsd.server.images import decode_base64, read_image, read_painted
from fastsd.server.json_numbers import as_whole
from fastsd.server.limits import Limits
from fastsd.server.orders import Draft
from fastsd.server.styles import Styles

# A1111's names of our arguments, for errors.
NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "schedule": "scheduler",
    "num_images_per_prompt": "batch_size x n_iter",
    "strength": "denoising_strength",
    "image": "init_images",
    "mask_image": "mask",
    "hires_scale": "hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "hires_upscaler": "hr_upscaler",
    "hires_strength": "denoising_strength",
    "inpaint_fill": "inpainting_fill",
    "inpaint_only_masked": "inpaint_full_res",
    "inpaint_padding": "inpaint_full_res_padding",
    "mask_invert": "inpainting_mask_invert",
    "image_guidance_scale": "image_cfg_scale",
    "refiner": "refiner_checkpoint",
    "refiner_switch": "refiner_switch_at",
    "seed_resize_from": "seed_resize_from_w",
    "clip_skip": "CLIP_stop_at_last_layers",
    "model": "sd_model_checkpoint",
    "controls": "alwayson_scripts",
}
FILLS = ("fill", "original", "noise", "blank")  # `inpainting_fill`
AUTOMATIC = ("", "automatic")
NOTHING = ("", "none", "automatic")


def translate(body: Generation, options: dict[str, Any], catalogue: Catalogue, styles: Styles, limits: Limits) -> Draft:
    """What a body asks for, with its images decoded.

    Args:
        options: of the server, by A1111's names.

    Raises:
        FastsdError: something that fastsd does not do, by the name of the field.
    """
    draft = Draft()
    refuse_unsupported(body)
    if body.unknown:
        draft.notes.append(f"fields that are not known and have no effect: {', '.join(map(str, body.unknown))[:500]}")
    if body.save_images:  # which SillyTavern always asks for
        draft.notes.append("save_images has no effect: the server keeps no files; images come in the answer")
    prompt, negative = styles.apply(body.styles or [], body.prompt or "", body.negative_prompt or "")
    draft.arguments = {
        "prompt": prompt,
        "negative_prompt": negative,
        "num_images_per_prompt": (body.batch_size or 1) * (body.n_iter or 1),
        "batch_size": body.batch_size or 1,
        "num_inference_steps": body.steps,
        "guidance_scale": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "seed": -1 if body.seed is None else body.seed,
        **_variation(body),
        **_sampling(body),
    }
    _apply_options(draft, options | (body.override_settings or {}), catalogue)
    _add_refiner(draft, body, catalogue)
    if isinstance(body, TextToImage):
        draft.arguments |= _second_pass(draft, body, catalogue)
    if isinstance(body, ImageToImage):
        _add_images(draft, body, limits)
    read_controls(draft, body.alwayson_scripts or {}, catalogue, limits)
    return draft


def refuse_unsupported(body: Generation) -> None:
    """Refuse fields that would have an effect in A1111 and have none here."""
    given = body.model_dump(include=set(REFUSED)) | dict(body.model_extra or {})
    for name, (without_effect, message) in REFUSED.items():
        value = given.get(name)
        if value is not None and not is_idle(value, without_effect):
            if name == "s_tmax" and is_idle(given.get("s_churn", 0), (0, None)):
                continue  # it bounds the churn
            raise FastsdError(f"not supported: {message}", argument=name, value=value)


def _variation(body: Generation) -> dict[str, Any]:
    """The second noise, and noise of another size."""
    found: dict[str, Any] = {}
    if body.subseed_strength:
        found = {"subseed_strength": body.subseed_strength, "subseed": -1 if body.subseed is None else body.subseed}
    width, height = body.seed_resize_from_w or 0, body.seed_resize_from_h or 0
    if width > 0 and height > 0:
        found["seed_resize_from"] = f"{width}x{height}"
    return found


def _sampling(body: Generation) -> dict[str, Any]:
    """Sampler, schedule and eta. Clients send the sampler twice, under its old name too."""
    sampler = body.sampler_name or body.sampler_index
    schedule = body.scheduler if (body.scheduler or "").lower() not in AUTOMATIC else None
    found: dict[str, Any] = {"sampler": sampler, "schedule": schedule}
    if sampler is None:  # the model's own, which the worker knows: it refuses an eta that this one has no use for
        return found | ({"eta": body.eta} if body.eta else {})
    name, own = resolve(sampler, schedule or "default")
    if not SAMPLERS[name].takes_schedule:
        found["schedule"] = None
    elif own != "default":
        found["schedule"] = own
    found["sampler"] = name
    if body.eta is None or body.eta == 1.0 and not SAMPLERS[name].takes_eta:
        return found  # webuiapi sends 1 always: the noise that ancestral samplers have anyway
    if SAMPLERS[name].takes_eta:
        return found | {"eta": body.eta}
    if body.eta:
        raise FastsdError(
            f"not supported: the noise of {SAMPLERS[name].label} is as it is", argument="eta", value=body.eta
        )
    return found


def _apply_options(draft: Draft, options: dict[str, Any], catalogue: Catalogue) -> None:
    """Settings of A1111's own, which a request may override."""
    for name, value in options.items():
        if value is None:
            continue
        match name:
            case "sd_model_checkpoint" if value == "":  # an empty box
                pass
            case "sd_model_checkpoint":
                draft.model = catalogue.find_model(_text(name, value), name)
            case "CLIP_stop_at_last_layers":
                draft.arguments["clip_skip"] = max(_whole(name, value), 1)
            case "eta_noise_seed_delta":
                draft.arguments["ensd"] = _whole(name, value) or None
            case "randn_source" if value in RNG:
                draft.arguments["noise"] = RNG[value]
            case "emphasis" if value in EMPHASIS.values():
                draft.arguments["emphasis"] = next(key for key, label in EMPHASIS.items() if label == value)
            case "like":
                draft.arguments["like"] = _text(name, value)
            case _ if is_idle(value, REFUSED_OPTIONS.get(name, ())):
                pass
            case _ if name.startswith(OPTIONS_OF_FILES) and name not in REFUSED_OPTIONS:
                draft.notes.append(f"{name:.60} has no effect: the server keeps no files; images come in the answer")
            case _:
                known = ", ".join(SETTABLE)
                raise FastsdError(f"not supported, or not with this value; {known} are", argument=name, value=value)


SETTABLE = (
    "sd_model_checkpoint",
    "CLIP_stop_at_last_layers",
    "eta_noise_seed_delta",
    "randn_source",
    "emphasis",
    "like",
)


def check_options(options: dict[str, Any], catalogue: Catalogue) -> None:
    """Refuse options that requests could not start from."""
    draft = Draft()
    _apply_options(draft, options, catalogue)
    check_call({"prompt": "", **{name: value for name, value in draft.arguments.items() if value is not None}})


def _whole(name: str, value: Any) -> int:
    found = as_whole(value)
    if not isinstance(found, int) or isinstance(found, bool):
        raise FastsdError("it should be a whole number", argument=name, value=value)
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FastsdError("it should be a text", argument=name, value=value)
    return value


def _add_refiner(draft: Draft, body: Generation, catalogue: Catalogue) -> None:
    name = body.refiner_checkpoint or ""
    if name.lower() in NOTHING:
        return
    draft.refiner = catalogue.find_refiner(name, "refiner_checkpoint")
    draft.arguments["refiner_switch"] = body.refiner_switch_at


def _second_pass(draft: Draft, body: TextToImage, catalogue: Catalogue) -> dict[str, Any]:
    """The hires fix. A1111's steps of the second pass all run; ours are those of the schedule that they end."""
    if not body.enable_hr:
        return {}
    given = body.hr_upscaler or "Latent"
    own = upscaler_named(given) if upscaler_named(given) in UPSCALERS else None
    if own is None:
        draft.upscaler = catalogue.find_upscaler(given, "hr_upscaler")
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    found = {"hires_scale": _scale(body), "hires_strength": strength, "hires_upscaler": own}
    if run := body.hr_second_pass_steps or 0:
        steps = int(run / strength) if strength > 0 else run
        found["hires_steps"] = min(steps + (int(steps * strength) < run), MAX_STEPS)
    return found


def _scale(body: TextToImage) -> float:
    wide, high = max(body.hr_resize_x or 0, 0), max(body.hr_resize_y or 0, 0)
    if not wide and not high:
        return 2.0 if body.hr_scale is None else body.hr_scale
    if body.width is None or body.height is None:
        raise FastsdError("given without {width} and {height}", argument="hr_resize_x")
    scales = [side / own for side, own in ((wide, body.width), (high, body.height)) if side]
    if not math.isclose(scales[0], scales[-1]):
        message = f"not supported: {wide}x{high} has another shape than {body.width}x{body.height}"
        raise FastsdError(message, argument="hr_resize_x")
    return scales[0]


def _add_images(draft: Draft, body: ImageToImage, limits: Limits) -> None:
    """The image to start from, and the mask."""
    sent = body.init_images or []
    if len(sent) != 1:
        raise FastsdError(f"{len(sent)} images; it should hold one", argument="init_images")
    image, fact = read_image(decode_base64(sent[0], "init_images"), "init_images", limits.pixels)
    own = draft.arguments
    own["width"], own["height"] = (side or _fitting(n) for side, n in zip((own["width"], own["height"]), image.size))
    draft.facts["image"] = fact
    size = own["width"], own["height"]
    own["image"] = resize(image, size, body.resize_mode or 0)
    own["strength"] = 0.75 if body.denoising_strength is None else body.denoising_strength
    own["image_guidance_scale"] = body.image_cfg_scale
    if body.mask:
        data = decode_base64(body.mask, "mask")
        mask, draft.facts["mask"] = read_image(data, "mask", limits.pixels, mask=True)
        mask = read_painted(data, "mask") or mask
        own["mask_image"] = resize(mask, size, body.resize_mode or 0)
        own |= _inpainting(body)
        if own["inpaint_only_masked"]:  # that part of the images as they were sent
            own["image"], own["mask_image"] = image, mask
    if own["image"].size != image.size:
        draft.notes.append(resized_note(image.size, size))


def _inpainting(body: ImageToImage) -> dict[str, Any]:
    blurs = [blur for blur in (body.mask_blur_x, body.mask_blur_y) if blur is not None]
    if len(blurs) == 2 and blurs[0] != blurs[1]:
        raise FastsdError("not supported: another blur than {mask_blur_x}", argument="mask_blur_y", value=blurs[1])
    blur = body.mask_blur if body.mask_blur is not None else (blurs or [4.0])[0]
    only = True if body.inpaint_full_res is None else body.inpaint_full_res
    return {
        "mask_blur": blur,
        "mask_invert": bool(body.inpainting_mask_invert),
        "inpaint_fill": FILLS[body.inpainting_fill or 0],
        "inpaint_only_masked": only,
        "inpaint_padding": (body.inpaint_full_res_padding or 0) if only else None,
    }


def _fitting(side: int) -> int:
    return max(side // 8 * 8, 8)


def resize(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """A1111's `resize_mode` (`resize_image` in its modules/images.py): 0 stretches, 1 crops, 2 fills with the edges.

    Raises:
        FastsdError: 3, which enlarges latents.
    """
    if mode == 3:
        raise FastsdError(
            "not supported: latents are enlarged by the hires fix of txt2img", argument="resize_mode", value=3
        )
    if image.size == size:
        return image
    if mode == 0:
        return image.resize(size, Image.Resampling.LANCZOS)
    if mode == 1:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    inside = ImageOps.contain(image, size, Image.Resampling.LANCZOS)
    result = Image.new(image.mode, size)
    left, top = (size[0] - inside.width) // 2, (size[1] - inside.height) // 2
    if top:
        for edge, at, high in ((0, 0, top), (inside.height - 1, top + inside.height, size[1] - top - inside.height)):
            row = inside.crop((0, edge, inside.width, edge + 1))
            result.paste(row.resize((size[0], max(high, 1))), (0, at))
    elif left:
        for edge, at, wide in ((0, 0, left), (inside.width - 1, left + inside.width, size[0] - left - inside.width)):
            column = inside.crop((edge, 0, edge + 1, inside.height))
            result.paste(column.resize((max(wide, 1), size[1])), (at, 0))
    result.paste(inside, (left, top))
    return result
