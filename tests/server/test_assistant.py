"""An assistant's client speaks to `fastsd mcp` over pipes."""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastsd.pipeline import Pipeline
from fastsd.server.limits import Limits
from fastsd.server.settings import ServerSettings
from tests.support.empty_model import EmptySettings, empty_engine
from tests.support.pipelines import MASK, PHOTO
from tests.support.server import ROOT, opened, png


def sent(image: Image.Image, path: Path) -> str:
    image.save(path)
    return base64.b64encode(path.read_bytes()).decode()


async def call(model: Path, *calls: tuple[str, dict[str, Any]]) -> tuple[list[str], list[Any]]:
    """The names of the tools, and what each call gives."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client

    words = ["-m", "fastsd", "mcp", "--model", str(model), "--dtype", "fp32", "--device", "cpu", "--max-images", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = StdioServerParameters(command=sys.executable, args=words, env=environment)
    async with stdio_client(server) as (reader, writer), ClientSession(reader, writer) as session:
        await session.initialize()
        tools = (await session.list_tools()).tools
        return [tool.name for tool in tools], [await session.call_tool(name, given) for name, given in calls]


@pytest.mark.heavy
def test_an_assistant_generates_and_edits(model: Path, tmp_path: Path) -> None:
    """The images are those of the pipeline; a mistake is said in one line."""
    pytest.importorskip("mcp", reason="needs the extra mcp")
    photo, mask = sent(PHOTO, tmp_path / "photo.png"), sent(MASK, tmp_path / "mask.png")
    calls = (
        ("generate_image", {"prompt": "a cat", "seed": 5, "steps": 3, "count": 2}),
        ("edit_image", {"image": photo, "mask": mask, "prompt": "a cat", "seed": 5, "steps": 4, "strength": 0.5}),
        ("generate_image", {"prompt": "a cat", "steps": 0}),
        ("edit_image", {"image": "http://example.com/x.png", "prompt": "a cat"}),
        ("generate_image", {"prompt": "a cat", "count": 3}),
        ("generate_image", {"prompt": "a cat", "width": 12}),
    )
    names, (made, edited, *wrong) = asyncio.run(call(model, *calls))
    assert names == ["generate_image", "edit_image"]
    pipe = Pipeline.from_pretrained(model, device="cpu", dtype="fp32")
    wanted = pipe("a cat", seed=5, num_inference_steps=3, num_images_per_prompt=2).images
    for k in range(2):
        np.testing.assert_array_equal(opened(made.content[2 * k].data), wanted[k])
        assert f"Seed: {5 + k}" in made.content[2 * k + 1].text
    own = pipe("a cat", image=PHOTO, mask_image=MASK, strength=0.5, seed=5, num_inference_steps=4).images[0]
    np.testing.assert_array_equal(opened(edited.content[0].data), own)
    reasons = (
        "steps is 0; it should be",
        "image: a URL",
        "count is 3; at most 2",
        "width is 12; it should be a multiple",
    )
    for answer, said in zip(wrong, reasons, strict=True):
        assert answer.is_error and said in answer.content[0].text


GIVEN: dict[str, dict[str, Any]] = {
    "generate_image": {"prompt": "a cat"},
    "edit_image": {"prompt": "a cat", "image": png()},
}
HUGE = 10**30
# Values that no argument of a type takes.
WRONG: dict[str, tuple[Any, ...]] = {
    "string": (True, 5, 1.5, [], ["a cat"], {}, {"a": 1}),
    "integer": (True, "abc", "", 1.5, HUGE, -HUGE, [], [1], {}, "\ud800"),
    "number": (True, "abc", "", HUGE, -HUGE, [], [1], {}, "\ud800"),
}
NO_IMAGES = ("", "abc", "data:image/png;base64,", "http://example.com/x.png", "../../etc/passwd", png()[:40], "x" * 400)
MORE_WRONG: dict[str, tuple[Any, ...]] = {
    "image": NO_IMAGES,
    "mask": NO_IMAGES,
    "prompt": ("x" * 20_001, "\ud800"),
    "negative_prompt": ("x" * 20_001, "\ud800"),
    "model": ("none", "../secret", "x" * 30_000),
    "width": (0, -8, 7, 4096),
    "height": (0, -8, 7, 4096),
    "steps": (0, -1, 1001),
    "count": (0, -1, 17),
    "guidance": (-0.1, 100.5),
    "strength": (-0.1, 1.1),
    "seed": (-2,),
}


def test_every_argument_of_every_tool_refuses_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the schemas that an assistant is told, in one line that names the argument; and the server goes on."""
    mcp = pytest.importorskip("mcp", reason="needs the extra mcp")
    from fastsd.server import assistant

    monkeypatch.setattr(assistant, "make_engine", empty_engine)
    monkeypatch.setattr(assistant, "engine_settings", lambda own: EmptySettings())

    async def walk() -> None:
        async with mcp.Client(assistant.make_server(ServerSettings(limits=Limits(body=2**20)))) as client:

            async def refused(tool: str, arguments: dict[str, Any]) -> str:
                answer = await client.call_tool(tool, arguments)
                assert answer.is_error and len(answer.content) == 1, (tool, str(arguments)[:200])
                said = str(answer.content[0].text)
                assert "\n" not in said and len(said) < 300 and "Traceback" not in said and "pydantic" not in said, said
                return said

            for tool in (await client.list_tools()).tools:
                given, properties = GIVEN[tool.name], tool.input_schema["properties"]
                assert set(properties) <= {*MORE_WRONG} and tool.input_schema["additionalProperties"] is False
                for name, schema in properties.items():
                    kinds = {one["type"] for one in schema.get("anyOf", [schema])}
                    wrong = [*WRONG[(kinds - {"null"}).pop()], *MORE_WRONG[name], *(() if "null" in kinds else (None,))]
                    for value in wrong:
                        assert name in await refused(tool.name, given | {name: value})
                for name in tool.input_schema["required"]:
                    rest = {key: value for key, value in given.items() if key != name}
                    assert await refused(tool.name, rest) == f"{name} is missing"
                assert await refused(tool.name, given | {"step": 3}) == "step: no such argument; did you mean steps?"
                assert "there are" in await refused(tool.name, given | {"zzz": 3})
                assert not (await client.call_tool(tool.name, given | {"steps": "3", "seed": 2.0})).is_error
            large = await refused("edit_image", {"prompt": "a cat", "image": "A" * (2**20 + 4)})
            assert large == "image: 1 MiB; at most 1 MiB are read"
            assert "paint" in await refused("paint", {"prompt": "a cat"})

    asyncio.run(walk())
