"""The README's table and the charts, from the result files.

    python -m bench.report [FILE.json ...] [--charts docs/images] [--readme README.md] [--kernels docs/performance.md]

Without files: the newest of each folder in bench/results/. The table replaces what stands between the two marks
"<!-- speed -->" and "<!-- /speed -->" in the README, that of the single kernels what stands between "<!-- kernels -->"
and "<!-- /kernels -->" in docs/performance.md; without the marks they are only printed. Nothing is drawn or written
that a green gate did not let through.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.figures import groups, peak, seconds, show, title
from bench.record import ROOT, limit_of, read
from fastsd.errors import FastsdError

SPEED, KERNELS = "speed", "kernels"  # the names of the marks


def newest() -> list[Path]:
    """The last result file of each folder (their names begin with the date)."""
    folders = sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir())
    files = [
        sorted(folder.glob("*.json"), key=lambda path: (path.name[:10], path.stat().st_mtime)) for folder in folders
    ]
    return [group[-1] for group in files if group]


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
    return "\n".join([head, "|---" * (len(names) + 2) + "|", *rows, "", f"Medians. {note(environment)}"])


def note(environment: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    threads = f", {environment['threads']} threads" if "cores" in environment else ""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v and k != "fastsd")
    commit = f"commit {environment['commit']}, {environment['date'][:10]}"
    return f"{environment['device']}{threads}; {versions}; {commit}."


def kernel_table(data: dict[str, Any]) -> str:
    """Markdown: for each kernel and candidate its time, rate and share of the limit; "" where none was measured."""
    rows = []
    for key, records in groups(data, ("kernel",)).items():
        for name, record in records.items():
            value, limit = seconds(record), limit_of(record)
            what = f"| {key[1]}, {key[5]} | {name} |"
            if value is None:
                rows.append(f"{what} {record.get('problem', '–').split(':')[0]} | | |")
            elif limit is None:
                rows.append(f"{what} {show(value)} | | |")
            else:
                rows.append(f"{what} {show(value)} | {limit.rate(value)} | {limit.seconds / value:.0%} |")
    if not rows:
        return ""
    head = ["| kernel | | time | reached | share of the limit |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"Medians. {note(data['environment'])}"])


def put(page: Path, name: str, text: str) -> bool:
    """Replace what stands between the marks of that name; whether they were there."""
    mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(mark) + ".*?" + re.escape(end), re.S)
    if not pattern.search(old):
        return False
    page.write_text(pattern.sub(lambda _: f"{mark}\n{text}\n{end}", old), encoding="utf-8")
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--charts", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--kernels", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(arguments)
    try:
        files = options.files or newest()
        if not files:
            raise FastsdError("no result files in bench/results; `pytest bench/ --benchmark` writes one")
        results = {path: read(path) for path in files}
    except FastsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, page, make in ((SPEED, options.readme, table), (KERNELS, options.kernels, kernel_table)):
        text = "\n\n".join(filter(None, map(make, results.values())))
        if not text:
            continue
        print(text + "\n")
        if not put(page, name, text):
            print(f"{page} has no line <!-- {name} -->; nothing was written there", file=sys.stderr)
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
