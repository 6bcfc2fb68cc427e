"""The table of docs/kernels.md: what the launches of the models compile to, under several versions of Triton."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.compiled import SHARED
from bench.dryrun.compiles import HEAD, ROOT, CompiledLaunches, KernelSizes, by_version
from bench.dryrun.launches import dumps, launches

PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- python -m bench.compile_report --models --write -->\n", "<!-- /compiled -->"


def compile_models(architectures: Iterable[int], folders: Sequence[Path]) -> list[CompiledLaunches]:
    """Find and compile the launches of each architecture; print what comes of it, as soon as it is known.

    Triton keeps what it compiled (TRITON_CACHE_DIR), so a run that was stopped goes on where it was.

    Args:
        folders: with other versions of Triton than the installed one.
    """
    found = []
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for sm in architectures:
            file = Path(folder) / f"launches-{sm}"
            file.write_bytes(dumps(launches(sm)))
            for version in (None, *folders):
                found.append(by_version(version, file, sm))
                print(*found[-1].rows(), sep="\n", flush=True)
    return found


def markdown(found: Sequence[CompiledLaunches]) -> str:
    """A row for each kernel, a column for each architecture; of several versions the most that any of them takes."""
    versions = sorted({one.triton for one in found}, key=lambda name: [int(part) for part in name.split(".")])
    names = sorted({kernel for one in found for kernel in one.kernels})
    limits = {sm: limit for sm, limit in SHARED.items() if any(one.sm == sm for one in found)}
    lines = [
        "| kernel | " + " | ".join(f"sm_{sm}" for sm in limits) + " |",
        "|---" * (1 + len(limits)) + "|",
        *(f"| `{name}` | " + " | ".join(_cell(found, sm, name) for sm in limits) + " |" for name in names),
        "| limit, KiB | " + " | ".join(f"{limit / 1024:g}" for limit in limits.values()) + " |",
    ]
    problems = sorted({f"sm_{one.sm}, Triton {one.triton}: {problem}" for one in found for problem in one.wrong})
    told = f"Triton {', '.join(versions)}. Every launch compiles and fits, and none spills inside a loop"
    told += ", but for these:" if problems else "."
    return "\n".join([*lines, "", told, *(f"- {problem}" for problem in problems)]) + "\n"


def _cell(found: Sequence[CompiledLaunches], sm: int, kernel: str) -> str:
    """launches: registers / bytes spilled / KiB of shared memory."""
    sizes = [one.kernels[kernel] for one in found if one.sm == sm and kernel in one.kernels]
    if not sizes:
        return ""
    most = KernelSizes(*(max(getattr(one, name) for one in sizes) for name in KernelSizes.__dataclass_fields__))
    return f"{most.launches}: {most.registers}/{most.spills}/{most.shared / 1024:.3g}"


def written(page: str, table: str) -> str:
    """The page with another table."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + table + page[end:]
