"""Figures out of a result file: records that belong together, and how they are shown."""

from __future__ import annotations

from typing import Any

TITLES = {
    "step": "one guided step", "decode": "VAE decode", "encode": "VAE encode", "image": "prompt to picture",
    "text": "text", "cold": "cold process to first picture", "update": "sampler update",
}  # fmt: skip
MAIN = ("step", "decode", "image", "cold")  # what the table and the first chart show


def groups(data: dict[str, Any], contests: tuple[str, ...] = MAIN) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Records by what was measured, each a record by candidate, in order of `contests`."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in sorted(
        (r for r in data["records"] if r["contest"] in contests), key=lambda r: contests.index(r["contest"])
    ):
        key = tuple(record.get(name) for name in ("contest", "model", "size", "batch", "steps", "dtype"))
        found.setdefault(key, {})[record["candidate"]] = record
    return found


def title(key: tuple[Any, ...]) -> str:
    contest, model, size, batch, steps, dtype = key
    text = f"{TITLES.get(contest, contest)}, {model} {size}², {dtype}"
    text += f", {steps} steps" if steps else ""
    return text + (f", batch {batch}" if batch and batch > 1 else "")


def seconds(record: dict[str, Any] | None) -> float | None:
    return record["seconds"]["median"] if record and record.get("seconds") else None


def peak(record: dict[str, Any]) -> float | None:
    """GiB that a process took at its peak, where that was measured."""
    sizes = record.get("peak", {})
    found = sizes.get("driver", sizes.get("resident"))
    return found / 2**30 if found else None


def show(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
