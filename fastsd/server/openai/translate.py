"""OpenAI's fields to the arguments of a call."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image

from fastsd.errors import FastsdError
from fastsd.image.files import READABLE
from fastsd.image.infotext import UPSCALERS, upscaler_named
from fastsd.server.catalogue import Catalogue
from fastsd.server.images import check_pixels, read_image
from fastsd.server.limits import Limits
from fastsd.server.openai.bodies import ImageRequest
from fastsd.server.orders import Draft

AUTOMATIC = (None, "", "auto", "default")
NAMES = {"num_images_per_prompt": "n", "width": "size", "height": "size", "mask_image": "mask"}


def translate(
    body: ImageRequest, catalogue: Catalogue, limits: Limits, image: bytes | None = None, mask: bytes | None = None
) -> Draft:
    """What a body asks for.

    Args:
        image, mask: files of edits. The mask's transparent pixels are edited, or without a mask the image's own.

    Raises:
        FastsdError: something that fastsd does not do, by the name of the field.
    """
    draft = Draft(notes=body.without_effect)
    draft.arguments = body.parameters() | {"prompt": body.prompt, "num_images_per_prompt": body.n or 1}
    draft.arguments.setdefault("seed", -1)
    if body.model not in AUTOMATIC:
        draft.model = catalogue.find_model(str(body.model))
    if body.refiner:
        draft.refiner = catalogue.find_refiner(body.refiner, "refiner")
    upscaler = draft.arguments.pop("hires_upscaler", None)
    if upscaler is not None:
        own = upscaler.lower() if upscaler.lower() in UPSCALERS else upscaler_named(upscaler)
        if own in UPSCALERS:
            draft.arguments["hires_upscaler"] = own
        else:
            draft.upscaler = catalogue.find_upscaler(upscaler, "hires_upscaler")
    if body.size not in (None, "auto"):
        found = re.fullmatch(r"([1-9]\d{0,4})[xX×]([1-9]\d{0,4})", str(body.size), re.A)
        if found is None:
            message = "it should be auto, or a width and a height, as in 512x512"
            raise FastsdError(message, argument="size", value=body.size)
        draft.arguments |= {"width": int(found[1]), "height": int(found[2])}
    if body.stream:
        count = body.partial_images or 0
        draft.previews = tuple(k / (count + 1) for k in range(1, count + 1))
        if count and (body.n or 1) > 1:
            raise FastsdError("not supported with several images; give {n} 1", argument="partial_images", value=count)
    elif body.partial_images:
        raise FastsdError("given without {stream}", argument="partial_images", value=body.partial_images)
    if image is not None:
        draft.arguments["image"], draft.facts["image"] = read_image(image, "image", limits.pixels)
        alpha = read_alpha(image if mask is None else mask, "image" if mask is None else "mask", limits.pixels)
        if mask is not None and alpha is None:
            message = "it has no transparency; transparent pixels are those that are edited"
            raise FastsdError(message, argument="mask")
        if alpha is not None:
            draft.arguments["mask_image"] = alpha
    return draft


def read_alpha(data: bytes, argument: str, pixels: int) -> Image.Image | None:
    """White where an image is transparent, black where it is opaque; None where it is opaque everywhere.

    Raises:
        FastsdError: no image.
    """
    check_pixels(data, argument, pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=READABLE) as opened:
                if not opened.has_transparency_data:
                    return None
                alpha = np.asarray(opened.convert("RGBA").getchannel("A"))
    except Exception as error:  # decoders meet junk with exceptions of every kind
        raise FastsdError(f"not an image that can be read ({error})", argument=argument) from error
    return None if alpha.min() == 255 else Image.fromarray(255 - alpha)
