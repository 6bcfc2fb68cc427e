"""ComfyUI's keys beside weights in 8 bits, where they are not what ComfyUI writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.weights.formats.open_file import read_tensors

TEXT = b'{"format": "float8_e4m3fn"}'


@pytest.mark.parametrize(
    "description",
    [
        torch.tensor(list(TEXT)),
        torch.full((4,), -3, dtype=torch.int8),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(8192, dtype=torch.uint8),
        torch.tensor(list(b"[" * 4096), dtype=torch.uint8),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
    ],
    ids=("integers", "negative", "floats", "long", "deep", "a list"),
)
def test_a_description_that_is_no_json_object_in_bytes_is_refused(description: torch.Tensor, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2), "a.comfy_quant": description}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match="ComfyUI's format 'None'"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(torch.ones(3), "one number"), (torch.tensor(2), "one number"), (torch.tensor(torch.inf), "holds inf")],
    ids=("three", "an integer", "infinite"),
)
def test_a_scale_that_is_no_number_is_refused(scale: torch.Tensor, reason: str, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2), "a.scale_weight": scale}, tmp_path / "x.safetensors")
    with pytest.raises(FastsdError, match=reason):
        read_tensors(tmp_path / "x.safetensors")
