"""Verifying and tuning the bundled model on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsd.cli import main
from fastsd.kernels import candidates

pytestmark = pytest.mark.gpu


def verify(capsys: pytest.CaptureFixture[str], dtype: str) -> dict:
    """The report of `fastsd verify`, which must pass."""
    code = main(["verify", "--device", "cuda", "--dtype", dtype, "--json"])
    report = json.loads(capsys.readouterr().out)
    failed = [row for row in report["rows"] if row["passed"] is False]
    assert code == 0 and not failed, failed
    return report


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_verify_passes(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(capsys, dtype)
    rows = {row["name"]: row for row in report["rows"] if row["level"] in ("op", "graphs")}
    kernels = ("groupnorm_silu", "layernorm", "geglu", "flash_attn", "advance")
    assert {rows[name]["backend"] for name in kernels} == {"triton"}
    assert rows["on and off"]["passed"] is True


def test_a_tuned_table_is_used_and_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTSD_CACHE", str(tmp_path))
    candidates.forget()
    try:
        assert main(["tune", "--dtype", "fp16"]) == 0
        (file,) = tmp_path.glob("choices-*.json")
        capsys.readouterr()
        assert str(file) in verify(capsys, "fp16")["choices"]
    finally:
        candidates.forget()
