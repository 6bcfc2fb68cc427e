"""extra-single-image: an image that is enlarged."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from fastsd.errors import FastsdError
from fastsd.generate.sizes import RESAMPLING
from fastsd.image.infotext import upscaler_named
from fastsd.server.a1111.bodies import Upscaling
from fastsd.server.a1111.idle import is_idle
from fastsd.server.images import decode_base64, read_image


@dataclass(frozen=True)
class Enlarging:
    """An image, and what becomes of it.

    Attributes:
        size: to which it is enlarged, in its own shape.
        box: (width, height) that is cut out of its middle then; None: all of it.
    """

    image: Image.Image
    size: tuple[int, int]
    box: tuple[int, int] | None = None

    def cut(self, enlarged: Image.Image) -> Image.Image:
        """The middle of the enlarged image."""
        if self.box is None:
            return enlarged
        left, top = ((own - side) // 2 for own, side in zip(enlarged.size, self.box, strict=True))
        return enlarged.crop((left, top, left + self.box[0], top + self.box[1]))


def refuse_unsupported(body: Upscaling) -> None:
    """Refuse what A1111 would do to the image besides.

    Raises:
        FastsdError: it names the field.
    """
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if getattr(body, name):
            raise FastsdError("not supported: faces are not restored", argument=name, value=getattr(body, name))
    if body.extras_upscaler_2_visibility and not is_idle(body.upscaler_2 or "", ("", "None")):
        message = "not supported: images of two upscalers are not blended"
        raise FastsdError(message, argument="upscaler_2", value=body.upscaler_2)


def unknown_fields(body: Upscaling) -> list[str]:
    """A note on fields that nobody knows, if there are any."""
    names = ", ".join(map(str, body.unknown))[:500]
    return [f"fields that are not known and have no effect: {names}"] if names else []


def read_upscaling(body: Upscaling, pixels: int) -> Enlarging:
    """The image, and the size that it is brought to; both have at most so many pixels.

    To a size (`resize_mode` 1) it is enlarged in its own shape until it covers that, and cut to it where
    `upscaling_crop` says so (`upscale` in A1111's scripts/postprocessing_upscale.py).
    """
    image, _ = read_image(decode_base64(body.image, "image"), "image", pixels)
    box, argument = None, "upscaling_resize"
    if body.resize_mode == 1:
        box, argument = (body.upscaling_resize_w or 512, body.upscaling_resize_h or 512), "upscaling_resize_w"
        scale = max(box[0] / image.width, box[1] / image.height)
    else:
        scale = body.upscaling_resize or 2.0
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    if size[0] * size[1] > pixels:
        message = f"{size[0]}x{size[1]} pixels; at most {pixels / 10**6:.0f} million are made"
        raise FastsdError(message, argument=argument)
    return Enlarging(image, size, None if body.upscaling_crop is False else box)


def enlarge(body: Upscaling, own: Enlarging) -> Image.Image:
    """The image enlarged by Lanczos or to the nearest, or as it was where no upscaler is named."""
    if body.upscaler_1 in (None, "", "None"):
        return own.image
    return own.cut(own.image.resize(own.size, RESAMPLING[upscaler_named(body.upscaler_1)]))
