"""A file's few-step method survives loading and converting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.few_step import KINDS
from fastsd.model.unet import UNet
from fastsd.pipeline import Pipeline
from fastsd.weights import load_single_file, save_folder
from fastsd.weights.convert import convert
from tests.support import original


def kind_of(pipe: Pipeline) -> str | None:
    return pipe.few_step and pipe.few_step.kind.name


@pytest.mark.heavy
def test_a_single_file_with_guidance_as_an_input(originals: Any, tmp_path: Path, capsys: Any) -> None:
    """Folder, file and folder again are the same model; `inspect` names its method; a wrong width is refused."""
    components = original.components("sd1")
    config = replace(components.unet.config, time_cond_proj_dim=16)
    torch.manual_seed(1)
    components = replace(components, unet=UNet(config))
    save_folder(components, tmp_path / "folder", torch.float32)
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "back")
    pipes = [
        Pipeline.from_pretrained(tmp_path / name, device="cpu", dtype="fp32")
        for name in ("folder", "file.safetensors", "back")
    ]
    results = [pipe("x", seed=1, guidance_scale=5.0, output_type="latent", width=64, height=64) for pipe in pipes]
    assert all(kind_of(pipe) == "lcm" for pipe in pipes)
    assert all(torch.equal(result.images, results[0].images) for result in results)
    assert load_single_file(tmp_path / "file.safetensors", torch.float32).unet.config == config
    assert main(["inspect", str(tmp_path / "file.safetensors")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "few steps: lcm: lcm, 4 steps (its UNet takes the guidance scale as an input)" in output
    key = "model.diffusion_model.time_embed.cond_proj.weight"
    wrong = originals.save(originals.tensors("sd1") | {key: torch.ones(32, 2)}, "wrong.safetensors")
    with pytest.raises(FastsdError, match=r"time_embed\.cond_proj\.weight reads 2 features"):
        load_single_file(wrong, torch.float32)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["hyper", "lightning-1"])
def test_converting_keeps_the_method(originals: Any, kind: str, tmp_path: Path) -> None:
    file = originals.save(originals.tensors("sd1"), f"{kind}.safetensors", {"fastsd.few_step": kind})
    convert(file, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    for path in (file, tmp_path / "folder", tmp_path / "again.safetensors"):
        pipe = Pipeline.from_pretrained(path, device="cpu", dtype="fp32")
        assert kind_of(pipe) == kind, path
        assert pipe.components.scheduler.sampler == KINDS[kind].samplers[0]
