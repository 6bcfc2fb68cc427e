"""While kernels are compiled and timed, a user sees why nothing happens yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastsd.cli import main
from fastsd.kernels.choice.table import TableEntry
from fastsd.pipeline import Pipeline


@pytest.mark.heavy
@pytest.mark.parametrize("choices", [0, 3])
@pytest.mark.parametrize("progress", ["--progress", "--no-progress"])
def test_it_is_said_once_and_counted_on_the_bar(
    progress: str, choices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choices are played: a CPU makes none."""
    stream = Pipeline.stream

    def played(self: Pipeline, *args: Any, **named: Any) -> Any:
        for i in range(choices):
            self.choice_mode.tell(("conv2d", f"key {i}"), TableEntry("torch"))  # type: ignore[misc]
        return stream(self, *args, **named)

    monkeypatch.setattr(Pipeline, "stream", played)
    arguments = ["--prompt", "a thin 1", "--steps", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert main([*arguments, "--count", "2", "--batch-size", "1", progress]) == 0
    error = capsys.readouterr().err
    assert error.count("note: kernels are compiled and timed for this GPU and image size, once") == (choices > 0)
    assert ("6 ops timed" in error) == (progress == "--progress" and choices > 0)
    assert "ops timed" not in error.rpartition("\r")[2]
