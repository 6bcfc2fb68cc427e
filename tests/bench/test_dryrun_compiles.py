"""What is told of the launches that dry runs meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="no Triton for this platform")

import torch
import triton
import triton.language as tl

from bench.compile_report import KernelLaunch
from bench.dryrun import compiles, launches
from fastsd.kernels import dispatch

pytestmark = pytest.mark.skipif(dispatch.interpreted(), reason="interpreted kernels are not compiled")


@triton.jit
def _fill_kernel(x_ptr, n, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE) * n, 1.0)  # a range of 3 does not compile


def fill(case: str, n: int, size: int, pointer: Any = torch.float16) -> KernelLaunch:
    return KernelLaunch(case, _fill_kernel, {"x_ptr": pointer, "n": n, "SIZE": size})


def test_rows_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiles, "launches", lambda sm: [fill("good", 32, 16), fill("bad", 32, 3)])
    row, problem = compiles.rows(90)
    assert row.split()[:3] == ["90", "fill", "2"] and row.split()[4:] == ["0", "0", "232448"]
    assert problem.startswith(" 90 ! bad: CompilationError: ")


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
    assert compiles.spills_in_a_loop(MACHINE.replace("FADD R2, R2, R3", "LDL R2, [R1]"))
    between, inside = (compiles.CodeSize(64, 8, 4096, looped=looped) for looped in (False, True))
    assert compiles.wrong(fill("a", 1, 16), between, 90) is None
    assert compiles.wrong(fill("a", 1, 16), inside, 90) == "a: 8 bytes spilled, 4096 of 232448 bytes of shared memory"


def test_launches_reach_another_process_and_are_there_once() -> None:
    found = [fill("a", 32, 16), fill("b", 48, 16), fill("c", 1, 16), fill("d", 33, 16)]
    assert [launch.case for launch in launches.distinct(found)] == ["a", "c", "d"]
    assert launches.loads(launches.dumps(found)) == found
