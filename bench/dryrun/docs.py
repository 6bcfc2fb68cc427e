"""The part of docs/performance.md that dry runs write."""

from __future__ import annotations

from pathlib import Path

from bench.dryrun.gpus import GPUS
from bench.dryrun.record import DryRun, dry_run
from bench.dryrun.table import markdown, memory, model
from bench.dryrun.ways import generate
from bench.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
START, END = "<!-- dry run -->", "<!-- /dry run -->"
GPU = GPUS["h100"]


def text_to_image(name: str) -> DryRun:
    """A family's run from text, one image of its size."""
    with dry_run(GPU) as run:
        generate(run, FAMILIES[name])
    return run


def block(sd15: DryRun, sdxl: DryRun) -> str:
    """The tables, from runs of SD1.5 and SDXL."""
    sections = {
        "SD1.5 512², guided step": sd15.of("step"),
        "SDXL 1024², guided step": sdxl.of("step"),
        "VAE decode 1024²": sdxl.of("decode"),
    }
    return "\n".join(
        [
            START,
            *markdown(sections, GPU),
            "",
            f"{GPU.name}, one image, fp16. Launches and bytes are counted, times modelled: {model(GPU)}.",
            f"SD1.5: {memory(sd15)}. SDXL: {memory(sdxl)}.",
            END,
        ]
    )


def written(page: str, new: str) -> str:
    """The page with another block."""
    start, end = page.index(START), page.index(END) + len(END)
    return page[:start] + new + page[end:]


def write() -> None:
    """Bring the page up to date."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(page, block(text_to_image("sd15"), text_to_image("sdxl"))), encoding="utf-8")
