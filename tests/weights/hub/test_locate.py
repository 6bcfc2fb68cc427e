"""Models by their hub id: revisions, the cache, interrupted downloads, logins, and the command line."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsd.bundled import BUNDLED
from fastsd.errors import FastsdError
from fastsd.image.files import read_text
from fastsd.image.metadata import read_texts
from fastsd.pipeline import Pipeline
from fastsd.weights.hub import locate
from fastsd.weights.hub.hub_id import HubId
from tests.support.hub import DIGITS, NEW, OLD, UNNEEDED, model_path
from tests.support.hub_server import Hub, serve_hub, set_offline

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[3]


def test_a_model_by_its_id_gives_the_images_of_its_folder(served: Hub) -> None:
    pipe = Pipeline.from_pretrained("org/digits", "cpu", "fp32")
    assert pipe.components.name == "digits" and pipe.source is not None and pipe.source.hub is not None
    arguments: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
    expected = Pipeline.from_pretrained(BUNDLED["digits"], "cpu", "fp32")("a thick eight", **arguments)
    np.testing.assert_array_equal(pipe("a thick eight", **arguments).images, expected.images)


def test_an_image_records_its_single_file(served: Hub, originals: Any) -> None:
    """By its path in the repository, and by its hash, which is its name in huggingface_hub's cache."""
    from fastsd.cli import main

    data = originals.file("sd1").read_bytes()
    served.add("org/files", {"sub/a.safetensors": data, "sub/b.safetensors": data[:-4] + b"\0" * 4})
    model = "org/files/sub/a.safetensors"
    base = ["--steps", "1", "-W", "64", "-H", "64", "-s", "1"]
    assert main(["-p", "x", "-m", model, *base, "-o", "a.png"]) == 0
    assert served.files() == ["sub/a.safetensors"]
    texts = read_text("a.png")
    settings = read_texts(texts)[0]
    assert (settings["model"], settings["model_path"], settings["revision"]) == ("a", model, NEW)
    assert f"Model hash: {hashlib.sha256(data).hexdigest()[:10]}, Model: a, " in texts["parameters"]
    seen = len(served.seen)
    assert main(["--from-image", "a.png", "-o", "b.png"]) == 0
    assert read_text("b.png") == texts and len(served.seen) == seen


def test_progress_shows_on_a_terminal(served: Hub, tmp_path: Path) -> None:
    """`test_the_command_line` checks that nothing shows without a terminal."""
    import fcntl
    import pty
    import struct
    import termios

    environment = os.environ | {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_ENDPOINT": served.url, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm needs a terminal with a size
    code = "from fastsd.weights.hub.locate import locate_file; locate_file('org/digits/digits.safetensors')"
    subprocess.run([sys.executable, "-c", code], env=environment, stderr=theirs, check=True, timeout=60)
    assert b"digits.safetensors: 100%" in os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)


def test_a_branch_moves_and_a_commit_does_not(served: Hub) -> None:
    config = {"scheduler/scheduler_config.json": DIGITS["scheduler/scheduler_config.json"] + b"\n"}
    served.repositories.clear()
    served.add("org/digits", DIGITS, OLD)
    first = model_path("org/digits")
    served.add("org/digits", DIGITS | config, NEW)
    served.repositories["org/digits"].refs["v1"] = OLD
    fetched = len(served.files())
    assert model_path("org/digits").name == NEW
    assert len(served.files()) == fetched + 1  # the file that changed
    seen = len(served.seen)
    assert model_path(f"org/digits@{OLD}") == model_path("org/digits", OLD) == first
    assert len(served.seen) == seen  # a commit that the cache holds completely needs no request
    assert model_path("org/digits@v1") == model_path("org/digits", "v1") == first
    assert locate.locate_model("org/digits@v1", None, False).hub == HubId("org/digits", OLD)


def test_a_cached_model_loads_offline_without_a_request(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    location = locate.locate_model("org/digits", None, False)
    set_offline(monkeypatch)
    seen = len(served.seen)
    assert Pipeline.from_pretrained("org/digits", "cpu", "fp32").source == location
    assert locate.locate_model("org/digits", NEW, True) == location
    assert locate.is_cached(HubId("org/digits")) and not locate.is_cached(HubId("org/digits", OLD))
    assert len(served.seen) == seen


def test_a_cached_model_loads_while_the_hub_is_down(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    root = model_path("org/digits")
    served.status = 503
    assert model_path("org/digits") == root
    served.status = 0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert model_path("org/digits") == root
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    assert model_path("org/digits") == root


def test_an_incomplete_download_is_not_used(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older commit stays in use while a newer one is incomplete; complete files are not fetched again."""
    served.repositories.clear()
    served.add("org/digits", DIGITS, OLD)
    old = model_path("org/digits")
    served.add("org/digits", {name: data + (b"\n" if name.endswith(".json") else b"") for name, data in DIGITS.items()})
    name = "unet/diffusion_pytorch_model.safetensors"
    served.repositories["org/digits"].commits[NEW][name] = DIGITS[name][:-4] + b"\0" * 4
    served.breaks = {name: 99}
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(FastsdError, match="the bytes that arrived are kept"):
        model_path("org/digits")
    with monkeypatch.context() as patch:
        set_offline(patch)
        assert model_path("org/digits") == old
        with pytest.raises(FastsdError, match="does not hold it completely"):
            model_path("org/digits", NEW)
    served.breaks, before = {}, len(served.files())
    assert model_path("org/digits").name == NEW
    assert served.files()[before:] == [name]


def test_an_interrupted_download_resumes(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last chunk that huggingface_hub has written."""
    from huggingface_hub import constants

    name, chunk = "unet/diffusion_pytorch_model.safetensors", 2**16
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    served.breaks = {name: 2}
    root = model_path("org/digits")
    assert (root / name).read_bytes() == DIGITS[name]
    size = len(DIGITS[name])
    first = size // 2 // chunk * chunk
    second = first + (size - first) // 2 // chunk * chunk
    ranges = [headers.get("range") for verb, path, headers in served.seen if verb == "GET" and path.endswith(name)]
    assert ranges == [None, f"bytes={first}-", f"bytes={second}-"]


@pytest.mark.parametrize("stored", [False, True], ids=["HF_TOKEN", "stored by a login"])
def test_a_token_opens_a_private_repository(
    served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: bool
) -> None:
    served.add("org/private", DIGITS, token="hf_right")
    if stored:
        (tmp_path / "token").write_text("hf_right")
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert model_path("org/private").name == NEW


def test_the_memory_check_comes_before_the_weights(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 1000)
    monkeypatch.setattr("fastsd.pipeline.load_checkpoint", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(FastsdError, match="the weights take"):
        Pipeline.from_pretrained("org/digits", "cpu", "fp32")


def test_the_command_line(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as in huggingface_hub; nothing else is written."""
    with serve_hub() as served:
        served.add("org/digits", DIGITS | UNNEEDED, token="hf_x")
        ours = ("HF_", "TRANSFORMERS_", "FASTSD_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home")}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_x"}
        (tmp_path / "home").mkdir()

        def run(*words: str, **variables: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "fastsd", "-p", "a thick eight", "--steps", "1", "-s", "1", *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True)
            return done.returncode, done.stderr

        assert run("-m", "org/digits", "--revision", "main", "-o", "a.png") == (0, "")
        assert sorted(served.files()) == sorted(DIGITS)
        seen = len(served.seen)
        assert run("-m", "org/digits", "-o", "b.png", HF_HUB_OFFLINE="1") == (0, "")
        assert len(served.seen) == seen
        assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "hf", "home"] and os.listdir(tmp_path / "home") == []
