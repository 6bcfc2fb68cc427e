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
        scale = arguments.get("hires_scale") or 1.0
        sides = {name: (arguments.get(name) or default_side) for name in ("width", "height")}
        for name, side in sides.items():
            if side > self.side or side * scale > self.side:
                larger = f" (times {{hires_scale}} {scale:g})" if scale > 1 else ""
                raise FastsdError(f"at most {self.side} pixels{larger} are generated", argument=name, value=side)
        steps = arguments.get("num_inference_steps") or default_steps
        steps += (arguments.get("hires_steps") or steps) * scale**2 if scale > 1 else 0
        work = sides["width"] * sides["height"] * count * steps
        if work > self.work:
            raise FastsdError(
                f"{{width}} x {{height}} x images x {{num_inference_steps}} is {work:.3g}; at most {self.work:.3g} are "
                "done for one request"
            )
