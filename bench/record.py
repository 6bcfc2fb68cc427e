"""The result file: measurements, with the device, the versions and the flags. Written after every result.

{"format": 1, "environment": {...}, "flags": {...}, "ceilings": {...}, "records": [...], "not_run": [...]}

A record is one candidate of one benchmark:

    benchmark, model, size, batch, steps, dtype, candidate    its identity
    gate                                                      the correctness check: passed, max, relative, psnr
    seconds                                                   median, low, high, rounds; or null, with a `problem`
    floor, by_kind, flops, bytes, binds                       the least time and work
    tflop_s, gb_s, share                                      the achieved rates and the share of the limit
    kinds, peak, split, ...                                   the median by kind of op, memory, phases of a cold process
    gpu                                                       its clocks, temperature and power, before and during
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.measure import Limit, Outcome
from bench.memory import open_nvml
from fastsd.errors import FastsdError
from fastsd.files import reason

FORMAT = 1
ROOT = Path(__file__).parent.parent
KEY = ("benchmark", "model", "size", "batch", "steps", "dtype", "candidate")
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "fastsd")


def git_commit() -> str:
    """The short commit, with "-dirty" if files differ from it; "unknown" outside a repository."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        process = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return process.stdout.strip() or "unknown"


def environment(device: torch.device) -> dict[str, Any]:
    """The device, clocks, driver, versions and commit of a measurement."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    common: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    return common | (_gpu(device) if device.type == "cuda" else _cpu())


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    fields: dict[str, Any] = {
        "device": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        nvml, handle = open_nvml()
        fields["driver"] = nvml.nvmlSystemGetDriverVersion()
        for name, kind in (("sm_mhz", nvml.NVML_CLOCK_SM), ("memory_mhz", nvml.NVML_CLOCK_MEM)):
            now, highest = nvml.nvmlDeviceGetClockInfo(handle, kind), nvml.nvmlDeviceGetMaxClockInfo(handle, kind)
            fields[name] = {"now": now, "max": highest}
        fields["power_limit_watts"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    except Exception as error:  # not installed, or not reported by the driver
        fields["driver"] = f"unknown ({type(error).__name__})"
    return fields


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "instructions": torch.backends.cpu.get_cpu_capability()}


class Results:
    """A result file that grows. A new record replaces an older one of the same identity."""

    def __init__(self, path: Path, device: torch.device, flags: dict[str, Any]):
        self.path = path
        old = read(path) if path.exists() else {"records": []}
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "environment": environment(device),
            "flags": flags,
            "ceilings": old.get("ceilings", {}),
            "records": old["records"],
            "not_run": [],
        }

    def add(self, **record: Any) -> None:
        """Add a record, or replace the one of the same identity, and write the file."""
        records = self.data["records"]
        index = next((i for i, r in enumerate(records) if identity(r) == identity(record)), len(records))
        records[index : index + 1] = [record]
        self.write()

    def find(self, labels: dict[str, Any]) -> dict[str, Any] | None:
        """The record with this identity."""
        return next((r for r in self.data["records"] if identity(r) == identity(labels)), None)

    def write(self) -> None:
        write(self.data, self.path)


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that identify a measurement."""
    return tuple(record.get(name) for name in KEY)


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """The fields of a record for an outcome. If the correctness check failed, `seconds` is null."""
    fields: dict[str, Any] = {"candidate": outcome.name, "gate": None, "seconds": None}
    if outcome.distance is not None:
        d = outcome.distance
        numbers = {"max": _number(d.max), "relative": _number(d.relative), "psnr": _number(d.psnr)}
        fields["gate"] = {"passed": not outcome.problem, **numbers}
    if outcome.spread is not None:
        s = outcome.spread
        fields["seconds"] = {
            "median": _number(s.median),
            "low": _number(s.low),
            "high": _number(s.high),
            "rounds": s.rounds,
        }
    if outcome.problem:
        fields["problem"] = outcome.problem
    if outcome.cut:
        fields["cut"] = outcome.cut
    if outcome.first_call:
        fields["first_call"] = _number(outcome.first_call)
    return fields


def achieved(limit: Limit, outcome: Outcome) -> dict[str, Any]:
    """The rates at the median, and the share of the limit; empty without a time."""
    if outcome.spread is None:
        return {}
    seconds = outcome.spread.median
    rates = {"tflop_s": limit.flops / seconds / 1e12, "gb_s": limit.bytes / seconds / 1e9}
    return {name: _number(value) for name, value in (rates | {"share": limit.seconds / seconds}).items()}


def limit_of(record: dict[str, Any]) -> Limit | None:
    """The limit of a record; None if its work was not counted."""
    if not record.get("floor"):
        return None
    return Limit(record["floor"], record.get("flops", 0.0), record.get("bytes", 0.0), record.get("binds", "flops"))


def _number(x: float) -> float | None:
    """Round to five digits; an infinite number becomes null, since JSON has none."""
    return float(f"{x:.5g}") if math.isfinite(x) else None


def write(data: dict[str, Any], path: Path) -> None:
    """Write a result file atomically: an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = ",\n  ".join(json.dumps(record, allow_nan=False) for record in data["records"])
    rest = {key: value for key, value in data.items() if key != "records"}
    text = json.dumps(rest, indent=1, allow_nan=False)[:-2] + ',\n "records": [\n  ' + records + "\n ]\n}\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def why_unwritable(path: Path) -> str | None:
    """Why no result file can be written there; None if one can. Makes its folder."""
    if path.is_dir():
        return "it is a folder; a result file is meant"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        return reason(error)


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        FastsdError: no such file, or not a result file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FastsdError(f"cannot be read ({error.strerror})", path=path) from error
    except ValueError as error:
        raise FastsdError("not a result file; `pytest bench/ --benchmark` writes one", path=path) from error
    records = data.get("records") if isinstance(data, dict) else None
    for record in records if isinstance(records, list) else ():
        if isinstance(record, dict) and "contest" in record:  # the key's older name
            record["benchmark"] = record.pop("contest")
    if not isinstance(records, list) or not all(isinstance(r, dict) and "benchmark" in r for r in records):
        raise FastsdError("not a result file; `pytest bench/ --benchmark` writes one", path=path)
    if data.get("format") != FORMAT:
        raise FastsdError(f"format {data.get('format')!r}; this version reads format {FORMAT}", path=path)
    return data


def default_path(device: torch.device) -> Path:
    """bench/results/<gpu or cpu>/<date>-<commit>.json"""
    if device.type == "cuda":
        folder = torch.cuda.get_device_name(device).lower().replace("nvidia ", "").replace(" ", "-")
    else:
        folder = "cpu"
    day = datetime.date.today().isoformat()
    return ROOT / "bench" / "results" / folder / f"{day}-{git_commit()}.json"
