"""ControlNets, T2I-Adapters and IP-Adapters as clients of A1111's extension send them, in `alwayson_scripts`."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from PIL import Image, ImageOps

from fastsd.cli.image_prompts import SCALE
from fastsd.errors import FastsdError, about
from fastsd.image.control_maps import GRID_RESOLUTION, SQUARE, color_grid, find_edges
from fastsd.server.catalogue import Catalogue, Listed
from fastsd.server.images import decode_base64, read_image
from fastsd.server.jobs import ControlChoice, ImagePromptChoice
from fastsd.server.limits import Limits
from fastsd.server.orders import Draft

MAX_UNITS = 8
# What reads the image of an IP-Adapter; the file says which tower it is, whatever the name. Without those of faces.
OF_IP_ADAPTERS = ("ip-adapter-auto", "ip-adapter_clip_sd15", "ip-adapter_clip_sdxl", "ip-adapter_clip_sdxl_plus_vith")
OF_COLOURS = ("t2ia_color_grid", "color")  # two names of one
MADE = ("canny", OF_COLOURS[0])  # maps of an image
MODULES = ["none", *MADE, *OF_IP_ADAPTERS]  # how an image is prepared
OF_STYLES = ("t2ia_style_clipvision", "clip_vision")  # T2I-Adapters that read CLIP's view of an image: two names of one
BALANCED = (None, 0, "Balanced")
STRETCH, CROP, FILL = 0, 1, 2
RESIZE = {"Just Resize": STRETCH, "Crop and Resize": CROP, "Resize and Fill": FILL}
MEANT_AS_USUAL = ("processor_res", "threshold_a", "threshold_b")  # where they are -1
MAX_RESOLUTION = 2048  # pixels; the extension's
# Fields of a unit that fastsd acts on, and those that say how an image is prepared, which few modules need.
KNOWN = ("enabled", "image", "input_image", "model", "module", "weight", "guidance_start", "guidance_end")
IDLE = frozenset(
    ("processor_res", "threshold_a", "threshold_b", "pixel_perfect", "low_vram", "lowvram", "save_detected_map")
    + ("resize_mode", "control_mode", "input_mode", "use_preview_as_input", "batch_images", "output_dir", "loopback")
    + ("hr_option", "mask", "mask_image", "inpaint_crop_input_image", "effective_region_mask", "generated_image")
    + ("is_ui", "advanced_weighting", "union_control_type", "pulid_mode", "ipadapter_input", "batch_image_dir")
)


def read_controls(draft: Draft, scripts: dict[str, Any], catalogue: Catalogue, limits: Limits) -> None:
    """Add the ControlNets, T2I-Adapters and IP-Adapters that a request asks for.

    Raises:
        FastsdError: another script that is always on and has arguments; a unit with something that is not supported.
    """
    for name, script in scripts.items():
        units = script.get("args") if isinstance(script, dict) else script
        if not units or (isinstance(units, list) and not any(units)):
            continue
        if isinstance(units, list) and str(units[0]).lower() == "false":  # by custom the first one switches a script on
            draft.notes.append(f"the script {name!r:.80} is off by its first argument")
            continue
        if name.lower() != "controlnet":
            raise FastsdError(f"not supported: the script {name!r:.80}; ControlNet is", argument="alwayson_scripts")
        if not isinstance(units, list) or len(units) > MAX_UNITS or not all(isinstance(unit, dict) for unit in units):
            message = f"ControlNet's args should be a list of objects, {MAX_UNITS} at most"
            raise FastsdError(message, argument="alwayson_scripts")
        for k, unit in enumerate(units):
            where = f"controlnet[{k}]"
            if not unit.get("enabled", True):
                continue
            if str(unit.get("module")).lower().startswith("ip-adapter"):
                draft.image_prompts.append(_read_ip_adapter(draft, where, unit, catalogue, limits))
            else:
                draft.controls.append(_read_control(draft, where, unit, catalogue, limits))


def _read_ip_adapter(
    draft: Draft, where: str, unit: dict[str, Any], catalogue: Catalogue, limits: Limits
) -> ImagePromptChoice:
    _check_fields(draft, where, unit)
    module = str(unit["module"]).lower()
    if module not in OF_IP_ADAPTERS:
        message = f"not supported; {', '.join(OF_IP_ADAPTERS)} are: no network of faces is here"
        raise FastsdError(message, argument=f"{where}.module", value=module)
    for name, usual in (("guidance_start", 0.0), ("guidance_end", 1.0)):
        if _number(where, unit, name, usual) != usual:
            raise FastsdError(
                f"not supported: an IP-Adapter acts in all steps; it should be {usual:g}",
                argument=f"{where}.{name}",
                value=unit[name],
            )
    if unit.get("mask") or unit.get("mask_image"):
        raise FastsdError("not supported; effective_region_mask is", argument=f"{where}.mask")
    mask = None
    if unit.get("effective_region_mask"):
        mask = _decode(unit["effective_region_mask"], f"{where}.effective_region_mask", limits, mask=True)
    listed = _find(where, unit, catalogue, "an IP-Adapter")
    with about(f"{where}.weight"):
        scale = SCALE.check(_number(where, unit, "weight", 1.0))
    return ImagePromptChoice(listed.name, str(listed.path), _read_image(draft, where, unit, limits), scale, mask)


def _check_fields(draft: Draft, where: str, unit: dict[str, Any]) -> None:
    """Refuse another mode, and note fields that nobody knows."""
    unknown = [str(name) for name in unit if name not in KNOWN and name not in IDLE]
    if unknown:
        draft.notes.append(f"{where}: fields that are not known and have no effect: {', '.join(unknown)[:300]}")
    if unit.get("control_mode") not in BALANCED:
        raise FastsdError("not supported; Balanced is", argument=f"{where}.control_mode", value=unit["control_mode"])


def _read_image(draft: Draft, where: str, unit: dict[str, Any], limits: Limits) -> Image.Image:
    """The unit's image, or the request's."""
    sent = unit.get("image") or unit.get("input_image")
    if isinstance(sent, dict):
        sent = sent.get("image")
    if sent is None and "image" in draft.arguments:
        return cast(Image.Image, draft.arguments["image"])
    return _decode(sent, f"{where}.image", limits)


def _decode(sent: Any, argument: str, limits: Limits, mask: bool = False) -> Image.Image:
    if not isinstance(sent, str):
        raise FastsdError("it should be an image, as base64", argument=argument)
    return read_image(decode_base64(sent, argument), argument, limits.pixels, mask)[0]


def _find(where: str, unit: dict[str, Any], catalogue: Catalogue, kind: str) -> Listed:
    if not isinstance(unit.get("model"), str):
        raise FastsdError(f"it should be the name of {kind}", argument=f"{where}.model", value=unit.get("model"))
    return catalogue.find_controlnet(unit["model"])


def _read_control(
    draft: Draft, where: str, unit: dict[str, Any], catalogue: Catalogue, limits: Limits
) -> ControlChoice:
    _check_fields(draft, where, unit)
    for name in ("mask", "mask_image", "effective_region_mask"):
        if unit.get(name):
            message = "not supported: ControlNets and T2I-Adapters act on the whole image"
            raise FastsdError(message, argument=f"{where}.{name}")
    mode = unit.get("resize_mode", 1)
    mode = RESIZE.get(mode, mode) if isinstance(mode, str) else mode
    if mode not in RESIZE.values() or isinstance(mode, bool):
        raise FastsdError(f"it should be one of {', '.join(RESIZE)}", argument=f"{where}.resize_mode", value=mode)
    width, height = (draft.arguments.get(name) for name in ("width", "height"))
    size = (int(width), int(height)) if width and height else None
    image, map_kind = _make_map(where, unit, _read_image(draft, where, unit, limits), size, int(mode))
    if size and "mask_image" not in draft.arguments:
        image = resize_control(image, size, int(mode), in_squares=map_kind == "color")
    listed = _find(where, unit, catalogue, "a ControlNet or T2I-Adapter")
    parts = {
        "weight": _number(where, unit, "weight", 1.0),
        "start": _number(where, unit, "guidance_start", 0.0),
        "end": _number(where, unit, "guidance_end", 1.0),
    }
    return ControlChoice(listed.name, str(listed.path), image, parts, map_kind)


def _make_map(
    where: str, unit: dict[str, Any], image: Image.Image, size: tuple[int, int] | None, mode: int
) -> tuple[Image.Image, str | None]:
    """The map that a unit's `module` makes of its image, and which of `MAPS` that is."""
    module = str(unit.get("module") or "none").lower()
    with about(f"{where}.module"):
        if module == "none":
            return image, None
        if module == "canny":
            low, high = (_number(where, unit, f"threshold_{k}", usual) for k, usual in (("a", 100.0), ("b", 200.0)))
            return find_edges(image, low, high), "canny"
        if module in OF_COLOURS:
            return color_grid(image, _resolution(where, unit, image, size, mode)), "color"
        message = f"not supported: send the map that it would make, with module none; {', '.join(MADE)} are made here"
        if module in OF_STYLES:
            message = "not supported: no T2I-Adapter of styles is here; an IP-Adapter reads an image's style"
        raise FastsdError(message, value=module)


