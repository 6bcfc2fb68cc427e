"""Every malformed file: no crash, no traceback, no code run, one line, within 1 s, little more memory than the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.cli import main
from fastsd.weights.formats.pickle_file import read_pickle
from tests.support.malformed import CASES

SECONDS, ALLOWANCE = 1.0, 50 * 2**20

# Runs the command line on each of the files in one process. Writing 5 to clear_refs resets the kernel's peak.
RUN = """
import contextlib, io, json, sys, time
from fastsd.cli import main
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
jobs = json.load(sys.stdin)
results = []
for words in jobs:
    out = io.StringIO()
    open("/proc/self/clear_refs", "w").write("5")
    before, start = memory("VmRSS"), time.process_time()
    with contextlib.redirect_stderr(out):
        code = main(words)
    results.append([code, out.getvalue(), time.process_time() - start, memory("VmHWM") - before])
json.dump(results, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes(originals: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Exit code, what was said, seconds and bytes above what the process had, for each case."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    tensors, good = originals.tensors("sd1"), originals.file("sd1")
    output = str(tmp_path_factory.mktemp("output") / "x.png")
    paths, jobs = {}, []
    for i, (name, case) in enumerate(CASES.items()):
        paths[name] = tmp_path_factory.mktemp(f"case{i}") / case.name
        case.build(paths[name], tensors)
        model = ["--model", str(good), "--vae", str(paths[name])] if case.as_vae else ["--model", str(paths[name])]
        where = [] if "--dtype" in case.flags else ["--dtype", "fp32"]
        jobs.append(["--prompt", "x", "--device", "cpu", "-o", output, *model, *where, *case.flags])
    warm = ["--prompt", "x", "--device", "cpu", "--dtype", "fp32", "-o", output, "--model", str(good), "--vae", "none"]
    done = subprocess.run([sys.executable, "-c", RUN], input=json.dumps([warm, *jobs]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, zip(paths.values(), json.loads(done.stdout)[1:]), strict=True))


def test_there_are_enough() -> None:
    assert len(CASES) >= 70


@pytest.mark.parametrize("name", CASES)
def test_malformed(outcomes: dict[str, tuple[Path, Any]], name: str) -> None:
    path, (code, said, seconds, peak) = outcomes[name]
    size = path.stat().st_size if path.is_file() else 0
    assert code == 2
    assert said.count("\n") == 1 and said.startswith("fastsd: error: "), said
    assert str(path) in said and re.search(CASES[name].message, said), said
    assert len(said) < 600 + len(str(path))
    assert seconds < SECONDS
    assert peak <= size + ALLOWANCE, f"{peak / 2**20:.0f} MB for a file of {size / 2**20:.0f} MB"
    assert not (path.parent / "ran").exists(), "code in the file was run"


def test_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Before 2.6 `weights_only` could be escaped from; there is no fallback."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    assert set(read_pickle(tmp_path / "x.ckpt", allow=True)) == {"a"}
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert main(["--prompt", "x", "--model", str(tmp_path / "x.ckpt"), "--allow-pickle", "--device", "cpu"]) == 2
    assert "needs torch 2.6 or newer, this is 2.5.1+cpu" in capsys.readouterr().err


def test_pickles_are_never_read_without_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    load = torch.load

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt")
    read_pickle(tmp_path / "x.ckpt", allow=True)
    assert seen and all(options.get("weights_only") is True for options in seen)
