"""The layout of package and tests: names, sizes, and the glossary's words."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400  # of a file
MAX_FUNCTION = 60  # lines, outside Triton kernels
AT_THE_TOP = 12  # modules and files of fastsd/ itself


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def test_files_and_functions_fit_a_readers_patience() -> None:
    long = []
    for path, tree in sources("fastsd", "bench", "book", "comfyui", "tests"):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            long.append(f"{path}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "triton" not in path.parts:
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION:
                    long.append(f"{path}: {node.name} has {size} lines")
    assert not long, "\n".join(long)


def test_a_class_name_means_one_class() -> None:
    where = defaultdict(list)
    for path, tree in sources("fastsd", "bench", "book", "comfyui"):
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                where[node.name].append(str(path))
    several = [f"{name}: {', '.join(paths)}" for name, paths in where.items() if len(paths) > 1]
    assert not several, "\n".join(several)


def test_the_top_of_the_package_stays_small() -> None:
    modules = [path.name for path in (ROOT / "fastsd").glob("*.py") if not path.name.startswith("__")]
    assert len(modules) <= AT_THE_TOP, modules


def test_tests_import_no_other_tests() -> None:
    wrong = []
    for path, tree in sources("tests"):
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong += [f"{path} imports {name}" for name in names if re.match(r"tests\.(?!support\b)", name)]
    assert not wrong, "\n".join(wrong)


# Tests of several modules together, which have no namesake.
TOGETHER = ("agreement", "parity", "gpu", "bench", "clients", "comfyui", "docs", "examples", "support", "reports")


def test_tests_mirror_the_package() -> None:
    """A test module tests the module of its name, or the folder of its name, or is about a whole folder."""
    stray = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        inside = path.relative_to(ROOT / "tests")
        if inside.parts[0] in TOGETHER:
            continue
        folder, stem = ROOT / "fastsd" / inside.parent, inside.stem.removeprefix("test_")
        about = (*ABOUT.get(str(inside.parent), ()), inside.parent.name)
        if not (folder / f"{stem}.py").exists() and not (folder / stem).is_dir() and stem not in about:
            stray.append(str(inside))
    assert not stray, "\n".join(stray)


# What is tested of a whole folder, by the folder.
ABOUT: dict[str, tuple[str, ...]] = {
    ".": ("imports", "layout", "package"),
    "batch": ("kills", "objects"),
    "cli": ("few_step", "prompts"),  # features that several of its modules share
    "evaluate/digits": ("bundled_model",),
    "train": ("kills",),
    "kernels": (
        "flash_attn_compile",
        "library_candidates",
        "triton_compile",
        "triton_versions",
        "triton_interpreted",
        "avx2",
        "precision",
        "recipe",
        "gradients",
    ),
    "kernels/triton": ("models", "training"),
    # Against diffusers' schedulers, against published loops, and an exact solution.
    "sampling": ("diffusers", "solvers", "euler_maruyama"),
    "server": ("openapi", "endurance", "proxy"),
    "verify": ("gpu",),
    "weights": ("malformed", "memory", "recipes"),
}


def test_the_words_that_we_left() -> None:
    """CONTRIBUTING.md has the glossary; the words of its second column are not written here."""
    glossary = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Glossary")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| ([^|]*)\|", glossary, re.M)[1:]
    left = [word.strip() for row in rows for word in row.split(",") if word.strip()]
    assert len(left) >= 10
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in left), re.I)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        if Path(name).suffix not in (".py", ".md", ".toml") or name in ("CONTRIBUTING.md", "tests/test_layout.py"):
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line) and '"contest"' not in line:  # an older key of result files
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
