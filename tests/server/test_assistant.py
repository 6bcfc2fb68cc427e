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
from tests.support.pipelines import MASK, PHOTO
from tests.support.server import ROOT, opened


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
    for answer, said in zip(wrong, ("steps is 0; it should be", "image: a URL", "count is 3; at most 2"), strict=True):
        assert answer.is_error and said in answer.content[0].text
