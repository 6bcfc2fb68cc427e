"""What an image remembers of its model: the hub's id and commit, the autoencoder, what the network predicts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load, load_file, save, save_file

from tests.support import tiny
from tests.support.cli import pixels, refused, settings, write_image
from tests.support.hub_server import Hub, local_hub

pytestmark = pytest.mark.heavy

OLD, NEW = "a" * 40, "c" * 40


def files(model: Path, brighter: float = 0.0) -> dict[str, bytes]:
    """A model's files by their names in a repository, whose images are brighter by so much."""
    found = {path.relative_to(model).as_posix(): path for path in model.rglob("*") if path.is_file()}
    data = {name: path.read_bytes() for name, path in found.items()}
    if brighter:
        name = "vae/diffusion_pytorch_model.safetensors"
        weights = load(data[name])
        weights["decoder.conv_out.bias"] += brighter
        data[name] = save(weights)
    return data


@pytest.fixture
def vae(model: Path, tmp_path: Path) -> Path:
    """An autoencoder of its own, whose images are brighter."""
    folder = tmp_path / "bright"
    shutil.copytree(model / "vae", folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub")
    with local_hub(monkeypatch, tmp_path) as hub:
        yield hub


def test_the_autoencoder_is_remembered(cli: Callable, model: Path, vae: Path, tmp_path: Path) -> None:
    base = ("-p", "x", "-s", 1)
    own = cli(*base, "-m", model, "-o", "own.png")
    first = cli(*base, "-m", model, "--vae", vae, "-o", "a.png")
    assert (pixels(first.paths[0]) != pixels(own.paths[0])).any()
    stored = settings(first.paths[0])["vae"]
    assert (stored["name"], stored["path"]) == ("bright", str(vae)) and len(stored["fingerprint"]) == 16
    again = cli("--from-image", "a.png", "-o", "b.png")
    assert (again.code, again.err) == (0, "")
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    assert settings(again.paths[0]) == settings(first.paths[0])
    shutil.copytree(model, tmp_path / "moved")  # the same model elsewhere keeps it
    assert cli("--from-image", "a.png", "-m", tmp_path / "moved", "-o", "c.png").err == ""
    np.testing.assert_array_equal(pixels(Path("c.png")), pixels(first.paths[0]))
    other = cli("--from-image", "a.png", "--vae", model / "vae", "-o", "d.png")
    assert "the autoencoder is not the one that generated the image ('bright')" in other.err
    other = cli("--from-image", "own.png", "--vae", vae, "-o", "e.png")
    assert "the autoencoder is not the one that generated the image (the model's own)" in other.err
    shutil.rmtree(vae)
    refused(cli("--from-image", "a.png", "-o", "f.png"), "--from-image a.png", f"--vae {str(vae)!r}; give it again")


def test_another_model_does_not_take_the_autoencoder_with_it(cli: Callable, model: Path, vae: Path) -> None:
    cli("-p", "x", "-s", 1, "-m", model, "--vae", vae, "--prediction", "v_prediction", "-o", "a.png")
    other = cli("--from-image", "a.png", "-m", "digits", "--steps", 1, "-o", "b.png")
    assert other.code == 0 and "vae" not in settings(Path("b.png")) and "prediction" not in settings(Path("b.png"))
    for said in (
        "the model is not the one",
        "the autoencoder is not the one",
        "generated with --prediction 'v_prediction'",
    ):
        assert said in other.err


def test_what_the_network_predicts_is_remembered(cli: Callable, model: Path) -> None:
    first = cli("-p", "x", "-s", 1, "-m", model, "--prediction", "v_prediction", "-o", "a.png")
    again = cli("--from-image", "a.png", "-o", "b.png")
    assert (again.code, again.err) == (0, "") and settings(again.paths[0])["prediction"] == "v_prediction"
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    other = cli("--from-image", "a.png", "--prediction", "epsilon", "-o", "c.png")
    assert "the image was generated with --prediction 'v_prediction'" in other.err
    assert (pixels(other.paths[0]) != pixels(first.paths[0])).any()


def test_a_hub_model_is_remembered_by_its_id_and_commit(
    cli: Callable, model: Path, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.add("org/tiny", files(model), OLD)
    first = cli("-p", "x", "-s", 1, "-m", "org/tiny", "--vae", "org/tiny", "-o", "a.png")
    assert (first.code, first.err) == (0, "")
    stored = settings(first.paths[0])
    assert (stored["model"], stored["model_path"], stored["revision"]) == ("tiny", "org/tiny", OLD)
    assert stored["vae"] == {"name": "tiny", "path": "org/tiny", "revision": OLD}
    served.add("org/tiny", files(model, brighter=0.5), NEW)
    seen = len(served.seen)
    again = cli("--from-image", "a.png", "-o", "b.png")
    assert (again.code, again.err) == (0, "") and settings(again.paths[0]) == stored
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    assert cli("--from-image", "a.png", "-m", "org/tiny", "-o", "c.png").err == ""
    assert len(served.seen) == seen  # the commit is in the cache
    newer = cli("--from-image", "a.png", "-m", "org/tiny", "--revision", "main", "-o", "d.png")
    assert "the model is not the one that generated the image ('tiny' at aaaaaaaaaaaa)" in newer.err
    assert settings(newer.paths[0])["revision"] == NEW
    local = cli("--from-image", "a.png", "-m", model, "-o", "e.png")
    assert "the model is not the one that generated the image ('tiny' at aaaaaaaaaaaa)" in local.err


def test_a_controlnet_of_the_hub_is_remembered(cli: Callable, model: Path, served: Hub, tmp_path: Path) -> None:
    weights = {seed: save(tiny.controlnet(tiny.UNET, seed=seed)) for seed in (0, 1)}
    served.add("org/net", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": weights[0]}, OLD)
    served.repositories["org/net"].refs["v1"] = OLD
    Image.new("RGB", (64, 64), "red").save(tmp_path / "map.png")
    words = ("--control-image", tmp_path / "map.png")
    first = cli("-p", "x", "-s", 1, "-m", model, "--control", "org/net", *words, "-o", "a.png")
    assert (first.code, first.err) == (0, "")
    stored = settings(first.paths[0])["controls"][0]
    assert (stored["name"], stored["path"], stored["revision"]) == ("net", "org/net", OLD)
    served.add("org/net", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": weights[1]}, NEW)
    again = cli("--from-image", "a.png", "--control", "org/net@v1", *words, "-o", "b.png")
    assert (again.code, again.err) == (0, "")
    np.testing.assert_array_equal(pixels(again.paths[0]), pixels(first.paths[0]))
    other = cli("--from-image", "a.png", "--control", "org/net", *words, "-o", "c.png")
    assert "--control is another file than 'net'" in other.err


def test_nothing_is_fetched_because_an_image_says_so(cli: Callable, model: Path, served: Hub, tmp_path: Path) -> None:
    served.add("org/tiny", files(model))

    def refused_for(own: str, *said: str) -> None:
        refused(cli("--from-image", write_image(tmp_path / "a.png", fastsd=own)), *said)

    id, commit = '"prompt": "x", "version": "1", "model_path": "org/tiny"', f'"revision": "{NEW}"'
    refused_for(f"{{{id}, {commit}}}", "the hub's 'org/tiny'; fetch it with", f"--model org/tiny --revision {NEW}")
    refused_for(f"{{{id}}}", "the model 'org/tiny'", "--model")
    refused_for(f'{{{id}, "revision": "../../x"}}', "fetch it with")
    vae = f'"vae": {{"path": "org/tiny", {commit}}}'
    refused_for(f'{{"prompt": "x", "version": "1", "model_path": "digits", {vae}}}', "--vae 'org/tiny'")
    refused_for('{"prompt": "x", "version": "1", "model_path": "digits", "vae": {"path": [1]}}', "--vae '[1]'")
    assert served.seen == []
    assert cli("-p", "x", "-m", "org/tiny", "-o", "b.png").code == 0
    seen = len(served.seen)
    assert cli("--from-image", write_image(tmp_path / "a.png", fastsd=f"{{{id}, {commit}}}"), "-o", "c.png").code == 0
    refused_for(f'{{{id}, "revision": "main"}}', "fetch it with")
    assert len(served.seen) == seen
