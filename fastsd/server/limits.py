"""How much one request may ask for: refused before any memory is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastsd.errors import FastsdError

MAX_PROMPT = 20_000  # characters; a prompt of 75 chunks of tokens has some


@dataclass(frozen=True)
class Limits:
    """Bounds of a request.

    Attributes:
        images: of one request.
        side: pixels.
        work: width x height x images x steps.
        body: bytes of a request.
        pixels: of an image that is sent.
    """

    images: int = 16
    side: int = 2048
    work: int = 2**31
    body: int = 64 * 2**20
    pixels: int = 2**24

    def check(self, arguments: Mapping[str, Any], default_side: int = 1024, default_steps: int = 50) -> None:
        """Refuse a call that is larger.

        Args:
            arguments: of `fastsd.Pipeline.__call__`.
            default_side, default_steps: assumed where the call leaves them to the model.

        Raises:
            FastsdError: it names the argument.
        """
        for name in ("prompt", "negative_prompt"):
            if len(arguments.get(name) or "") > MAX_PROMPT:
                raise FastsdError(f"{len(arguments[name])} characters; at most {MAX_PROMPT} are read", argument=name)
        count = arguments.get("num_images_per_prompt") or 1
        if count > self.images:
            raise FastsdError(f"at most {self.images} images a request", argument="num_images_per_prompt", value=count)
        self._check_noise(arguments)
        scale = arguments.get("hires_scale") or 1.0
        sides = _sides(arguments, default_side)
        for name, side in sides.items():
            if side > self.side and arguments.get(name) != side:
                size = f"{sides['width']}x{sides['height']}" + (" with {outpaint}" if arguments.get("outpaint") else "")
                raise FastsdError(f"{size} pixels; at most {self.side} of a side are generated", argument="image")
            if side > self.side or side * scale > self.side:
                larger = f" (times {{hires_scale}} {scale:g})" if scale > 1 else ""
                raise FastsdError(f"at most {self.side} pixels{larger} are generated", argument=name, value=side)
        listed = arguments.get("timesteps") or arguments.get("sigmas")
        steps = arguments.get("num_inference_steps") or (len(listed.split(",")) if listed else default_steps)
        steps += (arguments.get("hires_steps") or steps) * scale**2 if scale > 1 else 0
        work = sides["width"] * sides["height"] * count * steps
        if work > self.work:
            raise FastsdError(
                f"pixels x images x {{num_inference_steps}} is {work:.3g}; at most {self.work:.3g} are "
                "done for one request"
            )

    def _check_noise(self, arguments: Mapping[str, Any]) -> None:
        """Noise may be drawn for more images than are generated, and for larger ones."""
        for name, images in (("noise_count", 0), ("noise_index", 1)):
            images += arguments.get(name) or 0
            if images > self.images:
                message = f"noise is drawn for at most {self.images} images"
                raise FastsdError(message, argument=name, value=arguments[name])
        size = arguments.get("seed_resize_from")
        if size and max(map(int, size.split("x"))) > self.side:
            message = f"noise is drawn for at most {self.side} pixels of a side"
            raise FastsdError(message, argument="seed_resize_from", value=size)


def _sides(arguments: Mapping[str, Any], default: int) -> dict[str, int]:
    """Width and height of what is generated: those of the call, else of its image with what is painted around it."""
    image, found = arguments.get("image"), dict[str, int]()
    left, top, right, bottom = map(int, (arguments.get("outpaint") or "0,0,0,0").split(","))
    for name, more in (("width", left + right), ("height", top + bottom)):
        own = getattr(image, name, default) + more
        found[name] = max(arguments.get(name) or own, own if more else 0)
    return found
