"""Everything that can go wrong with the hub is one line that says what to do."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fastsd.errors import FastsdError
from fastsd.weights.hub import locate
from fastsd.weights.hub.hub_id import HubId
from tests.support.hub import DIGITS, model_path, sharded
from tests.support.hub_server import Hub, set_offline

Refused = Callable[..., None]


def test_repositories_that_cannot_be_used(served: Hub, refused: Refused) -> None:
    served.add("org/gated", DIGITS, gated=True)
    served.add("org/private", DIGITS, token="hf_right")
    served.add("org/single", {"a.safetensors": b"", "b.safetensors": b"", "README.md": b""})
    served.add("org/pickles", {name: b"" for name in DIGITS if not name.endswith(".safetensors")})
    served.add("org/other", {"model_index.json": b"{}", "transformer/config.json": b"{}"})
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    shards = sharded(DIGITS, "unet/diffusion_pytorch_model")
    served.add("org/shards", {name: data for name, data in shards.items() if "00002-of" not in name})
    served.add("org/outside", shards | {index: b'{"weight_map": {"x": "../../evil.safetensors"}}'})
    refused("org/none", "no such path here and no such repository", served.url, "HF_TOKEN")
    refused("org/private", "if it is private", "`hf auth login`")
    refused("org/gated", "ask for access at", f"{served.url}/org/gated", "HF_TOKEN")
    refused("org/digits@v9", "no revision 'v9'")
    refused("org/digits/none.safetensors", "no such file", "digits.safetensors")
    refused("org/single", "no model_index.json", "a.safetensors, b.safetensors")
    refused("org/pickles", "no text_encoder/model.safetensors", "fastsd reads no other weights")
    refused("org/other", "no unet/")
    refused("org/shards", "00002-of-00002.safetensors", "an index of shards there names it")
    with pytest.raises(FastsdError, match="not the name of a file in the same folder"):
        model_path("org/outside")


def test_a_config_that_is_too_large_is_not_fetched(
    served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "MAX_JSON", 1000)
    refused("org/digits", "bytes; no config has more than 1000")
    assert served.files() == []


def test_a_hub_that_answers_with_an_error(served: Hub, refused: Refused) -> None:
    served.status = 500
    refused("org/digits", f"{served.url} answers 500")


def test_offline_without_the_model(served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    set_offline(monkeypatch)
    refused("org/digits", "HF_HUB_OFFLINE is set")


def test_no_network(served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    refused("org/digits", "http://127.0.0.1:9 cannot be reached", "does not hold it completely")


def test_a_server_that_is_not_a_hub(served: Hub, refused: Refused) -> None:
    served.add("org/digits", {})
    served.status = 200  # an empty page for everything
    refused("org/digits", "does not answer like a hub")


def test_without_huggingface_hub(served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/digits", "pip install huggingface_hub")
    assert not locate.is_cached(HubId("org/digits"))
    assert served.seen == []


def test_too_little_disk_space_is_found_before_the_download(
    served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(locate.shutil, "disk_usage", lambda path: free)
    refused("org/digits", "GiB free", "HF_HOME")
    assert served.files() == []


def test_a_full_disk(served: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    refused("org/digits", "no space is left")


def test_the_command_line_names_the_flag(served: Hub, capsys: Any) -> None:
    from fastsd.cli import main

    served.add("org/ink", {"ink.safetensors": save({"ink": torch.zeros(1, 64)})})
    for flag in ("--lora", "--embedding", "--vae"):
        assert main(["-p", "x", flag, "org/none/ink.safetensors", "-o", "x.png"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastsd: error: {flag} org/none/ink.safetensors: no such path here"), error
    assert served.files() == []
    words = ["-p", "a thick eight, ink", "--steps", "1", "--embedding", "org/ink/ink.safetensors", "-o", "x.png"]
    assert main(words) == 0
    assert served.files() == ["ink.safetensors"]
