"""Imports run one way: errors, config -> kernels -> model, sampling, graph -> weights -> pipeline -> what uses it.

Those of bench/ too, in no circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fastsd"

# The statement of the order: a room imports only rooms of a lower rank, and itself. A new room needs a line here.
RANKS = {
    "errors": 0,
    "config": 0,
    "bundled": 0,
    "cuda": 1,
    "few_step": 1,
    "files": 1,
    "kernels": 2,
    "model": 3,
    "sampling": 3,
    "graph": 3,
    "parameters": 4,
    "runtime": 4,
    "components": 4,
    "image": 5,
    "weights": 5,
    "text": 5,
    "diffusers": 6,
    "upscale": 6,
    "generate": 6,
    "pipeline": 7,
    "data": 8,
    "train": 8,
    "evaluate": 8,
    "show": 8,
    "verify": 8,
    "tune": 8,
    "cli": 9,
    "batch": 10,
    "server": 10,
    "__main__": 11,
}
# Rooms of one rank that may know each other all the same.
ALLOWED = {
    ("generate", "upscale"),
    ("evaluate", "train"),
    ("tune", "verify"),
}
# `fastsd` itself hands these out, on demand; only the modules that use the pipeline may import `fastsd` itself.
FACE = {"diffusers", "errors", "generate", "pipeline", "upscale", "weights"}


def imported_modules(source: str, module: str, is_package: bool, top: str = "fastsd") -> list[str]:
    """Absolute names of everything under `top` that `source` imports, inside functions too.

    `module` is the dotted name of the source, which relative imports start from. `from a import b` gives `a.b`, since
    b may be a module. What stands under `if TYPE_CHECKING:` counts too: it is an edge in the design.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                drop = node.level - 1 if is_package else node.level
                parents = module.split(".")[: len(module.split(".")) - drop]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [name for name in found if name == top or name.startswith(f"{top}.")]


def room(module: str) -> str:
    """The room of a dotted name: "model" for fastsd.model.clip, "" for fastsd itself and for names in it."""
    second = (module.split(".") + [""])[1]
    return second if second in RANKS else ""


