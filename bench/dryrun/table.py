"""The tables of a dry run: launches, bytes, modelled time and floor, by kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bench.dryrun.cost import KINDS
from bench.dryrun.gpus import LAUNCH, REACHED, Gpu
from bench.dryrun.record import DryRun, RecordedLaunch, Section

ITEMSIZE = 2  # bytes of an element of weights and activations


@dataclass(frozen=True)
class Row:
    """The launches of one kind in a section: their number, bytes, modelled seconds; the floor's seconds."""

    launches: int
    bytes: int
    seconds: float
    floor: float


def seconds(launch: RecordedLaunch, gpu: Gpu) -> float:
    """The modelled time of a launch: the longest of its operations, bytes and exponentials, and at least `LAUNCH`.

    A product of fp8 takes half the time of one of 16 bits.
    """
    reachable = gpu.reachable
    products = gpu.tflops * 1e12 * REACHED["attention"] if launch.kind == "attention" else reachable.flops
    products *= 2 if any(x.dtype == torch.float8_e4m3fn for x in launch.tensors) else 1
    times = launch.flops / products, launch.bytes / reachable.bytes, launch.exps / reachable.exps
    return max(LAUNCH, *times)


def rows(section: Section, gpu: Gpu) -> dict[str, Row]:
    """By kind, those that have launches; and "all"."""
    floors = section.floors.seconds(gpu.reachable, ITEMSIZE)
    found = {}
    for kind in KINDS:
        launches = [launch for launch in section.launches if launch.kind == kind]
        if launches:
            found[kind] = _row(launches, gpu, floors.get(kind, 0.0))
    return {**found, "all": _row(section.launches, gpu, sum(floors.values()))}


def _row(launches: Iterable[RecordedLaunch], gpu: Gpu, floor: float) -> Row:
    launches = list(launches)
    time = sum(seconds(launch, gpu) for launch in launches)
    return Row(len(launches), sum(launch.bytes for launch in launches), time, floor)


def text(run: DryRun, gpu: Gpu) -> str:
    """Every section of a run, and its memory."""
    lines = [f"{gpu.name}, modelled: {model(gpu)}", ""]
    for section in run.sections:
        if not section.launches:
            continue
        times = f", {section.replays} times" if section.replays else ""
        lines.append(f"{section.name or 'outside of graphs'}{times}")
        lines.append(f"  {'':12} launches        GB  modelled, ms  floor, ms")
        for kind, row in rows(section, gpu).items():
            numbers = f"{row.launches:8}  {row.bytes / 1e9:8.3f}  {1e3 * row.seconds:12.3f}"
            lines.append(f"  {kind:12} {numbers}" + (f"  {1e3 * row.floor:9.3f}" if row.floor else ""))
        lines.append("")
    return "\n".join([*lines, memory(run)])


def model(gpu: Gpu) -> str:
    """The assumptions of a modelled time."""
    return (
        f"{REACHED['products']:.0%} of {gpu.tflops:g} TFLOP/s ({REACHED['attention']:.0%} in attention), "
        f"{REACHED['bytes']:.0%} of {gpu.gbytes:g} GB/s, at least {1e6 * LAUNCH:g} µs a launch"
    )


def memory(run: DryRun) -> str:
    """The allocator's peaks."""
    held, reserved = run.memory.peak / 2**30, run.memory.reserved / 2**30
    return f"memory, modelled: {held:.2f} GiB allocated at the peak, {reserved:.2f} GiB reserved"


def markdown(sections: dict[str, Section], gpu: Gpu) -> list[str]:
    """One table of several sections, by their titles."""
    tables = {title: rows(section, gpu) for title, section in sections.items()}
    lines = [f"| | {' | '.join(f'{title}: launches | GB | ms (floor)' for title in tables)} |"]
    lines.append("|---|" + "---|" * (3 * len(tables)))
    for kind in (*KINDS, "all"):
        if not any(kind in table for table in tables.values()):
            continue
        cells = []
        for table in tables.values():
            row = table.get(kind)
            cells += ["", "", ""] if row is None else [str(row.launches), f"{row.bytes / 1e9:.2f}", _times(row)]
        bold = "**" if kind == "all" else ""
        lines.append(f"| {bold}{kind}{bold} | {' | '.join(cells)} |")
    return lines


def _times(row: Row) -> str:
    return f"{1e3 * row.seconds:.2f}" + (f" ({1e3 * row.floor:.2f})" if row.floor else "")
