"""Pickled checkpoints: what `torch.save` writes is read, and only by the safe unpickler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.cli import main
from fastsd.errors import FastsdError
from fastsd.weights import load_single_file
from fastsd.weights.formats.pickle_file import read_pickle
from tests.support.tiny import all_weights, assert_same


def test_a_checkpoint_that_torch_saved(originals: Any, tmp_path: Path) -> None:
    """`state_dict` beside training's own values; parameters; tensors that share a storage or are transposed."""
    tensors: dict[str, Any] = dict(originals.tensors("sd2"))
    both = torch.cat([tensors["model.diffusion_model.out.0.weight"], tensors["model.diffusion_model.out.0.bias"]])
    tensors["model.diffusion_model.out.0.weight"], tensors["model.diffusion_model.out.0.bias"] = both[:64], both[64:]
    for key in ("model.diffusion_model.time_embed.0.weight", "cond_stage_model.model.text_projection"):
        tensors[key] = torch.nn.Parameter(tensors[key].T.contiguous().T)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = tensors[key].to(memory_format=torch.channels_last)
    torch.save({"state_dict": tensors, "epoch": 3, "global_step": 875000, "lr": [1e-4]}, tmp_path / "x.ckpt")
    torch.save(tensors, tmp_path / "flat.safetensors")  # a pickle whatever its name says
    expected = all_weights(load_single_file(originals.file("sd2"), torch.float32, prediction="epsilon"))
    for name in ("x.ckpt", "flat.safetensors"):
        with pytest.raises(FastsdError, match="a pickle, which can hold programs.*allow_pickle"):
            load_single_file(tmp_path / name, torch.float32, prediction="epsilon")
        found = load_single_file(tmp_path / name, torch.float32, prediction="epsilon", allow_pickle=True)
        assert_same(all_weights(found), expected)


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Before torch 2.6 `weights_only` could be bypassed; there is no fallback."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    assert set(read_pickle(tmp_path / "x.ckpt", allow=True)) == {"a"}
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert main(["--prompt", "x", "--model", str(tmp_path / "x.ckpt"), "--allow-pickle", "--device", "cpu"]) == 2
    assert "needs torch 2.6 or newer, this is 2.5.1+cpu" in capsys.readouterr().err


def test_pickles_are_only_read_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = torch.load

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", recorded)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    read_pickle(tmp_path / "x.ckpt", allow=True)
    assert calls and all(options.get("weights_only") is True for options in calls)
