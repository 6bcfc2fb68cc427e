"""What a user gets by installing: the public face, the files in the package, and pins that fit the requirements."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastsd
from tests.support.project import PYPROJECT, ROOT, dry_run

PINS = [
    line.split(";")[0].strip()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_public_face() -> None:
    assert set(fastsd.__all__) <= set(dir(fastsd))
    assert issubclass(fastsd.FastsdError, ValueError)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastsd.__version__)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = fastsd.nothing_like_it


def test_pipeline_is_handed_out_on_demand() -> None:
    from fastsd.pipeline import Pipeline

    assert fastsd.Pipeline is Pipeline


def test_version_has_a_changelog_entry() -> None:
    assert f"## {fastsd.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_data_file_is_packaged() -> None:
    """A wheel holds .py files and what package-data names; a file that neither covers would be missing there."""
    package = ROOT / "fastsd"
    packaged = {
        path for pattern in PYPROJECT["tool"]["setuptools"]["package-data"]["fastsd"] for path in package.glob(pattern)
    }
    data = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "__pycache__" not in path.parts
    }
    assert data and not data - packaged
    assert package / "assets" / "clip_vocab" / "LICENSE" in packaged


def build(kind: str, source: Path, into: Path) -> Path:
    """What a package's front end does with pyproject.toml, without fetching anything; kind: wheel or sdist."""
    into.mkdir()
    command = [sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{kind}({str(into)!r})"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (made,) = into.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def run(folder: Path, path: str, *words: str) -> str:
    """What Python says in a folder, with a PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.heavy
def test_a_wheel_draws_without_the_source(tmp_path: Path) -> None:
    """The wheel of a clean checkout and of its sdist are the same; installed elsewhere it draws the same digit."""
    pytest.importorskip("setuptools", "77", reason="pyproject.toml asks for setuptools 77")
    clean, site, elsewhere = tmp_path / "checkout", tmp_path / "site", tmp_path / "elsewhere"
    shutil.copytree(ROOT / "fastsd", clean / "fastsd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean)
    source = {path.relative_to(clean).as_posix() for path in (clean / "fastsd").rglob("*") if path.is_file()}

    shutil.unpack_archive(build("sdist", clean, tmp_path / "sdist"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    shutil.rmtree(clean / "fastsd.egg-info")
    wheel = build("wheel", clean, tmp_path / "wheel")
    found = contents(wheel)
    assert {name for name in found if name.startswith("fastsd/")} == source
    assert contents(build("wheel", unpacked, tmp_path / "wheel of the sdist")) == found

    shutil.unpack_archive(wheel, site, "zip")  # which installs it: there is Python and data in it, and nothing else
    elsewhere.mkdir()
    assert Path(run(elsewhere, str(site), "-c", "import fastsd; print(fastsd.__file__)")).parent == site / "fastsd"
    words = ("-m", "fastsd", "--prompt", "a handwritten eight", "--seed", "7", "--output")
    run(elsewhere, str(site), *words, str(tmp_path / "wheel.png"))
    run(ROOT, str(ROOT), *words, str(tmp_path / "source.png"))
    np.testing.assert_array_equal(*(np.asarray(Image.open(tmp_path / f"{kind}.png")) for kind in ("wheel", "source")))


def test_every_requirement_is_pinned() -> None:
    """Each direct requirement has an exact pin that it allows, so that two set-ups of one commit are the same."""
    from packaging.requirements import Requirement

    pins = {canonical(name): version for name, version in (pin.split("==") for pin in PINS)}
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert canonical(requirement.name) in pins, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[canonical(requirement.name)], prereleases=True), requirement


def test_make_never_installs_an_unpinned_torch() -> None:
    """The first package that pip is asked for is torch by its exact pin, before anything that depends on it."""
    installs = [line for line in dry_run(".venv/.dev") if "pip install" in line]
    assert [line.split("constraints.txt ")[1] for line in installs] == [
        next(pin for pin in PINS if pin.startswith("torch==")),
        "-e .",
        "-e '.[dev]'",
    ]


STATE = """if True:
    import json, locale, logging, os, random, signal, sys, warnings
    import numpy, torch

    def state():
        handlers = {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals() if s not in (9, 19)}
        rng = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        flags = (torch.get_num_threads(), torch.get_num_interop_threads(), torch.is_grad_enabled(),
                 str(torch.get_default_dtype()), torch.get_float32_matmul_precision(),
                 torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                 torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32,
                 torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.enabled)
        logs = (logging.root.level, len(logging.root.handlers), sys.excepthook is sys.__excepthook__)
        return json.dumps([handlers, hash(str(rng)), flags, logs, [str(f) for f in warnings.filters],
                           locale.setlocale(locale.LC_ALL), os.getcwd()])

    warnings.simplefilter("ignore")
    before, environment = state(), dict(os.environ)
    import fastsd
    fastsd.Pipeline
    imported = state()
    pipe = fastsd.Pipeline.from_pretrained("digits", device="cpu", dtype="fp32")
    pipe("a handwritten one", num_inference_steps=1)
    print(before == imported, before == state(), torch.is_inference_mode_enabled())
    print(sorted(k for k in set(os.environ) | set(environment) if os.environ.get(k) != environment.get(k)))
"""


@pytest.mark.heavy
def test_neither_an_import_nor_a_call_changes_global_state() -> None:
    """Threads, flags, dtypes, random numbers, warnings, handlers. Two environment variables are set on import, unless
    the process has them (docs/library.md)."""
    said = run(ROOT, str(ROOT), "-c", STATE).splitlines()
    assert said[0] == "True True False"
    assert set(eval(said[1])) <= {"OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"}


CALLER = """
import asyncio
from pathlib import Path

from PIL import Image

import fastsd


def draw(pipe: fastsd.Pipeline, prompt: str) -> fastsd.Result:
    pipe.set_adapters([fastsd.Adapter(Path("ink.safetensors"), unet=0.5)])
    for step in pipe.stream(prompt, seed=1):
        image: Image.Image = step.preview()
        image.save(f"{step.index}.png")
    return asyncio.run(pipe.generate(prompt, on_step=lambda step: print(step.index, step.total)))


def enlarge(pipe: fastsd.Pipeline, image: Image.Image) -> tuple[int, int]:
    upscaler: fastsd.Upscaler = pipe.load_upscaler("4x.safetensors")
    pipe("a handwritten one", hires_scale=2, hires_upscaler=upscaler)
    return upscaler(image, scale=1.5, progress=lambda done, total: print(done, total)).size


def accelerated(pipe: object) -> object:
    return fastsd.restore(fastsd.accelerate(pipe))


try:
    seeds: list[int] = draw(fastsd.Pipeline.from_pretrained("digits"), "a handwritten one").seeds
except fastsd.FastsdError as error:
    argument: str | None = error.argument
"""


@pytest.mark.slow  # mypy reads torch
def test_a_caller_passes_strict_type_checks(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "caller.py").write_text(CALLER, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(CALLER.replace("list[int] =", "list[str] ="), encoding="utf-8")
    skipped = "[mypy-diffusers.*,transformers.*]\nfollow_imports = skip\n"  # larger than all else together
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}", encoding="utf-8")
    options = ["--strict", "--no-incremental", "--config-file", "mypy.ini"]
    code = "import sys; from mypy import api; out = api.run(sys.argv[1:]); print(out[0])"
    said = run(tmp_path, str(ROOT), "-c", code, *options, "--follow-imports=silent", "caller.py", "wrong.py")
    assert "caller.py" not in said, said
    assert "wrong.py" in said and "Found 1 error" in said, said
