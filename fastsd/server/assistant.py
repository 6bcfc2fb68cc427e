"""The tools that an assistant calls: generate an image, edit one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from mcp.server.mcpserver import Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import Tool
from pydantic import Field, ValidationError

from fastsd.errors import FastsdError, describe, nearest
from fastsd.image.files import encode
from fastsd.image.metadata import write_texts
from fastsd.server.app_state import State
from fastsd.server.bad_body import explain
from fastsd.server.images import decode_base64, read_image
from fastsd.server.jobs import JobError
from fastsd.server.json_numbers import NumberField, WholeField
from fastsd.server.orders import Draft, make_order
from fastsd.server.serve import check_model, engine_settings, make_engine
from fastsd.server.settings import ServerSettings

API = "mcp"
NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "num_images_per_prompt": "count",
    "mask_image": "mask",
}
Prompt = Annotated[str, Field(description="what the image shows")]
Negative = Annotated[str, Field(description="what to stay away from")]
Side = Annotated[WholeField | None, Field(description="pixels, a multiple of 8; by default the model's own")]
Steps = Annotated[WholeField | None, Field(description="denoising steps; by default the model's own")]
Guidance = Annotated[
    NumberField | None, Field(description="how closely to follow the prompt; by default the model's own")
]
Seed = Annotated[WholeField, Field(description="the same seed gives the same image; -1: random")]
Count = Annotated[WholeField, Field(description="how many images")]
Model = Annotated[str | None, Field(description="the name of a checkpoint; by default the one that is loaded")]
Encoded = Annotated[str, Field(description="an image file as base64")]
Mask = Annotated[str | None, Field(description="an image file as base64, white where the other is painted anew")]
Strength = Annotated[NumberField, Field(ge=0, le=1, description="how much of the image changes")]


class ToolServer(MCPServer):
    """Its tools refuse what they do not take, in one line of this project's words."""

    async def list_tools(self) -> list[Tool]:
        """The tools, whose schemas say that they take no other arguments."""
        tools = await super().list_tools()
        for tool in tools:
            tool.input_schema["additionalProperties"] = False
        return tools

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None) -> Any:
        """Call a tool.

        Raises:
            ToolError: there is no such tool, it takes no such arguments, or it gives no images.
        """
        known = next(
            (tool.input_schema["properties"] for tool in await self.list_tools() if tool.name == name), arguments
        )
        for argument in arguments:
            if argument not in known:
                hint = nearest(argument, known) or f"; there are {', '.join(known)}"
                raise ToolError(f"{argument:.60}: no such argument{hint}")
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ToolError(explain(error.__cause__.errors()[0])[0]) from None
            raise (error.__cause__ if isinstance(error.__cause__, ToolError) else error) from None


def make_server(own: ServerSettings) -> ToolServer:
    """The server, whose worker starts with it."""
    check_model(own)
    state = State(own, make_engine, engine_settings(own))

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await state.queue.start(state.catalogue.choice(state.current))
        try:
            yield
        finally:
            await state.queue.stop()

    server = ToolServer("fastsd", lifespan=lifespan, log_level="WARNING")
    _add_generate(server, state)
    _add_edit(server, state)
    return server


def _add_generate(server: ToolServer, state: State) -> None:
    @server.tool(structured_output=False)
    async def generate_image(
        prompt: Prompt,
        negative_prompt: Negative = "",
        width: Side = None,
        height: Side = None,
        steps: Steps = None,
        guidance: Guidance = None,
        seed: Seed = -1,
        count: Count = 1,
        model: Model = None,
    ) -> list[Any]:
        """Generate images from a text. The answer holds each image and, as text, the settings that repeat it."""
        arguments: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
        arguments |= {"num_inference_steps": steps, "guidance_scale": guidance, "seed": seed}
        arguments |= {"width": width, "height": height}
        return await generate(state, arguments | {"num_images_per_prompt": count}, model)


def _add_edit(server: ToolServer, state: State) -> None:
    @server.tool(structured_output=False)
    async def edit_image(
        image: Encoded,
        prompt: Prompt,
        strength: Strength = 0.75,
        mask: Mask = None,
        negative_prompt: Negative = "",
        steps: Steps = None,
        guidance: Guidance = None,
        seed: Seed = -1,
        model: Model = None,
    ) -> list[Any]:
        """Change an image, or the part of it under a mask, towards a text."""
        arguments: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed}
        arguments |= {"num_inference_steps": steps, "guidance_scale": guidance, "strength": strength}
        return await generate(state, arguments, model, image, mask)


async def generate(
    state: State, arguments: dict[str, Any], model: str | None, image: str | None = None, mask: str | None = None
) -> list[Any]:
    """Each image as a file, followed by the text of its settings. A call that is cancelled leaves the queue.

    Raises:
        ToolError: in words for the assistant.
    """
    draft, limits, job = Draft(arguments), state.settings.limits, None
    try:
        for name, sent in (("image", image), ("mask_image", mask)):
            if sent is not None:
                if len(sent) > limits.body:
                    message = f"{len(sent) / 2**20:.0f} MiB; at most {limits.body / 2**20:g} MiB are read"
                    raise FastsdError(message, argument=name)
                data = decode_base64(sent, name)
                arguments[name], _ = read_image(data, name, limits.pixels, mask=name == "mask_image")
        draft.model = state.catalogue.find_model(model) if model else None
        job = state.queue.submit(make_order(draft, API, state.current, state.catalogue, limits))
        finished = await job.result
    except FastsdError as error:
        raise ToolError(describe(error, lambda name: NAMES.get(name, name))) from None
    except JobError as error:
        raise ToolError(str(error)) from None
    finally:
        if job is not None:
            state.queue.cancel(job)
    answer: list[Any] = []
    for one, own in zip(finished.images, finished.settings, strict=True):
        texts = write_texts(own)
        answer.append(Image(data=encode(one, ".png", texts), format="png"))
        answer.append("\n".join([texts["parameters"], *finished.notes]))
    return answer
