"""Results for tables and charts: groups of records, titles, formatted numbers."""

from __future__ import annotations

from typing import Any

from bench.record import KEY

TITLES = {
    "step": "one guided step", "decode": "VAE decode", "encode": "VAE encode", "image": "prompt to image",
    "text": "text", "cold": "cold process to first image", "update": "sampler update",
    "denoise": "one step with guidance and update",
}  # fmt: skip
MAIN = ("denoise", "step", "decode", "image", "cold")  # the benchmarks of the table and of the first chart


Groups = dict[tuple[Any, ...], dict[str, dict[str, Any]]]  # records by what was measured, then by candidate


def groups(data: dict[str, Any], benchmarks: tuple[str, ...] = MAIN) -> Groups:
    """The records of each measurement by candidate, in the order of `benchmarks`."""
    by_key: Groups = {}
    records = [record for record in data["records"] if record["benchmark"] in benchmarks]
    for record in sorted(records, key=lambda record: benchmarks.index(record["benchmark"])):
        key = tuple(record.get(name) for name in KEY[:-1])
        by_key.setdefault(key, {})[record["candidate"]] = record
    return by_key


def title(key: tuple[Any, ...]) -> str:
    benchmark, model, size, batch, steps, dtype = key
    text = f"{TITLES.get(benchmark, benchmark)}, {model} {size}², {dtype}"
    text += f", {steps} steps" if steps else ""
    return text + (f", batch {batch}" if batch and batch > 1 else "")


def seconds(record: dict[str, Any] | None) -> float | None:
    return record["seconds"]["median"] if record and record.get("seconds") else None


def peak(record: dict[str, Any]) -> float | None:
    """The peak memory of the process in GiB; None if it was not measured."""
    sizes = record.get("peak", {})
    size = sizes.get("driver", sizes.get("resident"))
    return size / 2**30 if size else None


def show(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def reason(record: dict[str, Any]) -> str:
    """Why a record has no time, in a few words."""
    problem, gate = record.get("problem", "–"), record.get("gate")
    if gate and not gate["passed"] and not problem.startswith("failed"):
        return "correctness check failed"
    return problem.split(":")[0]