def _resolution(where: str, unit: dict[str, Any], image: Image.Image, size: tuple[int, int] | None, mode: int) -> int:
    """The pixels of the shorter side that a map is made at: `processor_res`, or what the result needs where
    `pixel_perfect` is set (`pixel_perfect_resolution` in the extension)."""
    if unit.get("pixel_perfect"):
        scales = [to / side for to, side in zip(size or image.size, image.size, strict=True)]
        needed = round((min(scales) if mode == FILL else max(scales)) * min(image.size))
        return min(max(needed, SQUARE), MAX_RESOLUTION)
    resolution = _number(where, unit, "processor_res", GRID_RESOLUTION)
    if not SQUARE <= resolution <= MAX_RESOLUTION:
        message = f"it should be from {SQUARE} to {MAX_RESOLUTION}"
        raise FastsdError(message, argument=f"{where}.processor_res", value=resolution)
    return int(resolution)


def resize_control(image: Image.Image, size: tuple[int, int], mode: int, in_squares: bool = False) -> Image.Image:
    """The extension's `resize_mode` (`detectmap_proc` in its scripts/controlnet.py): 0 leaves the stretching to the
    call, 1 crops, 2 fills with the median colour of the border. A map in squares of one colour keeps them."""
    if mode == CROP:
        return ImageOps.fit(image, size, Image.Resampling.NEAREST if in_squares else Image.Resampling.BICUBIC)
    if mode == FILL and image.width * size[1] != image.height * size[0]:
        pixels = np.asarray(image)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        colour = np.median(border, axis=0).astype(np.uint8)
        inside = ImageOps.contain(image, size, Image.Resampling.NEAREST if in_squares else Image.Resampling.LANCZOS)
        result = Image.new(image.mode, size, tuple(map(int, colour)))
        result.paste(inside, ((size[0] - inside.width) // 2, (size[1] - inside.height) // 2))
        return result
    return image.resize(size, Image.Resampling.NEAREST) if in_squares else image


def _number(where: str, unit: dict[str, Any], name: str, default: float) -> float:
    value = default if unit.get(name) is None else unit[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 4096:
        raise FastsdError("it should be a number", argument=f"{where}.{name}", value=value)
    return float(default if value == -1 and name in MEANT_AS_USUAL else value)
