"""What clients send: OpenAI's field names, and at top level the parameters of a call by fastsd's names."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fastsd.errors import FastsdError, nearest
from fastsd.parameters import PARAMETERS, of_call
from fastsd.parameters.kinds import Value
from fastsd.server.json_numbers import WholeField, check
from fastsd.server.limits import MAX_PROMPT

Name = Annotated[str, StringConstraints(max_length=300)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT)]

# Names that users of other servers give to parameters.
ALIASES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "scheduler": "schedule",
    "sampler_name": "sampler",
}
# Parameters that are not the client's to set: files, and what the server decides.
OWN = ("prompt", "image", "mask_image", "depth_image", "controls", "batch_size", "num_images_per_prompt", "output_type")
CHOICES = ("size", "response_format", "output_format", "output_compression", "quality", "style", "background", "n")
HARMLESS = ("user", "safety_identifier", "moderation", "input_fidelity")


class ImageRequest(BaseModel):
    """What generations and edits share. Other fields are parameters of a call, see `parameters`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Prompt
    model: Name | None = None
    refiner: Name | None = None
    n: Annotated[WholeField, Field(ge=1, le=10)] | None = 1
    size: Annotated[str, StringConstraints(max_length=20)] | None = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[WholeField, Field(ge=0, le=100)] | None = None
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = False
    partial_images: Annotated[WholeField, Field(ge=0, le=3)] | None = 0

    @model_validator(mode="before")
    @classmethod
    def _without_empty_boxes(cls, body: Any) -> Any:
        """A page's empty box is a choice that was left out."""
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value != "" or field not in CHOICES}

    @property
    def suffix(self) -> str:
        """Of the files that are sent back."""
        return {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[self.output_format or "png"]

    def parameters(self) -> dict[str, Any]:
        """The other fields as arguments of a call.

        Raises:
            FastsdError: no such parameter, or a value that it does not take; it names the field as the client does.
        """
        known = {row.name for row in of_call() if not isinstance(row.kind, Value) and row.flags} - set(OWN)
        found: dict[str, Any] = {}
        for field, value in (self.model_extra or {}).items():
            name = ALIASES.get(field, field)
            if value is None or field in HARMLESS:
                continue
            if name not in known:
                raise FastsdError(f"no such parameter{nearest(field, (*known, *ALIASES))}", argument=field)
            if name in found:
                raise FastsdError(f"given twice: it is {{{name}}}", argument=field)
            try:
                found[name] = check(PARAMETERS[name].kind, value)
            except FastsdError as error:
                raise FastsdError(error.message, argument=field, value=error.value) from None
        return found

    @property
    def spellings(self) -> dict[str, str]:
        """The parameters that this body gives once, and what it calls them."""
        fields = list(self.model_extra or {})
        names = [ALIASES.get(field, field) for field in fields]
        given = Counter(names)
        return {name: field for name, field in zip(names, fields, strict=True) if given[name] == 1}

    @property
    def without_effect(self) -> list[str]:
        """Notes on fields that have an effect at OpenAI and none here."""
        given = {"quality": self.quality, "style": self.style, "output_compression": self.output_compression}
        idle = [name for name, value in given.items() if value not in (None, "auto", "standard")]
        return [f"{name} has no effect; steps and guidance are parameters here" for name in idle]


class ImageGeneration(ImageRequest):
    """The body of generations."""


class ImageEdit(ImageRequest):
    """The fields of edits besides its files."""
