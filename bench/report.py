"""The tables in the README and in docs/performance.md, and the charts, from the result files.

    python -m bench.report [FILE.json ...] [--charts docs/images] [--readme README.md] [--kernels docs/performance.md]

Without files: the newest of each folder in bench/results/. The main table replaces the text between the marks
"<!-- speed -->" and "<!-- /speed -->" in the README; the table of single kernels replaces the text between
"<!-- kernels -->" and "<!-- /kernels -->" in docs/performance.md. Without the marks they are only printed. A candidate
whose correctness check failed appears without a time.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.figures import groups, peak, reason, seconds, show, title
from bench.record import ROOT, limit_of, read
from fastsd.errors import FastsdError

SPEED, KERNELS = "speed", "kernels"  # the names of the marks


def newest() -> list[Path]:
    """The newest result file of each folder, by the date in its name."""
    folders = sorted(path for path in (ROOT / "bench" / "results").glob("*") if path.is_dir())
    files = [
        sorted(folder.glob("*.json"), key=lambda path: (path.name[:10], path.stat().st_mtime)) for folder in folders
    ]
    return [group[-1] for group in files if group]


def table(data: dict[str, Any]) -> str:
    """Markdown: a row for each measurement, a column for each candidate; peers with their ratio to fastsd."""
    measured = groups(data)
    names = list(dict.fromkeys(name for records in measured.values() for name in records))
    names = [name for name in names if name != "fastsd, nothing hoisted"]
    environment, rows = data["environment"], []
    for key, records in measured.items():
        own = seconds(records.get("fastsd"))
        cells = []
        for name in names:
            value, record = seconds(records.get(name)), records.get(name)
            if value is None:
                cells.append("–" if record is None else reason(record))
                continue
            ratio = f" ({value / own:.2f}×)" if own and name != "fastsd" else ""
            memory = f", {peak(record):.1f} GiB" if record and peak(record) else ""
            bold = "**" if name == "fastsd" else ""
            cells.append(f"{bold}{show(value)}{bold}{ratio}{memory}")
        floor = records.get("fastsd", {}).get("floor")
        share = f"{floor / own:.0%}" if floor and own else "–"
        rows.append(f"| {title(key)} | {' | '.join(cells)} | {share} |")
    head = f"| | {' | '.join(names)} | fastsd's share of the limit |"
    return "\n".join([head, "|---" * (len(names) + 2) + "|", *rows, "", f"Medians. {note(environment)}"])


def note(environment: dict[str, Any]) -> str:
    """The device, the versions and the commit of the measurements."""
    threads = f", {environment['threads']} threads" if "cores" in environment else ""
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v and k != "fastsd")
    commit = f"commit {environment['commit']}, {environment['date'][:10]}"
    return f"{environment['device']}{threads}; {versions}; {commit}."


def kernel_table(data: dict[str, Any]) -> str:
    """Markdown: the time, rate and share of the limit of each kernel and candidate; "" if none was measured."""
    rows = []
    for key, records in groups(data, ("kernel",)).items():
        for name, record in records.items():
            value, limit = seconds(record), limit_of(record)
            start = f"| {key[1]}, {key[5]} | {name} |"
            if value is None:
                rows.append(f"{start} {reason(record)} | | |")
            elif limit is None:
                rows.append(f"{start} {show(value)} | | |")
            else:
                rows.append(f"{start} {show(value)} | {limit.rate(value)} | {limit.seconds / value:.0%} |")
    if not rows:
        return ""
    head = ["| kernel | | time | rate | share of the limit |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"Medians. {note(data['environment'])}"])


def replace_marked(page: Path, name: str, text: str) -> bool:
    """Replace the text between the marks of that name; returns whether the page has them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
    if not pattern.search(old):
        return False
    page.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{end}", old), encoding="utf-8")
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
        if not replace_marked(page, name, text):
            print(f"{page} has no line <!-- {name} -->; the table is not written", file=sys.stderr)
    try:
        from bench.charts import write_charts
    except ImportError:
        print("no charts: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
        return 0
    for path, data in results.items():
        for chart in write_charts(data, options.charts, path.parent.name):
            print(f"written: {chart}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
