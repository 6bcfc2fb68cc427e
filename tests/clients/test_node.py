"""OpenAI's clients for Node, unchanged; `npm ci --prefix tests/clients` installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fastsd.server.settings import ServerSettings
from tests.support.empty_model import colour
from tests.support.server import listening, opened

FOLDER, KEY = Path(__file__).parent, "a key of some length"


def first(image: str) -> object:
    """The colour by which the empty model says its seed."""
    return opened(image).getpixel((0, 0))


@pytest.mark.heavy
def test_openai_and_the_ai_sdk_for_node() -> None:
    if shutil.which("node") is None or not (FOLDER / "node_modules").is_dir():
        pytest.skip("needs node, and its packages: npm ci --prefix tests/clients")
    with listening(ServerSettings(api_key=KEY), 0.002, ("", KEY)) as port:
        command = ["node", str(FOLDER / "openai.mjs"), f"http://127.0.0.1:{port}/v1", KEY]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == ["digits"]
    assert [first(one) for one in found["generated"]] == [colour(7), colour(8)]
    *partial, (kind, last) = found["events"]
    assert [one for one, _ in partial] == ["image_generation.partial_image"] * 2
    assert kind == "image_generation.completed" and first(last) == colour(8)
    assert [first(one) for one in found["edited"]] == [colour(9), colour(9)]
    assert found["refused"] == [
        ["NotFoundError", 404, "model", "invalid_request_error"],
        ["UnprocessableEntityError", 422, "size", "invalid_request_error"],
        ["AuthenticationError", 401, None, "authentication_error"],
    ]
    assert [first(one) for one in found["sdk"]] == [colour(11), colour(12)]
    assert [first(one) for one in found["sdkEdited"]] == [colour(11)] and found["warnings"] == []
