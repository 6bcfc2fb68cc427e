"""Models by their hub id, against a local server that speaks its protocol: what is fetched, kept, asked and said."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fastsd.errors import FastsdError
from fastsd.image.files import read_text
from fastsd.image.metadata import read_texts
from fastsd.pipeline import BUNDLED, Pipeline
from fastsd.weights.hub import hub_id
from fastsd.weights.hub import locate as hub
from tests.support.hub_server import Hub, offline, serving, taken_for_the_hub

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[3]
OLD, NEW = "a" * 40, "c" * 40
DIGITS = {path.relative_to(BUNDLED).as_posix(): path.read_bytes() for path in BUNDLED.rglob("*") if path.is_file()}
# What repositories hold beside that, and what is not to be fetched.
BESIDE = {
    "README.md": b"# digits",
    "digits.safetensors": b"a single-file copy",
    "digits.ckpt": b"a pickle",
    "unet/diffusion_pytorch_model.bin": b"a pickle",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"other weights",
    "text_encoder/flax_model.msgpack": b"another framework's",
    "vae/model.onnx": b"another framework's",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"not used",
    "feature_extractor/preprocessor_config.json": b"{}",
}
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]


def half(data: bytes) -> bytes:
    """The fp16 variant of a weight file."""
    from safetensors.torch import load

    return save({key: tensor.half() for key, tensor in load(data).items()})


def sharded(files: dict[str, bytes], stem: str) -> dict[str, bytes]:
    """The files with one network's weights in two shards."""
    from safetensors.torch import load

    tensors = load(files[f"{stem}.safetensors"])
    folder, _, name = stem.rpartition("/")
    keys = sorted(tensors)
    parts = {f"{name}-00001-of-00002.safetensors": keys[::2], f"{name}-00002-of-00002.safetensors": keys[1::2]}
    index = {"metadata": {}, "weight_map": {key: part for part, inside in parts.items() for key in inside}}
    found = {name: data for name, data in files.items() if name != f"{stem}.safetensors"}
    found |= {f"{folder}/{part}": save({key: tensors[key] for key in inside}) for part, inside in parts.items()}
    return found | {f"{stem}.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for the hub, with an empty cache, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with taken_for_the_hub(monkeypatch, tmp_path) as found:
        found.add("org/digits", DIGITS | BESIDE)
        yield found


def model(text: str, revision: str | None = None, halved: bool = False) -> Path:
    return hub.locate_model(text, revision, halved).path


# What is an id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", hub_id.HubId("org/name")),
        ("o.r-g_1/na.me-2_x", hub_id.HubId("o.r-g_1/na.me-2_x")),
        ("org/name@v1.5", hub_id.HubId("org/name", "v1.5")),
        ("org/name@refs/pr/1", hub_id.HubId("org/name", "refs/pr/1")),
        ("org/name/a b.safetensors", hub_id.HubId("org/name", None, "a b.safetensors")),
        ("org/name@fp16/sub/a.safetensors", hub_id.HubId("org/name", "fp16", "sub/a.safetensors")),
        *((path, None) for path in ("name", "./org/name", "../org/name", "/org/name", "~/name", "org/name/", "")),
        *((path, None) for path in ("org/name.safetensors", "org/name.ckpt", "models/sd/v1.5", "org/name/a.ckpt")),
        *((path, None) for path in ("org/name.git", f"org/{'n' * 97}", "org/name/./a.safetensors")),
        ("org/name/c:a.safetensors", None),
        *((path, None) for path in ("org/na..me", "or--g/name", "-org/name", "org/name.", "org/ä", "org/name@../x")),
        *((path, None) for path in ("org/name/../a.safetensors", "org/name//a.safetensors", "org/name@", "org\\name")),
    ],
)
def test_what_an_id_looks_like(text: str, expected: hub_id.HubId | None) -> None:
    assert hub_id.parse_hub_id(text) == expected
    assert expected is None or str(expected) == text


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.from_regex(r"[\w./@-]{0,9}/[\w.-]{0,9}(@[\w./-]{0,9})?(/[^\0]{0,9}\.safetensors)?", fullmatch=True))
def test_an_id_is_one_for_huggingface_hub_too(served: Hub, text: str) -> None:
    """What it would complain about by an exception of its own is a path to us; and none leaves the cache."""
    from huggingface_hub.utils import validate_repo_id

    wanted = hub_id.parse_hub_id(text)
    if wanted is not None:
        validate_repo_id(wanted.repo)
        for cached in (hub.is_cached(wanted), hub.is_cached(hub_id.HubId(wanted.repo, NEW, wanted.file), vae=True)):
            assert not cached
        assert str(wanted) == text and ".." not in Path(text).parts


