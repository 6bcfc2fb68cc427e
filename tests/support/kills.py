"""Training runs that are killed at random moments. Run as a script: it forks before PyTorch has threads."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.project import ROOT


def kill_at_random(config: Path, out: Path, kills: int, longest: float, seed: int = 0) -> list[str]:
    """Train in a process of its own, kill it, go on; `kills` times in all, then let it finish. Returns a line for each.

    Args:
        config: it saves after every step, and exports to no other folder than the run's own.
        out: takes as many runs as that needs, each in a folder of its own.
        longest: seconds after which a process is killed at the latest.
    """
    arguments = [str(config), str(out), str(kills), str(longest), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kills", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [line for line in done.stdout.splitlines() if line.startswith("killed")]


def _forked(config: str, out: str) -> int:
    """Start training in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from fastsd.cli import main

        code = main(
            ["train", "--config", config, "--out", out, *(["--resume"] if list(Path(out).glob("*.pt")) else [])]
        )
    finally:
        sys.stderr.flush()
        os._exit(code)


def _finished(pid: int, seconds: float | None) -> bool:
    """Wait for a process at most so long, then kill it; whether it ended by itself, without an error."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is None or time.monotonic() < end:
        waited, status = os.waitpid(pid, os.WNOHANG)
        if waited:
            assert os.waitstatus_to_exitcode(status) == 0, "training failed"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _main(config: str, out: str, kills: int, longest: float, seed: int) -> None:
    import tensorboardX  # noqa: F401  # here, so that the forked processes need not

    from fastsd.train import training  # noqa: F401

    moments, killed, number = random.Random(seed), 0, 0
    while killed < kills:  # a fast machine ends a run before it is killed so often; then the next begins
        run, before = Path(out) / str(number), {}
        while killed < kills and not _finished(_forked(config, str(run)), moments.uniform(0.05, longest)):
            killed += 1
            before = _check_progress(run, before)
            print(f"killed {killed}: {before}", flush=True)
        number += 1
    if not (run / "model").exists():
        assert _finished(_forked(config, str(run)), None)


def _check_progress(run: Path, before: dict[str, int]) -> dict[str, int]:
    """The steps in a killed run's checkpoints, which load, and have lost at most the step that was being saved."""
    from fastsd.train import checkpoint
    from fastsd.train.figures import read_metrics

    files = [path for path in run.glob("*.pt") if path.name != "latents.pt"]
    steps = {path.name: checkpoint.load(path)["step"] for path in files}
    metrics = read_metrics(run / "metrics.jsonl")
    for name, step in steps.items():
        written = max((line["step"] for line in metrics if f"{line['stage']}.pt" == name), default=0)
        assert before.get(name, 0) <= step and written - step <= 1, (name, step, written, before)
    assert before.keys() <= steps.keys()
    return steps


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
