"""Marker tensors of EDM models that cannot be what they say. What good ones mean: tests/reports/test_settings.py."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastsd.errors import FastsdError
from fastsd.weights.formats.safetensors_file import TensorEntry, read_header
from fastsd.weights.layouts.edm_markers import HIGHEST, LOWEST, MEAN, STD, with_markers
from fastsd.weights.layouts.family import CheckpointFamily, find_family


@pytest.fixture(scope="module")
def family(originals: Any) -> CheckpointFamily:
    path = originals.file("sdxl")
    entries, metadata = read_header(path)
    return find_family(path, {key: entry.shape for key, entry in entries.items()}, metadata)


@pytest.mark.parametrize(
    ("markers", "reason"),
    [
        ({MEAN: torch.zeros(4)}, f"the key {STD} is missing"),
        ({MEAN: torch.zeros(4), STD: torch.zeros(4)}, "positive"),
        ({MEAN: torch.zeros(3), STD: torch.ones(3)}, "should hold 4 numbers"),
        ({MEAN: torch.full((4,), math.nan), STD: torch.ones(4)}, "a few finite numbers"),
        ({HIGHEST: torch.zeros(0)}, "a few finite numbers"),
        ({HIGHEST: torch.tensor(1.0), LOWEST: torch.tensor(2.0)}, "it should be above 2"),
        ({LOWEST: torch.tensor(0.1)}, f"the key {HIGHEST} is missing"),
    ],
    ids=str,
)
def test_refused_markers(
    markers: dict[str, torch.Tensor], reason: str, family: CheckpointFamily, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(markers, path)
    with pytest.raises(FastsdError, match=reason):
        with_markers(path, family, read_header(path)[0])


def test_a_marker_as_large_as_a_network_is_refused_unread(family: CheckpointFamily) -> None:
    path = Path("no such file")  # reading it would fail
    entry = TensorEntry(path, torch.uint8, (2**36,), 0, 2**36, HIGHEST)
    with pytest.raises(FastsdError, match="a few finite numbers"):
        with_markers(path, family, {HIGHEST: entry})


def test_a_cosxl_that_edits_reads_the_image_scaled(family: CheckpointFamily, tmp_path: Path) -> None:
    """ComfyUI goes by EDM's noise levels (comfy/supported_models.py)."""
    save_file({HIGHEST: torch.tensor(120.0)}, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")[0]
    edits = replace(family, unet=replace(family.unet, in_channels=2 * family.unet.out_channels))
    found = [with_markers(tmp_path, one, entries).scaled_image for one in (family, edits)]
    assert found == [False, True] and not edits.scaled_image
