"""The README's table and the charts, from the result files.

    python -m bench.report [FILE.json ...] [--charts docs/images] [--readme README.md]

Without files: the newest of each folder in bench/results/. The table replaces what stands between the two marks
"<!-- speed -->" and "<!-- /speed -->" in the README; without the marks it is only printed. Nothing is drawn or
written that a green gate did not let through.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.record import ROOT, read
from fastsd.errors import FastsdError

TITLES = {
    "step": "one guided step", "decode": "VAE decode", "encode": "VAE encode", "image": "prompt to picture",
    "text": "text", "cold": "cold process to first picture", "update": "sampler update",
}  # fmt: skip
MAIN = ("step", "decode", "image", "cold")  # what the table and the first chart show
MARK, END = "<!-- speed -->", "<!-- /speed -->"


def newest() -> list[Path]:
    """The last result file of each folder (their names begin with the date)."""
    folders = sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir())
    files = [
        sorted(folder.glob("*.json"), key=lambda path: (path.name[:10], path.stat().st_mtime)) for folder in folders
    ]
    return [group[-1] for group in files if group]


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


def table(data: dict[str, Any]) -> str:
    """Markdown: a row for each measurement, a column for each candidate; peers with their ratio to fastsd."""
    found = groups(data)
    names = list(dict.fromkeys(name for records in found.values() for name in records))
    names = [name for name in names if name != "fastsd, nothing hoisted"]
    environment, rows = data["environment"], []
    for key, records in found.items():
        own = seconds(records.get("fastsd"))
        cells = []
        for name in names:
            value, record = seconds(records.get(name)), records.get(name)
            if value is None:
                cells.append("–" if record is None else record.get("problem", "–").split(":")[0])
                continue
            ratio = f" ({value / own:.2f}×)" if own and name != "fastsd" else ""
            memory = f", {peak(record):.1f} GiB" if record and peak(record) else ""
            cells.append(
                f"{'**' if name == 'fastsd' else ''}{show(value)}{'**' if name == 'fastsd' else ''}{ratio}{memory}"
            )
        floor = records.get("fastsd", {}).get("floor")
        share = f"{floor / own:.0%}" if floor and own else "–"
        rows.append(f"| {title(key)} | {' | '.join(cells)} | {share} |")
    head = f"| | {' | '.join(names)} | fastsd's share of the limit |"
    threads = f", {environment['threads']} threads" if "cores" in environment else ""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v and k != "fastsd")
    note = f"{environment['device']}{threads}; {versions}; commit {environment['commit']}, {environment['date'][:10]}."
    return "\n".join([head, "|---" * (len(names) + 2) + "|", *rows, "", f"Medians. {note}"])


def put(readme: Path, text: str) -> bool:
    """Replace what stands between the marks; whether they were there."""
    old = readme.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(MARK) + ".*?" + re.escape(END), re.S)
    if not pattern.search(old):
        return False
    readme.write_text(pattern.sub(lambda _: f"{MARK}\n{text}\n{END}", old), encoding="utf-8")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--charts", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    try:
        files = options.files or newest()
        if not files:
            raise FastsdError("no result files in bench/results; `pytest bench/ --benchmark` writes one")
        results = {path: read(path) for path in files}
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = "\n\n".join(table(data) for data in results.values())
    print(text)
    if not put(options.readme, text):
        print(f"\n{options.readme} has no line {MARK}; nothing was written there", file=sys.stderr)
    try:
        from bench.charts import draw
    except ImportError:
        print("no charts: matplotlib is missing (pip install -e '.[bench]')", file=sys.stderr)
        return 0
    for path, data in results.items():
        for chart in draw(data, options.charts, path.parent.name):
            print(f"drawn: {chart}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
