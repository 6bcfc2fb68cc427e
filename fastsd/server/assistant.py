"""The tools that an assistant calls: generate an image, edit one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

from fastsd.errors import FastsdError, describe
from fastsd.image.files import encode
from fastsd.image.metadata import write_texts
from fastsd.server.app_state import State
from fastsd.server.images import decode_base64, read_image
from fastsd.server.jobs import JobError
from fastsd.server.orders import Draft, make_order
from fastsd.server.serve import check_model, engine_settings, make_engine
from fastsd.server.settings import ServerSettings

API = "mcp"
NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance", "num_images_per_prompt": "count"}
Prompt = Annotated[str, Field(description="what the image shows")]
Negative = Annotated[str, Field(description="what to stay away from")]
Side = Annotated[int | None, Field(description="pixels, a multiple of 8; by default the model's own")]
Steps = Annotated[int | None, Field(description="denoising steps; by default the model's own")]
Guidance = Annotated[float | None, Field(description="how closely to follow the prompt; by default the model's own")]
Seed = Annotated[int, Field(description="the same seed gives the same image; -1: random")]
Model = Annotated[str | None, Field(description="the name of a checkpoint; by default the one that is loaded")]
Encoded = Annotated[str, Field(description="an image file as base64")]
Mask = Annotated[str | None, Field(description="an image file as base64, white where the other is painted anew")]
Strength = Annotated[float, Field(ge=0, le=1, description="how much of the image changes")]


def make_server(own: ServerSettings) -> MCPServer:
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

    server: MCPServer = MCPServer("fastsd", lifespan=lifespan, log_level="WARNING")
    _add_generate(server, state)
    _add_edit(server, state)
    return server


def _add_generate(server: MCPServer, state: State) -> None:
    @server.tool(structured_output=False)
    async def generate_image(
        prompt: Prompt,
        negative_prompt: Negative = "",
        width: Side = None,
        height: Side = None,
        steps: Steps = None,
        guidance: Guidance = None,
        seed: Seed = -1,
        count: int = 1,
        model: Model = None,
    ) -> list[Any]:
        """Generate images from a text. The answer holds each image and, as text, the settings that repeat it."""
        arguments: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
        arguments |= {"num_inference_steps": steps, "guidance_scale": guidance, "seed": seed}
        arguments |= {"width": width, "height": height}
        return await generate(state, arguments | {"num_images_per_prompt": count}, model)


def _add_edit(server: MCPServer, state: State) -> None:
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
