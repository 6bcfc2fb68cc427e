"""What is told of the launches that dry runs meet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import torch
import triton
import triton.language as tl

from bench import compile_report
from bench.compiled import SHARED
from bench.dryrun import compile_table, compiles, launches
from bench.intercept import KernelLaunch
from fastsd.kernels import dispatch

KERNELS = compile_table.ROOT / "fastsd" / "kernels" / "triton"

pytestmark = pytest.mark.skipif(dispatch.interpreted(), reason="interpreted kernels are not compiled")


@triton.jit
def _fill_kernel(x_ptr, n, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE) * n, 1.0)  # a range of 3 does not compile


def fill(case: str, n: int, size: int, pointer: Any = torch.float16) -> KernelLaunch:
    return KernelLaunch(case, _fill_kernel, {"x_ptr": pointer, "n": n, "SIZE": size})


def test_rows_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told = compiles.summary([fill("good", 32, 16), fill("bad", 32, 3)], 90)
    row, problem = told.rows()
    assert row.split()[1:4] == ["90", "fill", "2"] and row.split()[5:] == ["0", "0", "232448"]
    assert problem.startswith(f"{triton.__version__:6}  90 ! bad: CompilationError: ")
    assert compiles.CompiledLaunches.read(told.text()) == told


def test_the_table_holds_the_most_of_all_versions_and_what_is_wrong() -> None:
    def made(version: str, sm: int, registers: int, shared: int, *wrong: str) -> compiles.CompiledLaunches:
        return compiles.CompiledLaunches(version, sm, {"fill": compiles.KernelSizes(2, registers, 0, shared)}, wrong)

    found = [made("3.10.0", 90, 40, 1024), made("3.9.0", 90, 32, 2048), made("3.9.0", 75, 24, 512)]
    lines = compile_table.markdown(found).splitlines()
    assert lines[0] == "| kernel | sm_75 | sm_90 |" and lines[2] == "| `fill` | 2: 24/0/0.5 | 2: 40/0/2 |"
    assert lines[-1].startswith("Triton 3.9.0, 3.10.0. Every launch compiles")
    bad = compile_table.markdown([*found, made("3.9.0", 80, 1, 1, "a: no")]).splitlines()
    assert bad[-2:] == [
        "Triton 3.9.0, 3.10.0. Every launch compiles and fits, and none spills inside a loop, but for these:",
        "- sm_80, Triton 3.9.0: a: no",
    ]


def test_the_pages_table_is_of_kernels_that_exist_and_fit() -> None:
    """It is made by a run of the better part of an hour."""
    page = compile_table.PAGE.read_text(encoding="utf-8")
    table = page[page.index(compile_table.BEGIN) : page.index(compile_table.END)]
    sources = (file.read_text(encoding="utf-8") for file in KERNELS.glob("*.py"))
    kernels = {name for source in sources for name in re.findall(r"^def _(\w+)_kernel\(", source, re.M)}
    named = set(re.findall(r"^\| `(\w+)` ", table, re.M))
    assert {"linear", "conv2d_tma", "conv2d_pointers", "flash_attn", "quantize_rows", "advance"} <= named <= kernels
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("| ")]
    limits = [SHARED[int(name.strip().removeprefix("sm_"))] for name in rows[0][1:]]
    assert len(limits) > 2
    for _, *cells in rows[1:-1]:
        for cell, limit in zip(cells, limits, strict=True):
            assert not cell.strip() or float(cell.rpartition("/")[2]) * 1024 <= limit, cell
    assert "Error" not in table


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--models", "--write", "--sm", "90"], "--write keeps all architectures"),
        (["--triton", "."], "--triton is for --models"),
        (["--models", "--triton", "no such folder"], "there is no Triton in no such folder"),
    ],
)
def test_bad_flags_are_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compile_report.main(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_launch_that_does_not_fit_is_told() -> None:
    size = compiles.CodeSize(255, 0, 120_000)
    assert compiles.wrong(fill("large", 1, 16), size, 90) is None
    told = compiles.wrong(fill("large", 1, 16), size, 120)
    assert told == "large: 0 bytes spilled, 120000 of 101376 bytes of shared memory"


MACHINE = """
        /*0010*/                   STL [R1], R14 ;
.L_x_1:
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/              @!P2 BRA `(.L_x_1) ;
        /*0040*/                   LDL.LU R17, [R1] ;
.L_x_2:
        /*0050*/              @!P2 BRA `(.L_x_2) ;
        /*0060*/              @!P2 BRA `(.L_x_3) ;
.L_x_3:
"""


def test_a_number_kept_from_one_loop_to_the_next_is_no_spill_of_a_loop() -> None:
    assert not compiles.spills_in_a_loop(MACHINE)
    never_read = MACHINE.replace("FADD R2, R2, R3", "STL.64 [R1], RZ").replace("LDL.LU R17, [R1]", "NOP")
    assert not compiles.spills_in_a_loop(never_read)
    assert compiles.spills_in_a_loop(MACHINE.replace("FADD R2, R2, R3", "LDL R2, [R1]"))
    between, inside = (compiles.CodeSize(64, 8, 4096, looped=looped) for looped in (False, True))
    assert compiles.wrong(fill("a", 1, 16), between, 90) is None
    assert compiles.wrong(fill("a", 1, 16), inside, 90) == "a: 8 bytes spilled, 4096 of 232448 bytes of shared memory"


def test_launches_reach_another_process_and_are_there_once() -> None:
    found = [fill("a", 32, 16), fill("b", 48, 16), fill("c", 1, 16), fill("d", 33, 16)]
    assert [launch.case for launch in launches.distinct(found)] == ["a", "c", "d"]
    assert launches.loads(launches.dumps(found)) == found