def bad_edges(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of one source that run against the order, each as one line."""
    here, bad = room(module), []
    for target in imported_modules(source, module, is_package):
        there = room(target)
        if here == "":
            right = there in FACE or there == ""
        elif there == "":
            right = RANKS[here] > RANKS["pipeline"]
        else:
            right = there == here or RANKS[there] < RANKS[here] or (here, there) in ALLOWED
        if not right:
            bad.append(f"{module} imports {target}")
    return bad


def sources(top: str = "fastsd") -> list[tuple[str, Path]]:
    files = []
    for file in sorted((PACKAGE.parent / top).rglob("*.py")):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        files.append((".".join(part for part in parts if part != "__init__"), file))
    return files


def test_every_room_has_a_rank() -> None:
    rooms = {module.split(".")[1] for module, _ in sources() if "." in module}
    assert rooms <= set(RANKS), f"rooms without a rank in this test: {sorted(rooms - set(RANKS))}"


@pytest.mark.parametrize(("module", "file"), sources(), ids=[module for module, _ in sources()])
def test_imports_run_one_way(module: str, file: Path) -> None:
    edges = bad_edges(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")
    assert not edges, "against the order of the modules: " + "; ".join(edges)


@pytest.mark.parametrize(("top", "known_module"), [("fastsd", "fastsd.pipeline"), ("bench", "bench.intercept")])
def test_modules_import_one_another_in_no_circle(top: str, known_module: str) -> None:
    """Within a subpackage too, and inside functions; a package's `__init__` stands for the package."""
    names = {module for module, _ in sources(top)}

    def known(name: str) -> str:
        return name if name in names else name.rpartition(".")[0]

    edges = {
        module: {
            known(name)
            for name in imported_modules(file.read_text(encoding="utf-8"), module, file.name == "__init__.py", top)
        }
        - {module, top}
        for module, file in sources(top)
        if module != top  # it hands out names of all of them
    }
    order: list[str] = []
    while edges:
        free = sorted(module for module, targets in edges.items() if not targets & set(edges))
        assert free, f"a circle among {sorted(edges)}"
        order += free
        for module in free:
            del edges[module]
    assert known_module in order


def test_what_is_measured_knows_neither_tests_nor_what_measures_it() -> None:
    """tests -> bench -> fastsd."""
    for top, others in {"fastsd": ("bench", "tests"), "bench": ("tests",)}.items():
        for module, file in sources(top):
            for other in others:
                found = imported_modules(file.read_text(encoding="utf-8"), module, file.name == "__init__.py", other)
                assert not found, f"{module} imports {found[0]}"


def replaced_functions() -> set[str]:
    """The functions of fastsd's modules that files of bench/ replace by `patch.object(module, "name", ...)`."""
    names = {module for module, _ in sources()}
    found = set()
    for file in (PACKAGE.parent / "bench").rglob("*.py"):
        source = file.read_text(encoding="utf-8")
        modules = {name.rpartition(".")[2]: name for name in imported_modules(source, "bench", False) if name in names}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "patch.object":
                owner, name = map(ast.unparse, node.args[:2])
                if owner in modules:
                    found.add(f"{modules[owner]}.{ast.literal_eval(name)}")
    return found


def test_what_is_replaced_to_trace_launches_is_found_in_its_module() -> None:
    """A module that binds such a function by name would go on calling the real one."""
    replaced = replaced_functions()
    assert {"fastsd.kernels.launch.architecture.class_of", "fastsd.kernels.candidates.run"} <= replaced
    bound = {
        f"{module} binds {name}"
        for module, file in sources()
        for name in imported_modules(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
        if name in replaced
    }
    assert not bound


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("import fastsd.weights", "fastsd.model.unet", False),
        ("from fastsd import weights", "fastsd.model.unet", False),
        ("from ..weights import load_folder", "fastsd.model.unet", False),
        ("from .. import weights", "fastsd.model.unet", False),
        ("from .. import weights", "fastsd.model", True),  # one level up from a package is its parent
        ("def f():\n    from fastsd.pipeline import Pipeline", "fastsd.sampling.samplers", False),
        ("from fastsd.model.unet import UNet", "fastsd.sampling.advance", False),  # leaves do not know each other
        ("import fastsd", "fastsd.graph", False),
        ("from fastsd.cli import main", "fastsd.train.loop", False),
        ("if TYPE_CHECKING:\n    import fastsd.pipeline", "fastsd.kernels.linear", False),
        ("from fastsd.train import loop", "fastsd", True),
    ],
)
def test_the_check_finds_a_bad_edge(source: str, module: str, is_package: bool) -> None:
    assert bad_edges(source, module, is_package)


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from fastsd.kernels.linear import linear", "fastsd.model.unet", False),
        ("from . import layers", "fastsd.model.unet", False),
        ("from .layers import Attention", "fastsd.model", True),
        ("from ..errors import FastsdError", "fastsd.sampling.samplers", False),
        ("def f():\n    import fastsd.train.loop", "fastsd.cli", False),
        ("import fastsd\nfrom fastsd import __version__", "fastsd.cli", False),
        ("from fastsd import errors", "fastsd.model.unet", False),
        ("from fastsd.pipeline import Pipeline", "fastsd", True),
        ("import torch, fastsdlike", "fastsd.config", False),
    ],
)
def test_the_check_allows_a_good_edge(source: str, module: str, is_package: bool) -> None:
    assert bad_edges(source, module, is_package) == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_light() -> None:
    """Nothing heavy comes with `import fastsd`: not torch, and not what only tests use."""
    loaded = set(run("import fastsd, sys; print(*sys.modules, sep='\\n')").split())
    assert "fastsd" in loaded
    heavy = {"torch", "triton", "diffusers", "transformers", "scipy", "numpy", "tokenizers", "PIL", "huggingface_hub"}
    assert not loaded & heavy


@pytest.mark.heavy
def test_the_pipeline_loads_nothing_that_it_does_not_use() -> None:
    """The pipeline needs torch, but still neither what only tests use, nor the compiler, nor the training code."""
    loaded = set(run("import fastsd, sys; fastsd.Pipeline; print(*sys.modules, sep='\\n')").split())
    assert "torch" in loaded
    assert not loaded & {
        "triton",
        "diffusers",
        "transformers",
        "huggingface_hub",
        "scipy",
        "fastsd.train",
        "fastsd.evaluate",
        "torch._dynamo",
    }


def test_the_pipeline_adds_little_to_torch() -> None:
    """What makes an import slow: other packages than these four, and reading files or starting processes on the way.

    The seconds are in `bench/bench_cold.py`.
    """
    code = """if True:
        import os, sys, torch
        before, done = set(sys.modules), []
        def note(event, arguments):
            file = os.path.basename(str(arguments[0])) if event == "open" else ""
            if file and ".py" not in file and not file.endswith(".so"):
                done.append(file)
            elif event in ("subprocess.Popen", "os.system", "socket.connect"):
                done.append(event)
        sys.addaudithook(note)
        import fastsd
        fastsd.Pipeline
        print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
        print(*done)
    """
    packages, done = run(code).split("\n")[:2]
    assert "fastsd" in packages.split()
    assert set(packages.split()) <= {"fastsd", "numpy", "safetensors", "tokenizers", "PIL"}
    assert not done
