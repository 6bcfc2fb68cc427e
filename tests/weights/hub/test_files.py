"""The files that are fetched for a model, an autoencoder, a ControlNet or one file, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save

from fastsd.bundled import BUNDLED
from fastsd.pipeline import Pipeline
from fastsd.weights.hub import locate
from fastsd.weights.hub.hub_id import HubId
from tests.support.hub import DIGITS, NEW, UNNEEDED, WEIGHTS, half, model_path, sharded
from tests.support.hub_server import Hub, set_offline


def test_only_the_needed_files_are_fetched_and_only_once(served: Hub) -> None:
    location = locate.locate_model("org/digits", None, False)
    assert location.hub == HubId("org/digits", NEW)
    assert sorted(served.files()) == sorted(DIGITS)
    fetched = {path.relative_to(location.path).as_posix(): path.read_bytes() for path in location.path.rglob("*.*")}
    assert fetched == DIGITS
    seen = len(served.seen)
    assert locate.locate_model("org/digits", None, False) == location
    assert [(verb, path) for verb, path, _ in served.seen[seen:]] == [("GET", "/api/models/org/digits")]


@pytest.mark.parametrize("halved", [False, True])
def test_the_variant_follows_the_precision(served: Hub, halved: bool) -> None:
    variants = {f"{stem}.fp16.safetensors": half(DIGITS[f"{stem}.safetensors"]) for stem in WEIGHTS}
    served.add("org/digits", DIGITS | variants)
    root = model_path("org/digits", halved=halved)
    suffix = ".fp16.safetensors" if halved else ".safetensors"
    assert sorted(n for n in served.files() if n.endswith(".safetensors")) == [stem + suffix for stem in WEIGHTS]
    assert len(list(root.rglob("*.safetensors"))) == len(WEIGHTS)


def test_full_precision_weights_are_fetched_after_half_precision_ones(served: Hub) -> None:
    variants = {f"{stem}.fp16.safetensors": half(DIGITS[f"{stem}.safetensors"]) for stem in WEIGHTS}
    served.add("org/digits", DIGITS | variants)
    model_path("org/digits", NEW, halved=True)
    model_path("org/digits", NEW)
    assert {f"{stem}.safetensors" for stem in WEIGHTS} <= set(served.files())
    seen = len(served.seen)
    model_path("org/digits", NEW)
    assert len(served.seen) == seen


def test_an_index_brings_its_shards(served: Hub) -> None:
    files = sharded(DIGITS, "unet/diffusion_pytorch_model")
    served.add("org/digits", files | UNNEEDED | {"unet/diffusion_pytorch_model-00001-of-00007.safetensors": b"stray"})
    root = model_path("org/digits")
    assert sorted(served.files()) == sorted(files)
    Pipeline.from_pretrained(root, "cpu", "fp32")


def test_one_file_of_a_repository(served: Hub) -> None:
    served.add("org/files", {"sub/a.safetensors": save({"x": torch.ones(2)}), "b.safetensors": b"other"})
    location = locate.locate_model("org/files/sub/a.safetensors", None, False)
    assert location.path.name == "a.safetensors" and location.path.read_bytes() == save({"x": torch.ones(2)})
    assert served.files() == ["sub/a.safetensors"]
    assert locate.locate_file(f"org/files@{NEW}/sub/a.safetensors") == location
    assert served.files() == ["sub/a.safetensors"]


def test_an_autoencoder_of_its_own_or_of_a_model(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = {name.removeprefix("vae/"): data for name, data in DIGITS.items() if name.startswith("vae/")}
    served.add("org/vae", vae | {"README.md": b"", "diffusion_pytorch_model.bin": b"a pickle"})
    assert locate.locate_vae("org/vae", False).path.name == NEW
    assert sorted(served.files()) == sorted(vae)
    location = locate.locate_vae("org/digits", False)
    assert location.path.name == "vae" and location.hub == HubId("org/digits", NEW)
    assert sorted(served.files()) == sorted([*vae, "vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
    set_offline(monkeypatch)
    seen = len(served.seen)
    pipe = Pipeline.from_pretrained(BUNDLED["digits"], "cpu", "fp32", vae="org/vae")
    assert locate.locate_vae("org/digits", False) == location
    assert pipe.vae_source is not None and pipe.vae_source.hub == HubId("org/vae", NEW)
    assert len(served.seen) == seen


def test_a_controlnet_and_the_other_commands(served: Hub, capsys: Any) -> None:
    from fastsd.cli import main

    weights = "diffusion_pytorch_model.safetensors"
    served.add("org/control", {"config.json": b"{}", weights: b"", "control_canny.pth": b"", "images/bird.png": b""})
    location = locate.locate_controlnet("org/control", True)
    assert location.hub == HubId("org/control", NEW)
    assert sorted(path.name for path in location.path.iterdir()) == ["config.json", weights]
    assert main(["convert", "org/digits", "folder", "--dtype", "fp16"]) == 0
    assert Pipeline.from_pretrained("folder", "cpu", "fp32").components.sample_size == 8
    served.add("org/files", {"a.safetensors": save({"x": torch.ones(2)})})
    capsys.readouterr()
    assert main(["inspect", "org/files/a.safetensors"]) == 0
    assert "1 tensors" in capsys.readouterr().out
