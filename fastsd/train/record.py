"""A run's folder: who may use it, and the record of what made it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastsd
from fastsd.errors import FastsdError
from fastsd.files import write_whole
from fastsd.train import tables
from fastsd.train.settings import TrainingSettings

CONFIG = "config.toml"  # the resolved config, in the run's folder
# Keys that a resumed run may change: they decide when and where, not what is computed. More steps stretch the
# schedule, which is what they are for.
FREE = ("out", "export", "checkpoint_minutes", "stall_minutes", "shard", "data.path")
FREE_OF_A_STAGE = ("fit.steps", "fit.max_minutes", "fit.sample_every", "fit.validate_every", "fit.max_nonfinite")


def write_record(out: Path, settings: TrainingSettings, data: dict[str, Any]) -> None:
    """Write the resolved config, and record.json: data, commit, environment."""
    write_whole(out / CONFIG, tables.write_toml(resolved(settings)).encode(), overwrite=True)
    text = json.dumps({"data": data, **environment()}, indent=2) + "\n"
    write_whole(out / "record.json", text.encode(), overwrite=True)


def resolved(settings: TrainingSettings) -> tables.Table:
    """All values of a config, those by default too, by their keys as `--set` takes them."""
    flat = tables.flatten(settings)
    return {key.removeprefix("stages."): value for key, value in flat.items() if value is not None and value != {}}


def environment() -> dict[str, Any]:
    """What a run's figures may depend on besides its config."""
    packages = {}
    for name in ("torch", "numpy", "triton"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "missing"
    return {
        "fastsd": fastsd.__version__,
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }


def check_same(out: Path, before: TrainingSettings, settings: TrainingSettings) -> None:
    """Raises FastsdError where the run in `out`, whose config is `before`, had another one; it shows the difference.

    The table of a stage that has not begun may change.
    """
    waiting = tuple(f"{name}." for name in settings.stages if not (out / f"{name}.pt").is_file())
    old, new = resolved(before), resolved(settings)
    changed = [
        f"{key} from {_shown(old, key)} to {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in FREE
        and not key.endswith(FREE_OF_A_STAGE)
        and not key.startswith(waiting)
    ]
    if changed:
        raise FastsdError(
            f"this run was started with another config; changed: {'; '.join(changed)};"
            " take the changes back, or start a new run with another --out",
            path=out,
        )


def _shown(table: tables.Table, key: str) -> str:
    return json.dumps(table[key]) if key in table else "nothing"


def _commit() -> str | None:
    """The commit of the code that runs, with a "+" where files differ from it; None outside a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
