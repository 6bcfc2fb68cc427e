"""TAESD's files in every form, and the defects of each half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.model.taesd import TAESD
from fastsd.weights import load_preview, load_vae
from tests.support import taesd_files
from tests.support.folders import edit_json

pytest.importorskip("diffusers", reason="the files are made by diffusers, which is not installed")
FP32 = torch.float32


@pytest.fixture(scope="module")
def theirs() -> Any:
    """diffusers' AutoencoderTiny."""
    torch.manual_seed(0)
    return taesd_files.make()


@pytest.mark.parametrize("form", taesd_files.FORMS)
def test_every_form_of_file(theirs: Any, form: str, tmp_path: Path) -> None:
    path = taesd_files.write(theirs, form, tmp_path / "x")
    ours = load_vae(path, True, FP32, allow_pickle=form == "pickles")
    assert isinstance(ours, TAESD) and ours.config.scaling_factor == 1.0
    expected = theirs.state_dict()
    assert set(ours.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    preview = load_preview(path, 4, FP32, allow_pickle=form == "pickles")
    assert preview.encoder is None
    assert all(torch.equal(value, expected[key]) for key, value in preview.state_dict().items())


def without(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def with_zeros(key: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


BAD = {  # a change of the decoder's file, and the message
    "a key is missing": (without("9.conv.2.bias"), r"9\.conv\.2\.bias \[8\] is missing"),
    "the first is missing": (without("1.weight"), r"the key 1\.weight is missing"),
    "the last is missing": (lambda t: [t.pop(k) for k in ("19.weight", "19.bias")], "is missing|no TAESD decoder has"),
    "an unknown key": (with_zeros("clip.weight", 1), r"clip\.weight \[1\] matches no parameter"),
    "a block too many": (with_zeros("18.conv.6.weight", 8, 8, 3, 3), r"18\.conv\.6\.weight .* matches no parameter"),
    "a bias that no TAESD has": (with_zeros("7.bias", 8), r"7\.bias \[8\] matches no parameter"),
    "a wrong shape": (
        with_zeros("3.conv.0.weight", 8, 8, 1, 1),
        r"3\.conv\.0\.weight is \[8, 8, 1, 1\]; .* \[8, 8, 3, 3\]",
    ),
    "images of four channels": (with_zeros("19.weight", 4, 8, 3, 3), r"19\.weight is \[4, 8, 3, 3\]"),
    "wider than any": (with_zeros("1.weight", 2000, 4, 1, 1), r"1\.weight is \[2000, 4, 1, 1\]; no TAESD"),
    "of no width": (with_zeros("1.weight", 0, 4, 3, 3), r"1\.weight is \[0, 4, 3, 3\]; no TAESD"),
    "too many levels": (
        lambda t: [t.update({f"{n}.weight": torch.zeros(1)}) for n in range(20, 60)],
        "no TAESD decoder has",
    ),
    "integers": (lambda t: t.update({"19.bias": torch.zeros(3, dtype=torch.int32)}), "19.bias is torch.int32"),
    "not a number": (lambda t: t["19.bias"].fill_(float("nan")), r"19\.bias holds NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_decoders(theirs: Any, tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    tensors = {key: value.clone() for key, value in taesd_files.as_author(theirs)["decoder"].items()}
    change(tensors)
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    for load in (lambda: load_vae(path, False, FP32), lambda: load_preview(path, 4, FP32)):
        with pytest.raises(FastsdError, match=rf"x\.safetensors: .*({message})") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_halves_that_do_not_belong_together(theirs: Any, tmp_path: Path) -> None:
    path = taesd_files.write(theirs, "two files", tmp_path)
    encoder = tmp_path / "taesd_encoder.safetensors"
    for other, message in (
        (taesd_files.make(width=4), r"taesd_encoder\.safetensors: the key 0\.weight is \[4, 3, 3, 3\]"),
        (taesd_files.make(latent_channels=16), r"taesd_encoder\.safetensors: the key 14\.weight is \[16, 8, 3, 3\]"),
    ):
        save_file(taesd_files.as_author(other)["encoder"], encoder)
        with pytest.raises(FastsdError, match=message):
            load_vae(path, False, FP32)
    short = {key: value for key, value in taesd_files.as_author(theirs)["encoder"].items() if int(key[:1]) < 6}
    save_file(short, encoder)
    with pytest.raises(FastsdError, match="taesd_encoder.*(levels, the decoder 4|is missing)"):
        load_vae(path, False, FP32)
    assert load_preview(path, 4, FP32).encoder is None  # a preview does not read the encoder
    save_file({"a": torch.ones(1)}, encoder)  # not an encoder
    assert load_vae(path, False, FP32).encoder is None
    path.unlink()
    save_file(taesd_files.as_author(theirs)["encoder"], encoder)
    for load in (lambda: load_vae(encoder, False, FP32), lambda: load_preview(encoder, 4, FP32)):
        with pytest.raises(FastsdError, match="only TAESD's encoder; give the file of its decoder"):
            load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is 4"),
        ({"shift_factor": 0.1}, "shift_factor is 0.1"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"decoder_block_out_channels": [8, 8, 8, 16]}, "decoder_block_out_channels is .* the same width"),
        ({"encoder_block_out_channels": [2**20] * 4}, "encoder_block_out_channels is .* from 1 to 1024"),
        ({"num_decoder_blocks": [3, 3, 3, 10**6]}, "num_decoder_blocks is .* from 0 to 16"),
        ({"num_encoder_blocks": [1, 3]}, "num_encoder_blocks is .* list of 4"),
        ({"num_decoder_blocks": None}, "num_decoder_blocks is None"),
    ],
)
def test_bad_configs(theirs: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    theirs.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    with pytest.raises(FastsdError, match=rf"config\.json: {message}"):
        load_vae(tmp_path, False, FP32)
