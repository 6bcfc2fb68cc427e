"""The committed report matches the kernels, and its counts match the machine code."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="no Triton for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from bench.compile_report import DTYPES, REPORT, SHARED, bound, heading, line, lines
from bench.kernel_calls import launches
from bench.machine_code import Loop, counts, main_loop

QUICK = ("groupnorm_silu 64x1280", "layernorm 320", "geglu 1280", "advance", "flash_attn 4096x4096x40")
COMMITTED = REPORT.read_text().splitlines()


@pytest.fixture
def same_triton() -> None:
    if not COMMITTED[0].startswith(f"Triton {triton.__version__}."):
        pytest.skip(f"the report is of {COMMITTED[0].split('. ')[0]}, the installed version is {triton.__version__}")


def test_the_committed_rows_are_up_to_date(same_triton: None) -> None:
    assert COMMITTED[: len(heading().splitlines())] == heading().splitlines()
    chosen = [launch for launch in launches(90, torch.float16) if launch.case in QUICK]
    assert len(chosen) == len(QUICK)
    for launch in chosen:
        assert line(launch, 90, "fp16") in COMMITTED, "run python -m bench.compile_report --write, and review the diff"


@pytest.mark.slow
@pytest.mark.parametrize("capability", sorted(SHARED))
def test_all_committed_rows_are_up_to_date(capability: int, same_triton: None) -> None:
    assert list(lines(capability)) == [row for row in COMMITTED if row.startswith(f"{capability:>3} ")]


def test_the_report_holds_every_launch() -> None:
    starts = {row[: len("  0 bf16  ") + 50].rstrip() for row in COMMITTED}
    for capability in SHARED:
        for name, dtype in DTYPES.items():
            if dtype is torch.float16 or capability >= 80:
                expected = {f"{capability:>3} {name:5} {launch.case}" for launch in launches(capability, dtype)}
                assert len(expected) >= 15 and expected <= starts


def test_nothing_spills_and_everything_fits() -> None:
    rows = [row for row in COMMITTED if row[:3].strip().isdigit()]
    assert len(rows) > 15 * len(SHARED)
    for row in rows:
        _, spills, shared, *_ = row.split()[-8:]  # registers, spills, shared, loop, mma, exp, bound and its clocks
        assert int(spills) == 0 and int(shared) <= SHARED[int(row[:3])], row


MACHINE = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP ;
"""


def test_the_innermost_loop_counts() -> None:
    assert main_loop(MACHINE) == Loop(5, 2, 2 * 4096, 1, 32 * 16)


def test_without_a_loop_the_whole_kernel_counts() -> None:
    straight = MACHINE.replace("@P1 BRA", "@P1 BRX").replace("@P2 BRA", "@P2 BRX")
    assert main_loop(straight) == Loop(11, 2, 2 * 4096, 1, 32 * (16 + 16 + 8))


def test_flop_of_products_of_four_warps_and_of_unknown_size() -> None:
    assert counts(["HGMMA.64x128x16.F32"]).flop == 2 * 64 * 128 * 16 // 4
    assert counts(["UTCHMMA", "HMMA.16816.F32"]).flop is None
    of_fp8 = counts(["QGMMA.64x128x32.F32.E4M3.E4M3"]), counts(["QMMA.16832.F32.E4M3.E4M3"])
    assert [one.flop for one in of_fp8] == [2 * 64 * 128 * 32 // 8, 2 * 16 * 8 * 32 // 2]  # in half the time


def test_the_bound_is_the_busiest_unit() -> None:
    assert bound(Loop(100, 0, 0, 20, 16), 90) == "exp 160"  # 4 lanes per clock
    assert bound(Loop(200, 1, 4096, 20, 0), 90) == "issue 200"
    assert bound(Loop(100, 50, 50 * 4096, 0, 0), 90) == "tensor 200"  # 1024 FLOP per clock in each of four partitions
    assert bound(Loop(10, 0, 0, 0, 512), 90) == "memory 141"
