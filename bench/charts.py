"""Charts of a result file: speed beside peers and the floor, time by kind of op, batches, memory, first image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.figures import groups, peak, seconds, show, title

COLOURS = {"fastsd": "#1f6feb", "pytorch": "#8b949e", "diffusers": "#d29922", "diffusers-channels-last": "#e3b341",
           "diffusers-compiled": "#bf8700", "floor": "#2da44e"}  # fmt: skip
HIDDEN = ("fastsd, nothing hoisted",)
# Titles of the phases of a cold process whose names in the result file differ.
PHASES = {"start of Python": "Python start-up", "other steps but the last": "middle steps"}
KINDS = {"conv": "#1f6feb", "linear": "#54aeff", "attention": "#d29922", "norm": "#a475f9", "other": "#d0d7de"}


def colour(name: str) -> str:
    return COLOURS.get(name, "#6e7781")


def write_charts(data: dict[str, Any], folder: Path, suffix: str) -> list[Path]:
    """Write every chart that has data, as <chart>-<suffix>.png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"speed": _speed, "parts": _parts, "batches": _batches, "memory": _memory, "first": _first}
    written = []
    for name, make in makers.items():
        figure = make(data)
        if figure is None:
            continue
        figure.text(0.995, -0.03, _source(data), ha="right", va="top", fontsize=6.5, color="#57606a")
        path = folder / f"{name}-{suffix}.png"
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def _source(data: dict[str, Any]) -> str:
    environment = data["environment"]
    return f"{environment['device']}, commit {environment['commit']}, {environment['date'][:10]}"


def _speed(data: dict[str, Any]) -> Any:
    """For each measurement a group of bars: the time of each candidate, and the floor."""
    measured = {
        key: value for key, value in groups(data, ("step", "decode", "image")).items() if seconds(value.get("fastsd"))
    }
    if not measured:
        return None
    figure, axes = plt.subplots(len(measured), 1, figsize=(8, 1.0 + 1.25 * len(measured)), squeeze=False)
    for (key, records), axis in zip(measured.items(), axes[:, 0]):
        bars = [(name, seconds(r)) for name, r in records.items() if name not in HIDDEN and seconds(r)]
        if records["fastsd"].get("floor"):
            bars.append(("floor", records["fastsd"]["floor"]))
        _bars(axis, bars)
        axis.set_title(title(key), fontsize=9, loc="left")
    figure.tight_layout()
    return figure


def _bars(axis: Any, bars: list[tuple[str, Any]]) -> None:
    """Horizontal bars with their names and values."""
    names, values = [name for name, _ in bars], [value for _, value in bars]
    axis.barh(names, values, color=[colour(name) for name in names], height=0.7)
    for i, value in enumerate(values):
        axis.text(value + 0.01 * max(values), i, show(value), va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(values))
    axis.tick_params(labelsize=8)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _parts(data: dict[str, Any]) -> Any:
    """Stacked by kind of op: the measured time, and below it the floor of the same work."""
    bars: list[tuple[str, dict[str, float], float]] = []  # name, seconds by kind, measured seconds
    for key, records in groups(data, ("step", "decode")).items():
        record = records.get("fastsd", {})
        whole = seconds(record)
        if whole and record.get("kinds") and record.get("by_kind"):
            bars.append((f"{title(key)}: {show(whole)}", record["kinds"], whole))
            bars.append((f"floor: {show(sum(record['by_kind'].values()))}", record["by_kind"], whole))
    if not bars:
        return None
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.45 * len(bars)))
    positions = [i // 2 * 2.4 + i % 2 * 0.9 for i in range(len(bars))]  # in pairs
    left = [0.0] * len(bars)
    for kind, shade in KINDS.items():
        values = [part.get(kind, 0.0) / whole for _, part, whole in bars]
        axis.barh(positions, values, left=left, color=shade, label=kind, height=0.8)
        for position, value, start in zip(positions, values, left):
            if value > 0.04:
                axis.text(start + value / 2, position, f"{value:.0%}", ha="center", va="center", fontsize=7)
        left = [a + b for a, b in zip(left, values)]
    axis.set_yticks(positions, [name for name, _, _ in bars])
    axis.set_xlim(0, max(1.0, *left))
    axis.set_xlabel("share of the measured time", fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _batches(data: dict[str, Any]) -> Any:
    """Images times steps per second by batch size, for measurements at several batch sizes."""
    lines: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = {}
    for key, records in groups(data, ("step", "image")).items():
        benchmark, model, size, batch, steps, dtype = key
        work = batch * (steps or 1)
        for name, record in records.items():
            whole = seconds(record)
            if whole and name not in HIDDEN:
                line = lines.setdefault((benchmark, model, size, 1, steps, dtype), {})
                line.setdefault(name, []).append((batch, work / whole))
                if name == "fastsd" and record.get("floor"):
                    line.setdefault("floor", []).append((batch, work / record["floor"]))
    lines = {key: line for key, line in lines.items() if len(line.get("fastsd", [])) > 1}
    if not lines:
        return None
    figure, axes = plt.subplots(len(lines), 1, figsize=(7, 0.6 + 2.6 * len(lines)), squeeze=False)
    for (key, line), axis in zip(lines.items(), axes[:, 0]):
        for name, points in line.items():
            points.sort()
            style = "--" if name == "floor" else "-"
            axis.plot(*zip(*points), style, marker="o", markersize=4, color=colour(name), label=name)
        batches = sorted({batch for points in line.values() for batch, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
        axis.set_ylim(0)
        axis.set_xlabel("batch size", fontsize=8)
        axis.set_ylabel("images × steps / s", fontsize=8)
        axis.set_title(title(key), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _memory(data: dict[str, Any]) -> Any:
    """Peak memory of a process that generates one image."""
    measured = {
        key: [(name, peak(r)) for name, r in records.items() if peak(r) and seconds(r)]
        for key, records in groups(data, ("cold",)).items()
    }
    measured = {key: bars for key, bars in measured.items() if bars}
    if not measured:
        return None
    figure, axes = plt.subplots(len(measured), 1, figsize=(8, 1.0 + 0.9 * len(measured)), squeeze=False)
    for (key, bars), axis in zip(measured.items(), axes[:, 0]):
        _bars(axis, bars)
        for text, (_, value) in zip(axis.texts, bars):
            text.set_text(f"{value:.2f} GiB")
        axis.set_title("peak memory, " + title(key), fontsize=9, loc="left")
    figure.tight_layout()
    return figure


def _first(data: dict[str, Any]) -> Any:
    """A cold process up to its first image, stacked by phase."""
    rows = [
        (f"{name}, {key[1]}, {key[5]}", record["split"])
        for key, records in groups(data, ("cold",)).items()
        for name, record in records.items()
        if record.get("split") and seconds(record)
    ]
    if not rows:
        return None
    order = list(dict.fromkeys(["start of Python", *(part for _, split in rows for part in split)]))
    shades = ("#8b949e", "#d0d7de", "#54aeff", "#d29922", "#1f6feb", "#8250df", "#2da44e")
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.4 * len(rows)))
    left = [0.0] * len(rows)
    for part, shade in zip(order, shades):
        values = [split.get(part, 0.0) for _, split in rows]
        axis.barh([name for name, _ in rows], values, left=left, color=shade, label=PHASES.get(part, part), height=0.6)
        left = [a + b for a, b in zip(left, values)]
    for i, total in enumerate(left):
        axis.text(total, i, f" {total:.1f} s", va="center", fontsize=8)
    axis.set_xlim(0, 1.12 * max(left))
    axis.set_xlabel("seconds from the start of the process to the first image", fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
