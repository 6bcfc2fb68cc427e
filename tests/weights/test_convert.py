"""Converting and converting back preserves every bit; nothing is overwritten, half written or lost without a note."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.model.unet import UNet
from fastsd.weights import convert as convert_module
from fastsd.weights import load_folder, load_single_file, save_folder
from fastsd.weights.convert import convert
from fastsd.weights.layouts.names import sources
from fastsd.weights.layouts.save import weights_file, write_configs
from tests.support import original
from tests.support.folders import edit_json
from tests.support.sparse import write_zeros
from tests.support.tiny import all_weights, assert_same


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's weight files, by network and key."""
    tensors = {}
    for network in ("unet", "vae", "text_encoder", "text_encoder_2"):
        path = folder / weights_file(network)
        if path.exists():
            tensors |= {f"{network}.{key}": value for key, value in load_file(path).items()}
    return tensors


@pytest.mark.parametrize("family", [*original.FAMILIES, "sd1 inpainting", "sdxl InstructPix2Pix", "sd2 depth"])
def test_folder_to_file_and_back(originals: Any, family: str, tmp_path: Path) -> None:
    """The single file holds what the tests' own writer writes, and marker keys."""
    folder = originals.folder(family)
    convert(folder, tmp_path / "x.safetensors")
    expected = {key: value for key, value in originals.tensors(family).items() if not key.endswith("logit_scale")}
    tiny = original.FAMILIES[family.split(" ")[0]]
    if tiny.truncated:  # the folder lacks the last layer and the projection
        last = f"{tiny.texts[0][1]}transformer.resblocks.2."
        expected = {k: v for k, v in expected.items() if not k.startswith(last) and not k.endswith("text_projection")}
    if family == "sd2":
        expected["v_pred"] = torch.tensor([])  # the marker states the prediction
    assert_same(load_file(tmp_path / "x.safetensors"), expected)
    convert(tmp_path / "x.safetensors", tmp_path / "back")
    assert_same(stored(tmp_path / "back"), stored(folder))
    loaded, before = load_folder(tmp_path / "back", torch.float32), load_folder(folder, torch.float32)
    assert loaded.scheduler == before.scheduler
    assert loaded.unet.config == before.unet.config and loaded.vae.config == before.vae.config
    for ours, theirs in zip(loaded.tokenizers, before.tokenizers, strict=True):
        assert torch.equal(ours("a cat! naïve"), theirs("a cat! naïve"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_file_to_folder_and_back(originals: Any, family: str, tmp_path: Path) -> None:
    convert(originals.file(family), tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "x.safetensors")
    expected = {k: v for k, v in originals.tensors(family).items() if not k.endswith("logit_scale")}
    assert_same(load_file(tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_precision(originals: Any, dtype: str, tmp_path: Path, capsys: Any) -> None:
    """`--dtype` rounds as torch does; without it the dtype is kept, bit for bit."""
    target = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    file, folder = tmp_path / "x.safetensors", tmp_path / "folder"
    assert main(["convert", str(originals.folder("sd1")), str(file), "--dtype", dtype]) == 0
    assert main(["convert", str(file), str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(file), str(folder)]
    assert_same(stored(folder), {key: value.to(target) for key, value in stored(originals.folder("sd1")).items()})


def test_mixed_precision_is_kept(originals: Any, tmp_path: Path) -> None:
    """A UNet in fp16 with a VAE in fp32, as many people store SDXL."""
    mixed = {k: v.half() if "diffusion_model" in k else v for k, v in originals.tensors("sdxl").items()}
    path = originals.save(mixed, "mixed.safetensors")
    convert(path, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "x.safetensors")
    expected = {k: v for k, v in mixed.items() if not k.endswith("logit_scale")}
    assert_same(load_file(tmp_path / "x.safetensors"), expected)


def test_a_pickle_becomes_a_safetensors_file(originals: Any, tmp_path: Path) -> None:
    tensors = originals.tensors("sd2")
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "x.ckpt")
    with pytest.raises(FastsdError, match="allow_pickle"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors", prediction="v_prediction", allow_pickle=True)
    found = load_single_file(tmp_path / "x.safetensors", torch.float32)
    assert found.scheduler.prediction_type == "v_prediction"
    expected = load_single_file(originals.file("sd2"), torch.float32, prediction="v_prediction")
    assert_same(all_weights(found), all_weights(expected))


@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_the_prediction_type_is_written(originals: Any, prediction: str, zero: bool, tmp_path: Path) -> None:
    shutil.copytree(originals.folder("sd2"), tmp_path / "folder")
    scheduler = tmp_path / "folder/scheduler/scheduler_config.json"
    edit_json(scheduler, prediction_type=prediction, rescale_betas_zero_snr=zero)
    convert(tmp_path / "folder", tmp_path / "x.safetensors")
    found = load_single_file(tmp_path / "x.safetensors", torch.float32).scheduler
    assert (found.prediction_type, found.rescale_betas_zero_snr) == (prediction, zero)
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")


def test_nothing_is_overwritten_without_the_flag(originals: Any, tmp_path: Path, capsys: Any) -> None:
    source, target = str(originals.file("sd1")), tmp_path / "x.safetensors"
    target.write_bytes(b"mine")
    assert main(["convert", source, str(target)]) == 2
    assert capsys.readouterr().err == f"fastsd: error: {target}: already exists; --overwrite replaces it\n"
    assert target.read_bytes() == b"mine"
    assert main(["convert", source, str(target), "--overwrite"]) == 0
    assert target.stat().st_size > 10_000
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "letter").write_bytes(b"mine")
    assert main(["convert", source, str(folder), "--overwrite"]) == 2
    assert "not a model folder, so it is not replaced" in capsys.readouterr().err
    assert files(folder) == {"letter": b"mine"}
    with pytest.raises(FastsdError, match="source and target are the same"):
        convert(source, source, overwrite=True)
    with pytest.raises(FastsdError, match="fastsd writes no pickles"):
        convert(source, tmp_path / "x.ckpt")


@pytest.mark.parametrize("target", ["x.safetensors", "folder"])
def test_a_failed_conversion_changes_nothing(
    originals: Any, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the middle of writing, with an older target to replace."""
    convert(originals.file("sd1"), tmp_path / target)
    before, count = files(tmp_path), 0
    read = convert_module.read_finite

    def failing(entry: Any, dtype: torch.dtype) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > 150:
            raise OSError(28, "No space left on device")
        return read(entry, dtype)

    monkeypatch.setattr(convert_module, "read_finite", failing)
    with pytest.raises(FastsdError, match=f"{target}: cannot be written .No space left on device"):
        convert(originals.file("sd1"), tmp_path / target, overwrite=True)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == [target]


def test_values_that_overflow_are_refused(originals: Any, tmp_path: Path) -> None:
    tensors = dict(originals.tensors("sd1"))
    key = "model.diffusion_model.out.2.bias"
    tensors[key] = tensors[key] + 1e6
    path = originals.save(tensors, "large.safetensors")
    with pytest.raises(FastsdError, match=r"large.safetensors: the key .*out.2.bias holds 1e\+06, but float16 ends at"):
        convert(path, tmp_path / "x.safetensors", torch.float16)
    convert(path, tmp_path / "x.safetensors", torch.bfloat16)


def test_a_config_that_a_single_file_cannot_store_is_refused(originals: Any, tmp_path: Path) -> None:
    """Single files hold no configs, so other heads or another schedule would be read back as another model."""
    cases = {
        "unet/config.json": ({"attention_head_dim": [4, 4, 4]}, "its UNet has num_attention_heads .4, 4, 4."),
        "vae/config.json": ({"scaling_factor": 0.5}, "its autoencoder has scaling_factor 0.5"),
        "text_encoder/config.json": ({"num_attention_heads": 2}, "its text encoder has num_attention_heads 2"),
        "scheduler/scheduler_config.json": ({"beta_end": 0.02}, "cannot store that beta_end is 0.02"),
    }
    for i, (name, (changes, message)) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        shutil.copytree(originals.folder("sd1"), folder)
        edit_json(folder / name, **changes)
        with pytest.raises(FastsdError, match=f"{folder}: .*{message}"):
            convert(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_settings_that_a_single_file_omits_are_noted(tmp_path: Path) -> None:
    components = original.components("sd1")
    components.scheduler = replace(components.scheduler, sampler="euler", timestep_spacing="trailing")
    components.defaults = {"num_inference_steps": 4}
    save_folder(components, tmp_path / "folder", torch.float32)
    notes = convert(tmp_path / "folder", tmp_path / "x.safetensors")
    assert "does not store timestep_spacing, sampler, sample_size; readers use the values of SD 1" in notes[0]
    assert "no default settings" in notes[1] and len(notes) == 2


def test_published_folders_with_the_old_end_token_convert(originals: Any, tmp_path: Path) -> None:
    """The configs of SD 1.5 and SDXL state eos_token_id 2, an old mistake that every reader corrects."""
    shutil.copytree(originals.folder("sd1"), tmp_path / "folder")
    edit_json(tmp_path / "folder/text_encoder/config.json", eos_token_id=2)
    convert(tmp_path / "folder", tmp_path / "x.safetensors")


def test_the_header_is_aligned_and_the_library_reads_it(originals: Any, tmp_path: Path) -> None:
    convert(originals.folder("sdxl"), tmp_path / "x.safetensors", torch.float16)
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "x.safetensors").values())


def test_a_matrix_of_several_dtypes_needs_the_flag(originals: Any, tmp_path: Path) -> None:
    shutil.copytree(originals.folder("sdxl"), tmp_path / "folder")
    path = tmp_path / "folder" / weights_file("text_encoder_2")
    tensors = load_file(path)
    key = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {key: tensors[key].half()}, path)
    with pytest.raises(FastsdError, match="in_proj_weight is assembled from tensors of several dtypes.*dtype"):
        convert(tmp_path / "folder", tmp_path / "x.safetensors")
    convert(tmp_path / "folder", tmp_path / "x.safetensors", torch.float16)


ALLOWANCE = 22 * 2**20  # bytes for headers and lists of keys

# VmHWM is the process's peak resident size. The first conversion loads what is loaded once.
CONVERT = """
import sys, torch
from fastsd.runtime.devices import DTYPES
from fastsd.weights.convert import convert
def read(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
convert(sys.argv[4], sys.argv[2] + ".safetensors", torch.bfloat16)
before = read("VmRSS")
convert(sys.argv[1], sys.argv[2], DTYPES.get(sys.argv[3]))
print(read("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["kept", "bf16"])
def test_converting_takes_the_memory_of_one_tensor(dtype: str, originals: Any, tmp_path: Path) -> None:
    """To a file and back: the largest tensor as it is read and, in another precision, as it is written."""
    components = original.components("sd1")
    config = replace(components.unet.config, block_out_channels=(320, 480, 480))
    with torch.device("meta"):
        components = replace(components, unet=UNet(config))
    folder, file, back = tmp_path / "folder", tmp_path / "file.safetensors", tmp_path / "back"
    write_configs(components, folder)
    for name, module in components.networks():
        write_zeros(module, folder / weights_file(name), "F32", 4)
    sizes = [4 * torch.Size(part.shape).numel() for _, _, parts in sources(components.unet) for part in parts]
    limit = ALLOWANCE + (max(sizes) if dtype == "kept" else max(sizes) * 3 // 2)
    assert sum(sizes) > 10 * limit and max(sizes) > ALLOWANCE // 2, "the model is too small for a meaningful limit"
    for source, target in ((folder, file), (file, back)):
        words = [sys.executable, "-c", CONVERT, str(source), str(target), dtype, str(originals.folder("sd1"))]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # freed memory goes back to the system
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
        assert int(done.stdout) <= limit, f"{int(done.stdout) / max(sizes):.2f} times the largest tensor"


def test_a_folder_that_reads_its_image_scaled_is_kept_as_a_folder(originals: Any, tmp_path: Path) -> None:
    """CosXL Edit's `is_cosxl_edit` is written back; a single file has no place for it."""
    source = Path(shutil.copytree(originals.folder("sdxl InstructPix2Pix"), tmp_path / "source"))
    edit_json(source / "model_index.json", is_cosxl_edit=True)
    assert load_folder(source, torch.float32).scaled_image
    convert(source, tmp_path / "half", dtype=torch.float16)
    assert load_folder(tmp_path / "half", torch.float32).scaled_image
    with pytest.raises(FastsdError, match="cannot store that its UNet reads the image to edit scaled"):
        convert(source, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name, network", [("digits", "autoencoder"), ("emoji", "UNet")])
def test_a_bundled_model_is_no_single_file(name: str, network: str, tmp_path: Path, capsys: Any) -> None:
    """The groups of its norms and its heads are not told by shapes, and no published model has its widths."""
    assert main(["convert", name, str(tmp_path / "x.safetensors")]) == 2
    said = capsys.readouterr().err
    assert f"no known {network} has levels of" in said and "convert to a folder" in said and said.count("\n") == 1
    assert main(["convert", name, str(tmp_path / "folder")]) == 0
    assert os.listdir(tmp_path) == ["folder"]