def test_what_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id.parse_hub_id("org/name") is not None
    assert hub_id.parse_hub_id(Path("org/name")) is None
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub_id.parse_hub_id("org/name") is None
    assert hub.locate_model("org/name", None, False) == hub_id.ModelLocation(Path("org/name"))


def test_revisions_that_cannot_be() -> None:
    assert (
        hub_id.parse_hub_id("org/name", "v1")
        == hub_id.parse_hub_id("org/name@v1", "v1")
        == hub_id.HubId("org/name", "v1")
    )
    for text, revision in (("org/name@v1", "v2"), ("./here", "v1"), ("org/name", "../x"), ("org/name", "a b")):
        with pytest.raises(FastsdError, match="^revision: "):
            hub_id.parse_hub_id(text, revision)


# What is fetched


def test_only_what_is_needed_is_fetched_and_once(served: Hub) -> None:
    place = hub.locate_model("org/digits", None, False)
    assert place.hub == hub_id.HubId("org/digits", NEW)
    assert sorted(served.files()) == sorted(DIGITS)
    assert {path.relative_to(place.path).as_posix(): path.read_bytes() for path in place.path.rglob("*.*")} == DIGITS
    seen = len(served.seen)
    assert hub.locate_model("org/digits", None, False) == place
    assert [(verb, path) for verb, path, _ in served.seen[seen:]] == [("GET", "/api/models/org/digits")]


def test_a_model_by_its_id_draws_what_its_folder_draws(served: Hub) -> None:
    pipe = Pipeline.from_pretrained("org/digits", "cpu", "fp32")
    assert pipe.components.name == "digits" and pipe.source is not None and pipe.source.hub is not None
    arguments: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
    expected = Pipeline.from_pretrained(BUNDLED, "cpu", "fp32")("a thick eight", **arguments)
    np.testing.assert_array_equal(pipe("a thick eight", **arguments).images, expected.images)


@pytest.mark.parametrize("halved", [False, True])
def test_the_variant_that_the_precision_reads(served: Hub, halved: bool) -> None:
    variants = {f"{stem}.fp16.safetensors": half(DIGITS[f"{stem}.safetensors"]) for stem in WEIGHTS}
    served.add("org/digits", DIGITS | variants)
    root = model("org/digits", halved=halved)
    ending = ".fp16.safetensors" if halved else ".safetensors"
    assert sorted(n for n in served.files() if n.endswith(".safetensors")) == [stem + ending for stem in WEIGHTS]
    assert len(list(root.rglob("*.safetensors"))) == len(WEIGHTS)


