"""`fastsd verify` passes what is right and fails what is broken, level by level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsd.cli import main
from fastsd.kernels import flash_attn, groupnorm_silu
from fastsd.pipeline import Pipeline
from fastsd.verify import images as pictures
from fastsd.verify import interpreted, layers
from fastsd.verify.drive import drive
from fastsd.verify.images import Drawing, compare_graphs, compare_pictures, psnr
from fastsd.verify.ops import check_op, check_ops
from fastsd.verify.rule import Row
from fastsd.verify.watch import Call, ops


def failures(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if row.passed is False}


def run(pipe: Pipeline) -> None:
    drive(pipe, "an eight", 64, 64)


def test_ops_pass(pipe: Pipeline) -> None:
    rows = check_ops(lambda: run(pipe), None)
    assert all(row.passed for row in rows)
    assert sum(row.calls for row in rows) > len(rows)  # calls of equal shapes are one row
    assert all(row.torch_error is not None and row.torch_error > 0 for row in rows if row.name == "conv2d")


def test_a_broken_op_fails_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    right = groupnorm_silu._groupnorm_silu_by_image
    monkeypatch.setattr(groupnorm_silu, "_groupnorm_silu_by_image", lambda *args: right(*args) * 1.00002)
    assert failures(check_ops(lambda: run(pipe), None)) == {"groupnorm_silu"}


def test_attention_by_heads_is_the_specification() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator) for n in (5, 7, 7))
    row = check_op(Call.of(ops()["flash_attn"], q, k, v), None)
    exact = flash_attn.flash_attn_ref(q.double(), k.double(), v.double())
    assert row.passed and row.torch_error == pytest.approx(
        (flash_attn.flash_attn(q, k, v).double() - exact).abs().max().item(), rel=1e-6
    )


def test_layers_pass_and_a_broken_one_fails(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = layers.check_layers(pipe, lambda: run(pipe), None)
    assert all(row.passed for row in rows)
    kinds = ("text_encoder1", "down_blocks.0.resnets.0", "transformer_blocks.0", "vae.decoder.mid_block.attentions.0")
    assert all(any(kind in row.name for row in rows) for kind in kinds)

    right = groupnorm_silu._groupnorm_silu_by_image
    monkeypatch.setattr(groupnorm_silu, "_groupnorm_silu_by_image", lambda *args: right(*args) * 1.001)
    broken = failures(layers.check_layers(pipe, lambda: run(pipe), None))
    assert {"unet.mid_block.resnets.0", "vae.decoder.mid_block.attentions.0"} <= broken
    assert not any("transformer_blocks" in name or "text_encoder" in name for name in broken)  # no group norm in these


def test_networks_pass(pipe: Pipeline) -> None:
    rows = layers.check_networks(pipe, "an eight", None)
    assert [row.name for row in rows] == ["text_encoder1", "unet", "vae.encode", "vae.decode"]
    assert all(row.passed for row in rows)


def test_pictures_are_judged_by_their_grey_levels() -> None:
    truth = np.full((1, 4, 4, 3), 0.5)
    row = Row("image", "picture")
    near = compare_pictures(row, truth + 1 / 255, truth, truth, 1.0, 2.0)
    far = compare_pictures(row, truth + 2 / 255, truth, truth, 1.0, 2.0)
    excused = compare_pictures(row, truth + 2 / 255, truth + 1 / 255, truth, 1.0, 2.0)
    assert (near.passed, far.passed, excused.passed) == (True, False, True)
    assert far.error == pytest.approx(2.0)
    assert psnr(255.0) == 0 and psnr(0.0) == float("inf")
    assert psnr(1.0) == pytest.approx(48.13, abs=0.01)


def test_the_picture_is_drawn_by_the_specification_too(pipe: Pipeline) -> None:
    row = pictures.check_picture(Drawing("digits", "cpu", "fp32", "an eight", 2), pipe)
    assert row.passed and row.error is not None and row.error < 0.1


def test_graphs_must_not_change_a_bit() -> None:
    drawing = Drawing("digits", "cpu", "fp32", "an eight", 2)
    latent = torch.ones(1, 4, 8, 8)
    same = compare_graphs(Row("graphs", "x"), lambda on: (latent, 1.0), drawing)
    other = compare_graphs(Row("graphs", "x"), lambda on: (latent + (1e-7 if on else 0), 1.0), drawing)
    assert same.passed is True and other.passed is False
    assert pictures.check_graphs(drawing, torch.device("cpu")).passed is None


def test_the_interpreter_runs_every_kernel_and_passes() -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    rows = interpreted.in_another_process()
    assert {"advance", "geglu", "groupnorm_silu", "layernorm"} <= {row.name for row in rows}
    assert {row.backend for row in rows} == {"triton"} and {row.note for row in rows} == {"fp32", "fp16"}
    assert not failures(rows)


def words(*more: str) -> list[str]:
    return ["verify", "--device", "cpu", "--dtype", "fp32", "--steps", "1", *more]


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a test of its own."""
    monkeypatch.setattr(interpreted, "in_another_process", list)


def test_the_command_prints_a_table(no_interpreter: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words()) == 0
    printed = capsys.readouterr().out
    assert "model: digits" in printed and "FAIL" not in printed and " 0 failed" in printed
    assert "pass  conv2d" in printed and "PSNR" in printed


def test_the_command_prints_json_and_fails(
    no_interpreter: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = flash_attn._sdpa
    monkeypatch.setattr(flash_attn, "_image_fp32", lambda q, k, v: right(q[None], k[None], v[None])[0] * 1.001)
    monkeypatch.setattr(flash_attn, "SMALLEST", 1)
    assert main(words("--json")) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and found["dtype"] == "fp32"
    levels = {row["level"] for row in found["rows"]}
    assert levels == {"op", "layer", "module", "image", "graphs"}
    assert "flash_attn" in {row["name"] for row in found["rows"] if row["passed"] is False}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "nothing-here"], "nothing-here"),
        (["--steps", "0"], "--steps is 0"),
        (["--device", "cuda:99"], "CUDA devices"),
    ],
)
def test_mistakes_are_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(*more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
