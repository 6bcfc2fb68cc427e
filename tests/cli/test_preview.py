"""--preview and --vae taesd on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastsd.cli import preview
from fastsd.config import TAESDConfig
from fastsd.model.taesd import TAESD
from fastsd.pipeline import Pipeline, Step
from tests.support.cli import pixels, refused

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder's file; the encoder's is beside it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("taesd")
    module = TAESD(TAESDConfig(block_out_channels=(8,) * 4))
    for side, shift in (("encoder", 0), ("decoder", 1)):
        half = {}
        for key, value in getattr(module, side).state_dict().items():
            number, rest = key.removeprefix("layers.").split(".", 1)
            half[f"{int(number) + shift}.{rest}"] = value
        save_file(half, folder / f"taesd_{side}.safetensors")
    return folder / "taesd_decoder.safetensors"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bytes, int]]:
    """Every preview that is written: where, what, and of which step."""
    seen: list[tuple[Path, bytes, int]] = []
    show = preview.Preview.show

    def watch(self: preview.Preview, step: Step) -> Path | None:
        new = show(self, step)
        if self.path is not None:
            seen.append((self.path, self.path.read_bytes(), step.index))
        return new

    monkeypatch.setattr(preview.Preview, "show", watch)
    return seen


def test_every_n_steps_a_whole_image_that_is_gone_at_the_end(cli: Callable, model: Path, shown: list) -> None:
    ran = cli("-p", "x", "-m", model, "--steps", 5, "-s", 1, "--dtype", "fp32", "--preview", 2, "-o", "a.png")
    assert (ran.code, ran.paths) == (0, [Path("a.png")])
    assert ran.err == "note: a preview is in a.preview.png until the image is done\n"
    assert [(path, index) for path, _, index in shown] == [(Path("a.preview.png"), i) for i in (2, 3, 4, 5)]
    assert shown[0][1] == shown[1][1] != shown[2][1] == shown[3][1]  # the last step's is the image itself
    steps = list(Pipeline.from_pretrained(model, dtype="fp32").stream("x", num_inference_steps=5, seed=1))
    for at, index in ((0, 2), (2, 4)):
        Path("shown.png").write_bytes(shown[at][1])
        assert np.array_equal(pixels(Path("shown.png")), np.asarray(steps[index - 1].preview()))
    assert not Path("a.preview.png").exists()
    plain = cli("-p", "x", "-m", model, "--steps", 5, "-s", 1, "--dtype", "fp32", "-o", "b.png")
    assert plain.err == "" and np.array_equal(pixels(Path("a.png")), pixels(Path("b.png")))


def test_a_name_that_is_taken_is_left_alone(cli: Callable, model: Path, shown: list) -> None:
    Path("out").mkdir()
    for name in ("preview.png", "preview-1.png"):
        Path("out", name).write_text("mine")
    ran = cli("-p", "x", "-m", model, "--count", 2, "-b", 1, "--preview", 1, "-o", "out")
    assert ran.code == 0 and {path for path, _, _ in shown} == {Path("out/preview-2.png")}
    assert Path("out/preview.png").read_text() == Path("out/preview-1.png").read_text() == "mine"
    assert sorted(path.name[:5] for path in Path("out").iterdir()) == ["00000", "00001", "previ", "previ"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device"), 2, "error: --preview: cannot write beside out: the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_it_is_gone_after_a_failure_too(
    cli: Callable, model: Path, shown: list, monkeypatch: Any, error: BaseException, code: int, said: str
) -> None:
    write, done = preview.write_whole, []

    def full(path: Path, data: bytes, overwrite: bool = False) -> None:
        if len(done) == 2:
            raise error
        done.append(path)
        write(path, data, overwrite)

    monkeypatch.setattr(preview, "write_whole", full)
    ran = cli("-p", "x", "-m", model, "--steps", 5, "--preview", 1, "-o", "out")
    assert (ran.code, ran.out) == (code, "") and len(shown) == 2
    assert ran.err.splitlines()[1:] == [f"fastsd: {said}"]
    assert not Path("out").exists()


def test_previews_by_taesd(cli: Callable, model: Path, taesd: Path, shown: list) -> None:
    words = ("-p", "x", "-m", model, "--steps", 3, "-s", 1, "--dtype", "fp32", "--preview", 2, "-o")
    assert cli(*words, "own.png").code == 0
    assert cli(*words, "tiny.png", "--preview-decoder", taesd).code == 0
    assert np.array_equal(pixels(Path("own.png")), pixels(Path("tiny.png")))
    assert shown[0][1] != shown[-1][1]


@pytest.mark.parametrize("words", [("--vae", "taesd"), ("--vae",)])
def test_taesd_as_the_autoencoder(cli: Callable, model: Path, taesd: Path, words: tuple[str, ...]) -> None:
    common = ("-p", "x", "-m", model, "-s", 1, "--dtype", "fp32")
    assert cli(*common, "-o", "first.png", *words, taesd).code == 0
    assert cli(*common, "-o", "own.png").code == 0
    pipe = Pipeline.from_pretrained(model, dtype="fp32", vae=taesd)
    assert np.array_equal(pixels(Path("first.png")), np.asarray(pipe("x", seed=1).images[0]))
    assert not np.array_equal(pixels(Path("first.png")), pixels(Path("own.png")))
    assert cli(*common, "-o", "again.png", *words, taesd, "--image", "first.png", "--vae-tiling").code == 0


def test_a_decoder_alone_and_an_image_to_start_from(cli: Callable, model: Path, taesd: Path) -> None:
    alone = Path("alone.safetensors")
    alone.write_bytes(taesd.read_bytes())
    Image.new("RGB", (64, 64)).save("a.png")
    assert cli("-p", "x", "-m", model, "--vae", alone, "-o", "b.png").code == 0
    ran = cli("-p", "x", "-m", model, "--vae", alone, "-o", "c.png", "--image", "a.png")
    refused(ran, "--image: the autoencoder is only TAESD's decoder", "its encoder beside")


def test_what_is_refused(cli: Callable, model: Path, taesd: Path) -> None:
    common = ("-p", "x", "-m", model)
    full = model / "vae"
    refused(cli(*common, "--vae", "taesd", full), f"--vae taesd {full}: not TAESD")
    refused(cli(*common, "--vae", "taesd"), "--vae: takes a file, a folder or a hub id; or the word taesd and one")
    refused(cli(*common, "--vae", taesd, taesd), "--vae: takes a file, a folder or a hub id; or the word taesd and one")
    refused(cli(*common, "--vae", "taesd", taesd, taesd), "--vae: takes a file")
    refused(cli(*common, "--preview-decoder", taesd), "--preview-decoder: given without --preview")
    refused(cli(*common, "--preview", 1, "--preview-decoder", full), f"--preview-decoder {full}: not TAESD")
    refused(cli(*common, "--preview", 1, "--preview-decoder", "none"), "--preview-decoder none: no such")
    refused(cli(*common, "--preview", 0), "--preview is '0'; it should be a whole number from 1")
    Path("taesd").mkdir()
    refused(cli(*common, "--vae", "taesd"), "--vae taesd/config.json: cannot be read")