def test_full_weights_are_fetched_although_half_ones_are_there(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {f"{stem}.fp16.safetensors": half(DIGITS[f"{stem}.safetensors"]) for stem in WEIGHTS}
    served.add("org/digits", DIGITS | variants)
    model("org/digits", NEW, halved=True)
    model("org/digits", NEW)
    assert {f"{stem}.safetensors" for stem in WEIGHTS} <= set(served.files())
    seen = len(served.seen)
    model("org/digits", NEW)
    assert len(served.seen) == seen


def test_shards_are_fetched_through_their_index(served: Hub) -> None:
    files = sharded(DIGITS, "unet/diffusion_pytorch_model")
    served.add("org/digits", files | BESIDE | {"unet/diffusion_pytorch_model-00001-of-00007.safetensors": b"stray"})
    root = model("org/digits")
    assert sorted(served.files()) == sorted(files)
    Pipeline.from_pretrained(root, "cpu", "fp32")


def test_one_file_of_a_repository(served: Hub) -> None:
    served.add("org/files", {"sub/a.safetensors": save({"x": torch.ones(2)}), "b.safetensors": b"other"})
    place = hub.locate_model("org/files/sub/a.safetensors", None, False)
    assert place.path.name == "a.safetensors" and place.path.read_bytes() == save({"x": torch.ones(2)})
    assert served.files() == ["sub/a.safetensors"]
    assert hub.locate_file(f"org/files@{NEW}/sub/a.safetensors") == place
    assert served.files() == ["sub/a.safetensors"]


def test_a_single_file_draws_and_is_remembered(served: Hub, originals: Any) -> None:
    """By its place in the repository, and by its hash, which is its name in huggingface_hub's cache."""
    from fastsd.cli import main

    data = originals.file("sd1").read_bytes()
    served.add("org/files", {"sub/a.safetensors": data, "sub/b.safetensors": data[:-4] + b"\0" * 4})
    given = "org/files/sub/a.safetensors"
    base = ["--steps", "1", "-W", "64", "-H", "64", "-s", "1"]
    assert main(["-p", "x", "-m", given, *base, "-o", "a.png"]) == 0
    assert served.files() == ["sub/a.safetensors"]
    texts = read_text("a.png")
    own = read_texts(texts)[0]
    assert (own["model"], own["model_path"], own["revision"]) == ("a", given, NEW)
    assert f"Model hash: {hashlib.sha256(data).hexdigest()[:10]}, Model: a, " in texts["parameters"]
    seen = len(served.seen)
    assert main(["--from-image", "a.png", "-o", "b.png"]) == 0
    assert read_text("b.png") == texts and len(served.seen) == seen


def test_an_autoencoder_of_its_own_or_of_a_model(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name.removeprefix("vae/"): data for name, data in DIGITS.items() if name.startswith("vae/")}
    served.add("org/vae", own | {"README.md": b"", "diffusion_pytorch_model.bin": b"a pickle"})
    assert hub.locate_vae("org/vae", False).path.name == NEW
    assert sorted(served.files()) == sorted(own)
    place = hub.locate_vae("org/digits", False)
    assert place.path.name == "vae" and place.hub == hub_id.HubId("org/digits", NEW)
    assert sorted(served.files()) == sorted([*own, "vae/config.json", "vae/diffusion_pytorch_model.safetensors"])
    offline(monkeypatch)
    seen = len(served.seen)
    pipe = Pipeline.from_pretrained(BUNDLED, "cpu", "fp32", vae="org/vae")
    assert hub.locate_vae("org/digits", False) == place
    assert pipe.vae_source is not None and pipe.vae_source.hub == hub_id.HubId("org/vae", NEW)
    assert len(served.seen) == seen


def test_a_controlnet_and_files_for_the_other_commands(served: Hub, tmp_path: Path, capsys: Any) -> None:
    from fastsd.cli import main

    weights = "diffusion_pytorch_model.safetensors"
    served.add("org/control", {"config.json": b"{}", weights: b"", "control_canny.pth": b"", "images/bird.png": b""})
    place = hub.locate_controlnet("org/control", True)
    assert place.hub == hub_id.HubId("org/control", NEW)
    assert sorted(path.name for path in place.path.iterdir()) == ["config.json", weights]
    assert main(["convert", "org/digits", "folder", "--dtype", "fp16"]) == 0
    assert Pipeline.from_pretrained("folder", "cpu", "fp32").components.sample_size == 8
    served.add("org/files", {"a.safetensors": save({"x": torch.ones(2)})})
    capsys.readouterr()
    assert main(["inspect", "org/files/a.safetensors"]) == 0
    assert "1 tensors" in capsys.readouterr().out


def test_progress_shows_on_a_terminal_only(served: Hub, tmp_path: Path) -> None:
    """The command line's test sees none without one."""
    import fcntl
    import pty
    import struct
    import termios

    environment = os.environ | {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"HF_ENDPOINT": served.url, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # of no size, tqdm shows nothing
    code = "from fastsd.weights.hub.locate import locate_file; locate_file('org/digits/digits.safetensors')"
    subprocess.run([sys.executable, "-c", code], env=environment, stderr=theirs, check=True, timeout=60)
    assert b"digits.safetensors: 100%" in os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)


# Revisions


def test_a_branch_moves_and_a_commit_does_not(served: Hub) -> None:
    note = {"scheduler/scheduler_config.json": DIGITS["scheduler/scheduler_config.json"] + b"\n"}
    served.repositories.clear()
    served.add("org/digits", DIGITS, OLD)
    first = model("org/digits")
    served.add("org/digits", DIGITS | note, NEW)
    served.repositories["org/digits"].refs["v1"] = OLD
    fetched = len(served.files())
    assert model("org/digits").name == NEW
    assert len(served.files()) == fetched + 1  # the one that changed
    seen = len(served.seen)
    assert model(f"org/digits@{OLD}") == model("org/digits", OLD) == first
    assert len(served.seen) == seen  # a commit that is whole in the cache is not asked for
    assert model("org/digits@v1") == model("org/digits", "v1") == first
    assert hub.locate_model("org/digits@v1", None, False).hub == hub_id.HubId("org/digits", OLD)


# Offline


def test_a_cached_model_loads_without_any_request(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    place = hub.locate_model("org/digits", None, False)
    offline(monkeypatch)
    seen = len(served.seen)
    assert Pipeline.from_pretrained("org/digits", "cpu", "fp32").source == place
    assert hub.locate_model("org/digits", NEW, True) == place
    assert hub.is_cached(hub_id.HubId("org/digits")) and not hub.is_cached(hub_id.HubId("org/digits", OLD))
    assert len(served.seen) == seen


def test_a_cached_model_loads_where_the_hub_is_down(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    root = model("org/digits")
    served.status = 503
    assert model("org/digits") == root
    served.status = 0
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    assert model("org/digits") == root
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert model("org/digits") == root


def test_half_a_download_is_no_model(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer commit that came only in part leaves the older one in use; what has come is not fetched again."""
    served.repositories.clear()
    served.add("org/digits", DIGITS, OLD)
    old = model("org/digits")
    served.add("org/digits", {name: data + (b"\n" if name.endswith(".json") else b"") for name, data in DIGITS.items()})
    name = "unet/diffusion_pytorch_model.safetensors"
    served.repositories["org/digits"].commits[NEW][name] = DIGITS[name][:-4] + b"\0" * 4
    served.breaks = {name: 99}
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(FastsdError, match="the bytes that arrived are kept"):
        model("org/digits")
    with monkeypatch.context() as patch:
        offline(patch)
        assert model("org/digits") == old
        with pytest.raises(FastsdError, match="does not hold it completely"):
            model("org/digits", NEW)
    served.breaks, before = {}, len(served.files())
    assert model("org/digits").name == NEW
    assert served.files()[before:] == [name]


def test_a_broken_download_goes_on_where_it_broke(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the chunk: what huggingface_hub has not written yet comes again."""
    from huggingface_hub import constants

    name, chunk = "unet/diffusion_pytorch_model.safetensors", 2**16
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    served.breaks = {name: 2}
    root = model("org/digits")
    assert (root / name).read_bytes() == DIGITS[name]
    size = len(DIGITS[name])
    first = size // 2 // chunk * chunk
    second = first + (size - first) // 2 // chunk * chunk
    ranges = [headers.get("range") for verb, path, headers in served.seen if verb == "GET" and path.endswith(name)]
    assert ranges == [None, f"bytes={first}-", f"bytes={second}-"]


# What is said


def refused(text: str, *said: str, revision: str | None = None) -> str:
    with pytest.raises(FastsdError) as caught:
        hub.locate_model(text, revision, False)
    message = str(caught.value)
    assert message.startswith(f"{text}: ") and "\n" not in message, message
    for words in said:
        assert words in message
    return message


def test_errors_are_one_line(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
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
        model("org/outside")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "MAX_JSON", 1000)
        fetched = len(served.files())
        refused("org/digits", "bytes; no config has more than 1000")
        assert len(served.files()) == fetched
    served.status = 500
    refused("org/digits", f"{served.url} answers 500")
    served.status = None
    offline(monkeypatch)
    refused("org/digits", "HF_HUB_OFFLINE is set")


def test_no_network(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("org/digits", "http://127.0.0.1:9 cannot be reached", "does not hold it completely")


def test_the_command_line_names_the_flag(served: Hub, capsys: Any) -> None:
    from fastsd.cli import main

    served.add("org/ink", {"ink.safetensors": save({"ink": torch.zeros(1, 64)})})
    for flag in ("--lora", "--embedding", "--vae"):
        assert main(["-p", "x", flag, "org/none/ink.safetensors", "-o", "x.png"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"fastsd: error: {flag} org/none/ink.safetensors: no such path here"), error
    assert served.files() == []
    assert (
        main(["-p", "a thick eight, ink", "--steps", "1", "--embedding", "org/ink/ink.safetensors", "-o", "x.png"]) == 0
    )
    assert served.files() == ["ink.safetensors"]


def test_what_is_no_hub(served: Hub) -> None:
    served.add("org/digits", {})
    served.status = 200  # an empty page for everything
    refused("org/digits", "does not answer like a hub")


def test_without_the_extra(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/digits", "pip install huggingface_hub")
    assert not hub.is_cached(hub_id.HubId("org/digits"))
    assert served.seen == []


@pytest.mark.parametrize("kept", [False, True])
def test_a_token_opens_what_is_private(
    served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool
) -> None:
    """The one that HF_TOKEN names, or the one that a login left."""
    served.add("org/private", DIGITS, token="hf_right")
    if kept:
        (tmp_path / "token").write_text("hf_right")
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert model("org/private").name == NEW


def test_too_little_room_is_found_before_the_download(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    free = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: free)
    refused("org/digits", "GiB free", "HF_HOME")
    assert served.files() == []


def test_a_full_disk(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    refused("org/digits", "no space is left")


def test_the_memory_check_comes_before_the_weights(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsd.runtime.memory.available", lambda device: 1000)
    monkeypatch.setattr("fastsd.pipeline.load_checkpoint", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(FastsdError, match="the weights take"):
        Pipeline.from_pretrained("org/digits", "cpu", "fp32")


# The whole, as a user runs it


def test_the_command_line(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are huggingface_hub's, and nothing else is written to."""
    with serving() as served:
        served.add("org/digits", DIGITS | BESIDE, token="hf_x")
        ours = ("HF_", "TRANSFORMERS_", "FASTSD_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path / "home")}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT), "HF_TOKEN": "hf_x"}
        (tmp_path / "home").mkdir()

        def draw(*words: str, **more: str) -> tuple[int, str]:
            command = [sys.executable, "-m", "fastsd", "-p", "a thick eight", "--steps", "1", "-s", "1", *words]
            done = subprocess.run(command, cwd=tmp_path, env=environment | more, capture_output=True, text=True)
            return done.returncode, done.stderr

        assert draw("-m", "org/digits", "--revision", "main", "-o", "a.png") == (0, "")
        assert sorted(served.files()) == sorted(DIGITS)
        seen = len(served.seen)
        assert draw("-m", "org/digits", "-o", "b.png", HF_HUB_OFFLINE="1") == (0, "")
        assert len(served.seen) == seen
        assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png", "hf", "home"] and os.listdir(tmp_path / "home") == []
