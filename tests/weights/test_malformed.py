"""Every malformed file is refused in one line: no traceback, no code run, within 1 s, in little memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.malformed import CASES

pytestmark = pytest.mark.heavy

SECONDS, ALLOWANCE = 1.0, 50 * 2**20

# Runs the command line on every file in one process. Writing 5 to clear_refs resets the process's peak memory.
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
    """For each case: its path; and the exit code, the output, the seconds and the additional bytes of memory."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc")
    tensors, good = originals.tensors("sd1"), originals.file("sd1")
    output = str(tmp_path_factory.mktemp("output") / "x.png")
    paths, jobs = {}, []
    for i, (name, case) in enumerate(CASES.items()):
        paths[name] = tmp_path_factory.mktemp(f"case{i}") / case.name
        case.build(paths[name], tensors)
        model = ["--model", str(good), "--vae", str(paths[name])] if case.as_vae else ["--model", str(paths[name])]
        dtype = [] if "--dtype" in case.flags else ["--dtype", "fp32"]
        jobs.append(["--prompt", "x", "--device", "cpu", "-o", output, *model, *dtype, *case.flags])
    # The first job, which is not counted, imports what every job needs.
    first = ["--prompt", "x", "--device", "cpu", "--dtype", "fp32", "-o", output, "--model", str(good), "--vae", "none"]
    done = subprocess.run([sys.executable, "-c", RUN], input=json.dumps([first, *jobs]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, zip(paths.values(), json.loads(done.stdout)[1:]), strict=True))


def test_there_are_enough() -> None:
    assert len(CASES) >= 70


@pytest.mark.parametrize("name", CASES)
def test_malformed(outcomes: dict[str, tuple[Path, Any]], name: str) -> None:
    path, (code, output, seconds, peak) = outcomes[name]
    size = path.stat().st_size if path.is_file() else 0
    assert code == 2
    assert output.count("\n") == 1 and output.startswith("fastsd: error: "), output
    assert str(path) in output and re.search(CASES[name].message, output), output
    assert len(output) < 600 + len(str(path))
    assert seconds < SECONDS
    assert peak <= size + ALLOWANCE, f"{peak / 2**20:.0f} MB for a file of {size / 2**20:.0f} MB"
    assert not (path.parent / "ran").exists(), "code in the file was run"
