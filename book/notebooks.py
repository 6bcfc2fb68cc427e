"""Notebooks: run from the first cell to the last, and as a page of the site with what they printed and drew."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 900  # of one cell


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run(path: Path) -> Any:
    """The notebook with its outputs; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds its traceback.
    """
    notebook = read(path)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    return notebook


def as_page(notebook: Any, stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its images by their names."""
    parts, images = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stdout":
                parts.append(f"```text\n{output.text.rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                name = f"{stem}-{len(images) + 1}.png"
                images[name] = base64.b64decode(output.data["image/png"])
                parts.append(f"![what this cell draws]({name})")
    return "\n\n".join(parts) + "\n", images
