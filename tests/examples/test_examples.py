"""The programs in examples/ run, each where its package is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.heavy


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == ["fastapi_app", "gradio_app", "queue_bot"]
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 50, file


def test_fastapi() -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    client = TestClient(load("fastapi_app").app)
    answer = client.get("/image", params={"prompt": "a handwritten seven", "steps": 2})
    assert answer.status_code == 200 and Image.open(io.BytesIO(answer.content)).size == (64, 64)
    refused = client.get("/image", params={"prompt": "a handwritten seven", "steps": 0})
    assert refused.status_code == 422 and "num_inference_steps is 0" in refused.json()["detail"]


def test_gradio() -> None:
    pytest.importorskip("gradio", reason="gradio is larger than what the tests install")
    images = list(load("gradio_app").draw("a handwritten seven", 3, 0))
    assert len(images) == 3 and all(image.size == (64, 64) for image in images)


def test_queue_bot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = load("queue_bot")
    asyncio.run(module.main(["a handwritten three", "a handwritten four"]))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["answer0.png", "answer1.png"]


def test_a_newer_request_ends_the_older_one() -> None:
    import fastsd

    module = load("queue_bot")

    async def both() -> list[object]:
        bot = module.Bot(fastsd.Pipeline.from_pretrained("digits", device="cpu", dtype="fp32"))
        return list(await asyncio.gather(bot.ask("user", "a handwritten three"), bot.ask("user", "a handwritten four")))

    older, newer = asyncio.run(both())
    assert older is None and isinstance(newer, fastsd.Result)
